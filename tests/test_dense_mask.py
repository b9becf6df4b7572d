"""Dense masks read as rank integers: exactly, or refused."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from esokern import masks
from esokern.integrations.dense_mask import rank_mask, understand

LENGTH = 12
ORDER = torch.stack([torch.randperm(LENGTH, generator=torch.Generator().manual_seed(s)) for s in range(2)])
VALID = torch.tensor([[1] * 12, [0] * 3 + [1] * 7 + [0] * 2], dtype=torch.bool)
MASKS = {
    "causal": masks.causal(LENGTH),
    "fewer queries": masks.causal(5, LENGTH),
    "bidirectional": masks.bidirectional(LENGTH),
    "lengths": masks.bidirectional(LENGTH, kv_lengths=[7, 0]),
    "any order": masks.any_order(ORDER),
    "prefix": masks.prefix_lm(LENGTH, [3, 8]),
    "mixed": masks.esolm_diffusion(torch.arange(LENGTH), torch.tensor([5, 0]), variant="mixed"),
    "sequential A": masks.esolm_sequential(torch.arange(LENGTH), torch.tensor([5, 2]), variant="A"),
    "block causal": masks.block_causal(LENGTH, 5),
    "block diffusion": masks.block_diffusion(LENGTH, 5),
    "block diffusion 1": masks.block_diffusion(LENGTH, 1),
    "sets": masks.set_causal(torch.arange(LENGTH)),
    "sets, causal": masks.set_causal(torch.arange(LENGTH), noisy="causal"),
    "window": masks.sliding_window(LENGTH, window_size=(2, 1), num_prefix=2),
}


@pytest.mark.parametrize("name", MASKS)
def test_every_mask_comes_back(name):
    visible = MASKS[name].dense()
    assert torch.equal(rank_mask(visible).dense(), visible)


@pytest.mark.parametrize("name", ["sequential A", "block diffusion", "block diffusion 1", "sets"])
def test_and_so_with_the_clean_half_first(name):
    visible = MASKS[name].dense().roll((LENGTH, LENGTH), (1, 2))
    assert torch.equal(rank_mask(visible).dense(), visible)


def test_padding():
    both = VALID[:, :, None] & VALID[:, None, :]
    for visible in (both, both & MASKS["block causal"].dense(), VALID[:, None].expand(2, LENGTH, LENGTH)):
        assert torch.equal(rank_mask(visible).dense(), visible)


@pytest.mark.parametrize("name", ["block diffusion", "sets", "sets, causal"])
@pytest.mark.parametrize("turn", [0, LENGTH])
def test_padding_of_both_halves(name, turn):
    valid = VALID.repeat(1, 2)
    visible = MASKS[name].dense().roll((turn, turn), (1, 2)) & valid[:, :, None] & valid[:, None]
    assert torch.equal(rank_mask(visible).dense(), visible)


def test_no_queries_no_keys():
    for shape in ((1, 0, 3), (2, 3, 0)):
        visible = torch.ones(shape, dtype=torch.bool)
        assert torch.equal(rank_mask(visible).dense(), visible)


def test_a_third_run_is_refused():
    visible = torch.rand(1, 40, 40, generator=torch.Generator().manual_seed(0)) < 0.5
    with pytest.raises(ValueError, match="beginning and one further run"):
        rank_mask(visible)


def test_every_way_to_write_a_mask():
    causal = MASKS["causal"].dense()[0]
    hidden = ~causal
    for mask in (
        causal,
        causal[None, None],
        torch.zeros(LENGTH, LENGTH).masked_fill(hidden, -torch.inf),
        torch.zeros(LENGTH, LENGTH).masked_fill(hidden, torch.finfo(torch.float32).min),
        torch.zeros(LENGTH, LENGTH, dtype=torch.float16).masked_fill(hidden, torch.finfo(torch.float16).min),
        create_block_mask(lambda b, h, q, k: q >= k, None, None, LENGTH, LENGTH, device="cpu"),
    ):
        assert torch.equal(understand(mask, LENGTH, LENGTH).dense()[0], causal)
    padding = VALID[:, None, None]
    assert torch.equal(understand(padding, 4, LENGTH).dense(), VALID[:, None].expand(2, 4, LENGTH))


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.randn(LENGTH, LENGTH), ValueError, "a bias is not served"),
        (torch.full((LENGTH, LENGTH), torch.nan), ValueError, "a bias is not served"),
        (torch.ones(2, 3, LENGTH, LENGTH, dtype=torch.bool), ValueError, "one for each of 3"),
        (torch.ones(LENGTH, LENGTH, dtype=torch.int32), TypeError, "bool or float, got torch.int32"),
        (torch.ones(2, LENGTH, LENGTH, dtype=torch.bool), ValueError, "or 4-D"),
        ("full", TypeError, "got str"),
    ],
)
def test_what_is_no_rank_mask_is_refused(mask, error, message):
    with pytest.raises(error, match=message):
        understand(mask, LENGTH, LENGTH)
