"""Variational bounds against closed forms, on models small enough to enumerate every mask set and every order.

The reference here knows no 2L masks and no kernels: it forwards the tokens that the definition names, one context at a
time, under a dense mask.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from esokern import likelihood, nelbo, objectives
from esokern.models.network import Network, NetworkConfig

LENGTH, VOCAB = 4, 3  # 81 texts, 24 orders
MASK = VOCAB
TEXTS = torch.tensor(list(itertools.product(range(VOCAB), repeat=LENGTH)))
ORDERS = list(itertools.permutations(range(LENGTH)))


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def network():
    """Trained for a moment on texts of equal tokens, so that what a mask costs depends on how many others there are."""
    torch.manual_seed(3)
    network = Network(NetworkConfig(VOCAB + 1, 16, 2, 2, LENGTH, cond_dim=4))
    for parameter in network.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(60):
        x = torch.randint(0, VOCAB, (32, 1)).expand(-1, LENGTH).contiguous()
        x = torch.where(torch.rand(x.shape) < 0.2, torch.randint(0, VOCAB, x.shape), x)
        t = objectives.antithetic_t(32)
        zt = objectives.mask_tokens(x, 1 - t, MASK)
        loss, _ = objectives.esolm_loss(network, x, objectives.EsoLMObjective(alpha_0=0.5))
        (loss + objectives.mdlm_nll(network, x, zt, t, low_var=True).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return network.eval().requires_grad_(False)


def logp_of_texts(network, tokens, positions, visible):
    """float64 [81, S]: log p of the text's token at each of `positions`, from the rows `tokens` [81, S]."""
    logits = network(tokens, torch.as_tensor(positions), visible).double()
    logits[..., MASK] = -math.inf
    return logits.log_softmax(-1).gather(-1, TEXTS[:, positions][..., None])[..., 0]


@functools.cache
def esolm_logp(network, order, num_clean, variant):
    """float64 [81, masks]: the diffusion phase with the first num_clean of `order` clean."""
    order = list(order)
    rank = torch.arange(LENGTH)
    visible = rank[:, None] >= rank
    if variant == "A":
        visible = visible | (rank < num_clean)  # clean tokens see each other; masks see them anyway
    tokens = torch.where(rank < num_clean, TEXTS[:, order], MASK)
    return logp_of_texts(network, tokens, order, visible)[:, num_clean:]


@functools.cache
def sequential_logp(network, clean, variant):
    """float64 [81]: tokens outside `clean` from left to right, one forward each of [clean | decoded | mask]."""
    total = torch.zeros(len(TEXTS), dtype=torch.float64)
    order = list(clean)
    for position in [p for p in range(LENGTH) if p not in clean]:
        order.append(position)
        rank = torch.arange(len(order))
        visible = rank[:, None] >= rank
        if variant == "A":
            visible = visible | (rank < len(clean))
        tokens = TEXTS[:, order].clone()
        tokens[:, -1] = MASK
        total += logp_of_texts(network, tokens, order, visible)[:, -1]
    return total


def cross_entropies(logp_of_set):
    """float64 [81, L + 1]: mean over the sets M of m masks of the summed nats at M."""
    sums = torch.zeros(len(TEXTS), LENGTH + 1, dtype=torch.float64)
    for m in range(1, LENGTH + 1):
        sets = list(itertools.combinations(range(LENGTH), m))
        sums[:, m] = -sum(logp_of_set(masked) for masked in sets) / len(sets)
    return sums


@functools.cache
def esolm_sums(network, variant):
    """cross_entropies of the diffusion phase, averaged over the orders that put clean tokens first."""
    sums = torch.zeros(len(TEXTS), LENGTH + 1, dtype=torch.float64)
    for order, m in itertools.product(ORDERS, range(1, LENGTH + 1)):
        sums[:, m] -= esolm_logp(network, order, LENGTH - m, variant).sum(1) / len(ORDERS)
    return sums


def integral(sums, alpha_0, low=0.0, high=1.0, eps=0.0):
    """The diffusion term of eq. 7 over t in [low, high], alpha_t = alpha_0 (1 - (1 - eps) t), by Gauss-Legendre: exact,
    as the integrand is a polynomial."""
    length = sums.shape[1] - 1
    nodes, weights = np.polynomial.legendre.leggauss(2 * length)
    total = 0
    for t, weight in zip(low + (high - low) * (nodes + 1) / 2, (high - low) * weights / 2, strict=True):
        alpha = alpha_0 * (1 - (1 - eps) * t)
        chance = [math.comb(length, m) * (1 - alpha) ** m * alpha ** (length - m) for m in range(length + 1)]
        total = total + weight * alpha_0 * (1 - eps) / (1 - alpha) * (sums @ torch.tensor(chance, dtype=torch.float64))
    return total


def sequential_terms(network, alpha_0, variant):
    """Probability of every set C of clean tokens, and log p [81] of the others for every order of C."""
    for size in range(LENGTH + 1):
        for clean in itertools.combinations(range(LENGTH), size):
            chance = alpha_0**size * (1 - alpha_0) ** (LENGTH - size)
            yield clean, chance, [sequential_logp(network, order, variant) for order in itertools.permutations(clean)]


def check_draws(draws, exact):
    """draws [texts, n]: their mean is `exact`, within what their spread allows, and it allows little."""
    error = draws.std(1) / math.sqrt(draws.shape[1])
    assert (error < 0.03 * exact).all()
    assert ((draws.mean(1) - exact).abs() < 4.5 * error + 1e-5).all()


FEW = [0, 24, 40, 77]  # texts, two of them of equal tokens


@pytest.mark.parametrize("variant", ["A", "B"])
@pytest.mark.parametrize("alpha_0", [0.0, 0.3, 0.8, 1.0])
def test_esolm(network, alpha_0, variant):
    exact = integral(esolm_sums(network, variant), alpha_0)
    for _, chance, logps in sequential_terms(network, alpha_0, variant):
        exact = exact - chance * sum(logps) / len(logps)
    generator = torch.Generator().manual_seed(0)
    draws = nelbo.esolm_nelbo(network, TEXTS[FEW], alpha_0, generator, variant=variant, draws=3000)
    check_draws(draws.double(), exact[FEW])


def likelihood_with_reshuffling(network, alpha_0, variant):
    """float64 [81]: p(x) of the process that the NELBO bounds. Before every token the orders of clean tokens
    and of masks are drawn anew; the sequential phase keeps one order of the clean tokens.
    """
    step = {}  # p(x_i | clean set), averaged over orders
    for order, num_clean in itertools.product(ORDERS, range(LENGTH)):
        clean, masks = frozenset(order[:num_clean]), order[num_clean:]
        for i, logp in zip(masks, esolm_logp(network, order, num_clean, variant).T, strict=True):
            step.setdefault((clean, i), []).append(logp.exp())
    step = {key: sum(values) / len(values) for key, values in step.items()}
    total = 0
    for clean, chance, logps in sequential_terms(network, alpha_0, variant):
        paths = [
            math.prod(step[frozenset(path[:k]), i] for k, i in enumerate(path))
            for path in itertools.permutations(clean)
        ]
        total = total + chance * sum(paths) / len(paths) * sum(logp.exp() for logp in logps) / len(logps)
    return total


@pytest.mark.parametrize("variant", ["A", "B"])
@pytest.mark.parametrize("alpha_0", [0.0, 0.4, 1.0])
def test_esolm_bounds_a_likelihood(network, alpha_0, variant):
    likelihood = likelihood_with_reshuffling(network, alpha_0, variant)
    assert likelihood.sum().item() == pytest.approx(1, abs=1e-6)
    exact = integral(esolm_sums(network, variant), alpha_0)
    for _, chance, logps in sequential_terms(network, alpha_0, variant):
        exact = exact - chance * sum(logps) / len(logps)
    gap = exact + likelihood.log()
    assert (gap > -1e-6).all()
    assert gap.max() < 1e-6 if alpha_0 == 0 else gap.max() > 0.01


def mdlm_sums(network):
    def logp(masked):
        tokens = TEXTS.clone()
        tokens[:, masked] = MASK
        return logp_of_texts(network, tokens, list(range(LENGTH)), "bidirectional")[:, masked].sum(1)

    return cross_entropies(logp)


def test_mdlm(network):
    exact = integral(mdlm_sums(network), 1.0)
    generator = torch.Generator().manual_seed(0)
    check_draws(nelbo.mdlm_nelbo(network, TEXTS[FEW], generator, draws=3000).double(), exact[FEW])


def bd3lm_block_sums(network, begin, end):
    """float64 [81, block + 1]: as cross_entropies, in the block [begin, end) after clean blocks of its size."""
    sums = torch.zeros(len(TEXTS), end - begin + 1, dtype=torch.float64)
    for m in range(1, end - begin + 1):
        sets = list(itertools.combinations(range(begin, end), m))
        for masked in sets:
            tokens = TEXTS[:, :end].clone()
            tokens[:, masked] = MASK
            block = torch.tensor([0] * begin + [1] * (end - begin))
            logp = logp_of_texts(network, tokens, list(range(end)), block[:, None] >= block)
            sums[:, m] -= logp[:, masked].sum(1) / len(sets)
    return sums


@pytest.mark.parametrize("block_size", [1, 2, 3, 4])
def test_bd3lm(network, block_size):
    """Here at most two blocks have more than one token, so that a clean prefix is one block or single tokens."""
    if block_size == 1:
        exact = -sequential_logp(network, (), "B")
        draws = nelbo.bd3lm_nelbo(network, TEXTS, 1, torch.Generator().manual_seed(0))
        torch.testing.assert_close(draws.double(), exact, atol=1e-5, rtol=1e-5)
        return
    blocks = [(begin, min(begin + block_size, LENGTH)) for begin in range(0, LENGTH, block_size)]
    exact = sum(integral(bd3lm_block_sums(network, *block), 1.0) for block in blocks)
    generator = torch.Generator().manual_seed(0)
    check_draws(nelbo.bd3lm_nelbo(network, TEXTS[FEW], block_size, generator, draws=3000).double(), exact[FEW])


@pytest.mark.parametrize("alpha_0", [0.3, 1.0])
def test_how_far_the_published_estimator_is_off(network, alpha_0):
    """It averages the weighted loss over t in [eps, 1]; the module says what that leaves out."""
    sums, eps = esolm_sums(network, "B"), objectives.NOISE_EPS
    published = integral(sums, alpha_0, low=eps, eps=eps) / (1 - eps)
    exact = integral(sums, alpha_0)

    def per_token(share):  # of masks
        chance = [math.comb(LENGTH, m) * share**m * (1 - share) ** (LENGTH - m) for m in range(LENGTH + 1)]
        return sums @ torch.tensor(chance, dtype=torch.float64) / max(share * LENGTH, 1e-12)

    off = eps * alpha_0 * (per_token(max(1 - alpha_0, 1e-9)) + per_token(1.0)) - eps * exact / LENGTH
    torch.testing.assert_close((exact - published) / LENGTH, off, atol=5e-6, rtol=0)
    assert off.mean() > 1e-4 * alpha_0


def test_draws_are_evenly_spaced():
    """Every value is uniform; the draws of a block, of a row, and all together are one in each of equal slices."""
    generator = torch.Generator().manual_seed(0)
    many = torch.stack([nelbo._evenly_spaced(4, 3, 2, generator) for _ in range(4000)])  # [.., draws, rows, blocks]
    assert ((many >= 0) & (many < 1)).all()
    for frequency in (1, 2, 4):
        assert (((many * frequency) % 1).mean(0) - 0.5).abs().max() < 5 / math.sqrt(12 * 4000)
    for group in (many, many.transpose(2, 3).flatten(1, 2), many.flatten(1)):
        n = group.shape[1]
        counts = (group * n).long().sort(1).values
        assert (counts == torch.arange(n).view(-1, *[1] * (group.dim() - 2))).all()
    together = torch.corrcoef(many.permute(2, 3, 0, 1).reshape(6, -1))  # of the rows and blocks of a draw
    assert (together - torch.eye(6)).abs().max() < 5 / math.sqrt(16000)


def test_binomial_and_quantile():
    from scipy import stats

    for n, p in ((5, 0.3), (1000, 0.999), (24, 0.0), (24, 1.0)):
        expected = torch.from_numpy(stats.binom.cdf(np.arange(n + 1), n, p))
        torch.testing.assert_close(nelbo._binomial_cdf(n, p), expected, atol=1e-10, rtol=0)
    u = (torch.arange(1000) + 0.5) / 1000
    weights = torch.tensor([0.0, 1.0, 3.0, 0.0, 4.0, 0.0], dtype=torch.float64)
    assert nelbo._quantile(weights, u.double()).bincount(minlength=6).tolist() == [0, 125, 375, 0, 500, 0]
    assert nelbo._quantile(weights, torch.zeros(1, dtype=torch.float64)).item() == 1


def test_exactly_so_many_masks():
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(2000, 7, dtype=torch.int64)
    counts = torch.tensor([[3, 0, 1], [1, 2, 0]]).repeat(1000, 1)
    masked = nelbo._mask_exactly(x, counts, 3, 9, generator) == 9
    by_block = torch.nn.functional.pad(masked, (0, 2)).view(-1, 3, 3).sum(-1)
    assert torch.equal(by_block, counts)
    share = masked[1::2].double().mean(0)
    expected = torch.tensor([1 / 3] * 3 + [2 / 3] * 3 + [0], dtype=torch.float64)
    assert (share - expected).abs().max() < 5 * math.sqrt(0.25 / 1000)


def golden(name="tiny-weights"):
    folder = Path(__file__).parent / "goldens"
    sizes, tensors = json.loads((folder / "tiny.json").read_text()), load_file(folder / f"{name}.safetensors")
    names = ("vocab_size", "hidden_size", "n_blocks", "n_heads", "length", "cond_dim")
    network = Network(NetworkConfig(**{n: sizes[n] for n in names}))
    network.load_state_dict(tensors)
    return network.requires_grad_(False).eval(), load_file(folder / "tiny-cases.safetensors")["x0"]


CALLS = {
    "esolm-B": lambda network, x, g, **options: nelbo.esolm_nelbo(network, x, 0.4, g, **options),
    "esolm-A": lambda network, x, g, **options: nelbo.esolm_nelbo(network, x, 0.4, g, variant="A", **options),
    "mdlm": nelbo.mdlm_nelbo,
    "bd3lm": lambda network, x, g, **options: nelbo.bd3lm_nelbo(network, x, 5, g, **options),
}


@pytest.mark.parametrize("name", CALLS)
def test_shapes_chunks_and_both_kinds_of_network(name, capfd):
    network, x = golden()
    whole = CALLS[name](network, x, torch.Generator().manual_seed(1), draws=3)
    assert whole.shape == (3, 3)
    assert whole.dtype == torch.float32
    chunked = CALLS[name](network, x, torch.Generator().manual_seed(1), draws=3, max_tokens=50, progress=True)
    torch.testing.assert_close(chunked, whole, atol=1e-4, rtol=1e-5)
    assert "0%" in capfd.readouterr().err
    folded = CALLS[name](network.fold(), x, torch.Generator().manual_seed(1), draws=3)
    torch.testing.assert_close(folded, whole, atol=1e-3, rtol=1e-5)
    once = CALLS[name](network, x, torch.Generator().manual_seed(2))
    assert torch.equal(once, CALLS[name](network, x, torch.Generator().manual_seed(2), draws=1)[:, 0])
    assert capfd.readouterr().err == ""


def test_evenly_spaced_draws_are_less_noisy(monkeypatch):
    """Where the nats of a mask grow with the number of masks, eight draws of a row already give their mean."""

    def cross_entropy(network, x, zt):
        masked = zt == network.config.mask_id
        return masked * masked.sum(1, keepdim=True) / x.shape[1] ** 2

    monkeypatch.setattr(objectives, "mdlm_cross_entropy", cross_entropy)
    network, x = golden()
    for _ in range(20):
        draws = nelbo.mdlm_nelbo(network, x, draws=8)
        assert ((draws.mean(1) - 12.5 / 24).abs() < 1.01 / 24).all()
        assert (draws.mean() - 12.5 / 24).abs() < 0.5 / 24
    assert draws.std(1).min() > 5 / 24


def test_errors():
    network, x = golden()
    with pytest.raises(ValueError, match=r"alpha_0: must lie in \[0, 1\], got 1.5"):
        nelbo.esolm_nelbo(network, x, 1.5)
    with pytest.raises(ValueError, match="draws: must be at least 1, got 0"):
        nelbo.mdlm_nelbo(network, x, draws=0)
    with pytest.raises(ValueError, match="block_size: must be at least 1, got 0"):
        nelbo.bd3lm_nelbo(network, x, 0)
    with pytest.raises(ValueError, match="variant is 'C'"):
        nelbo.esolm_nelbo(network, x, 0.5, variant="C")
    for compute in (
        lambda x: nelbo.esolm_nelbo(network, x, 0.5),
        lambda x: nelbo.mdlm_nelbo(network, x),
        lambda x: nelbo.bd3lm_nelbo(network, x, 4),
        lambda x: likelihood.importance_weighted(network, x, 1),
    ):
        with pytest.raises(
            ValueError, match=r"x: must be \[batch, length\] with a length of at least 1, got \[\d+, 0\]"
        ):
            compute(x[:, :0])
