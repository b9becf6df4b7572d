"""The noise: Philox against published answers, the Gumbel numbers against float64, and the same bits everywhere."""

import math

import pytest
import torch

from esokern import philox
from esokern.unmask_sample import unmask_sample, unmask_sample_from_logits
from esokern.unmask_select import unmask_select


def words(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    assert philox.philox4x32(words(*counter), words(*key)).tolist() == list(expected)


def exact_gumbel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """-log(-log(1 - U)) in float64, each side of 1/2 from the exact number."""
    x, y = x.double(), y.double()
    u = torch.where(x < 2**16, x * 2.0**-32 + (y + 0.5) * 2.0**-64, (x + 0.5) * 2.0**-32)
    complement = (2.0**32 - 1 - x + 0.5) * 2.0**-32
    return -torch.where(u < 0.5, -torch.log1p(-u), -complement.log()).log()


def test_gumbel_accuracy():
    random = torch.randint(2**32, (200_000,))
    edges = [0, 1, 2, 2**16 - 1, 2**16, 2**30 - 1, 2**30, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1]
    x = torch.cat([words(*edges), torch.arange(2**16), 2**32 - 1 - torch.arange(2**16), random])
    y = torch.randint(2**32, x.shape)
    y[:3] = words(0, 1, 2**32 - 1)
    noise, exact = philox._gumbel_from_words(x, y), exact_gumbel(x, y)
    # One rounding of -log U (relative 2e-7) shifts the result by as much, absolutely.
    assert ((noise.double() - exact).abs() <= 3e-7 + 2e-7 * exact.abs()).all()
    assert noise[0] == pytest.approx(45.05, abs=0.01)  # the largest there is: U = 2^-65
    assert noise.isfinite().all()


def test_gumbel_depends_on_nothing_else():
    seed, position, step = words(3, -5, 2**40 + 1), words(0, 2**31, 2**32 - 1), words(9, 8, 7)
    whole = philox.gumbel(seed, position, step, 0, 4099)
    for start, count in [(0, 1), (1, 1), (2, 7), (3, 4096), (4098, 1), (5, 11)]:
        assert torch.equal(philox.gumbel(seed, position, step, start, count), whole[:, start : start + count])
    assert torch.equal(philox.gumbel(seed[1:2], position[1:2], step[1:2], 0, 4099), whole[1:2])
    # Only the low 32 bits of position and step count.
    assert torch.equal(philox.gumbel(seed, position - 2**32, step + 2**32, 0, 4099), whole)
    for other in [(seed + 1, position, step), (seed + 2**32, position, step), (seed, position + 1, step)]:
        assert (philox.gumbel(*other, 0, 4099) == whole).float().mean() < 0.01
    assert (philox.gumbel(seed, position, step + 1, 0, 4099) == whole).float().mean() < 0.01
    # Far ids: no 32-bit trouble in the block number.
    assert philox.gumbel(seed, position, step, 2**33 + 2, 9).isfinite().all()


def one_id_rows(ids: torch.Tensor, vocab: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Logits [rows, vocab]: 0 at one id of each row and -inf elsewhere, so the score of the draw is its noise."""
    return torch.full((len(ids), vocab), -math.inf, dtype=dtype).scatter_(1, ids[:, None], 0.0)


@pytest.mark.parametrize("vocab_start", [0, 1, 50_257, 151_934, 2**31 + 3])
def test_bits_are_the_reference_s(backend, vocab_start):
    vocab, rows = 77, 77 * 3
    ids = torch.arange(rows) % vocab
    seed = torch.randint(-(2**63), 2**63 - 1, (rows,))
    position, step = torch.randint(2**32, (rows,)), torch.randint(2**32, (rows,))
    noise = philox.gumbel(seed, position, step, vocab_start, vocab)[torch.arange(rows), ids]
    drawn = unmask_sample_from_logits(
        one_id_rows(ids, vocab),
        seed=seed,
        positions=position,
        step=step,
        vocab_start=vocab_start,
        return_score=True,
        backend=backend,
    )
    assert torch.equal(drawn.tokens, ids + vocab_start)
    assert torch.equal(drawn.score, noise)


def tail_ids(seed: int, position: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids of one row whose noise comes from the refined tail (first word below 2^16), and that noise."""
    noise = philox.gumbel(words(seed), words(position), words(0), 0, vocab)[0]
    ids = (noise > -math.log(2.0**-16) + 1e-3).nonzero()[:, 0]
    return ids, noise[ids]


def test_bits_of_the_tail(backend):
    ids, noise = tail_ids(seed=11, position=5, vocab=1 << 19)
    assert len(ids) >= 4
    for token, value in zip(ids.tolist(), noise.tolist(), strict=True):
        drawn = unmask_sample_from_logits(
            one_id_rows(words(token % 16), 16),
            seed=11,
            positions=words(5),
            vocab_start=token - token % 16,
            return_score=True,
            backend=backend,
        )
        assert drawn.score.item() == value


@pytest.mark.parametrize("fused", [False, True], ids=["logits", "fused"])
def test_best_of_a_flat_vocabulary(backend, fused):
    """All logits 0: token and score are those of the largest noise, tail included."""
    vocab, rows = 50_258, 5
    position = torch.arange(rows) * 1000
    noise = philox.gumbel(words(7).expand(rows), position, words(2).expand(rows), 0, vocab)
    options = {"seed": 7, "positions": position, "step": 2, "return_score": True, "backend": backend}
    if fused:
        drawn = unmask_sample(torch.randn(rows, 16), torch.zeros(vocab, 16), **options)
    else:
        drawn = unmask_sample_from_logits(torch.zeros(1, vocab).expand(rows, -1), **options)
    assert torch.equal(drawn.score, noise.amax(1))
    assert torch.equal(drawn.tokens, noise.argmax(1))


def test_selection_gumbel():
    """The noise of a choice: words 0 and 1 of a stream of its own, by seed, position and step."""
    seed, position, step = words(3, -5, 2**40 + 1), words(0, 2**31, 2**32 - 1), words(9, 8, 7)
    counter = torch.stack([torch.zeros_like(position), position, step, torch.full_like(step, 2)], -1)
    x = philox.philox4x32(counter, torch.stack([seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF], -1))
    noise = philox.selection_gumbel(seed, position, step)
    torch.testing.assert_close(noise.double(), exact_gumbel(x[:, 0], x[:, 1]), rtol=1e-6, atol=1e-6)
    assert torch.equal(philox.selection_gumbel(seed, position - 2**32, step + 2**32), noise)
    assert torch.equal(philox.selection_gumbel(seed[:1], position, step[:1])[:1], noise[:1])  # shapes broadcast
    for other in [(seed + 1, position, step), (seed + 2**32, position, step), (seed, position, step + 1)]:
        assert (philox.selection_gumbel(*other) != noise).all()
    assert (philox.gumbel(seed, position, step, 0, 64) != noise[:, None]).all()  # and no token's noise


def test_bits_of_a_choice_s_noise(backend):
    """A threshold of exactly the noise is reached, the next larger float is not; the refined tail included."""
    position = torch.arange(2**19)
    noise = philox.selection_gumbel(words(11), position, words(6))
    tail = (noise > -math.log(2.0**-16) + 1e-3).nonzero()[:, 0]
    assert 3 <= len(tail) <= 20
    for chosen in (tail, position[:40]):
        rows, text = len(chosen), torch.full((len(chosen), int(chosen.max()) + 1), 9)
        call = {
            "proposed": torch.ones(rows, 1, dtype=torch.int64), "confidence": torch.zeros(rows, 1), "mask_id": 9,
            "window_start": chosen, "temperature": math.inf, "seed": 11, "step": 6, "backend": backend,
        }  # fmt: skip
        above = torch.nextafter(noise[chosen], torch.tensor(math.inf))
        assert not unmask_select(text, **call, threshold=above).num_transferred.any()
        assert unmask_select(text, **call, threshold=noise[chosen]).num_transferred.all()


def test_score_is_two_roundings(backend):
    """logit + temperature * noise: the product rounds, then the sum; never one fused operation."""
    vocab = 64
    ids = torch.arange(vocab)
    logits = torch.full((vocab, vocab), -math.inf)
    logits[ids, ids] = torch.randn(vocab) * 10
    temperature = torch.rand(vocab) + 0.1
    noise = philox.gumbel(words(3).expand(vocab), ids, words(0).expand(vocab), 0, vocab)[ids, ids]
    drawn = unmask_sample_from_logits(
        logits, temperature=temperature, seed=3, positions=ids, return_score=True, backend=backend
    )
    product = temperature * noise
    assert torch.equal(drawn.score, logits[ids, ids] + product)


def test_seeds_beyond_63_bits(backend):
    """An unsigned seed is the same 64 bits as the signed one."""
    options = {"positions": words(1), "return_score": True, "backend": backend}
    logits = torch.zeros(1, 40)
    unsigned = unmask_sample_from_logits(logits, seed=2**64 - 3, **options)
    signed = unmask_sample_from_logits(logits, seed=-3, **options)
    assert torch.equal(unsigned.score, signed.score)


# ---- distribution ----------------------------------------------------------------------------------------------


def chi_squared_p(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """p-value of counts against probabilities, neighbouring bins merged until each expects at least 5."""
    from scipy.stats import chi2

    total = counts.sum().item()
    bins: list[list[float]] = [[0.0, 0.0]]
    for count, probability in zip(counts.tolist(), probabilities.tolist(), strict=True):
        if bins[-1][1] >= 5:
            bins.append([0.0, 0.0])
        bins[-1][0] += count
        bins[-1][1] += probability * total
    if bins[-1][1] < 5:
        count, expected = bins.pop()
        bins[-1][0] += count
        bins[-1][1] += expected
    statistic = sum((count - expected) ** 2 / expected for count, expected in bins)
    return chi2.sf(statistic, len(bins) - 1)


@pytest.mark.parametrize(("vocab", "draws"), [(50_258, 3000), (151_936, 1500)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_draws_follow_the_softmax(vocab, draws, temperature):
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(vocab, generator=generator)
    head = torch.randperm(vocab, generator=generator)[:60]
    logits[head] += torch.linspace(5, 9, 60)
    tokens = unmask_sample_from_logits(
        logits.expand(draws, -1), temperature=temperature, seed=20, positions=torch.arange(draws), return_logprob=False
    ).tokens
    order = logits.argsort(descending=True)
    probabilities = (logits.double() / temperature).softmax(0)
    counts = torch.bincount(tokens, minlength=vocab)
    assert chi_squared_p(counts[order], probabilities[order]) > 1e-3
    # And in the order of ids, where a fault of a tile or a lane would show.
    assert chi_squared_p(counts, probabilities) > 1e-3
    lanes = torch.arange(vocab) % 64
    assert (
        chi_squared_p(
            torch.zeros(64).index_add_(0, lanes, counts.float()),
            torch.zeros(64, dtype=torch.float64).index_add_(0, lanes, probabilities),
        )
        > 1e-3
    )


def test_filtered_draws_follow_the_renormalised_softmax():
    vocab, draws = 50_258, 2000
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(vocab, generator=generator)
    logits[torch.randperm(vocab, generator=generator)[:60]] += torch.linspace(6, 11, 60)
    tokens = unmask_sample_from_logits(
        logits.expand(draws, -1), top_k=200, top_p=0.9, seed=21, positions=torch.arange(draws), return_logprob=False
    ).tokens
    ordered, order = logits.double().sort(descending=True)
    p = ordered[:200].softmax(0)
    p = p[p.cumsum(0) - p < 0.9]
    counts = torch.bincount(tokens, minlength=vocab)[order]
    assert counts[len(p) :].sum() == 0
    assert chi_squared_p(counts[: len(p)], p / p.sum()) > 1e-3


VOCAB, GAP, RACES = 262_144, 18.0, 4096


def coarse_race(races: int, vocab: int, gap: float, generator: torch.Generator) -> int:
    """How often an unlikely id wins with Gumbel noise from 24-bit uniforms, -log(-log(k / 2^24)).

    The best of vocab - 1 uniform k is drawn at once: P(max k <= m) = ((m + 1) / 2^24)^(vocab - 1).
    """
    levels = 2.0**24

    def gumbel(u: torch.Tensor) -> torch.Tensor:
        return -(-u.log()).log()

    uniform = torch.rand(races, 2, dtype=torch.float64, generator=generator)
    # 0 and 1 themselves excluded, as every such sampler must.
    best_tail = ((uniform[:, 0] ** (1 / (vocab - 1)) * levels).floor() / levels).clamp(1 / levels, 1 - 1 / levels)
    head = ((uniform[:, 1] * levels).floor() / levels).clamp(1 / levels, 1 - 1 / levels)
    return int((gumbel(best_tail) > gumbel(head) + gap).sum())


def test_tail_race():
    """One id leads 262,143 others by 18 nats: they must win as often as the softmax says, 16 times in 4096.

    Noise from 24-bit uniforms ends at 16.6, so that there they practically never do: an unnoticed lower temperature.
    """
    tail_mass = (VOCAB - 1) * math.exp(-GAP)
    expected = RACES * tail_mass / (1 + tail_mass)
    allowed = 3 * math.sqrt(expected)
    logits = torch.zeros(VOCAB)
    logits[1234] = GAP
    tokens = unmask_sample_from_logits(
        logits.expand(RACES, -1), seed=99, positions=torch.arange(RACES), return_logprob=False
    ).tokens
    wins = int((tokens != 1234).sum())
    assert abs(wins - expected) < allowed, f"{wins} wins, expected {expected:.1f}"
    coarse_wins = coarse_race(RACES, VOCAB, GAP, torch.Generator().manual_seed(1))
    assert abs(coarse_wins - expected) > allowed, f"the coarse sampler passed with {coarse_wins} wins"
    # At the gap of 20.5 and 100,000 races it has not one win where 32.8 are expected.
    assert coarse_race(100_000, VOCAB, 20.5, torch.Generator().manual_seed(2)) == 0
