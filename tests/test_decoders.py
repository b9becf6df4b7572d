"""Decoders against the published ones, token for token and step for step; what their settings may be."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from decoder_goldens import load, tensors
from decoder_toys import ToyDenoiser, ranks, tiny_network
from esokern import decoders, generate, unmask_sample_from_logits, unmask_select
from esokern.models import CallableDenoiser, Step


@pytest.fixture(autouse=True)
def _one_thread():
    """Everything here is tiny: more threads only wait for each other."""
    torch.set_num_threads(1)


# --- as published ----------------------------------------------------------------------------------------------------

# What is not offered: a confidence without two tokens that are drawn, texts that are overwritten with eos_id while
# masks are left, a threshold under a budget of tokens, a repetition penalty.
LLADA = [case for case in load("llada") if not case["params"]["confidence_eos_eot_inf"]]
FAST_DLLM = [case for case in load("fast-dllm") if not case["params"]["early_stop"]]
DREAM = [case for case in load("dream") if case["params"]["threshold"] is None or "block_length" in case["params"]]
SGLANG = [case for case in load("sglang") if not case["params"].get("penalty_lambda")]


def cases(golden):
    return pytest.mark.parametrize("case", golden, ids=[case["name"] for case in golden])


def check_schedule(case, result, block_length):
    """Tokens, the order in which they were decoded, and the number of forward passes are the published ones'."""
    nfe = 0
    for number, row in enumerate(case["rows"]):
        made = slice(len(row["prompt"]), len(row["prompt"]) + len(row["tokens"]))
        assert result.tokens[number, made].tolist() == row["tokens"]
        assert ranks(result.decode_step[number, made].tolist()) == ranks(row["committed_at"])
    for first in range(0, len(row["tokens"]), block_length):
        # Passes that fill nothing are left out; rows of a batch go through their blocks together.
        nfe += max(len(set(row["committed_at"][first : first + block_length])) for row in case["rows"])
    assert result.nfe == nfe


def prompts(case):
    return [row["prompt"] for row in case["rows"]]


def test_toys_are_the_published_models():
    logits = tensors("logits")
    tokens = logits.pop("tokens")
    for name, expected in logits.items():
        toy = ToyDenoiser(name)
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        hidden = toy.hidden(tokens, positions, Step(torch.full((len(tokens),), tokens.shape[1], dtype=torch.int32)))
        torch.testing.assert_close(hidden @ toy.head_weight.T, expected, rtol=1e-4, atol=1e-4)


@cases(LLADA)
def test_llada(case):
    """Its `generate`: low_confidence, blocks, steps that do not divide them, guidance, a forbidden end of text."""
    params = case["params"]
    decoder = decoders.LLaDA(steps=params["steps"], block_length=params["block_length"], cfg_scale=params["cfg_scale"])
    toy = ToyDenoiser("llada")
    suppress = [toy.eos_id] if params["logits_eos_inf"] else []
    result = generate(
        toy, prompts(case), decoder=decoder, max_new_tokens=32, mask_id=toy.mask_id, suppress_tokens=suppress
    )
    check_schedule(case, result, params["block_length"])


@cases(FAST_DLLM)
def test_fast_dllm(case):
    """Fast-dLLM's and dInfer's `generate`, with prefix and dual cache: fixed steps, threshold, factor."""
    params = case["params"]
    length = params["block_length"]
    if params["factor"] is not None:
        decoder = decoders.FastDLLM(block_length=length, factor=params["factor"])
    elif params["threshold"] is not None:
        decoder = decoders.FastDLLM(block_length=length, threshold=params["threshold"])
    else:
        decoder = decoders.LLaDA(block_length=length, steps=params["steps"])
    toy = ToyDenoiser("llada")
    result = generate(
        toy, prompts(case), decoder=decoder, cache=params["cache"], max_new_tokens=32, mask_id=toy.mask_id
    )
    check_schedule(case, result, length)


@cases(DREAM)
def test_dream(case):
    """Dream's `diffusion_generate`, and Fast-dLLM's by blocks with its caches: shift, filters, schedule."""
    params = case["params"]
    names = ("steps", "alg", "top_p", "top_k", "eps", "block_length", "threshold")
    options = {name: params[name] for name in names if params.get(name) is not None}
    toy = ToyDenoiser("dream")
    result = generate(
        toy,
        prompts(case),
        decoder=decoders.Dream(**options),
        cache=params["cache"],
        max_new_tokens=32,
        mask_id=toy.mask_id,
    )
    check_schedule(case, result, 32 if params["cache"] == "none" else params["block_length"])


@cases(load("dkv"))
def test_delayed_cache(case):
    """dKV-Cache: its tokens, and how many of them each forward pass computes."""
    params = case["params"]
    decoder = decoders.LLaDA(steps=params["steps"], block_length=params["block_length"])
    computed = []

    class Counting(ToyDenoiser):
        def hidden(self, tokens, positions, step):
            computed.append((step.slots >= 0).sum(1).tolist())
            return super().hidden(tokens, positions, step)

    toy = Counting("llada")
    cache = decoders.Delayed(params["cache_reloading_step"])
    result = generate(toy, prompts(case), decoder=decoder, cache=cache, max_new_tokens=32, mask_id=toy.mask_id)
    check_schedule(case, result, params["block_length"])
    assert list(zip(*computed, strict=True)) == [tuple(row["run_lengths"]) for row in case["rows"]]


def check_changes(case, decoder, limited):
    """Every change of every step is the published one. Those pad the last block to the grid, and `limited` ones hide
    that part from the others; a row of ours stops at its eos_id at the latest when theirs does."""
    params = case["params"]
    length, eos_id = params["block_length"], params.get("eos_id")
    for row in case["rows"]:
        begin = len(row["prompt"])
        end = begin + params["gen_length"]
        toy = ToyDenoiser(
            "llada",
            causal_block=length if params["attention"] == "block_causal" else 1000,
            limit=end if limited else 1000,
        )
        steps = []
        result = generate(
            toy,
            row["prompt"],
            decoder=decoder,
            max_new_tokens=-(-end // length) * length - begin,
            mask_id=toy.mask_id,
            eos_id=eos_id,
            callback=steps.append,
        )
        changes = [torch.stack([step.positions - begin, step.tokens], 1).tolist() for step in steps if len(step.tokens)]
        published = [step for step in row.get("changes", []) if step]
        if eos_id is not None and len(changes) < len(published):
            assert changes == published[: len(changes)]
            assert eos_id in result.tokens[0, begin:end]
            continue
        assert "changes" not in row or changes == published
        made = result.tokens[0, begin:end].tolist()
        stop = made.index(eos_id) + 1 if eos_id in made else None
        assert made[:stop] == row["tokens"][:stop]
        assert len(changes) <= result.nfe <= row["nfe"]


@cases(load("llada2"))
def test_block_refinement(case):
    """LLaDA2's pipeline: quotas, thresholds, edits, steps after the last mask, end of text."""
    params = case["params"]
    decoder = decoders.BlockRefinement(
        block_length=params["block_length"],
        steps=min(params["num_inference_steps"], params["gen_length"] // params["minimal_topk"]),
        threshold=params["threshold"],
        edit_threshold=params["editing_threshold"],
        max_post_steps=params["max_post_steps"],
    )
    check_changes(case, decoder, limited=True)


class GridEntropyBound(decoders.EntropyBound):
    """Entropy-bounded unmasking in the blocks of a fixed grid."""

    def windows(self, begin, end):
        return decoders.JointThreshold(block_length=self.block_length).windows(begin, end)


@cases(SGLANG)
def test_serving_engine(case):
    """SGLang's JointThreshold, LowConfidence and EBSampling."""
    params = case["params"]
    options = {
        name: params[name] for name in ("block_length", "threshold", "edit_threshold", "gamma") if name in params
    }
    match params["algorithm"]:
        case "JointThreshold":
            decoder = decoders.JointThreshold(max_post_steps=params["max_post_edit_steps"], **options)
        case "LowConfidence":
            decoder = decoders.JointThreshold(edit_threshold=None, **options)
        case "EBSampling":
            decoder = GridEntropyBound(**options)
    check_changes(case, decoder, limited=False)


STEPS = load("steps")


@cases([case for case in STEPS if case["name"].startswith("step-")])
def test_single_step(case):
    """BlockRefinementScheduler.step on given logits: what is filled and what is edited."""
    params, mask_id = case["params"], 22
    tokens, logits = tensors("steps")["sample"], tensors("steps")["logits"]
    decoder = decoders.BlockRefinement(
        block_length=tokens.shape[1],
        steps=params["num_inference_steps"],
        threshold=min(params["threshold"], 1.0),  # 2 = never, and so is 1
        edit_threshold=params["editing_threshold"],
    )
    wanted = next(itertools.islice(decoder.options((tokens == mask_id).sum(1).numpy(), 1), params["timestep"], None))
    drawn = unmask_sample_from_logits(logits.flatten(0, 1), mask_id=mask_id, temperature=0.0, return_prob=True)
    editable = torch.arange(tokens.shape[1]).expand_as(tokens) >= params["prompt_length"]
    proposed, prob = drawn.tokens.view_as(tokens), drawn.prob.view_as(tokens)
    before = tokens.clone()
    result = unmask_select(
        tokens, proposed, prob, mask_id=mask_id, editable=editable, return_transfer_index=True, **wanted
    )
    assert tokens.tolist() == case["prev_sample"]
    for row, (filled, edited) in enumerate(zip(case["transfer"], case["editing"], strict=True)):
        changed = result.transfer_index[row].nonzero()[:, 0].tolist()
        assert changed == sorted(filled + edited)
        assert all(before[row, at] == mask_id for at in filled)


@cases([case for case in STEPS if case["name"].startswith("entropybound")])
def test_entropy_bound_step(case):
    """EntropyBoundScheduler.step: which positions are accepted, at its temperatures."""
    params, logits = case["params"], tensors("steps")["entropy_logits"]
    drawn = unmask_sample_from_logits(
        logits.flatten(0, 1),
        temperature=params["temperature"],
        positions=torch.zeros(logits.shape[0] * logits.shape[1], dtype=torch.int64),
        statistics="sampling",
        return_entropy=True,
    )
    tokens = torch.full(logits.shape[:2], 99)
    entropy = drawn.entropy.view_as(tokens)
    wanted = next(decoders.EntropyBound(gamma=params["entropy_bound"]).options(np.full(len(tokens), 16), 1))
    result = unmask_select(
        tokens,
        drawn.tokens.view_as(tokens),
        -entropy,
        entropy=entropy,
        mask_id=99,
        return_transfer_index=True,
        **wanted,
    )
    assert [row.nonzero()[:, 0].tolist() for row in result.transfer_index] == case["accepted"]


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("decoder", "nfe"),
    [
        (decoders.FastDLLM(block_length=4, threshold=0.5), 1),
        (decoders.Dream(alg="confidence_threshold", threshold=0.5), 1),
        (decoders.BlockRefinement(block_length=4, steps=4, threshold=0.5, edit_threshold=None), 4),
        (decoders.JointThreshold(block_length=4, threshold=0.5, edit_threshold=None), 4),
    ],
)
def test_a_probability_that_is_the_threshold(decoder, nfe):
    """Is enough for Fast-dLLM and Dream, and not for LLaDA2."""

    def even(tokens, positions, cache):
        return torch.tensor([0.0, 0.0, -100.0]).expand(*tokens.shape, 3)

    model = CallableDenoiser(even, vocab_size=3)
    assert generate(model, [], decoder=decoder, max_new_tokens=4, mask_id=2).nfe == nfe


def test_schedules_need_steps_for_every_block():
    network = tiny_network()
    for decoder in (decoders.LLaDA(steps=5, block_length=4), decoders.Dream(steps=5, block_length=4)):
        with pytest.raises(ValueError, match="steps: must be a multiple of the number of blocks, 3, got 5"):
            generate(network, [1], decoder=decoder, max_new_tokens=12)


@pytest.mark.parametrize(
    ("decoder", "options", "message"),
    [
        (decoders.LLaDA, {"steps": 0}, "steps: must be an integer of at least 1, got 0"),
        (decoders.LLaDA, {"steps": True}, "steps: must be an integer of at least 1, got True"),
        (decoders.LLaDA, {"block_length": 0}, "block_length: must be an integer of at least 1 or None, got 0"),
        (decoders.LLaDA, {"remasking": "low"}, "remasking: got 'low', supported are low_confidence, random"),
        (decoders.LLaDA, {"cfg_scale": -1.0}, "cfg_scale: must lie in"),
        (decoders.FastDLLM, {"threshold": 1.5}, "threshold: must lie in"),
        (decoders.FastDLLM, {"factor": -0.5}, "factor: must lie in"),
        (decoders.Dream, {"alg": "topk"}, "alg: got 'topk', supported are origin, maskgit_plus"),
        (decoders.Dream, {"eps": 2.0}, "eps: must lie in"),
        (decoders.Dream, {"alg_temp": -1.0, "alg": "entropy"}, "alg_temp: must lie in"),
        (decoders.Dream, {"alg_temp": 0.5}, "alg_temp: alg 'origin' chooses by itself, got alg_temp 0.5"),
        (decoders.EntropyBound, {"gamma": -0.1}, "gamma: must lie in"),
        (decoders.EntropyBound, {"order": "p"}, "order: got 'p', supported are neg_entropy, prob, margin"),
        (decoders.FirstHitting, {"block_length": 2.0}, "block_length: must be an integer of at least 1 or None"),
        (decoders.BlockRefinement, {"steps": 0}, "steps: must be an integer of at least 1"),
        (decoders.BlockRefinement, {"max_post_steps": -1}, "max_post_steps: must lie in"),
        (decoders.JointThreshold, {"edit_threshold": 2.0}, "edit_threshold: must lie in"),
        (decoders.Delayed, {"interval": 0}, "interval: must be an integer of at least 1, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(decoder, options, message):
    with pytest.raises(ValueError, match=message):
        decoder(**options)
