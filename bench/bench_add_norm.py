"""Residual + LayerNorm, and embedding + LayerNorm, against the same in torch."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

import esokern
from harness import Cost

VOCAB = 50258


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("rows", [2, 64, 4096])
@pytest.mark.parametrize("name", ["residual", "embedding"])
def test_add_norm(compare, name, rows, dtype):
    hidden = 768
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(VOCAB if name == "embedding" else rows, hidden, generator=generator).to(dtype)
    residual = torch.randn(rows, hidden, generator=generator).to(dtype) if name == "residual" else None
    tokens = torch.randint(VOCAB, (rows,), generator=generator) if name == "embedding" else None
    weight, bias = torch.rand(2, hidden, generator=generator).to(dtype)

    def ours():
        return esokern.add_norm(x, residual, tokens=tokens, weight=weight, bias=bias)

    def theirs():
        total = functional.embedding(tokens, x) if residual is None else residual + x
        return functional.layer_norm(total, (hidden,), weight, bias), total

    for a, b in zip(ours(), theirs(), strict=True):
        torch.testing.assert_close(a.float(), b.float(), atol=6e-2 if dtype == torch.bfloat16 else 1e-4, rtol=1e-2)
    reads_and_writes = 3 if residual is None else 4
    cost = Cost(bytes=reads_and_writes * rows * hidden * x.element_size())
    compare("add_norm", f"{name} {rows}x{hidden}", dtype, {"esokern": ours, "torch": theirs}, cost, seconds=0.5)
