"""One decoding step's attention on a filled cache, against torch's best forms of the same work.

The alternatives find the new keys and values already in the cache; ours also appends them.
"""

from __future__ import annotations

import pytest
import torch

import esokern
from harness import Cost

HEADS, HEAD_DIM = 12, 64


def torch_forms(q, k_cache, v_cache):
    """SDPA with a boolean mask, SDPA without one where it means the same, and matmul + softmax with all constant work
    done beforehand (queries scaled, additive mask ready)."""
    seqlen_q, seqlen_kv = q.shape[1], k_cache.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (q, k_cache, v_cache))
    scaled_q, k_t = q * q.shape[-1] ** -0.5, k.transpose(-1, -2)
    visible = torch.ones(seqlen_q, seqlen_kv, dtype=torch.bool).tril(seqlen_kv - seqlen_q)
    bias = torch.zeros(seqlen_q, seqlen_kv, dtype=q.dtype).masked_fill(~visible, float("-inf"))
    forms = {
        "sdpa mask": lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible),
        "matmul softmax": lambda: torch.matmul(scaled_q, k_t).add_(bias).softmax(-1) @ v,
    }
    if seqlen_q == 1:
        forms["sdpa"] = lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v)
    return forms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("seqlen_kv", [512, 2048, 8192])
@pytest.mark.parametrize("seqlen_q", [1, 2, 4, 16, 64])
@pytest.mark.parametrize("batch", [1, 4])
def test_cached_attention(compare, batch, seqlen_q, seqlen_kv, dtype):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, seqlen_q, HEADS, HEAD_DIM, generator=generator).to(dtype) for _ in range(3))
    k_cache, v_cache = (torch.randn(batch, seqlen_kv, HEADS, HEAD_DIM, generator=generator).to(dtype) for _ in range(2))
    cache_seqlens = torch.full((batch,), seqlen_kv - seqlen_q, dtype=torch.int32)
    k_cache[:, -seqlen_q:], v_cache[:, -seqlen_q:] = k, v

    candidates = {
        "esokern": lambda: esokern.attention_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=cache_seqlens),
        **torch_forms(q, k_cache, v_cache),
    }
    ours, theirs = candidates["esokern"](), candidates["sdpa mask"]().transpose(1, 2)
    torch.testing.assert_close(ours.float(), theirs.float(), atol=2e-2 if dtype == torch.bfloat16 else 1e-5, rtol=0)
    cost = Cost(
        bytes=2 * k_cache.numel() * k_cache.element_size(),
        flops=4 * batch * HEADS * seqlen_q * seqlen_kv * HEAD_DIM,
    )
    compare("attention_with_kvcache", f"B{batch} H12 Sq{seqlen_q} KV{seqlen_kv} D64", dtype, candidates, cost)
