"""Fixtures of all tests: every back end and instruction set, one seed per test, no state left behind.

The CUDA kernels run in every test of an op: on the host under the emulator ("cuda-emulated", "cuda-race", see
tests/emulator), where `make emulator` has built it, or on a GPU ("cuda") where there is one.
"""

import importlib.machinery
import importlib.util
import os

# Before torch: waiting threads sleep. Where other work shares the CPUs, spinning makes these small calls 10x slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pathlib
import platform
import zlib

import pytest
import torch

from esokern import backend as backends

# What the CPU must have (names of /proc/cpuinfo) for each instruction set the kernels are compiled for.
_ISA_FLAGS = {
    "generic": set(),
    "avx2": {"avx2", "fma", "bmi1", "bmi2", "f16c", "movbe", "abm"},
    "avx512": {"avx2", "fma", "bmi1", "bmi2", "f16c", "movbe", "abm"}
    | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
}
_ISA_FLAGS["avx512bf16"] = _ISA_FLAGS["avx512"] | {"avx512_bf16"}


def _expected_isas() -> list[str]:
    """Instruction sets this machine's CPU has, read independently of the module under test."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not cpuinfo.exists():
        return ["generic"]
    flags = next(
        (line.split(":")[1].split() for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), []
    )
    return [isa for isa, needed in _ISA_FLAGS.items() if needed <= set(flags)]


def pytest_sessionstart(session: pytest.Session) -> None:
    missing = [isa for isa in _expected_isas() if isa not in backends.supported_isas()]
    if missing:
        raise pytest.UsageError(
            f"the CPU has {', '.join(missing)}, but esokern was built for {', '.join(backends.built_isas())} and runs "
            f"{', '.join(backends.supported_isas())}: a part of the kernels would go untested"
        )


def _emulated_modules() -> dict[str, object]:
    """The builds of the CUDA kernels for the host by name: "emulated" and "race", or what ESOKERN_EMULATORS names."""
    folder = os.environ.get("ESOKERN_EMULATOR_DIR", pathlib.Path(__file__).parent.parent / "build" / "emulator")
    modules = {}
    for name in os.environ.get("ESOKERN_EMULATORS", "emulated,race").split(","):
        found = importlib.machinery.PathFinder.find_spec(f"_cuda_{name}", [str(folder)])
        if found is not None:
            modules[name] = importlib.util.module_from_spec(found)
            found.loader.exec_module(modules[name])
    return modules


GPU = torch.cuda.is_available() and backends.cuda_architectures() is not None
EMULATED = {} if GPU else _emulated_modules()
_SCHEDULES = ("in_order", "reverse", "random", "starving")


@pytest.fixture(
    params=[
        "reference",
        *(f"cpu-{isa}" for isa in backends.supported_isas()),
        *(f"cuda-{name}" for name in EMULATED),
        *(["cuda"] if GPU else []),
    ]
)
def backend(request: pytest.FixtureRequest):
    """Each back end by the name that ops take; the compiled CPU one once per instruction set.

    "cuda-emulated" and "cuda-race" are the CUDA kernels on the host, each test under another schedule of threads. For
    "cuda" all tensors that a test makes without naming a device are on the GPU.
    """
    name, _, variant = request.param.partition("-")
    before = backends.get_isa()
    if name == "cpu":
        backends.set_isa(variant)
    elif variant:
        seed = zlib.crc32(request.node.nodeid.encode())
        EMULATED[variant].set_schedule(_SCHEDULES[seed % len(_SCHEDULES)], seed)
        backends.emulate_cuda(EMULATED[variant])
    with torch.device("cuda" if request.param == "cuda" else "cpu"):
        yield name
    backends.set_isa(before)


@pytest.fixture
def emulator():
    """The plain build of the emulator as the back end "cuda", threads in order."""
    if "emulated" not in EMULATED:
        pytest.skip("`make emulator` builds it")
    EMULATED["emulated"].set_schedule("in_order")
    backends.emulate_cuda(EMULATED["emulated"])
    return EMULATED["emulated"]


@pytest.fixture(autouse=True)
def _seed_and_threads(request: pytest.FixtureRequest):
    """Random numbers that depend on the test alone, and the thread count put back."""
    threads = torch.get_num_threads()
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))
    yield
    torch.set_num_threads(threads)
