"""Decoders over caches and in batches: rows are the same bits alone, approximate caches are exact where they can be."""

from __future__ import annotations

import pytest
import torch

from decoder_toys import DECODERS, MASK_ID, ranks, tiny_network
from esokern import decoders, generate
from esokern.models.denoiser import NetworkDenoiser


@pytest.fixture(autouse=True)
def _one_thread():
    """Everything here is tiny: more threads only wait for each other."""
    torch.set_num_threads(1)


PROMPTS = [[1, 2, 3, 4], [5, 6, 7, 8, 9, 10, 11], [3, MASK_ID, MASK_ID, 8, MASK_ID]]
CACHES = ("prefix", "dual", "delayed")


def with_caches(names, caches=CACHES):
    """Pairs of a decoder and a cache, without those that are refused."""
    pairs = [(name, cache) for name in names for cache in caches]
    return [(name, cache) for name, cache in pairs if not (DECODERS[name].edits and cache == "delayed")]


@pytest.fixture(scope="module")
def network():
    return tiny_network()


@pytest.fixture(scope="module")
def one_layer():
    return tiny_network(n_blocks=1)


@pytest.mark.parametrize(("name", "cache"), with_caches(DECODERS, (None, *CACHES)))
def test_batch_is_single_runs(network, name, cache):
    """Ragged rows with gaps are the same bits alone and together: tokens, log-probabilities, order."""
    options = {"decoder": DECODERS[name], "cache": cache, "max_new_tokens": 12, "return_logprob": True}
    result = generate(network, PROMPTS, seed=3, **options)
    singles = [generate(network, prompt, seed=3 + row, **options) for row, prompt in enumerate(PROMPTS)]
    assert max(single.nfe for single in singles) <= result.nfe <= sum(single.nfe for single in singles)
    for row, (prompt, single) in enumerate(zip(PROMPTS, singles, strict=True)):
        length = len(prompt) + 12
        tokens = result.row(row)
        assert torch.equal(tokens, single.tokens[0])
        assert torch.equal(result.logprob[row, :length], single.logprob[0])
        assert ranks(result.decode_step[row, :length].tolist()) == ranks(single.decode_step[0].tolist())
        given = torch.tensor(prompt + [MASK_ID] * 12) != MASK_ID
        assert torch.equal(tokens[given], torch.tensor(prompt + [MASK_ID] * 12)[given])
        assert not (tokens == MASK_ID).any()
        assert (result.tokens[row, length:] == MASK_ID).all()
        assert torch.equal(result.decode_step[row, :length] < 0, given)
        assert (result.logprob[row][result.decode_step[row] < 0] == 0).all()


@pytest.mark.parametrize(
    ("name", "cache"), [("llada guided", None), ("dream margin", "delayed"), ("fast_dllm", "dual")]
)
def test_threads_change_nothing(network, name, cache):
    options = {"decoder": DECODERS[name], "cache": cache, "max_new_tokens": 12, "return_logprob": True}
    result = generate(network, PROMPTS, **options)
    torch.set_num_threads(3)
    again = generate(network, PROMPTS, **options)
    assert torch.equal(again.tokens, result.tokens)
    assert torch.equal(again.logprob, result.logprob)


@pytest.mark.parametrize(
    ("name", "cache"), with_caches(["llada", "llada guided", "dream", "fast_dllm", "joint_threshold"])
)
def test_caches_of_one_layer_are_exact(one_layer, name, cache):
    """Keys and values of a single layer depend on their own token alone, so a policy that is right caches exactly."""
    options = {"decoder": DECODERS[name], "max_new_tokens": 12}
    exact = generate(one_layer, PROMPTS, **options)
    cached = generate(one_layer, PROMPTS, cache=cache, report_divergence=True, **options)
    assert torch.equal(cached.tokens, exact.tokens)
    assert cached.divergence.positions > 0
    assert cached.divergence.agreement == 1
    assert abs(cached.divergence.kl) < 1e-8


def test_delayed_cache_of_a_network_that_predicts_the_next_token(one_layer, network):
    """Its masks need their neighbours' outputs, which are computed again with them."""
    shifted = NetworkDenoiser(one_layer)
    shifted.shift = True
    options = {"decoder": DECODERS["dream"], "max_new_tokens": 12, "mask_id": MASK_ID}
    cached = generate(shifted, PROMPTS, cache="delayed", report_divergence=True, **options)
    assert torch.equal(cached.tokens, generate(shifted, PROMPTS, **options).tokens)
    assert cached.divergence.positions > 0
    assert abs(cached.divergence.kl) < 1e-8


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_block_cache_of_a_network_that_predicts_the_next_token(network, cache):
    """Blocks may begin with a given token, which the step that fills the cache then has nothing to add to."""
    shifted = NetworkDenoiser(network)
    shifted.shift = True
    prompt = [MASK_ID] * 4 + [5] + [MASK_ID] * 3 + [6, 7, 8, 9] + [MASK_ID] * 2
    decoder = decoders.FastDLLM(block_length=4, threshold=0.9)
    result = generate(shifted, prompt, decoder=decoder, cache=cache, mask_id=MASK_ID)
    assert not (result.tokens == MASK_ID).any()
    assert result.tokens[0, 4] == 5
    assert result.tokens[0, 8:12].tolist() == [6, 7, 8, 9]
    # The first position of a block comes from a pass of its own.
    assert (result.decode_step[0, 1:4] > result.decode_step[0, 0]).all()


def test_divergence_counts_the_masks_of_cached_steps(network):
    options = {"decoder": decoders.LLaDA(steps=10, temperature=1.5), "max_new_tokens": 10, "cache": "dual"}
    plain = generate(network, PROMPTS[:2], **options)
    assert plain.divergence is None
    result = generate(network, PROMPTS[:2], report_divergence=True, **options)
    assert torch.equal(result.tokens, plain.tokens)
    assert result.nfe == plain.nfe == 10
    assert result.divergence.positions == 2 * 45  # 9 + 8 + ... + 1
    assert result.divergence.kl > 1e-4
    assert result.divergence.agreement < 1


def test_divergence_is_zero_where_everything_is_computed(network):
    decoder = decoders.LLaDA(steps=6, block_length=None)
    exact = generate(network, [], decoder=decoder, max_new_tokens=12)
    for cache, positions in (("prefix", 10 + 8 + 6 + 4 + 2), (decoders.Delayed(interval=1), 0)):
        result = generate(network, [], decoder=decoder, max_new_tokens=12, cache=cache, report_divergence=True)
        assert torch.equal(result.tokens, exact.tokens)
        assert result.divergence.positions == positions
        assert abs(result.divergence.kl) < 1e-8
        assert result.divergence.agreement == 1


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", ["llada", "dream"])
def test_one_step_is_enough_to_finish(network, name, cache):
    """Where a block's first token has a pass of its own, the others still have theirs."""
    shifted = NetworkDenoiser(network)
    shifted.shift = True
    decoder = decoders.LLaDA(steps=2, block_length=4) if name == "llada" else decoders.Dream(steps=2, block_length=4)
    result = generate(shifted, [1, 2], decoder=decoder, cache=cache, max_new_tokens=8, mask_id=MASK_ID)
    assert not (result.tokens == MASK_ID).any()
