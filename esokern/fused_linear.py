"""A linear layer with its neighbours in a transformer block: normalisation before, activation or residual after."""

from __future__ import annotations

import torch
from torch.nn import functional

from esokern import backend as _backend
from esokern.arrays import accept_arrays

_ACTIVATIONS = {None: 0, "gelu_tanh": 1}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@accept_arrays(writes=("out",))
def fused_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    normalize_eps: float | None = None,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """out = residual + activation(normalize(x) weight^T + bias), accumulated in float32 and rounded once.

    normalize(x) = (x - mean(x)) / sqrt(var(x) + normalize_eps) over the last dimension, without scale and shift: fold
    a layer norm's own into weight and bias, W' = W * scale, b' = b + W shift.

    Args:
        x: [..., in_features] float32, bfloat16 or float16. Leading dimensions are flattened, without a copy where their
            strides allow it.
        weight: [out_features, in_features], dtype of x, as in `torch.nn.Linear`.
        bias: [out_features], dtype of x.
        normalize_eps: None = no normalisation.
        activation: None or "gelu_tanh".
        residual: [..., out_features], dtype of x; may be `out`.
        out: [..., out_features], dtype of x; written and returned; may not share memory with x.
        backend: None = the compiled one of x's device, "reference" = PyTorch (any device, float64 too, differentiable).

    Returns:
        [..., out_features], dtype of x.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is supported.

    >>> x, weight = torch.randn(2, 8), torch.randn(16, 8)
    >>> fused_linear(x, weight, normalize_eps=1e-5, activation="gelu_tanh").shape
    torch.Size([2, 16])
    """
    chosen = _backend.select(backend, "fused_linear", x, weight, bias, residual, out)
    dtype, x_shape, weight_shape = x.dtype, x.shape, weight.shape
    if dtype not in _DTYPES and not (dtype == torch.float64 and chosen == "reference"):
        raise TypeError(
            f"fused_linear: x: got {dtype}, supported are float32, bfloat16 and float16"
            ' (and float64 with backend="reference")'
        )
    if len(weight_shape) != 2:
        raise ValueError(f"fused_linear: weight: must be [out_features, in_features], got {list(weight_shape)}")
    out_features, in_features = weight_shape
    if len(x_shape) == 0 or x_shape[-1] != in_features:
        raise ValueError(
            f"fused_linear: x: must be [..., {in_features}] for a weight {list(weight_shape)}, got {list(x_shape)}"
        )
    if weight.dtype != dtype:
        raise TypeError(f"fused_linear: weight: must have the dtype of x, {dtype}, got {weight.dtype}")
    flat = len(x_shape) == 2
    out_shape = (x_shape[0], out_features) if flat else (*x_shape[:-1], out_features)
    if bias is not None:
        _check("bias", bias, dtype, (out_features,))
    if residual is not None:
        _check("residual", residual, dtype, out_shape)
    if out is not None:
        _check("out", out, dtype, out_shape)
    if activation not in _ACTIVATIONS:
        raise ValueError(f'fused_linear: activation: got {activation!r}, supported are None and "gelu_tanh"')
    if normalize_eps is None:
        normalize_eps = -1.0
    elif not 0.0 <= normalize_eps < float("inf"):
        raise ValueError(f"fused_linear: normalize_eps: must be finite and >= 0, or None, got {normalize_eps}")

    if chosen == "reference":
        result = _reference(x, weight, bias, normalize_eps, activation, residual)
        return result if out is None else out.copy_(result)

    if out is None:
        out = x.new_empty(*out_shape)
    result = out
    if not flat:
        x, out = x.reshape(-1, in_features), _view_rows(out)
        residual = None if residual is None else residual.reshape(-1, out_features)
    _backend.run(chosen, "fused_linear", out, x, weight, bias, residual, float(normalize_eps), _ACTIVATIONS[activation])
    return result


def _check(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"fused_linear: {name}: must have the dtype of x, {dtype}, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"fused_linear: {name}: must be {list(shape)}, got {list(tensor.shape)}")


def _view_rows(out: torch.Tensor) -> torch.Tensor:
    """[..., out_features] as [rows, out_features] of the same memory."""
    try:
        return out.view(-1, out.shape[-1])
    except RuntimeError:
        raise ValueError(
            f"fused_linear: out: leading dimensions {list(out.shape[:-1])} of strides {list(out.stride())} cannot be "
            "seen as one; pass a contiguous tensor"
        ) from None


def _reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    normalize_eps: float,
    activation: str | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """The same in plain PyTorch, in float32 (float64 for float64 inputs)."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    result = x.to(compute)
    if normalize_eps >= 0:
        result = functional.layer_norm(result, result.shape[-1:], eps=normalize_eps)
    result = functional.linear(result, weight.to(compute), None if bias is None else bias.to(compute))
    if activation == "gelu_tanh":
        result = functional.gelu(result, approximate="tanh")
    if residual is not None:
        result = residual.to(compute) + result
    return result.to(x.dtype)
