"""The arrows between layers go one way: read from the includes and imports, so that a wrong one fails here."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A module may import modules of a lower number, and its own package.
LAYER = {
    "_cpu": 0,
    "_cuda": 0,
    "backend": 1,
    "masks": 1,
    "philox": 1,
    "arrays": 1,
    "per_row": 1,
    "attention": 2,
    "unmask_sample": 2,
    "unmask_select": 2,
    "fused_linear": 2,
    "add_norm": 2,
    "masked_cross_entropy": 2,
    "attention_with_kvcache": 3,  # attention plus a cache: its checks and reference are attention's
    "kv_cache": 3,
    "text": 4,
    "corpus": 5,
    "testing": 4,
    "models": 5,
    "objectives": 6,
    "data": 6,
    "nelbo": 7,
    "samplers": 7,
    "decoders": 8,
    "integrations": 8,
    "likelihood": 8,
    "distributed": 8,
    "train": 9,
    "demo": 9,
    "generate": 9,
    "perplexity": 9,
    "evaluate": 10,
    "cli": 11,
    "__main__": 12,
    "__init__": 12,
}


def _includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s+[<"]([^>"]+)[>"]', path.read_text(), flags=re.MULTILINE)


def _sources(folder: str) -> list[Path]:
    return [p for p in (ROOT / folder).rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"}]


def _imported_modules(path: Path) -> set[str]:
    """Top-level modules of esokern that a file imports, anywhere in it; `esokern` itself counts as __init__."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "esokern":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                if parts[0] == "esokern":
                    found.add(parts[1] if len(parts) > 1 else "__init__")
    return found


def _python_files() -> list[Path]:
    return sorted((ROOT / "esokern").rglob("*.py"))


@pytest.mark.parametrize("path", _sources("csrc"), ids=lambda p: str(p.relative_to(ROOT)))
def test_kernels_know_no_framework(path):
    for include in _includes(path):
        assert not re.match(r"(Python|pybind11|torch|ATen|c10)", include), f"{path}: includes {include}"


@pytest.mark.parametrize("path", _sources("csrc/common"), ids=lambda p: p.name)
def test_shared_headers_include_only_shared_headers(path):
    for include in _includes(path):
        assert "/" not in include or include.startswith("common/"), f"{path}: includes {include}"


@pytest.mark.parametrize("path", _sources("csrc/cpu"), ids=lambda p: p.name)
def test_cpu_kernels(path):
    for include in _includes(path):
        assert not include.startswith(("cuda", "../")), f"{path}: includes {include}"
    if path.stem != "dispatch":  # compiled per instruction set: std:: code would leak as weak symbols
        assert not re.search(r"#include <(string|vector|algorithm|functional|memory)>", path.read_text()), path
    if path.name != "parallel.h":
        assert "omp" not in "".join(_includes(path)), f"{path}: threads belong in parallel.h"
    if path.name != "simd.h":
        assert "immintrin.h" not in _includes(path), f"{path}: intrinsics belong in simd.h"


@pytest.mark.parametrize("path", _sources("csrc/cuda"), ids=lambda p: p.name)
def test_cuda_kernels(path):
    for include in _includes(path):
        assert not include.startswith(("cpu/", "../")), f"{path}: includes {include}"
        assert not include.startswith("cuda_") or path.name in ("ptx.cuh", "runtime.cu"), f"{path}: includes {include}"
    if path.name != "ptx.cuh":  # what else the hardware is asked for could not run under the emulator
        code = re.sub(r"//.*", "", path.read_text())
        assert not re.search(r"\basm\b|<<<|__shared__|__sync|__shfl|__CUDA_ARCH__", code), path


def test_bindings_see_the_contract_only():
    for path in _sources("python"):
        for include in _includes(path):
            allowed = include.startswith("pybind11/") or "/" not in include
            allowed = allowed or include in ("cpu/dispatch.h", "cuda/runtime.h")
            assert allowed, f"{path}: includes {include}"


def test_every_module_has_a_layer():
    modules = {p.relative_to(ROOT / "esokern").parts[0].removesuffix(".py") for p in _python_files()}
    assert modules <= set(LAYER), f"give these a layer: {sorted(modules - set(LAYER))}"


@pytest.mark.parametrize("path", _python_files(), ids=lambda p: str(p.relative_to(ROOT / "esokern")))
def test_python_arrows(path):
    module = path.relative_to(ROOT / "esokern").parts[0].removesuffix(".py")
    for imported in _imported_modules(path):
        if imported not in LAYER or imported == module:  # a name such as __version__
            continue
        assert LAYER[imported] < LAYER[module], f"{path.name} ({module}) imports {imported}: the arrow points up"
    compiled = {"_cpu", "_cuda"} & _imported_modules(path)
    assert module == "backend" or not compiled, "only backend.py imports the compiled modules"
