"""Dtypes and masks that the tests of attention and of its gradients share."""

import pytest
import torch

from esokern import masks

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def random_mask(batch, seqlen_q, seqlen_kv):
    """Ranks in any order, windows, queries that see nothing and keys that nobody sees."""
    k_rank = torch.stack([torch.randperm(seqlen_kv) for _ in range(batch)]).int()
    prefix_end = torch.randint(-1, seqlen_kv, (batch, seqlen_q), dtype=torch.int32) // 2
    window_start = torch.randint(0, seqlen_kv + 1, (batch, seqlen_q), dtype=torch.int32)
    window_end = window_start + torch.randint(-1, 9, (batch, seqlen_q), dtype=torch.int32)
    return masks.RankMask(k_rank, prefix_end, window_start, window_end)


def hostile_mask(batch, seqlen_q, seqlen_kv):
    """Ranks and bounds anywhere in int32, the ends among them: ties, windows that end before they begin."""
    values = torch.tensor([-(2**31), 1 - 2**31, -2, -1, 0, 1, 2, 2**30, 2**31 - 2, 2**31 - 1], dtype=torch.int32)
    shapes = [(batch, seqlen_kv), *[(batch, seqlen_q)] * 3]
    return masks.RankMask(*(values[torch.randint(len(values), shape)] for shape in shapes))


# name -> mask(batch, seqlen_q, seqlen_kv)
MASKS = {
    "none": lambda b, q, k: None,
    "causal": lambda b, q, k: masks.causal(q, k),
    "padding": lambda b, q, k: masks.bidirectional(q, k, kv_lengths=torch.randint(0, k + 1, (b,))),
    "any_order": lambda b, q, k: masks.any_order(
        torch.randint(0, k, (b, q)), torch.stack([torch.randperm(k) for _ in range(b)])
    ),
    "window": lambda b, q, k: masks.sliding_window(q, k, window_size=(5, 2), num_prefix=2),
    "random": random_mask,
    "hostile": hostile_mask,
}
