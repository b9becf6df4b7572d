"""Which back ends exist, which one a call gets, and how tensors reach the kernels. Only it imports `_cpu` and `_cuda`.

A back end is a namespace of functions with the op's name and the argument order of `csrc/ops.h`. Every kernel is also
registered as a torch operator, `torch.ops.esokern.<name>`, that writes into the tensors it is given; the op cards call
the kernel directly in eager mode (0.3 us) and the operator under `torch.compile`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType

import torch

try:
    from esokern import _cpu
except ImportError as error:  # pragma: no cover - a broken installation
    raise ImportError(
        "esokern's compiled module is missing. Install the package (`pip install .`), or in a source checkout run "
        f"`make dev` and start Python with PYTHONPATH set to the checkout. ({error})"
    ) from error

BACKENDS = ("reference", "cpu", "cuda")
_DEVICE_TYPE = {"cpu": "cpu", "cuda": "cuda"}  # of the tensors that a compiled back end takes
_modules: dict[str, ModuleType] = {"cpu": _cpu}  # those loaded

# Schemas in the argument order of csrc/ops.h; `!` marks what a kernel writes.
_SCHEMAS = {
    "attention": (
        "(Tensor(a!) out, Tensor(b!)? lse, Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
        "Tensor? k_rank, Tensor? prefix_end, Tensor? window_start, Tensor? window_end, float softmax_scale) -> ()"
    ),
    "attention_backward": (
        "(Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
        "Tensor dout, Tensor? dlse, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? k_rank, Tensor? prefix_end, "
        "Tensor? window_start, Tensor? window_end, float softmax_scale, bool deterministic) -> ()"
    ),
    "attention_with_kvcache": (
        "(Tensor(a!) out, Tensor(b!)? lse, Tensor q, Tensor(c!) k_cache, Tensor(d!) v_cache, Tensor? k, Tensor? v, "
        "Tensor(e!) cache_seqlens, Tensor? positions, Tensor? rotary_cos, Tensor? rotary_sin, Tensor? num_clean, "
        "Tensor? slots, Tensor? page_table, Tensor? cache_batch_idx, Tensor? cu_seqlens_q, Tensor? seqused_q, "
        "Tensor? k_rank, Tensor? prefix_end, Tensor? window_start, Tensor? window_end, int chunk_mask, "
        "bool rotary_interleaved, bool commit, float softmax_scale) -> ()"
    ),
    "unmask_sample": (
        "(Tensor(a!) tokens, Tensor(b!)? logprob, Tensor(c!)? prob, Tensor(d!)? margin, Tensor(e!)? entropy, "
        "Tensor(f!)? lse, Tensor(g!)? score, Tensor(h!) invalid, Tensor? hidden, Tensor? weight, Tensor? bias, "
        "Tensor? logits, Tensor temperature, Tensor? top_k, Tensor? top_p, Tensor? min_p, Tensor seed, "
        "Tensor positions, Tensor step, int mask_id, int vocab_start, float logit_softcap, int filter_order, "
        "int statistics) -> ()"
    ),
    "unmask_select": (
        "(Tensor(a!) tokens, Tensor(b!)? transfer_index, Tensor(c!) num_masked, Tensor(d!) num_transferred, "
        "Tensor(e!)? done, Tensor proposed, Tensor confidence, Tensor? entropy, Tensor window_start, "
        "Tensor? window_length, Tensor? num_select, Tensor? threshold, Tensor? factor, Tensor? entropy_bound, "
        "Tensor? temperature, Tensor? seed, Tensor? step, Tensor? editable, Tensor? edit_threshold, "
        "Tensor? remask_threshold, int mask_id) -> ()"
    ),
    "masked_cross_entropy": (
        "(Tensor(a!) lse, Tensor(b!) target_logit, Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, "
        "int mask_id, float logit_softcap) -> ()"
    ),
    "masked_cross_entropy_backward": (
        "(Tensor(a!) dlogits, Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor lse, Tensor grad, "
        "int mask_id, float logit_softcap) -> ()"
    ),
    "fused_linear": (
        "(Tensor(a!) out, Tensor x, Tensor weight, Tensor? bias, Tensor? residual, float normalize_eps, "
        "int activation) -> ()"
    ),
    "add_norm": (
        "(Tensor(a!) out, Tensor(b!)? sum, Tensor x, Tensor? tokens, Tensor? residual, Tensor? weight, Tensor? bias, "
        "float eps) -> ()"
    ),
}


def _load_cuda() -> ModuleType:
    """`esokern._cuda`, which is loaded when first needed. RuntimeError saying what is missing."""
    module = _modules.get("cuda")
    if module is None:
        try:
            module = importlib.import_module("esokern._cuda")
        except ImportError as error:
            raise RuntimeError(
                "esokern was installed without its CUDA kernels: the build found no GPU or no nvcc. Install the CUDA "
                f"toolkit and build again with ESOKERN_CUDA=ON set, e.g. `ESOKERN_CUDA=ON pip install .` ({error})"
            ) from None
        module.set_allocator(_allocate)
        _modules["cuda"] = module
    return module


def _allocate(num_bytes: int, index: int) -> torch.Tensor:
    """Scratch of a CUDA kernel, from torch's allocator on the current stream, so that a graph can capture the call."""
    device = torch.device("cuda", index) if _DEVICE_TYPE["cuda"] == "cuda" else "cpu"
    return torch.empty(num_bytes, dtype=torch.uint8, device=device)


def _run_on_cuda(op: str, *args: object) -> None:
    getattr(_load_cuda(), op)(*args)


_library = torch.library.Library("esokern", "DEF")


def define(name: str, schema: str, function: Callable[..., None]) -> None:
    """The torch operator `torch.ops.esokern.<name>`, a Python function that writes into the tensors `schema` marks.

    torch.compile calls it and does not look inside, so what it does may depend on values.
    """
    _library.define(name + schema)
    _library.impl(name, function, "CPU")
    _library.impl(name, function, "CUDA")
    torch.library.register_fake(f"esokern::{name}", lambda *args: None, lib=_library)


for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema)
    _library.impl(_name, getattr(_cpu, _name), "CPU")
    _library.impl(_name, functools.partial(_run_on_cuda, _name), "CUDA")
    torch.library.register_fake(f"esokern::{_name}", lambda *args: None, lib=_library)


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Will a gradient be asked for, in one of these tensors?"""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def select(backend: str | None, op: str, *tensors: torch.Tensor | None, differentiable: bool = False) -> str:
    """The back end that serves this call: `backend`, or the compiled one of the tensors' device.

    Raises ValueError for an unknown back end, for a device no compiled back end serves, and, unless the compiled op is
    `differentiable`, for inputs that require a gradient (the reference always is).
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"{op}: backend: got {backend!r}, supported are {', '.join(BACKENDS)} or None")
    given = [tensor for tensor in tensors if tensor is not None]
    devices = {tensor.device for tensor in given}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"{op}: all tensors must be on one device, got {names}")
    if backend == "reference":
        return backend
    device = given[0].device
    chosen = device.type if backend is None else backend
    if _DEVICE_TYPE.get(chosen) != device.type:
        supported = " and ".join(sorted(set(_DEVICE_TYPE.values()))) if backend is None else _DEVICE_TYPE[backend]
        raise ValueError(
            f"{op}: no compiled back end{'' if backend is None else f' {backend!r}'} for device {device}; supported: "
            f'{supported}. Move the tensors or pass backend="reference".'
        )
    if chosen == "cuda":
        _load_cuda()
    if not differentiable and needs_grad(*given):
        raise ValueError(
            f"{op}: an input requires grad, and the compiled kernel has no gradient. Call it under torch.no_grad() or "
            'torch.inference_mode(), or pass backend="reference", which is differentiable.'
        )
    return chosen


def run(chosen: str, op: str, *args: object) -> None:
    """Run the kernel `op` of the compiled back end `chosen`; `args` in the order of `csrc/ops.h`, outputs first."""
    if torch.compiler.is_compiling():
        getattr(torch.ops.esokern, op)(*args)
    else:
        getattr(_modules[chosen], op)(*args)


def cuda_architectures() -> str | None:
    """GPU architectures the CUDA kernels were compiled for, such as "80-real, 90-real"; None if there are none."""
    try:
        return _load_cuda().architectures()
    except RuntimeError:
        return None


def emulate_cuda(module: ModuleType) -> None:
    """From now on backend="cuda" means `module`, which runs the CUDA kernels on CPU tensors (tests/emulator)."""
    module.set_allocator(_allocate)
    _modules["cuda"] = module
    _DEVICE_TYPE["cuda"] = "cpu"


def built_isas() -> list[str]:
    """Instruction sets the CPU kernels were compiled for, worst first."""
    return _cpu.built_isas()


def supported_isas() -> list[str]:
    """Those of `built_isas()` that this CPU has."""
    return _cpu.supported_isas()


def get_isa() -> str:
    """The instruction set in use."""
    return _cpu.get_isa()


def set_isa(name: str) -> None:
    """Use another instruction set from now on (for tests). ValueError if it was not built or the CPU lacks it."""
    _cpu.set_isa(name)
