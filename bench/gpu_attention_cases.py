"""Cases of the attention ops, with torch's, flash-attn's and FlashInfer's forms of the same work."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

import esokern
from eager import cached_attention
from gpu_cases import Candidate, Case, Setting, peer
from harness import Cost


def sdpa_peers(case: Case, attend: Callable[[SimpleNamespace], torch.Tensor], label: str = "sdpa") -> None:
    """`attend`, which calls SDPA, once per back end; which of them take the inputs shows when they run."""

    def with_kernel(kernel: SDPBackend) -> Candidate:
        def call(s: SimpleNamespace) -> torch.Tensor:
            with sdpa_kernel(kernel):
                return attend(s)

        return call

    kernels = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
    for name in kernels:
        case.candidates[f"{label} {name.split('_')[0].lower()}"] = with_kernel(getattr(SDPBackend, name))


def flex_peer(case: Case, setting: Setting, mask_mod: Callable | None, rows: int, keys: int) -> None:
    """Compiled FlexAttention; its block mask is made beforehand and costs it nothing here."""
    if setting.device != "cuda":
        case.absent["flex"] = "compiled FlexAttention is timed on GPUs only"
        return
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()  # every mask is a program of its own
    compiled = torch.compile(flex_attention, dynamic=False)
    mask = None if mask_mod is None else create_block_mask(mask_mod, None, None, rows, keys, device=setting.device)
    case.candidates["flex"] = lambda s: compiled(s.heads_q, s.heads_k, s.heads_v, block_mask=mask).transpose(1, 2)


# --- attention_with_kvcache: one decoding step over a filled cache. Ours, flash-attn and eager also append.


def attention_with_kvcache(setting: Setting) -> Iterator[Callable[[], Case]]:
    shapes = [  # batch, new rows, keys, heads, kv_heads, head_dim, page_size
        (64, 2, 8192, 12, 12, 64, None),
        *((1, 2, keys, 12, 12, 64, None) for keys in (1024, 8192, 32768)),
        *((8, rows, 2048, 12, 12, 64, None) for rows in (1, 2, 16, 64)),
        (64, 2, 8192, 12, 12, 64, 256),
        (16, 2, 8192, 32, 8, 128, None),
    ]
    if setting.small:
        shapes = [(2, 2, 64, 2, 2, 16, None), (1, 3, 200, 4, 2, 32, None), (2, 2, 64, 2, 2, 16, 32)]
    for shape in shapes:
        yield functools.partial(_cached_step, setting, *shape)


def _cached_step(
    setting: Setting, batch: int, rows: int, keys: int, heads: int, kv_heads: int, head_dim: int, page: int | None
) -> Case:
    committed = keys - rows
    name = f"B{batch} H{heads}/{kv_heads} Sq{rows} KV{keys} D{head_dim}" + (f" page {page}" if page else "")
    seqlens = torch.full((batch,), committed, dtype=torch.int32, device=setting.device)

    def make() -> SimpleNamespace:
        q = setting.randn(batch, rows, heads, head_dim)
        k, v = (setting.randn(batch, rows, kv_heads, head_dim) for _ in range(2))
        caches = [setting.randn(batch, keys, kv_heads, head_dim) for _ in range(2)]
        caches[0][:, committed:], caches[1][:, committed:] = k, v
        table = None
        if page:
            table = torch.randperm(batch * keys // page, device=setting.device)
            caches = [torch.empty_like(c).view(-1, page, kv_heads, head_dim).index_copy_(
                0, table, c.view(-1, page, kv_heads, head_dim)
            ) for c in caches]  # fmt: skip
            table = table.view(batch, -1).int()
        heads_k, heads_v = (c.transpose(1, 2) for c in caches)
        return SimpleNamespace(
            q=q, k=k, v=v, k_cache=caches[0], v_cache=caches[1], table=table,
            heads_q=q.transpose(1, 2), heads_k=heads_k, heads_v=heads_v,
        )  # fmt: skip

    def ours(s: SimpleNamespace) -> torch.Tensor:
        return esokern.attention_with_kvcache(
            s.q, s.k_cache, s.v_cache, s.k, s.v, cache_seqlens=seqlens, page_table=s.table
        )

    visible = torch.ones(rows, keys, dtype=torch.bool, device=setting.device).tril(committed)

    def attend(s: SimpleNamespace, mask: torch.Tensor | None = visible if rows > 1 else None) -> torch.Tensor:
        heads_k, heads_v = s.heads_k, s.heads_v
        if page:  # SDPA knows no pages: they are gathered first
            heads_k, heads_v = (
                c.index_select(0, s.table.flatten()).view(batch, keys, kv_heads, head_dim).transpose(1, 2)
                for c in (s.k_cache, s.v_cache)
            )
        grouped = {"enable_gqa": True} if kv_heads != heads else {}
        return functional.scaled_dot_product_attention(
            s.heads_q, heads_k, heads_v, attn_mask=mask, **grouped
        ).transpose(1, 2)

    def flash_with(function: Callable, pages: str) -> Candidate:
        return lambda s: function(
            s.q,
            s.k_cache,
            s.v_cache,
            s.k,
            s.v,
            cache_seqlens=seqlens,
            causal=True,
            **({pages: s.table} if page else {}),
        )

    size = torch.finfo(setting.dtype).bits // 8
    cost = Cost(
        bytes=(2 * batch * keys * kv_heads * head_dim + 2 * batch * rows * heads * head_dim) * size,
        flops=4 * batch * heads * rows * keys * head_dim,
    )
    case = Case("attention_with_kvcache", name, setting.dtype, cost, make, {"esokern": ours})
    sdpa_peers(case, attend, "gather + sdpa" if page else "sdpa")
    if not page and rows > 1 and setting.device == "cuda":  # the flash back end takes this mask, but no tensor
        lower_right = causal_lower_right(rows, keys)
        case.candidates["sdpa lower right"] = lambda s: attend(s, lower_right)
    if not page and kv_heads == heads:
        case.candidates["eager"] = lambda s: cached_attention(s.q, s.k, s.v, s.k_cache, s.v_cache, committed)
        if keys == 8192 or rows == 16:
            flex_peer(case, setting, lambda b, h, q, k: k <= q + committed, rows, keys)
        else:
            case.absent["flex"] = "takes seconds to compile, so only KV8192 and Sq16 have it"
    else:
        case.absent |= {"eager": "knows neither pages nor grouped heads", "flex": "its form here knows neither"}
    peer(case, "flash-attn", "flash_attn", "flash_attn_with_kvcache", lambda f: flash_with(f, "block_table"))
    peer(case, "fa3", "flash_attn_interface", "flash_attn_with_kvcache", lambda f: flash_with(f, "page_table"))
    size_of_page = page or math.gcd(keys, 16)
    peer(
        case, "flashinfer", "flashinfer", "BatchPrefillWithPagedKVCacheWrapper",
        lambda wrapper: _flashinfer(wrapper, setting, batch, rows, keys, heads, kv_heads, head_dim, size_of_page, page),
    )  # fmt: skip
    return case


def _flashinfer(
    wrapper_class: type, setting: Setting, batch: int, rows: int, keys: int, heads: int, kv_heads: int, head_dim: int,
    page_size: int, paged: int | None,
) -> Candidate:  # fmt: skip
    """A plan per page table, made at its first use (the warm-up); a contiguous cache is pages in their order."""
    pages = keys // page_size
    wrappers: dict[int, object] = {}

    def call(s: SimpleNamespace) -> torch.Tensor:
        views = tuple(c.view(-1, page_size, kv_heads, head_dim) for c in (s.k_cache, s.v_cache))
        wrapper = wrappers.get(id(s))
        if wrapper is None:
            starts = torch.arange(batch + 1, dtype=torch.int32, device=setting.device)
            table = torch.arange(batch * pages, dtype=torch.int32, device=setting.device) if not paged else s.table
            last = torch.full((batch,), page_size, dtype=torch.int32, device=setting.device)
            wrapper = wrapper_class(torch.empty(2**27, dtype=torch.uint8, device=setting.device), "NHD")
            wrapper.plan(
                starts * rows, starts * pages, table.flatten(), last, heads, kv_heads, head_dim, page_size, causal=True,
                q_data_type=setting.dtype,
            )  # fmt: skip
            wrappers[id(s)] = wrapper
        return wrapper.run(s.q.view(batch * rows, heads, head_dim), views).view(s.q.shape)

    return call


# --- attention: whole sequences, alone and with gradients.


def attention(setting: Setting) -> Iterator[Callable[[], Case]]:
    shapes = [(8, 4096, 12, head_dim) for head_dim in (64, 128)] if not setting.small else [(1, 96, 2, 16)]
    for shape in shapes:
        for kind in ("causal", "any order", "bidirectional", "block diffusion 2L"):
            yield functools.partial(_attention, setting, *shape, kind)


def attention_backward(setting: Setting) -> Iterator[Callable[[], Case]]:
    """The cases of `attention`, each candidate with its gradients."""
    for make_case in attention(setting):
        yield functools.partial(_with_gradients, setting, make_case)


def _with_gradients(setting: Setting, make_case: Callable[[], Case]) -> Case:
    case = make_case()

    def make() -> SimpleNamespace:
        inputs = case.make()
        inputs.dout = setting.randn(*inputs.q.shape)
        return inputs

    def differentiated(candidate: Candidate) -> Candidate:
        def call(s: SimpleNamespace) -> tuple[torch.Tensor, ...]:
            with torch.enable_grad():
                leaves = [x.detach().requires_grad_() for x in (s.q, s.k, s.v)]
                out = candidate(_attention_inputs(*leaves))
                return (out.detach(), *torch.autograd.grad(out, leaves, s.dout))

        return call

    # Two matrix products forward and five backward; 12 tensors pass: q, k, v, out, then all of them again with their
    # gradients.
    cost = Cost(bytes=3 * case.cost.bytes, flops=3.5 * case.cost.flops)
    candidates = {name: differentiated(candidate) for name, candidate in case.candidates.items()}
    return dataclasses.replace(case, op="attention_backward", cost=cost, make=make, candidates=candidates)


def _attention_inputs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> SimpleNamespace:
    """q, k and v as ours take them, and as [batch, heads, seqlen, head_dim] for torch."""
    heads_q, heads_k, heads_v = (x.transpose(1, 2) for x in (q, k, v))
    return SimpleNamespace(q=q, k=k, v=v, heads_q=heads_q, heads_k=heads_k, heads_v=heads_v)


def _attention(setting: Setting, batch: int, seqlen: int, heads: int, head_dim: int, kind: str) -> Case:
    order = torch.randperm(seqlen, device=setting.device)[None].int()
    mask = {
        "causal": lambda: esokern.masks.causal(seqlen, device=setting.device),
        "any order": lambda: esokern.masks.any_order(order),
        "bidirectional": lambda: None,
        "block diffusion 2L": lambda: esokern.masks.block_diffusion(seqlen // 2, 16, device=setting.device),
    }[kind]()
    dense = None if mask is None else mask.dense()
    share = 1.0 if dense is None else dense.double().mean().item()

    def make() -> SimpleNamespace:
        return _attention_inputs(*(setting.randn(batch, seqlen, heads, head_dim) for _ in range(3)))

    def attend(s: SimpleNamespace) -> torch.Tensor:
        options = {"is_causal": True} if kind == "causal" else {"attn_mask": dense}
        return functional.scaled_dot_product_attention(s.heads_q, s.heads_k, s.heads_v, **options).transpose(1, 2)

    elements = batch * seqlen * heads * head_dim
    cost = Cost(
        bytes=4 * elements * torch.finfo(setting.dtype).bits // 8,
        flops=4 * batch * heads * seqlen * seqlen * head_dim * share,
    )
    name = f"B{batch} H{heads} S{seqlen} D{head_dim} {kind}"
    candidates = {"esokern": lambda s: esokern.attention(s.q, s.k, s.v, mask=mask)}
    case = Case("attention", name, setting.dtype, cost, make, candidates)
    sdpa_peers(case, attend)
    if kind == "any order":  # what published code does: sort the tokens, attend causally, sort back
        by_rank, rank = order[0].argsort(), order[0].long()

        def sorted_causal(s: SimpleNamespace) -> torch.Tensor:
            q, k, v = (x.index_select(1, by_rank).transpose(1, 2) for x in (s.q, s.k, s.v))
            out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return out.transpose(1, 2).index_select(1, rank)

        case.candidates["sort + sdpa causal"] = sorted_causal
    mask_mod = None
    if mask is not None:
        tensors = (mask.k_rank, mask.prefix_end, mask.window_start, mask.window_end)
        k_rank, prefix_end, start, end = (None if t is None else t[0].contiguous() for t in tensors)

        def mask_mod(b, h, q, k):
            visible = k_rank[k] <= prefix_end[q]
            return visible if start is None else visible | ((start[q] <= k_rank[k]) & (k_rank[k] <= end[q]))

    flex_peer(case, setting, (lambda b, h, q, k: k <= q) if kind == "causal" else mask_mod, seqlen, seqlen)
    if kind in ("causal", "bidirectional"):
        for label, modules in (("flash-attn", "flash_attn"), ("fa3", "flash_attn_interface")):
            peer(
                case, label, modules, "flash_attn_func",
                lambda f: lambda s: _first(f(s.q, s.k, s.v, causal=kind == "causal")),
            )  # fmt: skip
    return case


def _first(result: object) -> object:
    return result[0] if isinstance(result, tuple) else result
