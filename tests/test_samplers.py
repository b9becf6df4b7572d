"""Samplers: cached = recomputed, batch = single runs, given tokens stay, and the published samplers' logits."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from esokern.models.network import Network, NetworkConfig
from esokern.samplers import autoregressive, bd3lm, esolm, mdlm, run
from esokern.samplers.schedule import Schedule, block_schedule

GOLDENS = Path(__file__).parent / "goldens"
SIZES = json.loads((GOLDENS / "tiny.json").read_text())
LENGTH, MASK = SIZES["length"], SIZES["mask_index"]


def golden_network(weights, adaln=True):
    config = NetworkConfig(
        vocab_size=SIZES["vocab_size"],
        hidden_size=SIZES["hidden_size"],
        n_blocks=SIZES["n_blocks"],
        n_heads=SIZES["n_heads"],
        length=LENGTH,
        cond_dim=SIZES["cond_dim"],
        adaln=adaln,
    )
    network = Network(config)
    network.load_state_dict(load_file(GOLDENS / f"{weights}.safetensors"))
    folded = network.fold()
    folded.linear = "fused"  # with rows that are the same bits in every batch, on a GPU too
    return folded


@pytest.fixture(autouse=True)
def _one_thread():
    """Everything here is tiny: more threads only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def network():
    return golden_network("tiny-weights")


@pytest.fixture(scope="module")
def cases():
    return load_file(GOLDENS / "tiny-cases.safetensors")


def prompts():
    """int64 [4, LENGTH]: a prompt, a text with a gap, scattered tokens, nothing given; different numbers of masks."""
    tokens = torch.randint(0, MASK, (4, LENGTH), generator=torch.Generator().manual_seed(0))
    tokens[0, 5:] = MASK
    tokens[1, 4:20] = MASK
    tokens[2, 1::2] = MASK
    tokens[3] = MASK
    return tokens


SAMPLERS = {
    "esolm-diffusion": lambda *a, **k: esolm.generate(*a, num_steps=5, **k),
    "esolm-both": lambda *a, **k: esolm.generate(*a, alpha_0=0.5, num_steps=3, **k),
    "esolm-sequential": lambda *a, **k: esolm.generate(*a, alpha_0=0.0, num_steps=1, **k),
    "esolm-one-by-one": lambda *a, **k: esolm.generate(*a, num_steps=math.inf, **k),
    "esolm-independent": lambda *a, **k: esolm.generate(*a, alpha_0=0.6, num_steps=4, chunk_mask="independent", **k),
    "bd3lm-4": lambda *a, **k: bd3lm.generate(*a, block_size=4, num_steps=2, **k),
    "bd3lm-5": lambda *a, **k: bd3lm.generate(*a, block_size=5, num_steps=math.inf, **k),
    "bd3lm-1": lambda *a, **k: bd3lm.generate(*a, block_size=1, num_steps=1, **k),
    "autoregressive": lambda *a, **k: autoregressive.generate(*a, start_token=3, **k),
}
ALL = {**SAMPLERS, "mdlm": lambda *a, **k: mdlm.generate(*a, num_steps=4, **k)}


@pytest.mark.parametrize("name", SAMPLERS)
def test_cached_equals_recomputed(network, backend, name):
    """Token for token, on rows with equally many masks and on ragged ones, drawn and filtered."""
    for tokens, options in ((None, {"batch": 2, "length": LENGTH}), (prompts(), {"top_p": 0.9, "temperature": 0.7})):
        cached, recomputed = (
            SAMPLERS[name](network, tokens, seed=11, cached=way, backend=backend, return_logprob=True, **options)
            for way in (True, False)
        )
        assert torch.equal(cached.tokens, recomputed.tokens)
        assert torch.equal(cached.decode_step, recomputed.decode_step)
        assert cached.nfe == recomputed.nfe
        torch.testing.assert_close(cached.logprob, recomputed.logprob, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ALL)
def test_back_ends_draw_the_same(network, backend, name):
    options = {"seed": 5, "min_p": 0.02}
    expected = ALL[name](network, prompts(), backend="reference", **options)
    assert torch.equal(ALL[name](network, prompts(), backend=backend, **options).tokens, expected.tokens)


@pytest.mark.parametrize("name", ALL)
def test_a_batch_is_as_many_single_runs(network, backend, name):
    """Bitwise, log-probabilities included: a row does not depend on what else is in the batch."""
    tokens, seeds = prompts(), [7, 3, 9, 7]
    shared = {"schedule_seed": 1} if name.startswith("esolm") else {}
    whole = ALL[name](network, tokens, seed=seeds, return_logprob=True, backend=backend, **shared)
    for row, seed in enumerate(seeds):
        alone = ALL[name](network, tokens[row], seed=seed, return_logprob=True, backend=backend, **shared)
        assert torch.equal(alone.tokens[0], whole.tokens[row])
        if backend != "reference":  # torch's own matmul depends on the number of rows
            assert torch.equal(alone.logprob[0], whole.logprob[row])


@pytest.mark.parametrize("name", ALL)
def test_results(network, name):
    """Given tokens stay, no mask is left, the callback sees every token once, in the order of decode_step."""
    tokens, seen = prompts(), []
    result = ALL[name](network, tokens, seed=2, callback=seen.append)
    start = torch.where(torch.arange(LENGTH) == 0, torch.where(tokens == MASK, 3, tokens), tokens)
    given = (start if name == "autoregressive" else tokens) != MASK
    assert torch.equal(result.tokens[given], (start if name == "autoregressive" else tokens)[given])
    assert torch.equal(result.decode_step == -1, given)
    assert ((result.tokens >= 0) & (result.tokens < MASK)).all()
    assert [step.index for step in seen] == list(range(len(seen)))
    for step in seen:
        assert torch.equal(result.tokens[step.rows, step.positions], step.tokens)
        assert (result.decode_step[step.rows, step.positions] == step.index).all()
    assert sum(len(step.tokens) for step in seen) == result.num_generated == int((~given).sum())
    assert result.nfe == len(seen) == int(result.decode_step.max()) + 1
    assert result.seconds >= result.forward_seconds + result.sampling_seconds > 0
    assert result.tokens_per_second == pytest.approx(result.num_generated / result.seconds)
    result.tokens[0, 0] = 1  # ordinary tensors, not inference tensors


@pytest.mark.parametrize("name", ALL)
def test_nothing_to_generate(network, name):
    tokens = prompts()[:2].clamp(max=MASK - 1)
    result = ALL[name](network, tokens)
    assert torch.equal(result.tokens, tokens)
    assert result.nfe == 0


def test_stopwatch(monkeypatch):
    """On a GPU the spans are read from events, and nothing waits before the end. Stand-ins for the events here."""
    ticks, waits = iter(range(0, 100, 5)), []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            self.milliseconds = next(ticks)

        def synchronize(self):
            waits.append(self.milliseconds)

        def elapsed_time(self, end):
            return end.milliseconds - self.milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    watch = run.Stopwatch(torch.device("cuda"))
    assert watch.seconds() == 0
    for _ in range(3):
        with watch:
            pass
    assert not waits
    assert watch.seconds() == pytest.approx(0.015)
    assert waits == [25]
    watch = run.Stopwatch(torch.device("cpu"))
    with watch:
        pass
    assert 0 < watch.seconds() < 1


def test_phases(network):
    phases = []
    steps = [(5, 1), (2,), (0,), (3,), (4,)]
    esolm.generate(
        network, length=6, schedule=Schedule.from_steps([steps], [2]), callback=lambda s: phases.append(s.phase)
    )
    assert phases == ["diffusion", "diffusion", "sequential", "sequential", "sequential"]
    phases.clear()
    ragged = Schedule.from_steps([[(1,), (2,)], [(2,), (0,), (1,)]], [1, 2])
    tokens = torch.tensor([[4, MASK, MASK], [MASK, MASK, MASK]])
    esolm.generate(network, tokens, schedule=ragged, callback=lambda s: phases.append(s.phase))
    assert phases == ["diffusion", "mixed", "sequential"]


def test_number_of_evaluations(network):
    """NFE = L for one position at a time in all samplers; two forwards of a token at most otherwise."""
    options = {"length": LENGTH}
    assert esolm.generate(network, num_steps=math.inf, **options).nfe == LENGTH
    assert mdlm.generate(network, num_steps=math.inf, **options).nfe == LENGTH
    assert bd3lm.generate(network, num_steps=math.inf, **options).nfe == LENGTH
    assert autoregressive.generate(network, **options).nfe == LENGTH - 1
    assert esolm.generate(network, num_steps=1, **options).nfe == 1
    assert bd3lm.generate(network, num_steps=1, block_size=8, **options).nfe == LENGTH // 8
    blocks = block_schedule(torch.ones(1, LENGTH, dtype=torch.bool), num_steps=6)
    assert esolm.generate(network, schedule=blocks, **options).nfe == 6


def test_seeds_and_options(network):
    first, second = (esolm.generate(network, length=LENGTH, batch=2, seed=seed).tokens for seed in (0, 1))
    assert torch.equal(first[1], esolm.generate(network, length=LENGTH, seed=1, schedule_seed=0).tokens[0])
    assert not torch.equal(first, second)
    greedy = esolm.generate(network, prompts()[:1], batch=3, temperature=0.0, seed=[4, 4, 4]).tokens
    assert torch.equal(greedy[0], greedy[1])
    top_1 = esolm.generate(network, prompts()[:1], top_k=1, seed=4).tokens
    assert torch.equal(greedy[:1], top_1)
    rows = esolm.generate(network, prompts()[:1], batch=2, temperature=[0.0, 1.0], seed=[4, 4]).tokens
    assert torch.equal(rows[0], greedy[0])
    assert torch.equal(rows[1], esolm.generate(network, prompts()[0], seed=4).tokens[0])


class TeacherForcing:
    """Stands in for `Run.draw`: keeps the logits of each position and gives it the token of the golden text."""

    def __init__(self, monkeypatch, text):
        self.logits = torch.full((*text.shape, SIZES["vocab_size"]), math.nan)

        def draw(run, hidden, rows, positions):
            self.logits[rows, positions] = run.network.logits(hidden, run.backend)
            return text[rows, positions]

        monkeypatch.setattr(run.Run, "draw", draw)


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "recomputed"])
def test_published_esolm_sampler(network, cases, backend, cached, monkeypatch):
    forced = TeacherForcing(monkeypatch, cases["x0"])
    order, counts = cases["sampling_order"], cases["sampling_ks"].tolist()
    steps = [[part.tolist() for part in row.split(counts)] for row in order]
    schedule = Schedule.from_steps(steps, [0] * len(steps))
    result = esolm.generate(network, length=LENGTH, batch=3, schedule=schedule, cached=cached, backend=backend)
    assert torch.equal(result.tokens, cases["x0"])
    by_rank = forced.logits.gather(1, order[..., None].expand_as(forced.logits))
    expected = cases["sampling_logits_generation_order"]
    torch.testing.assert_close(by_rank[..., :MASK], expected[..., :MASK], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "recomputed"])
def test_published_bd3lm_sampler(backend, cached, monkeypatch):
    """One evaluation per block on the golden x_t: the golden logits are those of x_t given the clean blocks before."""
    block_size = json.loads((GOLDENS / "tiny-bd3lm.json").read_text())["block_size"]
    golden = load_file(GOLDENS / "tiny-bd3lm-cases.safetensors")
    forced = TeacherForcing(monkeypatch, golden["x0"])
    network = golden_network("tiny-bd3lm-weights")
    masked = golden["xt"] == MASK
    bd3lm.generate(network, golden["xt"], block_size=block_size, num_steps=1, cached=cached, backend=backend)
    expected = golden["cached_sampling_logits"]
    torch.testing.assert_close(forced.logits[masked][:, :MASK], expected[masked][:, :MASK], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "recomputed"])
def test_published_autoregressive_sampler(cases, backend, cached, monkeypatch):
    text = cases["x0"]
    forced = TeacherForcing(monkeypatch, text)
    network = golden_network("tiny-ar-weights", adaln=False)
    autoregressive.generate(network, text[:, :1], length=LENGTH, cached=cached, backend=backend)
    expected = cases["ar_logits"][:, :-1]
    torch.testing.assert_close(forced.logits[:, 1:, :MASK], expected[..., :MASK], atol=1e-5, rtol=1e-5)


def test_published_mdlm_network(cases, backend, monkeypatch):
    forced = TeacherForcing(monkeypatch, cases["x0"])
    tokens = cases["zt"]
    mdlm.generate(golden_network("tiny-mdlm-weights"), tokens, num_steps=1, backend=backend)
    masked = tokens == MASK
    expected = cases["mdlm_logits"][masked]
    torch.testing.assert_close(forced.logits[masked][:, :MASK], expected[:, :MASK], atol=1e-5, rtol=1e-5)


def test_log_probabilities_are_those_of_the_model(network, backend, monkeypatch):
    """At temperature 1 and without filters, whatever the draw used; of the logits that the sampler saw."""
    tokens = prompts()[:2]
    options = {"alpha_0": 0.5, "num_steps": 3, "backend": backend}
    result = esolm.generate(network, tokens, temperature=0.5, top_p=0.8, return_logprob=True, **options)
    forced = TeacherForcing(monkeypatch, result.tokens)
    esolm.generate(network, tokens, **options)
    expected = forced.logits[..., :MASK].log_softmax(-1).gather(-1, result.tokens[..., None])[..., 0]
    masked = tokens == MASK
    torch.testing.assert_close(result.logprob[masked], expected[masked], atol=1e-5, rtol=1e-5)
    assert not result.logprob[~masked].any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha_0": -0.1}, "alpha_0: must lie in"),
        ({"num_steps": 0}, "num_steps: must be"),
        ({"length": LENGTH + 1}, f"length: {LENGTH + 1} is beyond the network's length {LENGTH}"),
        ({"length": 0}, "length: must be an integer of at least 1"),
        ({"length": None}, "length: needed when no tokens are given"),
        ({"tokens": [0, MASK + 1]}, r"tokens: ids must lie in \[0, 53\), 52 meaning 'generate here'"),
        ({"tokens": [-1, 2]}, "tokens: ids must lie in"),
        ({"tokens": [1] * 9, "length": 8}, "tokens: 9 of them do not fit into length 8"),
        ({"tokens": [[[1]]]}, r"tokens: must be \[length\] or \[batch, length\]"),
        ({"tokens": [[1], [2]], "batch": 3}, "batch: tokens have 2 rows, batch is 3"),
        ({"batch": 0}, "batch: must be an integer of at least 1"),
        ({"seed": [1, 2]}, "seed: one per row is needed, got 2 for a batch of 1"),
        ({"seed": [-1]}, "seed: must lie in"),
        ({"chunk_mask": "both"}, "chunk_mask: got 'both', supported are 'causal', 'independent'"),
        ({"temperature": [1.0, 2.0]}, r"temperature: must be a number or \[batch\] = \[1\]"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"schedule": Schedule.from_steps([[(0,)]], [1])}, "schedule: row 0 must decode exactly its masked positions"),
        ({"backend": "abacus"}, "backend"),
    ],
)
def test_errors(network, arguments, message):
    with pytest.raises(ValueError, match=message):
        esolm.generate(network, **{"length": LENGTH, **arguments})


def test_errors_of_the_other_samplers(network):
    with pytest.raises(TypeError, match="tokens: must be int64 or int32"):
        mdlm.generate(network, torch.zeros(1, 4))
    with pytest.raises(TypeError, match="seed: must be an integer"):
        mdlm.generate(network, length=4, seed=1.5)
    with pytest.raises(ValueError, match="block_size"):
        bd3lm.generate(network, length=4, block_size=0)
    with pytest.raises(ValueError, match=r"start_token: must be an id in \[0, 52\)"):
        autoregressive.generate(network, length=4, start_token=MASK)


def test_a_network_that_returns_nan_is_reported(network, monkeypatch):
    monkeypatch.setattr(network, "head_bias", torch.full_like(network.head_bias, math.nan))
    with pytest.raises(RuntimeError, match="no token could be drawn at 4 positions, first at row 0, position 0"):
        esolm.generate(network, length=4, num_steps=1)
