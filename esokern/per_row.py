"""Options of an op that are a number or one value per row: as the contiguous [rows] tensors that kernels take."""

from __future__ import annotations

import operator

import torch

_INTEGERS = {torch.int32: (-(2**31), 2**31 - 1), torch.int64: (-(2**63), 2**64 - 1)}  # 2^63 and up: a seed


def option(
    op: str,
    name: str,
    value: float | torch.Tensor,
    rows: int,
    dtype: torch.dtype,
    device: torch.device,
    low: float | None = None,
    high: float | None = None,
    *,
    supported: str | None = None,
    raise_to: float | None = None,
    only_numbers: bool = False,
) -> torch.Tensor:
    """`value`, a number or a tensor [rows] or [], as a contiguous tensor [rows] of `dtype` that must not be written to.

    It must lie in [low, high] (None: what dtype holds). Values of a tensor are looked at where that is free, with
    `only_numbers` never; those below `raise_to` become it. `supported` says in words what low and high mean.

    Raises TypeError and ValueError that begin with "op: name:".
    """
    if not isinstance(value, torch.Tensor):
        number = _number(op, name, value, dtype)
        if dtype in _INTEGERS:
            least, greatest = _INTEGERS[dtype]
            low, high = least if low is None else low, greatest if high is None else high
        if low is not None and not low <= number <= high:
            raise ValueError(f"{op}: {name}: must be {supported or f'in [{low}, {high}]'}, got {value}")
        if number >= 2**63 and dtype == torch.int64:
            number -= 2**64  # the same 64 bits
        return constant(number if raise_to is None else max(number, raise_to), rows, dtype, device)
    if value.dtype != dtype and (
        value.dtype.is_floating_point != dtype.is_floating_point or value.dtype in (torch.bool, torch.uint8)
    ):
        kind = "floating-point" if dtype.is_floating_point else "int64 or int32"
        raise TypeError(f"{op}: {name}: must be {kind}, got {value.dtype}")
    if value.shape != (rows,) and value.dim() != 0:
        raise ValueError(f"{op}: {name}: must be a number or [{rows}], got {list(value.shape)}")
    if value.device != device:
        raise ValueError(f"{op}: {name}: must be on {device} like the other tensors, got {value.device}")
    if low is None and value.dtype == torch.int64 and dtype == torch.int32:
        low, high = _INTEGERS[dtype]
    if low is not None and not only_numbers and rows > 0 and values_visible(value):
        least, greatest = (bound.item() for bound in value.aminmax())
        if not (low <= least and greatest <= high):
            got = least if not low <= least else greatest
            raise ValueError(f"{op}: {name}: must be {supported or f'in [{low}, {high}]'}, got {got}")
    if raise_to is not None:
        value = value.clamp(min=raise_to)
    if value.dtype == dtype and value.dim() == 1 and value.is_contiguous():
        return value
    return value.to(dtype).expand(rows).contiguous()


def _number(op: str, name: str, value: object, dtype: torch.dtype) -> float:
    try:
        return float(value) if dtype.is_floating_point else operator.index(value)
    except (TypeError, ValueError):
        kind = "a number or a floating-point" if dtype.is_floating_point else "an int or an integer"
        raise TypeError(f"{op}: {name}: must be {kind} tensor [rows], got {type(value).__name__}") from None


_constants: dict[tuple, torch.Tensor] = {}


def constant(number: float, rows: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[rows] of one number. Kernels only read it, so the same tensor serves every call: a step's options repeat, and to
    fill a tensor costs more than all checks of the call."""
    if rows > 1024 or torch.compiler.is_compiling():
        return torch.full((rows,), number, dtype=dtype, device=device)
    key = (number, rows, dtype, device)
    tensor = _constants.get(key)
    if tensor is None:
        with torch.inference_mode(False):  # one made in inference mode would not do for a gradient later
            tensor = torch.full((rows,), number, dtype=dtype, device=device)
        if type(tensor) is torch.Tensor:  # not a fake one of some tracing mode
            if len(_constants) >= 1024:
                _constants.clear()
            _constants[key] = tensor
    return tensor


def values_visible(tensor: torch.Tensor) -> bool:
    """Whether looking at values costs no synchronisation and no graph break."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()
