"""Losses against the golden cases of the published code, and against their own definitions."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from esokern import objectives
from esokern.models.network import FoldedNetwork, Network, NetworkConfig
from esokern.objectives import EsoLMObjective

GOLDENS = Path(__file__).parent / "goldens"
SIZES = json.loads((GOLDENS / "tiny.json").read_text())
CASES = load_file(GOLDENS / "tiny-cases.safetensors")
BD3LM = load_file(GOLDENS / "tiny-bd3lm-cases.safetensors")
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def tiny(name: str = "tiny-weights") -> Network:
    tensors = load_file(GOLDENS / f"{name}.safetensors")
    names = ("vocab_size", "hidden_size", "n_blocks", "n_heads", "length", "cond_dim")
    network = Network(NetworkConfig(**{n: SIZES[n] for n in names}, adaln="sigma_map.mlp.0.bias" in tensors))
    network.load_state_dict(tensors)
    return network.requires_grad_(False).eval()


FOLD = pytest.mark.parametrize("fold", [False, True], ids=["network", "folded"])


def maybe_folded(network: Network, fold: bool) -> Network | FoldedNetwork:
    return network.fold() if fold else network


@FOLD
@pytest.mark.parametrize(("variant", "name"), [("B", "causal"), ("A", "mixed2"), ("mixed", "mixed")])
def test_diffusion_logits_match_goldens(variant, name, fold):
    network = maybe_folded(tiny(), fold)
    logits = objectives.diffusion_logits(network, CASES["zt"], CASES["order"], variant=variant)
    torch.testing.assert_close(logits, CASES[f"diffusion_{name}_logits_natural"], **TOLERANCE)


@FOLD
@pytest.mark.parametrize(("variant", "name"), [("B", "causal"), ("A", "mixed")])
def test_sequential_logits_match_goldens(variant, name, fold):
    network, order = maybe_folded(tiny(), fold), CASES["sequential_order"]
    logits = objectives.sequential_logits(network, CASES["zt"], CASES["x0"], order, variant=variant)
    torch.testing.assert_close(logits, CASES[f"sequential_{name}_logits_natural"], **TOLERANCE)


@FOLD
def test_losses_match_goldens(fold):
    network, x, zt = maybe_folded(tiny(), fold), CASES["x0"], CASES["zt"]
    nll = objectives.esolm_sequential_nll(network, x, zt, CASES["reconstruction_order"])
    torch.testing.assert_close(nll, CASES["reconstruction_loss_natural"], **TOLERANCE)
    nll = objectives.esolm_diffusion_nll(network, x, zt, CASES["order"], CASES["diffusion_t"], 0.5)
    torch.testing.assert_close(nll, CASES["diffusion_nll_natural"], **TOLERANCE)
    logp = objectives.any_order_logp(network, x, CASES["any_order_order"])
    torch.testing.assert_close(logp, CASES["any_order_logp"], **TOLERANCE)


@FOLD
def test_other_models_match_goldens(fold):
    mdlm, ar, bd3lm = (maybe_folded(tiny(f"tiny-{name}-weights"), fold) for name in ("mdlm", "ar", "bd3lm"))
    torch.testing.assert_close(objectives.mdlm_logits(mdlm, CASES["zt"]), CASES["mdlm_logits"], **TOLERANCE)
    bidirectional = objectives.mdlm_logits(tiny(), CASES["zt"])
    torch.testing.assert_close(bidirectional, CASES["diffusion_bidirectional_logits_natural"], **TOLERANCE)
    torch.testing.assert_close(objectives.ar_logits(ar, CASES["x0"]), CASES["ar_logits"], **TOLERANCE)
    logits = objectives.bd3lm_logits(bd3lm, BD3LM["xt"], BD3LM["x0"], SIZES_BD3LM["block_size"])
    torch.testing.assert_close(logits, BD3LM["training_logits"], **TOLERANCE)


SIZES_BD3LM = json.loads((GOLDENS / "tiny-bd3lm.json").read_text())


def log_probabilities(logits: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    logits = logits.double()
    logits[..., -1] = -math.inf
    return logits.log_softmax(-1).gather(-1, x[..., None])[..., 0]


def test_ar_nll_is_the_shifted_cross_entropy():
    network, x = tiny("tiny-ar-weights"), CASES["x0"]
    nll = objectives.ar_nll(network, x)
    expected = -log_probabilities(objectives.ar_logits(network, x)[:, :-1], x[:, 1:])
    assert (nll[:, 0] == 0).all()
    torch.testing.assert_close(nll[:, 1:].double(), expected, **TOLERANCE)


def test_masked_losses_weigh_by_the_schedule():
    """-alpha' / (1 - alpha) = (1 - eps) / ((1 - eps) t) = 1 / t at alpha_0 = 1."""
    network, x, zt = tiny("tiny-mdlm-weights"), CASES["x0"], CASES["zt"]
    t = torch.tensor([0.25, 0.5, 1.0])
    plain = objectives.mdlm_nll(network, x, zt, t, low_var=True)
    expected = torch.where(zt == 52, -log_probabilities(objectives.mdlm_logits(network, zt), x), 0.0)
    torch.testing.assert_close(plain.double(), expected, **TOLERANCE)
    torch.testing.assert_close(objectives.mdlm_nll(network, x, zt, t), plain / t[:, None], **TOLERANCE)

    network, x, zt = tiny("tiny-bd3lm-weights"), BD3LM["x0"], BD3LM["xt"]
    t = torch.linspace(0.1, 1.0, 18).view(3, 6)
    plain = objectives.bd3lm_nll(network, x, zt, t, 4, low_var=True)
    weighted = objectives.bd3lm_nll(network, x, zt, t, 4)
    torch.testing.assert_close(weighted.view(3, 6, 4), plain.view(3, 6, 4) / t[..., None], **TOLERANCE)


def test_the_any_order_likelihood_of_two_tokens_sums_to_one():
    """Over all pairs of tokens, p(first) p(second | first) is a distribution, in either order."""
    torch.manual_seed(0)
    network = Network(NetworkConfig(5, 16, 1, 2, 2, cond_dim=4)).eval().requires_grad_(False)
    torch.nn.init.normal_(network.output_layer.linear.weight)
    pairs = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    for order in ([[0, 1]], [[1, 0]]):
        for dtype, error in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
            logp = objectives.any_order_logp(network.to(dtype), pairs, torch.tensor(order))
            assert logp.dtype == dtype
            assert logp.exp().sum().item() == pytest.approx(1.0, abs=error)


def test_clean_first_order():
    masked = CASES["zt"] == 52
    n_clean = (~masked).sum(1)
    for shuffle_clean in (True, False, torch.tensor([True, False, True])):
        for shuffle_masks in (True, False):
            generator = torch.Generator().manual_seed(1)
            order = objectives.clean_first_order(
                masked, generator, shuffle_clean=shuffle_clean, shuffle_masks=shuffle_masks
            )
            assert (order.sort(-1).values == torch.arange(24)).all()
            assert (masked.gather(1, order) == (torch.arange(24) >= n_clean[:, None])).all()
            for row in range(3):
                kept = bool(torch.as_tensor(shuffle_clean).expand(3)[row])
                clean, masks = order[row, : n_clean[row]], order[row, n_clean[row] :]
                assert bool((clean.diff() > 0).all()) == (not kept)
                assert bool((masks.diff() > 0).all()) == (not shuffle_masks)


def test_noise_schedule_and_times():
    t = torch.tensor([0.0, 0.5, 1.0])
    alpha, derivative = objectives.log_linear(t, 0.5)
    torch.testing.assert_close(alpha, torch.tensor([0.5, 0.5 * (1 - 0.999 / 2), 0.5e-3]))
    torch.testing.assert_close(derivative, torch.full((3,), -0.5 * 0.999))
    t = objectives.antithetic_t(64, torch.Generator().manual_seed(3)).sort().values
    assert t[0] > 0
    assert t[-1] <= 1
    assert (t.diff() < 2 / 64 + 1e-6).all()  # one in every slice


@pytest.mark.parametrize(
    ("settings", "terms"),
    [
        ({"alpha_0": 1.0}, {"diffusion"}),
        ({"alpha_0": 0.0}, {"sequential"}),
        ({"alpha_0": 0.5}, {"diffusion", "sequential"}),
        ({"alpha_0": 0.25, "variant": "A"}, {"diffusion", "sequential"}),
        ({"alpha_0": 0.25, "infill_fraction": 1.0}, {"diffusion", "sequential"}),
    ],
)
def test_training_loss_reaches_every_parameter(settings, terms):
    network = tiny().requires_grad_(True)
    x = CASES["x0"].repeat(2, 1)
    value, parts = objectives.esolm_loss(network, x, EsoLMObjective(**settings), torch.Generator().manual_seed(0))
    assert set(parts) == terms
    torch.testing.assert_close(sum(parts.values()), value)
    value.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_infill_rows_keep_one_span():
    generator = torch.Generator().manual_seed(0)
    objective = EsoLMObjective(alpha_0=0.25, infill_fraction=1.0)
    given, alpha_0, _ = objectives._draw_context(objective, 512, 24, generator)
    inside = ~given
    assert (inside.any(1)).all()
    starts = (inside & ~torch.nn.functional.pad(inside, (1, 0))[:, :-1]).sum(1)
    assert (starts == 1).all()  # contiguous
    assert 0.4 < inside[:, -1].float().mean() < 0.75  # half reach the end by choice, some others by chance
    assert ((alpha_0 >= 0) & (alpha_0 <= 0.25)).all()
    plain = EsoLMObjective(alpha_0=0.25)
    given, alpha_0, shuffle = objectives._draw_context(plain, 8, 24, generator)
    assert not given.any()
    assert (alpha_0 == 0.25).all()
    assert shuffle.all()


def test_bad_settings_name_the_argument():
    with pytest.raises(ValueError, match=r"alpha_0 is 1.5"):
        EsoLMObjective(alpha_0=1.5)
    with pytest.raises(ValueError, match="variant is 'C'"):
        EsoLMObjective(variant="C")
    with pytest.raises(ValueError, match="without rows"):
        objectives.esolm_loss(tiny(), CASES["x0"][:1], EsoLMObjective(alpha_0=0.5))
    with pytest.raises(ValueError, match="variant is 'mixed'"):
        objectives.sequential_logits(tiny(), CASES["zt"], CASES["x0"], CASES["sequential_order"], variant="mixed")
