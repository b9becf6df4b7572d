"""esokern.generate: prompts, end of text, callbacks, seeds, corners, and what it refuses."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from decoder_toys import DECODERS, MASK_ID, as_function, tiny_network
from esokern import decoders, generate
from esokern.models.denoiser import CallableDenoiser, NetworkDenoiser

EXAMPLES = {
    page: re.findall(r"```python\n(.*?)```", (Path(__file__).parent.parent / "docs" / page).read_text(), re.DOTALL)
    for page in ("generate.md", "decoders.md")
}


@pytest.fixture(autouse=True)
def _one_thread():
    """Everything here is tiny: more threads only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def network():
    return tiny_network()


LLADA = DECODERS["llada"]


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_prompts_come_in_many_forms(network):
    options = {"decoder": LLADA, "max_new_tokens": 6}
    expected = generate(network, [[1, 2, 3]], **options).tokens
    assert expected.shape == (1, 9)
    for prompt in (
        [1, 2, 3],
        torch.tensor([1, 2, 3]),
        torch.tensor([[1, 2, 3]], dtype=torch.int32),
        np.array([[1, 2, 3]]),
        [torch.tensor([1, 2, 3])],
        ((1, 2, 3),),
    ):
        assert torch.equal(generate(network, prompt, **options).tokens, expected)
    masked = generate(network, [1, 2, 3] + [MASK_ID] * 6, decoder=LLADA).tokens
    assert torch.equal(masked, expected)


def test_result_of_ragged_rows(network):
    result = generate(network, [[1, 2, 3, 4], [], [5]], decoder=LLADA, max_new_tokens=6)
    assert result.lengths.tolist() == [10, 6, 7]
    assert [len(result.row(row)) for row in range(3)] == [10, 6, 7]
    assert result.num_generated == 18
    assert (result.tokens[1, 6:] == MASK_ID).all()
    padded = generate(network, [[1, 2, 3, 4], [], [5]], decoder=LLADA, max_new_tokens=6, eos_id=22)
    assert (padded.tokens[1, 6:] == 22).all()
    assert 0 < result.forward_seconds + result.sampling_seconds <= result.seconds
    assert result.tokens_per_second > 0


def test_a_prompt_is_not_written_to(network):
    prompt = torch.tensor([[1, MASK_ID, 2, MASK_ID]])
    generate(network, prompt, decoder=LLADA)
    assert prompt.tolist() == [[1, MASK_ID, 2, MASK_ID]]


# --- steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*DECODERS, "esolm", "mdlm"])
def test_callback_sees_every_change_once(network, name):
    prompts = [[1, 2, 3], [4, MASK_ID, 6, 7, MASK_ID]]
    text = torch.full((2, 17), MASK_ID)
    for row, prompt in enumerate(prompts):
        text[row, : len(prompt)] = torch.tensor(prompt)
    decode_step, changes, steps = torch.full_like(text, -1), 0, []

    def follow(step):
        nonlocal changes
        steps.append(step.index)
        places = list(zip(step.rows.tolist(), step.positions.tolist(), strict=True))
        assert len(set(places)) == len(places) == len(step.tokens)
        changes += len(places)
        text[step.rows, step.positions] = step.tokens
        decode_step[step.rows, step.positions] = step.index

    decoder = DECODERS.get(name) or {"esolm": decoders.EsoLM(alpha_0=0.5), "mdlm": decoders.MDLM(num_steps=6)}[name]
    result = generate(network, prompts, decoder=decoder, max_new_tokens=12, callback=follow, seed=2)
    assert torch.equal(text, result.tokens)
    assert torch.equal(decode_step, result.decode_step)
    assert len(steps) == result.nfe
    if "refinement" not in name and "joint" not in name:
        assert changes == result.num_generated == 26
    if isinstance(decoder, decoders.Decoder):
        assert steps == list(range(result.nfe))


@pytest.mark.parametrize("decoder", [LLADA, DECODERS["joint_threshold"], decoders.EsoLM()])
def test_progress_counts_tokens(network, decoder, capsys):
    generate(network, [[1, 2, 3], [4]], decoder=decoder, max_new_tokens=6, progress=True)
    assert "12/12" in capsys.readouterr().err
    generate(network, [[1, 2, 3], [4]], decoder=decoder, max_new_tokens=6)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "name", ["llada", "llada guided", "dream margin", "entropy_bound", "fast_dllm", "dream origin"]
)
@pytest.mark.parametrize("head", [True, False])
def test_logprob_is_the_models(network, name, head):
    """The log-softmax of the step's logits without the mask's column, at temperature 1 and before any filter."""
    seen = []

    class Listening(NetworkDenoiser):
        def hidden(self, tokens, positions, step):
            hidden = super().hidden(tokens, positions, step)
            logits = self.network.logits(hidden)
            if name == "llada guided":
                seen.append(2 * logits[:1] - logits[1:])
            else:
                seen.append(logits)
            return hidden if head else logits

    model = Listening(network)
    if not head:
        model.head_weight = model.head_bias = None
    decoder = DECODERS[name]
    result = generate(model, [1, 2, 3], decoder=decoder, max_new_tokens=12, mask_id=MASK_ID, return_logprob=True)
    for position in range(3, 15):
        logits = seen[result.decode_step[0, position]][0, position].double()
        logits[MASK_ID] = -math.inf
        expected = logits.log_softmax(-1)[result.tokens[0, position]].item()
        assert result.logprob[0, position].item() == pytest.approx(expected, abs=1e-4)


def test_without_logprob_there_is_none(network):
    assert generate(network, [1], decoder=LLADA, max_new_tokens=6).logprob is None


# --- seeds and options per row ---------------------------------------------------------------------------------------


def test_seeds(network):
    options = {"decoder": DECODERS["first_hitting"], "max_new_tokens": 10}
    batch = generate(network, [[1], [1], [1]], seed=5, **options).tokens
    assert not torch.equal(batch[0], batch[1])
    assert torch.equal(generate(network, [[1], [1], [1]], seed=[5, 6, 7], **options).tokens, batch)
    assert torch.equal(generate(network, [[1], [1]], seed=torch.tensor([7, 5]), **options).tokens, batch[[2, 0]])
    assert torch.equal(generate(network, [1], seed=6, **options).tokens[0], batch[1])


@pytest.mark.parametrize("kind", [decoders.FastDLLM, decoders.MDLM])
def test_options_per_row(network, kind):
    prompts = [[1, 2], [3, 4, 5], [6, 7]]
    per_row = kind(temperature=[0.0, 1.0, 2.0], top_k=torch.tensor([0, 3, 5]))
    result = generate(network, prompts, decoder=per_row, max_new_tokens=8, seed=9)
    for row, (temperature, top_k) in enumerate(((0.0, None), (1.0, 3), (2.0, 5))):
        decoder = kind(temperature=temperature, top_k=top_k)
        single = generate(network, prompts[row], decoder=decoder, max_new_tokens=8, seed=9 + row)
        assert torch.equal(single.tokens[0], result.row(row))


@pytest.mark.parametrize("decoder", [LLADA, decoders.FirstHitting(), decoders.Dream(steps=6, alg="entropy")])
def test_suppressed_tokens_are_never_drawn(network, decoder):
    options = {"decoder": decoder, "max_new_tokens": 12, "return_logprob": True}
    free = generate(network, [[1, 2]] * 4, **options)
    often = free.tokens[:, 2:].flatten().mode().values.item()
    result = generate(network, [[1, 2]] * 4, suppress_tokens=[often], **options)
    assert often not in result.tokens
    assert torch.isfinite(result.logprob).all()
    calls = CallableDenoiser(as_function(network), vocab_size=24)
    assert often not in generate(calls, [[1, 2]] * 4, suppress_tokens=[often], mask_id=MASK_ID, **options).tokens


# --- end of text -----------------------------------------------------------------------------------------------------

EOS = 9


def sentence(tokens, positions, cache):
    """Token position % 8 at each position, the earlier the surer; EOS at the position that the first token names."""
    wanted = torch.where(positions == tokens[:, :1], EOS, positions % 8)
    return torch.nn.functional.one_hot(wanted, 17) * (12.0 - positions[..., None] / 4)


SENTENCE = CallableDenoiser(sentence, vocab_size=17)


@pytest.mark.parametrize("decoder", [decoders.FastDLLM(block_length=4, threshold=1.0), decoders.LLaDA(steps=12)])
def test_rows_stop_at_the_end_of_text(decoder):
    """The row of the prompt [3] ends at position 3; the others go on, to position 7 and to the end."""
    prompts = [[3], [7, 6], [15, EOS]]
    options = {"decoder": decoder, "max_new_tokens": 12, "mask_id": 16}
    free = generate(SENTENCE, prompts, **options)
    result = generate(SENTENCE, prompts, eos_id=EOS, return_logprob=True, **options)
    assert result.tokens[0].tolist() == [3, 1, 2, EOS] + [EOS] * 10
    assert result.tokens[1].tolist() == [7, 6, 2, 3, 4, 5, 6, EOS] + [EOS] * 6
    assert result.row(2).tolist() == free.row(2).tolist() == [15, EOS] + [position % 8 for position in range(2, 14)]
    assert result.lengths.tolist() == [13, 14, 14]
    assert (result.decode_step[0, 1:4] >= 0).all()
    assert (result.decode_step[0, 4:] == -1).all()
    assert (result.logprob[0, 4:] == 0).all()
    single = generate(SENTENCE, prompts[0], eos_id=EOS, **options)
    assert torch.equal(single.tokens[0], result.tokens[0, :13])
    assert single.nfe == 3
    assert generate(SENTENCE, prompts[0], **options).nfe == 12


def test_an_end_behind_masks_stops_nothing():
    """Positions are filled from the right: the row may stop when what stands before its end is there."""

    def backwards(tokens, positions, cache):
        wanted = torch.where(positions == 3, EOS, positions % 8)
        return torch.nn.functional.one_hot(wanted, 17) * (6.0 + positions[..., None] / 4)

    decoder = decoders.FastDLLM(block_length=4, threshold=1.0)
    model = CallableDenoiser(backwards, vocab_size=17)
    result = generate(model, [5], decoder=decoder, max_new_tokens=12, mask_id=16, eos_id=EOS)
    assert result.tokens[0].tolist() == [5, 1, 2, EOS] + [EOS] * 9
    assert result.nfe == 4  # its whole block, and no other


@pytest.mark.parametrize("native", [decoders.EsoLM(), decoders.MDLM(num_steps=8)])
def test_native_decoders_cut_at_the_end_of_text(network, native):
    free = generate(network, [1], decoder=native, max_new_tokens=16)
    eos = free.tokens[0, 8].item()
    first = free.tokens[0, 1:].tolist().index(eos) + 1
    result = generate(network, [1], decoder=native, max_new_tokens=16, eos_id=eos)
    assert result.tokens[0, : first + 1].tolist() == free.tokens[0, : first + 1].tolist()
    assert (result.tokens[0, first:] == eos).all()


# --- corners ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("cache", [None, "dual"])
def test_corners(name, cache):
    """Mask 0, one token besides it, texts of one token, rows that are complete, windows without masks."""
    vocab = {"vocab_size": 2, "new_cache": None}
    model = CallableDenoiser(lambda tokens, positions, step: torch.zeros(*tokens.shape, 2), **vocab)
    if cache is not None:
        toy = tiny_network()
        model = NetworkDenoiser(toy)
    other = 1
    prompts = [[0], [other, 0, other, 0], [other, other, other], [0] * 7 + [other] * 8 + [0, 0]]
    result = generate(model, prompts, decoder=DECODERS[name], cache=cache, mask_id=0)
    for row, prompt in enumerate(prompts):
        given = torch.tensor(prompt) != 0
        assert (result.row(row) != 0).all()
        assert torch.equal(result.row(row)[given], torch.tensor(prompt)[given])
        assert torch.equal(result.decode_step[row, : len(prompt)] >= 0, ~given)
    if cache is None:
        assert all((result.row(row) == 1).all() for row in range(4))


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.LLaDA(steps=12, block_length=1),
        decoders.JointThreshold(block_length=1),
        decoders.FastDLLM(block_length=1),
    ],
)
def test_blocks_of_one_token_go_from_left_to_right(network, decoder):
    result = generate(network, [[1, 2], [3, 4]], decoder=decoder, max_new_tokens=12, cache="prefix")
    assert (result.decode_step[:, 2:].diff() > 0).all()


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("bad", ["all", "one row", "later"])
def test_a_model_that_returns_nan_ends_in_an_error(network, name, bad):
    plain, calls = as_function(network), 0

    def function(tokens, positions, cache):
        nonlocal calls
        calls += 1
        logits = plain(tokens, positions, cache)
        rows = {"all": slice(None), "one row": tokens[:, 0] == 2, "later": slice(0, calls > 2)}[bad]
        logits[rows] = math.nan
        return logits

    model = CallableDenoiser(function, vocab_size=24)
    with pytest.raises(RuntimeError, match=r"no token could be drawn at .* positions, first at row"):
        generate(model, [[1], [2]], decoder=DECODERS[name], max_new_tokens=12, mask_id=MASK_ID)
    assert calls < 60


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"cache": "exact"}, ValueError, "cache: LLaDA decodes a bidirectional model, in which every key and value"),
        ({"cache": "dula"}, ValueError, "cache: got 'dula', supported are None, \"none\", \"exact\", 'prefix', 'dual'"),
        ({"cache": 3}, ValueError, "cache: got 3, supported are"),
        ({"cache": "delayed", "decoder": decoders.JointThreshold()}, ValueError, "JointThreshold edits tokens, which"),
        ({"report_divergence": True}, ValueError, "report_divergence: without an approximate cache nothing diverges"),
        ({"decoder": "llada"}, TypeError, "decoder: must be one of esokern.decoders, got str"),
        ({"decoder": decoders.LLaDA}, TypeError, "decoder: must be one of esokern.decoders, got type"),
        ({"mask_id": 24}, ValueError, r"mask_id: must lie in the vocabulary, \[0, 24\), got 24"),
        ({"mask_id": -1}, ValueError, "mask_id: must be an id of the vocabulary, got -1"),
        ({"mask_id": True}, ValueError, "mask_id: must be an id of the vocabulary, got True"),
        ({"eos_id": MASK_ID}, ValueError, "eos_id: must be an id of the vocabulary other than mask_id, got 23"),
        ({"eos_id": -1}, ValueError, "eos_id: must be an id of the vocabulary"),
        ({"eos_id": 2.0}, ValueError, "eos_id: must be an id of the vocabulary"),
        ({"max_new_tokens": None}, ValueError, "prompt: has no mask_id 23 to replace; pass max_new_tokens"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens: must be an integer of at least 1"),
        ({"max_new_tokens": 2.0}, ValueError, "max_new_tokens: must be an integer of at least 1"),
        ({"prompt": [1, 24]}, ValueError, r"prompt: ids must lie in \[0, 24\), got 24"),
        ({"prompt": [-1]}, ValueError, r"prompt: ids must lie in \[0, 24\), got -1"),
        ({"prompt": [0.5]}, ValueError, "prompt: must be integer rows of token ids, got torch.float32"),
        ({"prompt": torch.zeros(1, 2, 3, dtype=torch.int64)}, ValueError, "prompt: must be integer rows of token ids"),
        ({"prompt": torch.tensor(3)}, ValueError, "prompt: must be integer rows of token ids"),
        ({"prompt": torch.zeros(0, 4, dtype=torch.int64)}, ValueError, "prompt: has no row"),
        ({"prompt": "hello"}, TypeError, "prompt: must be token ids, got the string 'hello'"),
        ({"prompt": [[], [1]], "max_new_tokens": None}, ValueError, "prompt: a row is empty; pass max_new_tokens"),
        ({"seed": 0.5}, TypeError, "seed: must be an integer"),
        ({"seed": True}, TypeError, "seed: must be an integer"),
        ({"seed": [0.5]}, TypeError, "float"),
        ({"seed": [1, 2]}, ValueError, "seed: one per row is needed, got 2 for a batch of 1"),
        ({"seed": [-1]}, ValueError, "seed: must lie in"),
        (
            {"decoder": decoders.LLaDA(temperature=[1.0, 2.0])},
            ValueError,
            r"temperature: must be a number or \[batch\]",
        ),
        ({"decoder": decoders.MDLM(top_k=[1, 2])}, ValueError, r"top_k: must be a number or \[batch\]"),
        ({"suppress_tokens": [24]}, ValueError, r"suppress_tokens: ids must lie in \[0, 24\), got \[24\]"),
        ({"decoder": decoders.EsoLM(), "suppress_tokens": [1]}, ValueError, "suppress_tokens: EsoLM cannot"),
        (
            {"decoder": decoders.EsoLM(), "cache": "prefix"},
            ValueError,
            "cache: EsoLM has an exact cache of its own, got",
        ),
        (
            {"decoder": decoders.MDLM(), "cache": "prefix"},
            ValueError,
            "cache: MDLM computes every step anew, got 'prefix'",
        ),
        ({"decoder": decoders.MDLM(), "cache": "exact"}, ValueError, "cache: MDLM decodes a bidirectional model"),
        (
            {"decoder": decoders.EsoLM(), "report_divergence": True},
            ValueError,
            "report_divergence: EsoLM has no approxi",
        ),
        ({"decoder": decoders.EsoLM(), "mask_id": 5}, ValueError, "mask_id: the network's is 23, got 5"),
        ({"max_new_tokens": 60}, ValueError, "prompt: 62 tokens, new ones included, exceed the network's length, 48"),
    ],
)
def test_refusals(network, options, error, message):
    options = {"prompt": [1, 2], "max_new_tokens": 4, "decoder": LLADA} | options
    with pytest.raises(error, match=message):
        generate(network, options.pop("prompt"), **options)


def test_refusals_of_other_models(network):
    function = as_function(network)
    model = CallableDenoiser(function, vocab_size=24)
    options = {"max_new_tokens": 4, "mask_id": MASK_ID, "decoder": LLADA}
    with pytest.raises(ValueError, match="mask_id: needed, the model's config names none"):
        generate(model, [1], max_new_tokens=4)
    with pytest.raises(TypeError, match="decoder: EsoLM needs a network of this package"):
        generate(model, [1], **options | {"decoder": decoders.EsoLM()})
    with pytest.raises(ValueError, match=r"cache: this model cannot use one, got Dual\(\)"):
        generate(model, [1], cache="dual", **options)
    with pytest.raises(TypeError, match=r"model: must be a network of this package, .* got int"):
        generate(3, [1], **options)
    capped = CallableDenoiser(function, vocab_size=24, logit_softcap=5.0)
    with pytest.raises(ValueError, match="decoder: guidance needs a linear LM head"):
        generate(capped, [1], **options | {"decoder": decoders.LLaDA(cfg_scale=1.0)})
    with pytest.raises(ValueError, match="suppress_tokens: need logits of -inf, but this model caps"):
        generate(capped, [1], suppress_tokens=[2], **options)
    with pytest.raises(
        ValueError, match=r"model: must return a tensor \[1, 5, 24\] for tokens \[1, 5\], got \[1, 24\]"
    ):
        generate(CallableDenoiser(lambda *step: function(*step)[:, 0], vocab_size=24), [1], **options)
    with pytest.raises(ValueError, match=r"model: must return a tensor .* got tuple"):
        generate(CallableDenoiser(lambda *step: (function(*step),), vocab_size=24), [1], **options)
    shifted = NetworkDenoiser(network)
    shifted.shift = True
    with pytest.raises(ValueError, match="cache: JointThreshold edits a block's first token"):
        generate(shifted, [1], cache="dual", **options | {"decoder": decoders.JointThreshold()})


# --- pages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", EXAMPLES)
def test_examples_of_the_pages(page):
    assert EXAMPLES[page]
    for number, code in enumerate(EXAMPLES[page]):
        assert len(code.splitlines()) <= 20
        exec(compile(code, f"{page}, example {number + 1}", "exec"), {})


def test_a_plain_function():
    """tokens, positions, cache -> logits: handed over as it is, it does what a denoiser of it does."""
    table = torch.randn(7, 7, generator=torch.Generator().manual_seed(0))
    shapes = []

    def function(tokens, positions, cache):
        assert cache is None
        assert tokens.shape == positions.shape
        shapes.append(tuple(tokens.shape))
        return table[tokens] + positions[..., None] % 3

    options = {"decoder": decoders.LLaDA(steps=4), "max_new_tokens": 4, "mask_id": 6}
    result = generate(function, [[1, 2, 3], [4]], **options)
    assert shapes[0] == (1, 7)  # to see the vocabulary
    expected = generate(CallableDenoiser(function, vocab_size=7), [[1, 2, 3], [4]], **options)
    assert torch.equal(result.tokens, expected.tokens)
    assert result.nfe == expected.nfe == 4
    for wrong, got in ((lambda *args: args[0], r"\[1, 5\]"), (lambda *args: None, "NoneType")):
        with pytest.raises(ValueError, match=rf"model: must return a tensor \[1, 5, vocab\] for tokens .*, got {got}"):
            generate(wrong, [4], **options)
