"""What nvcc made of the CUDA kernels: every architecture, no spills, and the instructions a kernel claims in its SASS.

Runs without a GPU wherever the CUDA kernels were built (ESOKERN_CUDA=ON forces that) and cuobjdump is at hand.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

import esokern
from esokern import backend

ARCHITECTURES = ["80", "90", "100", "120"]

# Kernel (a pattern for its mangled name) -> what its forms for bfloat16 and float16 must show: tensor cores, matrix
# loads, 16-byte asynchronous copies, 16-byte accesses.
GEMM = {"HMMA", "LDSM", "LDGSTS.E.BYPASS"}
CLAIMS = {
    r"\dattention_kernelI": GEMM | {"MUFU.EX2"},
    r"\dkeys_kernelI": GEMM | {"MUFU.EX2"},
    r"\dqueries_kernelI": GEMM | {"MUFU.EX2"},
    r"\dlanes_kernelI": {"LDG.E.128"},
    r"\dsample_headI": GEMM,
    r"\dlog_sum_headI": GEMM | {"MUFU.EX2"},
    r"\dgradient_headI": GEMM | {"MUFU.EX2", "STG.E.64"},
    r"\dfused_linear_kernelI": GEMM,
    r"\dsample_logitsI": {"LDG.E.128"},
    r"\dnormalize_rows_kernelI\S+Lb1E": {"LDG.E.128", "STG.E.128"},  # of aligned rows
}


def _module() -> Path | None:
    name = "_cuda" + sysconfig.get_config_var("EXT_SUFFIX")
    return next((path for folder in esokern.__path__ if (path := Path(folder, name)).exists()), None)


def _cuobjdump() -> str | None:
    wheel = Path(sysconfig.get_paths()["purelib"], "nvidia", "cu13", "bin", "cuobjdump")
    return str(wheel) if wheel.exists() else shutil.which("cuobjdump")


MODULE, CUOBJDUMP = _module(), _cuobjdump()
if os.environ.get("ESOKERN_CUDA") == "ON":
    assert MODULE is not None, "ESOKERN_CUDA=ON, but esokern._cuda was not built"
    assert CUOBJDUMP is not None, "cuobjdump is missing: make test installs it"
pytestmark = [
    pytest.mark.skipif(MODULE is None, reason="the CUDA kernels were not built (ESOKERN_CUDA=ON builds them)"),
    pytest.mark.skipif(CUOBJDUMP is None, reason="needs cuobjdump"),
]


@functools.lru_cache
def _resources(architecture: str) -> dict[str, dict[str, int]]:
    """Kernel -> REG, STACK, LOCAL, ... of the compiler's report."""
    command = [CUOBJDUMP, "-arch", f"sm_{architecture}", "--dump-resource-usage", str(MODULE)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Function (\S+):\n\s*(.*)", text)
    return {name: {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)} for name, line in found}


@functools.lru_cache
def _sass(architecture: str) -> dict[str, str]:
    """Kernel -> its instructions."""
    command = [CUOBJDUMP, "-arch", f"sm_{architecture}", "-sass", str(MODULE)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = re.split(r"\n\s*Function : (\S+)\n", text)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_import_needs_no_driver():
    assert backend.cuda_architectures() is not None


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_was_built_without_spills(architecture):
    kernels = _resources(architecture)
    assert kernels, f"no kernels for sm_{architecture}"
    for name, usage in kernels.items():
        assert usage["LOCAL"] == 0, f"sm_{architecture} {name}: {usage}"
        assert usage["STACK"] == 0, f"sm_{architecture} {name}: {usage}"


@pytest.mark.parametrize("architecture", ["80", "90"])
def test_no_local_memory_in_the_instructions(architecture):
    for name, code in _sass(architecture).items():
        assert not re.search(r"\b(LDL|STL)\b", code), f"sm_{architecture} {name}: spills"


@pytest.mark.parametrize("architecture", ["80", "90"])
@pytest.mark.parametrize("kernel", CLAIMS)
def test_kernels_use_the_instructions_they_claim(kernel, architecture):
    halves = {
        name: code
        for name, code in _sass(architecture).items()
        if re.search(kernel, name) and re.search(r"\db?f16E", name)
    }
    assert halves, f"no {kernel} for sm_{architecture}"
    for name, code in halves.items():
        missing = {instruction for instruction in CLAIMS[kernel] if instruction not in code}
        assert not missing, f"sm_{architecture} {name}: lacks {missing}"
