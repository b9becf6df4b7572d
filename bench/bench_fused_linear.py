"""Normalise + linear + activation or residual, as a decoding step uses it, against the same in torch."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

import esokern
from harness import Cost

SHAPES = {
    "norm qkv": (256, 768, {"normalize_eps": 1e-5}),
    "attn out": (256, 256, {}),
    "norm mlp gelu": (256, 1024, {"normalize_eps": 1e-5, "activation": "gelu_tanh"}),
    "mlp out": (1024, 256, {}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 16, 1024])
def test_fused_linear(compare, rows, name, dtype):
    in_features, out_features, options = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, in_features, generator=generator).to(dtype)
    # Several layers' weights in turn, as in a model: one alone would stay in the first caches.
    weights = [(torch.randn(out_features, in_features, generator=generator) / 16).to(dtype) for _ in range(6)]
    bias = torch.randn(out_features, generator=generator).to(dtype)
    residual = None if options else torch.randn(rows, out_features, generator=generator).to(dtype)

    def ours():
        for weight in weights:
            out = esokern.fused_linear(x, weight, bias, residual=residual, **options)
        return out

    def theirs():
        for weight in weights:
            y = functional.layer_norm(x, (in_features,)) if "normalize_eps" in options else x
            y = functional.linear(y, weight, bias)
            if "activation" in options:
                y = functional.gelu(y, approximate="tanh")
            out = y if residual is None else residual + y
        return out

    torch.testing.assert_close(
        ours().float(), theirs().float(), atol=5e-2 if dtype == torch.bfloat16 else 1e-4, rtol=1e-2
    )
    cost = Cost(
        bytes=6 * out_features * in_features * x.element_size(),
        flops=6 * 2 * rows * in_features * out_features,
    )
    candidates = {"esokern": ours, "torch": theirs}
    compare(
        "fused_linear",
        f"6 x {name} {in_features}x{out_features} rows {rows}",
        dtype,
        candidates,
        cost,
        seconds=0.5,
    )
