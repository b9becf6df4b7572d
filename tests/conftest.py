"""Fixtures of all tests: every back end and instruction set, one seed per test, no state left behind."""

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


@pytest.fixture(params=["reference", *(f"cpu-{isa}" for isa in backends.supported_isas())])
def backend(request: pytest.FixtureRequest):
    """Each back end by the name that ops take; the compiled CPU one once per instruction set."""
    name, _, isa = request.param.partition("-")
    before = backends.get_isa()
    if isa:
        backends.set_isa(isa)
    yield name
    backends.set_isa(before)


@pytest.fixture(autouse=True)
def _seed_and_threads(request: pytest.FixtureRequest):
    """Random numbers that depend on the test alone, and the thread count put back."""
    threads = torch.get_num_threads()
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))
    yield
    torch.set_num_threads(threads)
