"""Models that bring their own code, with their attention computed by this package: LLaDA, Dream, Eso-LM, BD3-LM, Set
Diffusion.

    with swap_attention(model):
        ...                     # their own sampler, their own training loop

Modules are told by their class names and methods; nothing of that code is imported. What is replaced is replaced on the
modules of this model alone: a method by one of ours, or by their own method running with some of the global names it
uses, such as the attention function, meaning ours. Masks become rank integers: from the model's own integers where it
makes them by name, else from the tensor it brings, once per forward (`dense_mask`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from esokern import masks
from esokern.integrations.published_attention import Namespace, Served, rebound
from esokern.masks import RankMask

_SERVED = (
    "LLaDA (modules LLaDABlock), Dream (DreamSdpaAttention), Eso-LM, BD3-LM and Set Diffusion (DDiTBlock, "
    "DDiTBlockCausal); for models of Hugging Face transformers use esokern.integrations.transformers"
)
_ABSENT = object()


def swap_attention(model: nn.Module, *, backend: str | None = None) -> SwappedAttention:
    """Let every attention module of a loaded model use this package, until the handle puts theirs back.

    Logits and gradients are those of the model up to rounding; parameters, caches and everything else stay the model's.
    Serves float32, bfloat16 and float16 with head_dim a multiple of 8 up to 256. A query that sees no key, which only
    padding does, gives 0. Swapping a swapped model again is allowed; each handle puts back what it found.

    Args:
        model: holds modules of one of these families, at any depth
        backend: of the ops, None = chosen by device; "reference" also serves float64 and any head_dim

    Returns a handle: `handle.restore()`, or `with swap_attention(model): ...`.

    Raises:
        TypeError: for a model with no attention module that is served, and for revisions of their code with other names
        ValueError: for a setting that is not served, with what to use. Nothing has been replaced then.
        ValueError or TypeError, when the model runs: for attention dropout and for masks that are no rank masks
    """
    served = Served(backend)
    changes, families, first = [], [], None
    for module in model.modules():
        family = _family(module)
        if family is None:
            continue
        name, replacements = family
        changes += [(module, attribute, value) for attribute, value in replacements(module, served).items()]
        if name != _MASKS_OF_ESOLM:
            families.append(name)
            first = module if first is None else first
    if first is None:
        raise TypeError(
            f"swap_attention: model: {type(model).__name__} has no attention that is served. Served: {_SERVED}"
        )
    return SwappedAttention(families, changes, first, served)


class SwappedAttention:
    """What `swap_attention` replaced; a context manager that puts it back on exit, also after an exception.

    families: the family of each module that was swapped, in the model's order
    """

    def __init__(
        self, families: list[str], changes: list[tuple[nn.Module, str, Any]], first: nn.Module, served: Served
    ) -> None:
        self.families = families
        self._changes = [(module, name, value, module.__dict__.get(name, _ABSENT)) for module, name, value in changes]
        for module, name, value in changes:
            setattr(module, name, value)
        # A tensor may hold another mask in the next forward.
        self._hook = first.register_forward_pre_hook(served.begin)

    def restore(self) -> None:
        """Put back what the call that made this handle found. Again: nothing happens.

        Raises RuntimeError, and changes nothing, if the model was swapped again since and that handle is not restored.
        """
        for module, name, value, _ in self._changes:
            if callable(value) and module.__dict__.get(name) is not value:
                raise RuntimeError(
                    f"restore: {type(module).__name__}.{name} was replaced again since; restore the later handle first"
                )
        for module, name, _, found in self._changes:
            if found is _ABSENT:
                delattr(module, name)
            else:
                setattr(module, name, found)
        self._changes = []
        self._hook.remove()

    def __enter__(self) -> SwappedAttention:
        return self

    def __exit__(self, *exception: object) -> None:
        self.restore()

    def __repr__(self) -> str:
        state = f"{len(self.families)} modules of {', '.join(sorted(set(self.families)))}"
        return f"SwappedAttention({state}{'' if self._changes else ', restored'})"


# --- families: what is replaced on one module

_MASKS_OF_ESOLM = "masks of Eso-LM"


def _family(module: nn.Module) -> tuple[str, Callable[[nn.Module, Served], dict[str, Any]]] | None:
    """The family of a module, and the function from (module, served) to its new attributes."""
    names = _class_names(module)
    if "LLaDABlock" in names:
        return "LLaDA", _llada
    if "DreamAttention" in names:
        return "Dream", _dream
    if "EsoLMDiT" in names:
        return _MASKS_OF_ESOLM, _esolm_masks
    if not names & {"DDiTBlock", "DDiTBlockCausal"}:
        return None
    if hasattr(module, "cross_attn_with_cache"):
        return "Set Diffusion", _set_diffusion
    if hasattr(module, "cross_attn"):
        return "BD3-LM", _bd3lm
    if hasattr(module, "_attention_with_kv_cache"):
        return "Eso-LM", _esolm
    raise TypeError(f"swap_attention: {type(module).__name__}: of an unknown code base. Served: {_SERVED}")


def _class_names(module: nn.Module) -> set[str]:
    return {cls.__name__ for cls in type(module).__mro__}


def _llada(block: nn.Module, served: Served) -> dict[str, Any]:
    return {"_scaled_dot_product_attention": served.sdpa}


def _dream(module: nn.Module, served: Served) -> dict[str, Any]:
    if "DreamSdpaAttention" not in _class_names(module):
        raise ValueError(
            f'swap_attention: {type(module).__name__} is not served; load the model with attn_implementation="sdpa"'
        )
    functional = Namespace(nn.functional, scaled_dot_product_attention=served.sdpa)
    names = {"torch": Namespace(torch, nn=Namespace(nn, functional=functional)), "repeat_kv": _not_repeated}
    return {"forward": rebound(module, "forward", **names)}


def _not_repeated(states: Tensor, groups: int) -> Tensor:
    return states


def _esolm_masks(network: nn.Module, served: Served) -> dict[str, Any]:
    def rank(seq_len: int) -> Tensor:
        return torch.arange(seq_len, device=next(network.parameters()).device)[None]

    def sequential(seq_len: int, cutoffs: Tensor | None = None) -> RankMask:
        return masks.esolm_sequential(rank(seq_len), cutoffs, variant="B" if cutoffs is None else "A")

    return {
        "_get_attention_mask": rebound(
            network,
            "_get_attention_mask",
            _get_causal_mask=lambda seq_len: masks.any_order(rank(seq_len)),
            _get_bidirectional_mask=lambda seq_len: masks.any_order(torch.zeros_like(rank(seq_len))),
            _get_mixed_mask=lambda seq_len, cutoffs: masks.esolm_diffusion(rank(seq_len), cutoffs, variant="mixed"),
            _get_mixed2_mask=lambda seq_len, cutoffs: masks.esolm_diffusion(rank(seq_len), cutoffs, variant="A"),
        ),
        "_sequential_features": rebound(
            network, "_sequential_features", _get_seq_mask=sequential, _get_seq_mask_prefix_lm=sequential
        ),
        # Where the network keeps the masks it made.
        "mdlm_mask": None,
        "seq_mask": None,
    }


def _esolm(block: nn.Module, served: Served) -> dict[str, Any]:
    names: dict[str, Any] = {"flex_attention_multi_headed": served.flex}
    cached = _esolm_cached
    if "DDiTBlockCausal" in _class_names(block):
        names["_get_causal_mask"] = lambda seq_len: masks.causal(seq_len, device=next(block.parameters()).device)
        cached = _esolm_cached_causal
    return {
        "forward": rebound(block, "forward", **names),
        "_attention_with_kv_cache": partial(cached, block, served),
    }


def _esolm_cached(
    block: nn.Module, served: Served, qkv: Tensor, rotary_cos_sin: tuple, num_clean: int, num_clean_and_mask: int
) -> Tensor:
    if num_clean == 0:  # nothing to keep, and as published nothing kept is seen
        scratch = (torch.empty_like(qkv[:, :, 0]) for _ in range(2))
        return served.cached(qkv, *scratch, 0, rotary_cos_sin)
    _make_cache(block, qkv)
    out = served.cached(qkv, block.k_cache, block.v_cache, block.num_clean_cached, rotary_cos_sin)
    block.num_clean_cached += num_clean
    return out


def _esolm_cached_causal(block: nn.Module, served: Served, qkv: Tensor, rotary_cos_sin: tuple) -> Tensor:
    _make_cache(block, qkv)
    out = served.cached(qkv, block.k_cache, block.v_cache, block.pointer + 1, rotary_cos_sin)
    block.pointer += 1
    return out


def _make_cache(block: nn.Module, qkv: Tensor) -> None:
    if block.k_cache is None:
        batch, _, _, heads, head_dim = qkv.shape
        block.k_cache, block.v_cache = (qkv.new_empty(batch, block.num_tokens, heads, head_dim) for _ in range(2))


def _bd3lm(block: nn.Module, served: Served) -> dict[str, Any]:
    _check_backend(block, "flex")
    takes_x = "x" in inspect.signature(type(block).cross_attn).parameters  # unused there, in the published models
    method = _bd3lm_with_x if takes_x else _bd3lm_attention
    return {"cross_attn": partial(method, block, served)} | _flex_method(block, served)


def _bd3lm_with_x(block: nn.Module, served: Served, x: Tensor, qkv: Tensor, mask: Tensor | None = None) -> Tensor:
    return _bd3lm_attention(block, served, qkv, mask)


def _bd3lm_attention(block: nn.Module, served: Served, qkv: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, v = qkv.unbind(2)
    causal = "DDiTBlockCausal" in _class_names(block) or getattr(block, "causal", False)
    if causal and mask is not None:
        raise ValueError("swap_attention: mask: must be None in a causal block, got one")
    if block.kv_cache is not None and not causal and mask is None:
        q = q[:, -block.block_size :]  # the block keeps the output of these rows alone
    if causal:
        mask = masks.causal(q.shape[1], device=q.device)
    elif mask is not None and mask.dtype != torch.bool:
        mask = mask.bool()
    return served.attend(q, k, v, mask).flatten(2)


def _set_diffusion(block: nn.Module, served: Served) -> dict[str, Any]:
    _check_backend(block, "flex_attention")
    replaced = {
        "cross_attn": partial(_set_attention, block, served),
        "cross_attn_with_cache": partial(_set_attention_over, block, served),
    }
    if hasattr(block, "_attention_with_kv_cache"):
        replaced["_attention_with_kv_cache"] = partial(_set_cached, block, served)
    return replaced | _flex_method(block, served)


def _set_attention(
    block: nn.Module, served: Served, qkv: Tensor, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    if "DDiTBlockCausal" in _class_names(block):
        mask = None  # as published
    return _set_attention_over(block, served, *qkv.unbind(2), mask=mask, causal=causal)


def _set_attention_over(
    block: nn.Module,
    served: Served,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    if causal:
        if mask is not None or q.shape[1] != k.shape[1]:
            raise ValueError(
                f"swap_attention: causal: is for as many queries as keys and no mask, got {q.shape[1]} queries, "
                f"{k.shape[1]} keys and a mask: {mask is not None}"
            )
        mask = masks.causal(q.shape[1], device=q.device)
    return served.attend(q, k, v, mask).flatten(2)


def _set_cached(
    block: nn.Module, served: Served, qkv: Tensor, rotary_cos_sin: tuple, num_clean: int, num_clean_and_mask: int
) -> Tensor:
    start = block.num_clean_cached
    block._ensure_kv_cache_capacity(k=qkv[:, :, 1], required_length=start + qkv.shape[1])
    out = served.cached(qkv, block.k_cache, block.v_cache, start, rotary_cos_sin)
    block.num_clean_cached += num_clean
    return out


def _check_backend(block: nn.Module, flex: str) -> None:
    if block.attn_backend not in ("sdpa", flex):
        raise ValueError(
            f'swap_attention: attn_backend: got {block.attn_backend!r}, served are "sdpa" and "{flex}"; load the model '
            'with attn_backend="sdpa"'
        )


def _flex_method(block: nn.Module, served: Served) -> dict[str, Any]:
    return {"cross_attn_flex": partial(_flex_packed, served)} if hasattr(block, "cross_attn_flex") else {}


def _flex_packed(served: Served, qkv: Tensor, mask: object = None) -> Tensor:
    return served.flex(*qkv.unbind(2), mask)
