"""Attention over whole sequences: what recomputing samplers and bidirectional models run."""

from __future__ import annotations

import pytest
import torch

import esokern
from harness import Cost

HEADS, HEAD_DIM = 6, 64


def cases(seqlen: int):
    """name -> (mask, torch's best form, share of the seqlen_q x seqlen_kv grid that is visible)."""
    sdpa = torch.nn.functional.scaled_dot_product_attention
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(seqlen, generator=generator)[None].int()
    any_order = esokern.masks.any_order(order)
    block = esokern.masks.block_diffusion(seqlen // 2, 16)
    dense_any, dense_block = any_order.dense(), block.dense()
    return {
        "bidirectional": (None, sdpa, 1.0),
        "causal": (esokern.masks.causal(seqlen), lambda q, k, v: sdpa(q, k, v, is_causal=True), 0.5),
        "any order": (any_order, lambda q, k, v: sdpa(q, k, v, attn_mask=dense_any), 0.5),
        "block diffusion 2L": (block, lambda q, k, v: sdpa(q, k, v, attn_mask=dense_block), 0.25),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", ["bidirectional", "causal", "any order", "block diffusion 2L"])
@pytest.mark.parametrize("seqlen", [256, 1024, 4096])
def test_attention(compare, seqlen, name, dtype):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, seqlen, HEADS, HEAD_DIM, generator=generator).to(dtype) for _ in range(3))
    mask, form, visible_share = cases(seqlen)[name]
    torch_q, torch_k, torch_v = (x.transpose(1, 2) for x in (q, k, v))
    candidates = {
        "esokern": lambda: esokern.attention(q, k, v, mask=mask),
        "sdpa": lambda: form(torch_q, torch_k, torch_v),
    }
    ours, theirs = candidates["esokern"](), candidates["sdpa"]().transpose(1, 2)
    torch.testing.assert_close(ours.float(), theirs.float(), atol=2e-2 if dtype == torch.bfloat16 else 1e-5, rtol=0)
    cost = Cost(bytes=4 * q.numel() * q.element_size(), flops=4 * HEADS * seqlen * seqlen * HEAD_DIM * visible_share)
    compare("attention", f"B1 H6 S{seqlen} D64 {name}", dtype, candidates, cost)
