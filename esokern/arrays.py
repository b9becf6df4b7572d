"""NumPy and CuPy arrays at the ops' doors: in without a copy through DLPack, results out as the same kind.

`@accept_arrays(writes=(...))` goes on a public op, outermost; `writes` names the arguments the op writes in place,
which stay shared with the caller's arrays:

    @accept_arrays(writes=("k_cache", "v_cache", "cache_seqlens", "out"))
    def attention_with_kvcache(...): ...

A call that begins with a torch tensor only pays for that look; under torch.compile nothing is left of it.
Objects of other types (numbers, strings, a RankMask with its torch tensors) pass through. Neither NumPy nor CuPy has a
bfloat16 of its own: arrays of the `ml_dtypes` package's type are taken and returned. With CuPy arrays the op runs on
CuPy's current stream.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch

_Function = TypeVar("_Function", bound=Callable)

_NAMES = {"numpy": "NumPy", "cupy": "CuPy"}
_DTYPES = {np.dtype(name) for name in ("float64", "float32", "float16", "int32", "int64", "bool", "uint8")}


class _Kinds(dict):
    """type -> "torch", "numpy", "cupy", "sequence" or None, filled as types are met."""

    def __missing__(self, cls: type) -> str | None:
        if issubclass(cls, torch.Tensor):
            kind = "torch"
        elif issubclass(cls, np.ndarray):
            kind = "numpy"
        elif cls.__module__.partition(".")[0] == "cupy" and cls.__name__ == "ndarray":
            kind = "cupy"
        elif issubclass(cls, (list, tuple)):
            kind = "sequence"
        else:
            kind = None
        self[cls] = kind
        return kind


_kinds = _Kinds()


def accept_arrays(*, writes: Iterable[str] = ()) -> Callable[[_Function], _Function]:
    """Decorator: the op also takes NumPy or CuPy arrays for tensors, alone or inside lists and tuples.

    One call takes one kind of array. `writes` are the arguments written in place; a read-only array there is refused.

    Raises (from the op): TypeError for mixed kinds or a dtype without a torch counterpart, ValueError for a read-only
    array that would be written and for memory torch cannot describe (negative or uneven strides).
    """
    written = frozenset(writes)

    def decorate(op: _Function) -> _Function:
        signature = inspect.signature(op)
        unknown = written - set(signature.parameters)
        if unknown:
            raise TypeError(f"accept_arrays: writes: {op.__name__} has no argument {', '.join(sorted(unknown))}")

        @functools.wraps(op)
        def call(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return op(*args, **kwargs)
            if args and isinstance(args[0], torch.Tensor):
                try:
                    return op(*args, **kwargs)
                except Exception:
                    # Only a call that failed is searched for arrays among its tensors: the search costs as much as the
                    # rest of a small call.
                    _kind_of_call(op, signature.bind(*args, **kwargs).arguments)
                    raise
            return _call_with_arrays(op, signature, written, args, kwargs)

        return call  # type: ignore[return-value]

    return decorate


def _call_with_arrays(
    op: Callable, signature: inspect.Signature, written: frozenset[str], args: tuple, kwargs: dict[str, Any]
) -> Any:
    arguments = signature.bind(*args, **kwargs).arguments
    kind = _kind_of_call(op, arguments)
    if kind == "torch":
        return op(*args, **kwargs)
    owners: dict[int, Any] = {}  # a tensor made here -> the array whose memory it shares

    def into(name: str, value: Any) -> Any:
        value_kind = _kinds[type(value)]
        if value_kind == "sequence":
            return _rebuild(value, [into(name, item) for item in value])
        if value_kind is None:
            return value
        tensor = _from_array(kind, f"{op.__name__}: {name}", value, name in written)
        owners[id(tensor)] = value
        return tensor

    def out_of(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return owners[id(value)] if id(value) in owners else _to_array(kind, value)
        if _kinds[type(value)] == "sequence":
            return _rebuild(value, [out_of(item) for item in value])
        return value

    with _stream(kind, arguments):
        tensors = {name: into(name, value) for name, value in arguments.items()}
        return out_of(op(**tensors))


def _kind_of_call(op: Callable, arguments: dict[str, Any]) -> str:
    """The one kind of array among the arguments; TypeError if there are two."""
    names: dict[str, str] = {}
    for name, value in arguments.items():
        for array in _arrays_within(value):
            names.setdefault(_kinds[type(array)], name)
    if len(names) > 1:
        found = ", ".join(f"{kind} ({name})" for kind, name in names.items())
        raise TypeError(f"{op.__name__}: arguments must be arrays of one kind, got {found}")
    return next(iter(names), "torch")


def _arrays_within(value: Any) -> Iterator[Any]:
    kind = _kinds[type(value)]
    if kind == "sequence":
        for item in value:
            yield from _arrays_within(item)
    elif kind is not None:
        yield value


def _stream(kind: str, arguments: dict[str, Any]) -> contextlib.AbstractContextManager:
    """For CuPy its current stream as torch's, so that the op comes after what the caller has enqueued and before what
    follows, and no stream waits for another."""
    if kind != "cupy":
        return contextlib.nullcontext()
    import cupy

    device = next(_arrays_within(list(arguments.values()))).device.id
    return torch.cuda.stream(torch.cuda.ExternalStream(cupy.cuda.get_current_stream(device).ptr, device))


def _rebuild(like: Any, items: list) -> Any:
    return type(like)(*items) if hasattr(like, "_fields") else type(like)(items)


def _from_array(kind: str, where: str, array: Any, written: bool) -> torch.Tensor:
    if kind == "numpy" and written and not array.flags.writeable:
        raise ValueError(f"{where}: is written in place, but the array is read-only; pass a writable copy")
    dtype = array.dtype
    bfloat16 = dtype.name == "bfloat16"
    if not bfloat16 and (dtype not in _DTYPES or not dtype.isnative):
        raise TypeError(
            f"{where}: got a {_NAMES[kind]} array of {dtype if dtype.isnative else dtype.str}, supported are native "
            "float32, float16, bfloat16 (ml_dtypes), int32, int64, bool, and float64 for the reference"
        )
    # torch aborts or misreads on these, so they are sorted out before it sees them.
    if any(stride < 0 or stride % dtype.itemsize for stride in array.strides):
        raise ValueError(
            f"{where}: strides {array.strides} bytes are negative or no multiple of the {dtype.itemsize}-byte element; "
            f"pass {kind}.ascontiguousarray(...)"
        )
    try:
        if bfloat16:  # as integers: not every version of the two exports ml_dtypes' type
            return torch.from_dlpack(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_dlpack(array)
    except BufferError as error:  # NumPy < 2.1 does not export read-only memory
        raise ValueError(f"{where}: {_NAMES[kind]} cannot share this array ({error}); pass a writable copy") from None


def _to_array(kind: str, tensor: torch.Tensor) -> Any:
    tensor = tensor.detach()
    bfloat16 = tensor.dtype == torch.bfloat16
    if bfloat16:
        tensor = tensor.view(torch.int16)
    if kind == "cupy":
        import cupy

        array = cupy.from_dlpack(tensor)
    else:
        array = tensor.numpy()
    if bfloat16:
        import ml_dtypes  # there, because an input had its type

        array = array.view(ml_dtypes.bfloat16)
    return array
