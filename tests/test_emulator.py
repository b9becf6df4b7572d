"""The emulator that the CUDA kernels run on in these tests: its own tests, its oracle, and the kernels under ASan."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import esokern

ROOT = Path(__file__).parent.parent
BUILD = Path(os.environ.get("ESOKERN_EMULATOR_DIR", ROOT / "build" / "emulator"))
needs_build = pytest.mark.skipif(not (BUILD / "self_test_emulated").exists(), reason="`make emulator` builds it")


@needs_build
@pytest.mark.parametrize("flavour", ["emulated", "race", "asan"])
def test_every_planted_fault_is_caught(flavour):
    done = subprocess.run([BUILD / f"self_test_{flavour}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ checks passed", done.stdout.splitlines()[-1]), done.stdout


@needs_build
def test_fragments_are_those_of_cutlass():
    oracle = BUILD / "cute_oracle"
    if not oracle.exists():
        pytest.skip("needs the headers of the nvidia-cutlass wheel and of the CUDA toolkit")
    done = subprocess.run([oracle], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


FILES = (
    "attention",
    "attention_backward",
    "attention_with_kvcache",
    "unmask_sample",
    "unmask_select",
    "unmask_select_edges",
    "masked_cross_entropy",
    "fused_linear",
    "add_norm",
)
# Some cases of every kernel: AddressSanitizer makes them five times slower, and a finding ends the process.
ASAN_CASES = (
    "cuda-asan and (test_against_reference or test_every_mask or test_ragged or test_paged or test_value_errors or "
    "test_shapes or test_options or test_allowed_set or test_strided or test_carry_over or test_what_sees or "
    "test_rules or test_hostile_values or test_wide_windows)"
)


@needs_build
def test_kernels_under_address_sanitizer():
    # Not -m pytest, which would put the checkout before the installed package.
    start = "import sys, pytest; sys.path.remove(''); sys.exit(pytest.main(sys.argv[1:]))"
    command = [sys.executable, "-c", start, "-q", "-x", "-p", "no:cacheprovider", "-k", ASAN_CASES]
    command += [f"tests/test_{name}.py" for name in FILES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=_asan_environment())
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert re.search(r"\d\d+ passed", done.stdout), done.stdout


def test_no_bank_conflicts(emulator):
    """Swizzled tiles: eight rows of a matrix lie in different banks, in every kernel that uses ldmatrix."""
    emulator.reset_bank_conflicts()
    for head_dim in (64, 96, 128, 256):
        for rows in (4, 80):
            q, k, v = (
                torch.randn(1, n, 2, head_dim, dtype=torch.bfloat16, requires_grad=True) for n in (rows, 130, 130)
            )
            esokern.attention(q, k, v, backend="cuda").sum().backward()
    x, weight = torch.randn(20, 192, dtype=torch.bfloat16), torch.randn(300, 192, dtype=torch.bfloat16)
    esokern.fused_linear(x, weight, backend="cuda")
    esokern.unmask_sample(x, weight, positions=torch.arange(20), backend="cuda")
    assert emulator.bank_conflicts() == 0, emulator.bank_conflict_sites()


def _asan_environment() -> dict[str, str]:
    """ASan must come before everything else in a process that did not begin with it."""
    compiler = shutil.which("g++") or "c++"
    libraries = [
        subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
        for name in ("libasan.so", "libstdc++.so")
    ]
    preload = " ".join(library.strip() for library in libraries)
    return {**os.environ, "LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0", "ESOKERN_EMULATORS": "asan"}
