"""LM head + sampling against a matmul followed by Gumbel-max in torch, in float64 as published and in float32."""

from __future__ import annotations

import pytest
import torch

import esokern
from eager import gumbel_max, nucleus
from harness import Cost

HIDDEN, VOCAB = 768, 50258


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("top_p", [None, 0.9])
@pytest.mark.parametrize("rows", [1, 2, 16, 64, 256])
def test_unmask_sample(compare, rows, top_p, dtype):
    if top_p is not None and rows > 64:
        pytest.skip("the sorted alternative takes seconds here")
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, HIDDEN, generator=generator).to(dtype)
    weight = (torch.randn(VOCAB, HIDDEN, generator=generator) / HIDDEN**0.5).to(dtype)
    positions = torch.arange(rows)

    def ours(**options):
        return esokern.unmask_sample(
            hidden,
            weight,
            mask_id=VOCAB - 1,
            temperature=1.0,
            top_p=top_p,
            seed=1,
            positions=positions,
            **options,
        )

    candidates = {
        "esokern": lambda: ours(return_logprob=False),
        "esokern + logprob": ours,
    }
    if top_p is None:
        candidates["matmul + f64 gumbel"] = lambda: gumbel_max(hidden @ weight.T, torch.float64)
        candidates["matmul + f32 gumbel"] = lambda: gumbel_max(hidden @ weight.T, torch.float32)
    else:
        candidates["matmul + f64 sort"] = lambda: gumbel_max(nucleus(hidden @ weight.T, top_p), torch.float64)
    cost = Cost(bytes=weight.numel() * weight.element_size(), flops=2 * rows * HIDDEN * VOCAB)
    case = f"rows {rows} D768 V50258" + ("" if top_p is None else f" top_p {top_p}")
    compare("unmask_sample", case, dtype, candidates, cost, seconds=2.0, max_rounds=40)
