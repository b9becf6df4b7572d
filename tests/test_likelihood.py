"""Exact and importance-weighted likelihoods on models small enough to enumerate, and of the samplers' own schedules."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from esokern import likelihood, masks, nelbo, objectives
from esokern.likelihood import OrderLikelihoods
from esokern.models.network import Network, NetworkConfig
from esokern.samplers import esolm
from esokern.samplers.schedule import Schedule, denoising_schedule

LENGTH, VOCAB = 4, 3  # 81 texts, 24 orders
MASK = VOCAB
TEXTS = torch.tensor(list(itertools.product(range(VOCAB), repeat=LENGTH)))
ORDERS = torch.tensor(list(itertools.permutations(range(LENGTH))))

GOLDENS = Path(__file__).parent / "goldens"
SIZES = json.loads((GOLDENS / "tiny.json").read_text())
CASES = load_file(GOLDENS / "tiny-cases.safetensors")


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(3)
    network = Network(NetworkConfig(VOCAB + 1, 16, 2, 2, LENGTH, cond_dim=4)).eval().requires_grad_(False)
    for parameter in network.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.4)
    return network


def golden(name="tiny-weights"):
    names = ("vocab_size", "hidden_size", "n_blocks", "n_heads", "length", "cond_dim")
    network = Network(NetworkConfig(**{n: SIZES[n] for n in names}))
    network.load_state_dict(load_file(GOLDENS / f"{name}.safetensors"))
    return network.requires_grad_(False).eval()


def last_logp(network, texts, context, position, visible):
    """float64 [texts]: log p of the token at `position`, a mask forwarded after the clean tokens at `context`."""
    positions = [*context, position]
    tokens = texts[:, positions].clone()
    tokens[:, -1] = network.config.mask_id
    logits = network(tokens, torch.tensor(positions), visible)[:, -1, : network.config.mask_id].double()
    return logits.log_softmax(-1).gather(-1, texts[:, position, None])[:, 0]


def esolm_logp(network, texts, order):
    """One forward per token of [clean tokens in decoding order | one mask]."""
    return sum(last_logp(network, texts, order[:k], position, "causal") for k, position in enumerate(order))


def bidirectional_logp(network, texts, order, begin, end):
    """Of the block [begin, end) after clean blocks that do not see it, in the order of the positions in `order`."""
    total, decoded = 0, []
    block = (torch.arange(end) >= begin).int()
    for position in (p for p in order if begin <= p < end):
        tokens = texts[:, :end].clone()
        tokens[:, [p for p in range(begin, end) if p not in decoded]] = network.config.mask_id
        logits = network(tokens, torch.arange(end), block[:, None] >= block)[:, position, : network.config.mask_id]
        total = total + logits.double().log_softmax(-1).gather(-1, texts[:, position, None])[:, 0]
        decoded.append(position)
    return total


def every_order(function):
    """[81, orders, ...] of function(texts, order [81, L])."""
    return torch.stack([function(TEXTS, order.expand_as(TEXTS)) for order in ORDERS], 1).double()


@pytest.fixture(scope="module")
def by_order(network):
    """float64 [81, 24, parts]: log p(x | order) of every text in every order."""
    return {
        "esolm": every_order(lambda x, order: objectives.any_order_logp(network, x, order)[:, None]),
        "mdlm": every_order(lambda x, order: likelihood.mdlm_order_logp(network, x, order)[:, None]),
        "bd3lm": every_order(lambda x, order: likelihood.bd3lm_order_logp(network, x, order, 2)),
    }


def test_every_order_is_a_distribution(by_order):
    for name, logp in by_order.items():
        total = logp.sum(2).exp().sum(0)
        torch.testing.assert_close(total, torch.ones_like(total), atol=2e-6, rtol=0, msg=name)
        assert logp.sum(2).std(1).min() > 1e-3  # and the orders differ
    by_block = by_order["bd3lm"].view(9, 9, 24, 2)[:, 0, :, 0].exp().sum(0)  # the first block alone
    torch.testing.assert_close(by_block, torch.ones_like(by_block), atol=2e-6, rtol=0)


def test_against_one_forward_per_token(network, by_order):
    for i in range(0, 24, 5):
        order = ORDERS[i].tolist()
        expected = {
            "esolm": esolm_logp(network, TEXTS, order)[:, None],
            "mdlm": bidirectional_logp(network, TEXTS, order, 0, LENGTH)[:, None],
            "bd3lm": torch.stack([bidirectional_logp(network, TEXTS, order, b, b + 2) for b in (0, 2)], 1),
        }
        for name, logp in expected.items():
            torch.testing.assert_close(by_order[name][:, i], logp, atol=1e-5, rtol=1e-5, msg=name)


def test_blocks_of_three_leave_a_shorter_one(network):
    order = torch.tensor([[2, 3, 0, 1]])
    logp = likelihood.bd3lm_order_logp(network, TEXTS, order, 3)
    first = torch.tensor([[0, 0, 0], [0, 0, 1]])
    assert logp.shape == (81, 2)
    # The second block is one token, so its probabilities add up to one after any first block.
    assert logp[:, 1].view(-1, 3).exp().sum(1).sub(1).abs().max() < 1e-5
    expected = [bidirectional_logp(network, TEXTS[:2], [2, 0, 1], 0, 3)[0]]
    assert logp[0, 0].item() == pytest.approx(expected[0].item(), abs=1e-5)
    assert torch.equal(TEXTS[:2, :3], first * 0)


def test_the_bound_falls_from_the_nelbo_to_the_likelihood(by_order):
    """With all 24 orders as the sample, one group is the exact likelihood and groups of one are the NELBO."""
    for name in ("esolm", "mdlm"):
        logp = by_order[name]
        result = OrderLikelihoods(logp)
        torch.testing.assert_close(result.nll(1), -logp.mean((1, 2)))
        exact = -(logp[..., 0].exp().mean(1)).log()
        torch.testing.assert_close(result.nll(), exact)
        assert math.isclose((-exact).exp().sum().item(), 1.0, abs_tol=2e-6)
        curve = torch.stack([result.nll(k) for k in (1, 2, 4, 8, 24)])
        assert (curve.diff(dim=0) <= 1e-12).all()
        by_hand = -logp[:, :, 0].exp().view(-1, 3, 8).mean(2).log().mean(1)
        torch.testing.assert_close(result.nll(8), by_hand)
        torch.testing.assert_close(result.nll(16), -logp[:, :16, 0].exp().mean(1).log())  # the remainder is left out


def test_the_bound_in_expectation_over_every_choice_of_orders(by_order):
    """The mean over all subsets of K orders falls with K; what `nll(k)` averages over are some of them."""
    logp = by_order["esolm"][::7]
    means = []
    for k in (1, 2, 3, 23, 24):
        subsets = torch.tensor(list(itertools.combinations(range(24), k)))
        means.append(OrderLikelihoods(logp[:, subsets].reshape(len(logp), -1, 1)).nll(k))
    curve = torch.stack(means)
    assert (curve.diff(dim=0) < 0).all()
    torch.testing.assert_close(curve[-1], -logp[..., 0].exp().mean(1).log())


def test_bounding_blocks_on_their_own_is_tighter(by_order):
    """In expectation over two orders: all 16 equally likely pairs of them, each block having two orders."""
    logp = by_order["bd3lm"]
    exact = -logp.exp().mean(1).log().sum(1)  # an order of the text is one of each block, independently
    torch.testing.assert_close(OrderLikelihoods(logp).nll(), exact)
    torch.testing.assert_close(OrderLikelihoods(logp.sum(2, keepdim=True)).nll(), exact)
    block_orders = [ORDERS.tolist().index([*a, *b]) for a in ([0, 1], [1, 0]) for b in ([2, 3], [3, 2])]
    pairs = logp[:, [i for pair in itertools.product(block_orders, repeat=2) for i in pair]]
    apart, jointly = OrderLikelihoods(pairs), OrderLikelihoods(pairs.sum(2, keepdim=True))
    torch.testing.assert_close(apart.nll(1), jointly.nll(1))
    assert (exact <= apart.nll(2)).all()
    assert (apart.nll(2) <= jointly.nll(2)).all()
    assert (jointly.nll(2) - apart.nll(2)).max() > 0.01


def test_the_mdlm_nelbo_is_the_mean_over_orders(network, by_order):
    """Eq. 4: the same bound, drawn by the number of masks."""
    x = TEXTS[::20]
    draws = nelbo.mdlm_nelbo(network, x, torch.Generator().manual_seed(0), draws=3000).double()
    error = draws.std(1) / math.sqrt(3000)
    assert ((draws.mean(1) - OrderLikelihoods(by_order["mdlm"][::20]).nll(1)).abs() < 4 * error).all()


def order_chances(alpha_0):
    """P^alpha_0 (eq. 22) of every order: summed over the clean sets that it may have come from."""
    chances = torch.zeros(len(ORDERS), dtype=torch.float64)
    for i, order in enumerate(ORDERS.tolist()):
        for size in range(LENGTH + 1):
            if order[size:] == sorted(order[size:]):
                chances[i] += alpha_0**size * (1 - alpha_0) ** (LENGTH - size) / math.factorial(size)
    return chances


@pytest.mark.parametrize("alpha_0", [0.0, 0.35, 1.0])
def test_random_orders(alpha_0):
    orders = likelihood.random_orders(20000, LENGTH, alpha_0, torch.Generator().manual_seed(0))
    counts = torch.stack([(orders == order).all(1).sum() for order in ORDERS]).double()
    chances = order_chances(alpha_0)
    assert counts.sum() == 20000
    assert chances.sum().item() == pytest.approx(1)
    assert ((counts - 20000 * chances).abs() <= 4.5 * (20000 * chances * (1 - chances)).sqrt() + 1e-6).all()


@pytest.mark.parametrize(
    ("model", "alpha_0", "block_size"),
    [("esolm", 1.0, None), ("esolm", 0.4, None), ("esolm", 0.0, None), ("mdlm", 1.0, None), ("bd3lm", 1.0, 2)],
)
def test_many_orders_give_the_exact_likelihood(network, by_order, model, alpha_0, block_size):
    rows = slice(3, 81, 15)
    chances = order_chances(alpha_0)[:, None]
    exact = -(by_order[model].exp() * chances).sum(1).log().sum(1)[rows]
    num_orders = 1 if alpha_0 == 0 else 2048
    result = likelihood.importance_weighted(
        network,
        TEXTS[rows],
        num_orders,
        model=model,
        alpha_0=alpha_0,
        block_size=block_size,
        generator=torch.Generator().manual_seed(0),
    )
    assert result.logp.shape == (6, num_orders, 2 if model == "bd3lm" else 1)
    assert result.logp.dtype == torch.float64
    if alpha_0 == 0:
        torch.testing.assert_close(result.nll(), exact, atol=1e-5, rtol=0)
        assert result.standard_error().isnan().all()
        return
    error = result.standard_error()
    assert (error < 0.01 * exact).all()
    assert ((result.nll() - exact).abs() < 4 * error).all()
    one = -(by_order[model].sum(2) * chances[:, 0]).sum(1)[rows]
    assert ((result.nll(1) - one).abs() < 4 * result.standard_error(1)).all()


def test_standard_errors():
    logp = torch.randn(3, 12, 2, dtype=torch.float64)
    result = OrderLikelihoods(logp)
    groups = -(logp.view(3, 4, 3, 2).exp().mean(2).log().sum(2))
    torch.testing.assert_close(result.standard_error(3), groups.std(1) / 2)
    without = torch.stack([-logp[:, [j for j in range(12) if j != i]].exp().mean(1).log() for i in range(12)])
    jackknife = (11 / 12 * (without - without.mean(0)).square().sum(0)).sum(1).sqrt()
    torch.testing.assert_close(result.standard_error(), jackknife)
    lopsided = logp.clone()
    lopsided[:, 5] = 800.0  # one order holds all of the probability, in float64 too
    assert (OrderLikelihoods(lopsided).standard_error() > 100).all()


@pytest.mark.parametrize(("model", "block_size"), [("esolm", None), ("mdlm", None), ("bd3lm", 7)])
def test_chunks_and_both_kinds_of_network(model, block_size, capfd):
    network, x = golden(), CASES["x0"]

    def weighted(network, **options):
        generator = torch.Generator().manual_seed(1)
        options |= {"model": model, "block_size": block_size, "generator": generator}
        return likelihood.importance_weighted(network, x, 5, **options).logp

    whole = weighted(network)
    torch.testing.assert_close(weighted(network, max_tokens=100, progress=True), whole, atol=1e-4, rtol=0)
    assert "0/5 [00:00<?, ? orders/s]" in capfd.readouterr().err
    torch.testing.assert_close(weighted(network, max_tokens=1), whole, atol=1e-4, rtol=0)
    torch.testing.assert_close(weighted(network.fold()), whole, atol=1e-3, rtol=0)
    assert capfd.readouterr().err == ""


def test_the_mask_of_all_steps():
    """Against its definition, mask for mask: [masks | clean], two rows with other steps."""
    step_start = torch.tensor([[0, 0, 2, 3, 3, 3], [0, 1, 2, 2, 4, 4]])
    for noisy in ("causal", "independent"):
        dense = masks.esolm_steps(step_start, noisy=noisy).dense()
        for row, i, j in itertools.product(range(2), range(6), range(6)):
            start = step_start[row, i]
            assert dense[row, 6 + i, 6 + j] == (j <= i)  # clean, clean
            assert not dense[row, 6 + i, j]  # clean, mask
            assert dense[row, i, 6 + j] == (j < start)  # mask, clean
            assert dense[row, i, j] == (start <= j <= i if noisy == "causal" else i == j)  # mask, mask
    one_by_one = torch.arange(6)[None]
    expected = masks.any_order_likelihood(one_by_one).dense()
    for noisy in ("causal", "independent"):
        assert torch.equal(masks.esolm_steps(one_by_one, noisy=noisy).dense(), expected)
    with pytest.raises(ValueError, match="noisy: got 'both'"):
        masks.esolm_steps(one_by_one, noisy="both")


def golden_schedule():
    order, counts = CASES["sampling_order"], CASES["sampling_ks"].tolist()
    return Schedule.from_steps([[part.tolist() for part in row.split(counts)] for row in order], [0] * len(order))


def test_the_published_sampler():
    expected = CASES["sampling_logits_generation_order"][..., :-1].double().log_softmax(-1)
    order = CASES["sampling_order"]
    expected = expected.gather(-1, CASES["x0"].gather(1, order)[..., None])[..., 0]
    logp = likelihood.schedule_logp(golden(), CASES["x0"], golden_schedule())
    torch.testing.assert_close(logp.gather(1, order).double(), expected, atol=1e-5, rtol=1e-5)
    independent = likelihood.schedule_logp(golden(), CASES["x0"], golden_schedule(), chunk_mask="independent")
    assert (independent - logp).abs().max() > 1e-3


@pytest.mark.parametrize("chunk_mask", esolm.CHUNK_MASKS)
def test_what_the_sampler_drew(chunk_mask):
    """Rows with different prompts, gaps and numbers of masks; temperature and filters do not matter."""
    network, length, mask_id = golden(), SIZES["length"], SIZES["mask_index"]
    tokens = torch.randint(0, mask_id, (4, length))
    tokens[0, 5:] = mask_id
    tokens[1, 4:20] = mask_id
    tokens[2, 1::2] = mask_id
    tokens[3] = mask_id
    schedule = denoising_schedule(tokens == mask_id, alpha_0=0.6, num_steps=3, seeds=[1, 2, 3, 4])
    drawn = esolm.generate(
        network.fold(),
        tokens,
        schedule=schedule,
        chunk_mask=chunk_mask,
        return_logprob=True,
        temperature=0.7,
        top_p=0.9,
    )
    for model in (network, network.fold()):
        logp = likelihood.schedule_logp(model, drawn.tokens, schedule, chunk_mask=chunk_mask)
        torch.testing.assert_close(logp, drawn.logprob, atol=1e-4, rtol=1e-5)
    assert (logp[tokens != mask_id] == 0).all()


def test_one_token_a_step_is_the_any_order_likelihood():
    network, x = golden(), CASES["x0"]
    order = CASES["order"]
    schedule = Schedule.from_steps([[[p] for p in row] for row in order.tolist()], [0, 3, 24])
    expected = objectives.any_order_logp(network, x, order)
    for chunk_mask in esolm.CHUNK_MASKS:
        logp = likelihood.schedule_logp(network, x, schedule, chunk_mask=chunk_mask)
        torch.testing.assert_close(logp.sum(1), expected, atol=1e-4, rtol=1e-5)


def test_schedule_logp_has_gradients():
    network = golden().requires_grad_(True)
    likelihood.schedule_logp(network, CASES["x0"], golden_schedule()).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_errors():
    network, x = golden(), CASES["x0"]
    for arguments, message in (
        ({"num_orders": 0}, "num_orders: must be at least 1, got 0"),
        ({"model": "ar"}, "model: got 'ar', supported are esolm, mdlm, bd3lm"),
        ({"model": "bd3lm"}, "block_size: goes with model 'bd3lm' and only with it, got None"),
        ({"block_size": 4}, "block_size: goes with model 'bd3lm' and only with it, got 4 with 'esolm'"),
        ({"alpha_0": -0.5}, r"alpha_0: must lie in \[0, 1\], got -0.5"),
        ({"model": "bd3lm", "block_size": 0}, "block_size: must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            likelihood.importance_weighted(network, x, **{"num_orders": 2, **arguments})
    with pytest.raises(ValueError, match=r"num_orders: must lie in 1 .. 3, the orders there are; got 4"):
        OrderLikelihoods(torch.zeros(1, 3, 1)).nll(4)
    with pytest.raises(ValueError, match="schedule: has 3 rows, x has 2"):
        likelihood.schedule_logp(network, x[:2], golden_schedule())
    with pytest.raises(ValueError, match="schedule: decodes position 23, x has 20 tokens a row"):
        likelihood.schedule_logp(network, x[:, :20], golden_schedule())
    with pytest.raises(ValueError, match="noisy: got 'both'"):
        likelihood.schedule_logp(network, x, golden_schedule(), chunk_mask="both")
