"""Estimates of every kind of model, rows, and the figures made of them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from esokern import likelihood, nelbo, objectives, perplexity
from esokern.models.network import Network, NetworkConfig
from esokern.perplexity import Estimate, Model, estimates, figures, split_rows

GOLDENS = Path(__file__).parent / "goldens"
X = load_file(GOLDENS / "tiny-cases.safetensors")["x0"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def network():
    sizes = json.loads((GOLDENS / "tiny.json").read_text())
    names = ("vocab_size", "hidden_size", "n_blocks", "n_heads", "length", "cond_dim")
    network = Network(NetworkConfig(**{n: sizes[n] for n in names}))
    network.load_state_dict(load_file(GOLDENS / "tiny-weights.safetensors"))
    return network.eval().fold()


def test_split_rows():
    stream = np.arange(23, dtype=np.int32)
    whole, last = split_rows(stream, 5)
    assert torch.equal(whole, torch.arange(20).view(4, 5))
    assert torch.equal(last, torch.arange(20, 23)[None])
    (whole,) = split_rows(stream.tolist(), 5, 1)
    assert whole.tolist() == [[0, 1, 2, 3, 4]]
    whole, last = split_rows(stream, 5, 3)
    assert whole[:, 0].tolist() == [0, 10]
    assert last.shape == (1, 3)
    assert [group.shape for group in split_rows(stream[:20], 5, 9)] == [(4, 5)]
    assert [group.shape for group in split_rows(stream[:3], 5)] == [(1, 3)]
    with pytest.raises(ValueError, match="the text is empty"):
        split_rows([], 5)


def test_exact_models(network):
    """Those with one order, from left to right; the shorter last row is evaluated at its own length."""
    rows, natural = [X, X[:1, :7]], torch.arange(24)[None]
    for model, one_row in (
        (Model("ar"), lambda x: objectives.ar_nll(network, x).sum(1)),
        (Model("esolm", alpha_0=0.0), lambda x: -objectives.any_order_logp(network, x, natural[:, : x.shape[1]])),
        (Model("esolm", alpha_0=0.0, variant="A"), lambda x: nelbo.esolm_nelbo(network, x, 0.0, variant="A")),
        (Model("bd3lm", block_size=1), lambda x: nelbo.bd3lm_nelbo(network, x, 1)),
    ):
        (exact,) = estimates(network, rows, model, num_orders=3, max_tokens=60)
        assert (exact.kind, exact.samples, exact.label) == ("exact", 1, "exact")
        assert exact.nll.dtype == torch.float64
        torch.testing.assert_close(exact.nll, torch.cat([one_row(x) for x in rows]).double(), atol=1e-4, rtol=1e-5)
        assert not exact.noise.any()


@pytest.mark.parametrize(
    "model",
    [
        Model("esolm", alpha_0=0.5),
        Model("esolm", alpha_0=0.5, variant="A"),
        Model("mdlm"),
        Model("bd3lm", block_size=5),
    ],
)
def test_bounds(network, model):
    """The functions of nelbo and likelihood, called one after the other with one generator."""
    num_orders = 5 if model.has_orders else 0
    assert model.has_orders == (model.variant == "B")
    found = estimates(network, [X], model, draws=3, num_orders=num_orders, seed=7)
    generator = objectives.seeded(7, 0)  # of the first rows
    options = {"generator": generator, "draws": 3}
    draws = {
        "esolm": lambda: nelbo.esolm_nelbo(network, X, 0.5, variant=model.variant, **options),
        "mdlm": lambda: nelbo.mdlm_nelbo(network, X, **options),
        "bd3lm": lambda: nelbo.bd3lm_nelbo(network, X, 5, **options),
    }[model.name]()
    torch.testing.assert_close(found[0].nll, draws.double().mean(1))
    torch.testing.assert_close(found[0].noise, draws.double().std(1) / math.sqrt(3))
    assert [e.label for e in found[:2]] == ["NELBO, 3 draws", "1 order"][: len(found)]
    assert [e.samples for e in found[1:]] == [1, 2, 4, 5] * model.has_orders
    if model.has_orders:
        settings = {"alpha_0": 0.5} if model.name == "esolm" else {"block_size": model.block_size}
        result = likelihood.importance_weighted(network, X, 5, model=model.name, generator=generator, **settings)
        for estimate in found[1:]:
            torch.testing.assert_close(estimate.nll, result.nll(estimate.samples))
            torch.testing.assert_close(estimate.noise, result.standard_error(estimate.samples))
    (alone,) = estimates(network, [X], model, draws=1, num_orders=0)
    assert alone.noise.isnan().all()


def test_figures():
    nll = torch.tensor([10.0, 20.0, 36.0], dtype=torch.float64)
    noise = torch.tensor([0.3, 0.0, 0.4], dtype=torch.float64)
    tokens, sizes = torch.tensor([4, 8, 10]), torch.tensor([10, 20, 25])
    found = figures(Estimate("nelbo", 2, nll, noise), tokens, sizes)
    assert (found["kind"], found["samples"]) == ("nelbo", 2)
    assert found["nats_per_token"] == pytest.approx(3.0)
    assert found["bits_per_byte"] == pytest.approx(66 / 55 / math.log(2))
    assert found["perplexity"] == pytest.approx(math.exp(3.0))
    # Residuals of the ratio: 10 - 12, 20 - 24, 36 - 30.
    rows = math.sqrt((4 + 16 + 36) * 3 / 2) / 22
    assert found["nats_per_token_se_rows"] == pytest.approx(rows)
    assert found["nats_per_token_se_noise"] == pytest.approx(0.5 / 22)
    assert found["bits_per_byte_se_noise"] == pytest.approx(0.5 / 55 / math.log(2))
    assert found["perplexity_se_rows"] == pytest.approx(math.exp(3.0) * rows)
    assert found["perplexity_se_noise"] == pytest.approx(math.exp(3.0) * 0.5 / 22)

    one = figures(Estimate("nelbo", 1, nll[:1], noise[:1] * math.nan), tokens[:1], None)
    missing = {name for name, value in one.items() if value is None}
    assert missing == {name for name in one if "_se_" in name or name.startswith("bits")}
    json.dumps(one, allow_nan=False)


def test_the_error_of_the_rows_is_what_other_rows_would_give():
    """Many texts of rows of one kind: the spread of their figures is the standard error of each."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 50, (4000, 40), generator=generator)
    nll = tokens * (2 + torch.randn(4000, 40, dtype=torch.float64, generator=generator) / 3)
    found = [figures(Estimate("exact", 1, a, torch.zeros_like(a)), b, None) for a, b in zip(nll, tokens, strict=True)]
    spread = np.std([f["nats_per_token"] for f in found])
    assert np.mean([f["nats_per_token_se_rows"] for f in found]) == pytest.approx(spread, rel=0.05)


def test_errors(network):
    for settings, message in (
        ({"name": "gpt"}, "model: got 'gpt', supported are esolm, mdlm, bd3lm, ar"),
        ({"name": "esolm", "alpha_0": 2.0}, r"alpha_0: must lie in \[0, 1\], got 2.0"),
        ({"name": "esolm", "variant": "mixed"}, "variant: got 'mixed', supported are A and B"),
        ({"name": "bd3lm", "block_size": 0}, "block_size: BD3-LM needs one of at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Model(**settings)
    for model, options, message in (
        (Model("mdlm"), {"draws": -1}, "draws and num_orders: must be at least 0, got -1 and 16"),
        (Model("esolm", variant="A"), {}, r"num_orders: Eso-LM \(A\) has no likelihood given an order"),
    ):
        with pytest.raises(ValueError, match=message):
            estimates(network, [X], model, **options)
    with pytest.raises(ValueError, match="rows: an autoregressive model predicts nothing in a row of one token"):
        perplexity.estimates(network, [X, X[:1, :1]], Model("ar"))
