"""What stands between two linear layers: add to the residual stream, normalise; and the embedding that begins it."""

from __future__ import annotations

import torch
from torch.nn import functional

from esokern import backend as _backend
from esokern.arrays import accept_arrays

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@accept_arrays(writes=("out", "sum_out"))
def add_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    *,
    tokens: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    return_sum: bool = True,
    out: torch.Tensor | None = None,
    sum_out: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """sum = residual + x, out = (sum - mean(sum)) / sqrt(var(sum) + eps) * weight + bias over the last dimension.

    The sum is added in float32 and rounded to the dtype, and out is computed from the rounded sum, in float32 and
    rounded once: normalising the returned sum again gives the same out. weight and bias are those of a LayerNorm, with
    adaLN's folded in: weight (1 + scale) and bias (1 + scale) + shift.

    Args:
        x: [..., hidden] float32, bfloat16 or float16; with `tokens` a table [vocab, hidden], the rows of which are
            added: an embedding.
        residual: [..., hidden], dtype of x. None = nothing is added.
        tokens: int64 (or int32) [...], rows of x. One outside the table raises a ValueError; on a GPU, where nothing
            waits for the host, its rows of out and sum become NaN.
        weight, bias: [hidden], dtype of x; None = no scale, no shift.
        return_sum: False = the sum is neither returned nor stored (unless sum_out is given).
        out, sum_out: [..., hidden], dtype of x; written and returned. Each may be residual or (without tokens) x
            itself, as in `sum_out=residual`, and shares no memory with anything else.
        backend: None = the compiled one of x's device, "reference" = PyTorch (any device, float64 too, differentiable).

    Returns:
        (out, sum), or out without return_sum; [..., hidden], dtype of x. With neither residual nor tokens nor sum_out
        the sum is x itself.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is supported.

    >>> table, tokens = torch.randn(10, 8), torch.tensor([[3, 1, 4]])
    >>> normed, stream = add_norm(table, tokens=tokens)
    >>> normed, stream = add_norm(torch.randn(1, 3, 8), stream, sum_out=stream)
    >>> stream.shape
    torch.Size([1, 3, 8])
    """
    chosen = _backend.select(backend, "add_norm", x, residual, tokens, weight, bias, out, sum_out)
    dtype, shape = x.dtype, x.shape
    if dtype not in _DTYPES and not (dtype == torch.float64 and chosen == "reference"):
        raise TypeError(
            f"add_norm: x: got {dtype}, supported are float32, bfloat16 and float16"
            ' (and float64 with backend="reference")'
        )
    if len(shape) == 0 or shape[-1] == 0:
        raise ValueError(f"add_norm: x: must be [..., hidden] with hidden >= 1, got {list(shape)}")
    hidden = shape[-1]
    if tokens is not None:
        if len(shape) != 2:
            raise ValueError(f"add_norm: x: must be a table [vocab, hidden] with tokens, got {list(shape)}")
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"add_norm: tokens: must be int64 or int32, got {tokens.dtype}")
        shape = (*tokens.shape, hidden)
    if residual is not None:
        _check("residual", residual, dtype, shape)
    if weight is not None:
        _check("weight", weight, dtype, (hidden,))
    if bias is not None:
        _check("bias", bias, dtype, (hidden,))
    if out is not None:
        _check("out", out, dtype, shape)
    if sum_out is not None:
        _check("sum_out", sum_out, dtype, shape)
    if not 0.0 <= eps < float("inf"):
        raise ValueError(f"add_norm: eps: must be finite and >= 0, got {eps}")

    if chosen == "reference":
        result, total = _reference(x, residual, tokens, weight, bias, eps)
        result = result if out is None else out.copy_(result)
        total = total if sum_out is None else sum_out.copy_(total)
        return (result, total) if return_sum else result

    if out is None:
        out = x.new_empty(shape)
    if sum_out is None and return_sum and (residual is not None or tokens is not None):
        sum_out = x.new_empty(shape)
    result = out, x if sum_out is None else sum_out
    if tokens is not None:
        tokens = tokens.reshape(-1).to(torch.int64)
    elif len(shape) != 2:
        x = x.reshape(-1, hidden)
    if len(shape) != 2:
        out = _view_rows("out", out)
        sum_out = None if sum_out is None else _view_rows("sum_out", sum_out)
        residual = None if residual is None else residual.reshape(-1, hidden)
    _backend.run(chosen, "add_norm", out, sum_out, x, tokens, residual, weight, bias, float(eps))
    return result if return_sum else result[0]


def _check(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"add_norm: {name}: must have the dtype of x, {dtype}, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"add_norm: {name}: must be {list(shape)}, got {list(tensor.shape)}")


def _view_rows(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """[..., hidden] as [rows, hidden] of the same memory."""
    try:
        return tensor.view(-1, tensor.shape[-1])
    except RuntimeError:
        raise ValueError(
            f"add_norm: {name}: leading dimensions {list(tensor.shape[:-1])} of strides {list(tensor.stride())} cannot "
            "be seen as one; pass a contiguous tensor"
        ) from None


def _reference(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    tokens: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain PyTorch, in float32 (float64 for float64 inputs)."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    if tokens is not None:
        if tokens.device.type == "cpu" and not torch.compiler.is_compiling():
            for token in tokens.flatten().tolist():
                if not 0 <= token < len(x):
                    raise ValueError(f"add_norm: tokens: each must be a row of x (got {token})")
        x = functional.embedding(tokens, x)
    if residual is not None:
        x = (residual.to(compute) + x.to(compute)).to(x.dtype)
    scale, shift = (None if tensor is None else tensor.to(compute) for tensor in (weight, bias))
    return functional.layer_norm(x.to(compute), x.shape[-1:], scale, shift, eps).to(x.dtype), x
