"""Op card: attention under a rank-integer mask.

    out[i] = sum_j p_ij v[j],   p_ij = exp(softmax_scale * q[i].k[j] - lse[i])
    lse[i] = log sum_j exp(softmax_scale * q[i].k[j]),   j over the keys that query i sees

A query that sees no key gives 0 and an lse of -inf. Query head h reads key head h // (heads / kv_heads).

Differentiable in q, k and v through both results, dout and dlse being the gradients that arrive in them:

    delta[i] = dout[i].out[i] - dlse[i],   ds_ij = p_ij (dout[i].v[j] - delta[i])
    dq[i] = softmax_scale sum_j ds_ij k[j],   dk[j] = softmax_scale sum_i ds_ij q[i],   dv[j] = sum_i p_ij dout[i]

over the pairs that see each other; what sees nothing, or is seen by nobody, has a gradient of 0 (Dao, arXiv 2307.08691,
section 3.1.2; dlse adds to it because the derivative of lse[i] in a score is p_ij).
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from esokern import backend as backends
from esokern.arrays import accept_arrays
from esokern.masks import RankMask

FLOAT_DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
)  # what the compiled kernels store; they add in float32
MAX_HEAD_DIM = 256


@accept_arrays(writes=("out",))
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mask: RankMask | None = None,
    softmax_scale: float | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
    deterministic: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of q over k and v, masked by the ranks of `mask`; see the formulas at the top of this file.

    Args:
        q: [batch, seqlen_q, heads, head_dim], or packed [total_q, heads, head_dim] with both cu_seqlens. Any
            strides as long as the last dimension is contiguous; so for k and v. float32, bfloat16 or float16
            (the reference also float64), head_dim a multiple of 8 up to 256 (the reference: any).
        k, v: [batch, seqlen_kv, kv_heads, head_dim] or [total_k, kv_heads, head_dim]; heads % kv_heads == 0.
        mask: who sees whom, from `esokern.masks`; None = every query sees every key (of its own sequence).
            k_rank is [batch or 1, seqlen_kv] or [total_k], the bounds are [batch or 1, seqlen_q] or
            [total_q]. Hidden keys and values still have to be finite.
        softmax_scale: default 1 / sqrt(head_dim).
        cu_seqlens_q, cu_seqlens_k: int32 [batch + 1], where each sequence begins in a packed layout: 0, ...,
            total.
        return_lse: also return the log-sum-exp.
        out: tensor of q's shape, dtype and device to write into; it must not overlap the inputs. Not for a compiled
            call that needs gradients.
        deterministic: the same bits every time in the backward too, where that costs something (CUDA);
            torch.use_deterministic_algorithms(True) turns it on as well. The forward always gives the same bits.
        backend: None (compiled, chosen by device), "cpu", "cuda" or "reference" (plain torch).

    Gradients in q, k and v, also through lse and under torch.compile: every back end; second derivatives: the reference
    alone. The log-sum-exp is computed where it is returned or a gradient is needed.

    NumPy and CuPy arrays are taken for tensors and given back; a mask's own tensors stay torch's.

    Returns:
        out, of q's shape and dtype; with return_lse also lse, natural logarithm, float32 (float64 for float64
        inputs), [batch, heads, seqlen_q] or [heads, total_q].

    Raises:
        TypeError, ValueError: naming the argument, what came and what is supported.
        RuntimeError: from a second derivative through a compiled back end.

    >>> q = k = v = torch.randn(1, 4, 2, 8)
    >>> attention(q, k, v, mask=masks.any_order(torch.tensor([[2, 0, 3, 1]]))).shape
    torch.Size([1, 4, 2, 8])
    """
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    check_floats("attention", ("q", "k", "v"), (q, k, v))
    q_shape, k_shape = q.shape, k.shape
    rows = ("total_q",) if packed else ("batch", "seqlen_q")
    keys = ("total_k",) if packed else ("batch", "seqlen_kv")
    check_dims("attention", "q", q_shape, (*rows, "heads", "head_dim"))
    check_dims("attention", "k", k_shape, (*keys, "kv_heads", "head_dim"))
    if v.shape != k_shape:
        raise ValueError(f"attention: v: must have the shape of k {list(k_shape)}, got {list(v.shape)}")
    check_heads("attention", "k", q_shape, k_shape)
    if packed:
        if cu_seqlens_q is None or cu_seqlens_k is None:
            missing = "cu_seqlens_q" if cu_seqlens_q is None else "cu_seqlens_k"
            raise ValueError(f"attention: cu_seqlens_q and cu_seqlens_k go together; {missing} is missing")
        batch = check_cu_seqlens("attention", "cu_seqlens_q", cu_seqlens_q)
        check_int32("attention", "cu_seqlens_k", cu_seqlens_k, (batch + 1,), ("batch + 1",))
    elif k_shape[0] != q_shape[0]:
        raise ValueError(f"attention: k: must have q's batch size {q_shape[0]}, got {k_shape[0]}")
    bounds = (None, None, None, None)
    if mask is not None:
        bounds = mask_tensors("attention", mask, q_shape[:-2], k_shape[:-2])
        if bounds[0] is None:
            raise ValueError(
                "attention: mask.k_rank: must be given, got None (a rank that is the row of a cache is for "
                "attention_with_kvcache)"
            )
    scale = check_scale("attention", softmax_scale, q_shape[-1])
    if out is not None:
        check_out("attention", out, q)
    chosen = backends.select(
        backend, "attention", q, k, v, out, cu_seqlens_q, cu_seqlens_k, *bounds, differentiable=True
    )
    if chosen == "reference":
        return _reference(q, k, v, cu_seqlens_q, cu_seqlens_k, bounds, scale, return_lse, out)

    check_compiled("attention", q.dtype, q_shape[-1])
    settings = _Settings(cu_seqlens_q, cu_seqlens_k, bounds, scale, deterministic, chosen)
    if backends.needs_grad(q, k, v, out):
        if out is not None:
            raise ValueError(
                "attention: out: must be None where an input or out requires grad, since what is written in place has "
                "no gradient; call it under torch.no_grad() or leave out away"
            )
        out, lse = _Attention.apply(q, k, v, settings)
        return (out, lse) if return_lse else out
    if out is None:
        out = torch.empty_like(q)
    lse = _empty_lse(q) if return_lse else None
    _forward(out, lse, q, k, v, settings)
    return out if lse is None else (out, lse)


# --- compiled


class _Settings(NamedTuple):
    """What both directions of a compiled call take beside floats."""

    cu_seqlens_q: torch.Tensor | None
    cu_seqlens_k: torch.Tensor | None
    bounds: tuple[torch.Tensor | None, ...]
    softmax_scale: float
    deterministic: bool
    backend: str


def _empty_lse(q: torch.Tensor) -> torch.Tensor:
    shape = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
    return torch.empty(shape, dtype=torch.float32, device=q.device)


def _forward(
    out: torch.Tensor, lse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, settings: _Settings
) -> None:
    cu_seqlens_q, cu_seqlens_k, bounds, scale, _, backend = settings
    arguments = (out, lse, q, k, v, cu_seqlens_q, cu_seqlens_k, *bounds, scale)
    if torch.compiler.is_compiling():
        backends.run(backend, "attention", *arguments)
        return
    try:
        backends.run(backend, "attention", *arguments)
    except (ValueError, RuntimeError):
        # The kernel only says that it refuses; these name the argument and its value.
        check_contiguous("attention", q=q, k=k, v=v, out=out)
        if cu_seqlens_q is not None:
            read_cu_seqlens("attention", "cu_seqlens_q", cu_seqlens_q, q.shape[0])
            read_cu_seqlens("attention", "cu_seqlens_k", cu_seqlens_k, k.shape[0])
        raise


class _Attention(torch.autograd.Function):
    """A compiled call that needs gradients: keeps q, k, v, out and lse, and no weights."""

    @staticmethod
    def forward(ctx, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, settings: _Settings):
        out, lse = torch.empty_like(q), _empty_lse(q)
        _forward(out, lse, q, k, v, settings)
        cu_seqlens_q, cu_seqlens_k, bounds, *ctx.settings = settings
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, *bounds)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: torch.Tensor | None, dlse: torch.Tensor | None):
        q, k, v, out, lse, *integers = ctx.saved_tensors
        scale, deterministic, backend = ctx.settings
        if dout is None:
            dout = torch.zeros_like(out)
        elif dout.stride(-1) != 1:  # of out.sum(), for example: one number, expanded
            dout = dout.clone(memory_format=torch.contiguous_format)
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
        arguments = (dq, dk, dv, q, k, v, out, lse, dout, dlse, *integers, scale, deterministic)
        backends.run(backend, "attention_backward", *arguments)
        return dq, dk, dv, None


# --- checks, shared with attention_with_kvcache


def check_floats(op: str, names: tuple[str, ...], tensors: tuple[torch.Tensor, ...]) -> None:
    """All of them floating-point tensors, of the dtype of the first."""
    dtype = getattr(tensors[0], "dtype", None)
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{op}: {names[i]}: must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype != dtype:
            raise TypeError(f"{op}: {names[i]}: must have q's dtype {dtype}, got {tensor.dtype}")
    if not dtype.is_floating_point:
        raise TypeError(f"{op}: {names[0]}: must be float32, bfloat16 or float16, got {dtype}")


def check_dims(op: str, name: str, shape: torch.Size, wanted: tuple[str, ...]) -> None:
    """As many dimensions as `wanted` names."""
    if len(shape) != len(wanted):
        hint = "; packed layouts need cu_seqlens" if len(shape) == 3 else ""
        raise ValueError(f"{op}: {name}: must be [{', '.join(wanted)}], got shape {list(shape)}{hint}")


def check_heads(op: str, name: str, q_shape: torch.Size, k_shape: torch.Size) -> None:
    """One head_dim, and key heads that divide the query heads."""
    heads, head_dim = q_shape[-2], q_shape[-1]
    if k_shape[-1] != head_dim:
        raise ValueError(f"{op}: {name}: must have q's head_dim {head_dim}, got {k_shape[-1]}")
    if k_shape[-2] == 0 or heads % k_shape[-2] != 0:
        raise ValueError(f"{op}: {name}: kv_heads must divide q's {heads} heads, got {k_shape[-2]}")


def check_int32(op: str, name: str, tensor: torch.Tensor, shape: tuple[int, ...], words: tuple[str, ...]) -> None:
    """An int32 tensor of exactly this shape."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{op}: {name}: must be an int32 tensor [{', '.join(words)}], got {type(tensor).__name__}")
    if tensor.dtype != torch.int32:
        raise TypeError(f"{op}: {name}: must be int32, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{op}: {name}: must be [{', '.join(words)}] = {list(shape)}, got {list(tensor.shape)}")


def check_cu_seqlens(op: str, name: str, cu_seqlens: torch.Tensor) -> int:
    """An int32 vector of at least one entry; returns the batch size."""
    size = cu_seqlens.numel() if isinstance(cu_seqlens, torch.Tensor) else 0
    check_int32(op, name, cu_seqlens, (size,), ("batch + 1",))
    if size == 0:
        raise ValueError(f"{op}: {name}: must be [batch + 1] and begin with 0, got an empty tensor")
    return size - 1


def check_scale(op: str, softmax_scale: float | None, head_dim: int) -> float:
    """The scale as a finite float, 1 / sqrt(head_dim) by default."""
    if softmax_scale is None:
        return head_dim**-0.5 if head_dim > 0 else 1.0
    if not math.isfinite(softmax_scale):
        raise ValueError(f"{op}: softmax_scale: must be finite, got {softmax_scale}")
    return float(softmax_scale)


def check_out(op: str, out: torch.Tensor, q: torch.Tensor) -> None:
    """A tensor like q."""
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"{op}: out: must be a torch.Tensor, got {type(out).__name__}")
    if out.dtype != q.dtype:
        raise TypeError(f"{op}: out: must have q's dtype {q.dtype}, got {out.dtype}")
    if out.shape != q.shape:
        raise ValueError(f"{op}: out: must have q's shape {list(q.shape)}, got {list(out.shape)}")


def serves(dtype: torch.dtype, head_dim: int) -> bool:
    """Do the compiled back ends take this?"""
    return dtype in FLOAT_DTYPES and head_dim % 8 == 0 and 0 < head_dim <= MAX_HEAD_DIM


def check_compiled(op: str, dtype: torch.dtype, head_dim: int) -> None:
    """What every compiled back end serves."""
    if serves(dtype, head_dim):
        return
    if dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{op}: q: the compiled back ends take float32, bfloat16 and float16, got {dtype}; "
            'backend="reference" takes it'
        )
    raise ValueError(
        f"{op}: q: the compiled back ends take a head_dim that is a multiple of 8 up to {MAX_HEAD_DIM}, "
        f'got {head_dim}; backend="reference" takes any'
    )


def check_contiguous(op: str, **tensors: torch.Tensor | None) -> None:
    """What compiled back ends ask of strides."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{op}: {name}: the last dimension must be contiguous, got strides {tensor.stride()}")


def mask_tensors(
    op: str, mask: RankMask, q_shape: tuple[int, ...], k_shape: tuple[int, ...]
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The mask's k_rank, prefix_end, window_start and window_end at full shape (expanded, not copied).

    q_shape and k_shape are the shapes that bounds and k_rank must have: [batch, rows] or, packed, [total].
    """
    if not isinstance(mask, RankMask):
        raise TypeError(f"{op}: mask: must be a RankMask (see esokern.masks) or None, got {type(mask).__name__}")
    k_rank = mask.k_rank
    if k_rank is not None:
        k_rank = _expanded(op, "k_rank", k_rank, k_shape)
    prefix_end = _expanded(op, "prefix_end", mask.prefix_end, q_shape)
    if mask.window_start is None:
        return k_rank, prefix_end, None, None
    return (
        k_rank,
        prefix_end,
        _expanded(op, "window_start", mask.window_start, q_shape),
        _expanded(op, "window_end", mask.window_end, q_shape),
    )


def _expanded(op: str, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    got = tensor.shape
    if got == shape:
        return tensor
    if len(shape) == 2 and len(got) == 2 and got[0] == 1 and got[1] == shape[1]:
        return tensor.expand(shape)
    wanted = list(shape) if len(shape) == 1 else f"{list(shape)} or {[1, shape[1]]}"
    raise ValueError(f"{op}: mask.{name}: must be {wanted}, got {list(got)}")


# --- reference


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor | None, softmax_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in the dtype given. q [..., seqlen_q, heads, head_dim], k and v [..., seqlen_kv, kv_heads,
    head_dim], visible bool [..., seqlen_q, seqlen_kv]. Returns out like q and lse [..., heads, seqlen_q]."""
    group = q.shape[-2] // k.shape[-2]
    q, k, v = (tensor.transpose(-3, -2) for tensor in (q, k, v))  # [..., heads, seqlen, head_dim]
    k, v = (tensor.repeat_interleave(group, dim=-3) for tensor in (k, v))
    scores = (q * softmax_scale) @ k.transpose(-2, -1)
    if visible is None:
        sees_any = torch.full((), k.shape[-2] > 0, device=q.device)
    else:
        visible = visible.unsqueeze(-3)
        sees_any = visible.any(-1, keepdim=True)
        # A row that sees nothing keeps its finite scores, so that no NaN arises in it or in its gradient.
        scores = scores.masked_fill(~visible & sees_any, -math.inf)
    lse = torch.logsumexp(scores, -1, keepdim=True)
    weights = torch.exp(scores - lse) * sees_any
    lse = lse.masked_fill(~sees_any, -math.inf)
    return (weights @ v).transpose(-3, -2), lse.squeeze(-1)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the reference computes in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    bounds: tuple,
    softmax_scale: float,
    return_lse: bool,
    out: torch.Tensor | None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    dtype = compute_dtype(q.dtype)
    k_rank, *query_bounds = bounds
    if cu_seqlens_q is None:
        visible = None if k_rank is None else RankMask(*bounds).dense()
        result, lse = attend(q.to(dtype), k.to(dtype), v.to(dtype), visible, softmax_scale)
    else:
        results, lses = [], []
        ends_q = read_cu_seqlens("attention", "cu_seqlens_q", cu_seqlens_q, q.shape[0])
        ends_k = read_cu_seqlens("attention", "cu_seqlens_k", cu_seqlens_k, k.shape[0])
        queries = [slice(*ends) for ends in itertools.pairwise(ends_q)]
        for rows, keys in zip(queries, (slice(*ends) for ends in itertools.pairwise(ends_k)), strict=True):
            visible = None
            if k_rank is not None:
                visible = RankMask(k_rank[keys], *(None if t is None else t[rows] for t in query_bounds)).dense()
            row, lse = attend(q[rows].to(dtype), k[keys].to(dtype), v[keys].to(dtype), visible, softmax_scale)
            results.append(row)
            lses.append(lse)
        result = torch.cat(results) if results else torch.empty_like(q)
        lse = torch.cat(lses, -1) if lses else torch.empty((q.shape[1], q.shape[0]), dtype=dtype, device=q.device)
    result = result.to(q.dtype)
    if out is not None:
        result = out.copy_(result)
    return (result, lse) if return_lse else result


def read_cu_seqlens(op: str, name: str, cu_seqlens: torch.Tensor, total: int) -> list[int]:
    """Its values, which must rise from 0 to total. Reads the tensor: for the reference and to explain
    errors."""
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != total or any(a > b for a, b in itertools.pairwise(ends)):
        raise ValueError(f"{op}: {name}: must rise from 0 to {total}, got {ends}")
    return ends
