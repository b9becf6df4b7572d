"""Forward and backward of attention: what a training step runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import esokern
from harness import Cost

BATCH, HEADS, HEAD_DIM = 2, 6, 64
NAMES = ["bidirectional", "causal", "any order", "Eso-LM sequential 2L", "block diffusion 2L"]


def mask_of(name: str, seqlen: int) -> esokern.masks.RankMask | None:
    """The mask of a training step; its 2L masks are over [noisy | clean] of seqlen / 2 tokens each."""
    generator = torch.Generator().manual_seed(0)
    if name == "bidirectional":
        return None
    if name == "causal":
        return esokern.masks.causal(seqlen)
    if name == "block diffusion 2L":
        return esokern.masks.block_diffusion(seqlen // 2, 16)
    tokens = seqlen if name == "any order" else seqlen // 2
    order = torch.stack([torch.randperm(tokens, generator=generator) for _ in range(BATCH)])
    return esokern.masks.any_order(order) if name == "any order" else esokern.masks.esolm_sequential(order)


def forward_and_backward(attention: Callable, floats: list[torch.Tensor], dout: torch.Tensor) -> Callable:
    """A function that runs both and returns dq, dk, dv."""
    leaves = [x.requires_grad_() for x in floats]
    return lambda: torch.autograd.grad(attention(*leaves), leaves, dout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seqlen", [1024, 2048])
def test_attention_backward(compare, seqlen, name, dtype):
    with torch.inference_mode(False):
        torch.manual_seed(0)
        q, k, v, dout = (torch.randn(BATCH, seqlen, HEADS, HEAD_DIM).to(dtype) for _ in range(4))
        mask = mask_of(name, seqlen)
        dense = None if mask is None else mask.dense()[:, None]
        causal = name == "causal"
        options = {"is_causal": True} if causal else {"attn_mask": dense}

        def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)

        by_head = [x.transpose(1, 2) for x in (q, k, v, dout)]
        candidates = {
            "esokern": forward_and_backward(lambda *x: esokern.attention(*x, mask=mask), [q, k, v], dout),
            "sdpa": forward_and_backward(sdpa, by_head[:3], by_head[3]),
        }
        for ours, theirs in zip(candidates["esokern"](), candidates["sdpa"](), strict=True):
            atol = 5e-2 if dtype == torch.bfloat16 else 1e-4
            torch.testing.assert_close(ours.float(), theirs.transpose(1, 2).float(), atol=atol, rtol=0)
        visible = seqlen**2 if dense is None else dense.sum().item() / dense.shape[0]
        cost = Cost(
            bytes=8 * q.numel() * q.element_size(),  # q, k, v, dout in; out, dq, dk, dv out
            flops=14 * BATCH * HEADS * HEAD_DIM * visible,
        )
        compare("attention_backward", f"B2 H6 S{seqlen} D64 {name}", dtype, candidates, cost)
