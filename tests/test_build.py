"""What was built: every instruction set, no symbol of one leaking into another, no libtorch behind the module."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from esokern import _cpu, backend

ROOT = Path(__file__).parent.parent
X86 = sysconfig.get_platform().endswith("x86_64")


def _objects() -> list[Path]:
    newest = max(ROOT.glob("build/*/CMakeFiles/_cpu.dir"), key=lambda p: p.stat().st_mtime, default=None)
    return sorted(newest.parent.glob("cpu_*.dir/**/*.o")) if newest else []


@pytest.mark.skipif(not X86, reason="other processors have the generic build alone")
def test_every_instruction_set_was_built():
    assert backend.built_isas() == ["generic", "avx2", "avx512", "avx512bf16"]


def test_the_best_supported_instruction_set_is_used():
    assert backend.get_isa() == backend.supported_isas()[-1]


def test_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="isa: got 'mmx', built are: generic"):
        backend.set_isa("mmx")


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm (binutils)")
def test_no_weak_symbols_in_the_objects_of_an_instruction_set():
    objects = _objects()
    assert objects, "no object files under build/: run `make dev` or `make test`"
    for path in objects:
        symbols = subprocess.run(["nm", "-C", str(path)], capture_output=True, text=True, check=True).stdout
        # The reference to the exception personality is a pointer, not code.
        leaks = [line for line in symbols.splitlines() if line[17:18] in ("W", "V", "u") and "DW.ref.__gxx" not in line]
        assert not leaks, f"{path}: {leaks}"


@pytest.mark.skipif(shutil.which("ldd") is None, reason="needs ldd")
def test_the_module_links_no_framework():
    linked = subprocess.run(["ldd", _cpu.__file__], capture_output=True, text=True, check=True).stdout
    assert "libgomp" in linked
    for name in ("torch", "c10", "cuda", "python"):
        assert name not in "".join(line.split("=>")[0] for line in linked.splitlines()), linked
