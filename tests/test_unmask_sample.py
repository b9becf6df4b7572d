"""unmask_sample against a float64 oracle written from the definitions, and what must hold bit for bit."""

import itertools
import math

import numpy as np
import pytest
import torch

from esokern import philox
from esokern.testing import assert_close, same_bits
from esokern.unmask_sample import UnmaskSample, merge_vocab_shards, unmask_sample, unmask_sample_from_logits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ALL = {
    "return_prob": True,
    "return_margin": True,
    "return_entropy": True,
    "return_lse": True,
    "return_score": True,
}
STATISTICS = ("logprob", "prob", "margin", "entropy", "lse", "score")


def per_row(value, rows):
    return np.broadcast_to(np.asarray(value), (rows,))


def oracle(
    logits: torch.Tensor,
    *,
    tokens=None,
    mask_id=None,
    temperature=1.0,
    top_k=None,
    top_p=None,
    min_p=None,
    filter_order="top_k_first",
    seed=0,
    positions=None,
    step=0,
    logit_softcap=None,
    statistics="model",
    vocab_start=0,
):
    """Row by row in float64 from logits [rows, vocab]. Returns (UnmaskSample of float64, clear): `clear` rows have a
    best score ahead of the next by 1e-4 and no id within 1e-6 of a filter's edge."""
    rows, vocab = logits.shape
    logits = logits.double().cpu().numpy()
    if logit_softcap is not None:
        logits = logit_softcap * np.tanh(logits / logit_softcap)
    temperature, top_k, top_p, min_p, seed, step = (
        per_row(default if value is None else value, rows)
        for value, default in ((temperature, 1), (top_k, 0), (top_p, 1), (min_p, 0), (seed, 0), (step, 0))
    )
    positions = torch.zeros(rows, dtype=torch.int64) if positions is None else positions
    noise = philox.gumbel(
        torch.tensor(seed.copy()), positions.long(), torch.tensor(step.copy()), vocab_start, vocab
    ).double()
    out, clear = [], []
    for row in range(rows):
        if tokens is not None and mask_id is not None and tokens[row] != mask_id:
            out.append((int(tokens[row]), 0.0, 1.0, 1.0, 0.0, 0.0, math.inf, False))
            clear.append(True)
            continue
        row_logits = logits[row].copy()
        if mask_id is not None and 0 <= mask_id - vocab_start < vocab:
            row_logits[mask_id - vocab_start] = -math.inf
        t = float(temperature[row])
        order = np.argsort(-row_logits, kind="stable")
        order = order[row_logits[order] > -math.inf]
        tempered = (row_logits[order] - row_logits[order[0]]) / (t if t > 0 else 1.0)
        kept = np.ones(len(order), dtype=bool)
        edge = math.inf
        k = int(top_k[row])
        if k > 0:
            kept[k:] = False
        considered = kept if filter_order == "top_k_first" else np.ones(len(order), dtype=bool)
        if top_p[row] < 1:
            mass = np.where(considered, np.exp(tempered), 0.0)
            mass /= mass.sum()
            before = np.concatenate([[0.0], np.cumsum(mass)[:-1]])
            edge = np.abs(before - top_p[row])[considered].min()
            kept &= before < top_p[row]
        if min_p[row] > 0:
            edge = min(edge, np.abs(tempered - math.log(min_p[row])).min())
            kept &= tempered >= math.log(min_p[row])
        allowed = order[kept]
        scores = row_logits[allowed] + (t * noise[row, allowed].cpu().numpy() if t > 0 else 0.0)
        ranked = np.sort(scores)[::-1]
        gap = ranked[0] - ranked[1] if len(ranked) > 1 else math.inf
        chosen = allowed[scores == ranked[0]].min()
        z = (row_logits[allowed] / (t if t > 0 else 1.0)) if statistics == "sampling" else row_logits[order]
        ids = allowed if statistics == "sampling" else order
        lse = z.max() + math.log(np.exp(z - z.max()).sum())
        p = np.exp(z - lse)
        top = np.sort(p)[::-1]
        logprob = z[ids == chosen][0] - lse
        out.append(
            (
                int(chosen) + vocab_start,
                logprob,
                math.exp(logprob),
                top[0] - (top[1] if len(top) > 1 else 0.0),
                -(p * (z - lse)).sum(),
                lse,
                ranked[0],
                False,
            )
        )
        clear.append(gap > 1e-4 and edge > 1e-6)
    columns = list(zip(*out, strict=True))
    return (
        UnmaskSample(
            torch.tensor(columns[0]),
            *(torch.tensor(column, dtype=torch.float64) for column in columns[1:7]),
            torch.tensor(columns[7]),
        ),
        torch.tensor(clear),
    )


def assert_matches(out: UnmaskSample, gold: UnmaskSample, plain: UnmaskSample, clear: torch.Tensor) -> None:
    assert clear.float().mean() >= 0.5
    assert torch.equal(out.tokens[clear], gold.tokens[clear])
    assert torch.equal(out.invalid, gold.invalid)
    for name in STATISTICS:
        value = getattr(out, name)
        assert value.dtype == torch.float32
        assert_close(value[clear], getattr(gold, name)[clear], getattr(plain, name)[clear], name)


def lm_head(rows, hidden_size, vocab, dtype=torch.float32, bias=True):
    hidden = torch.randn(rows, hidden_size).to(dtype)
    weight = (3 * torch.randn(vocab, hidden_size) / hidden_size**0.5).to(dtype)
    return hidden, weight, torch.randn(vocab).to(dtype) if bias else None


def exact_logits(hidden, weight, bias):
    logits = hidden.double() @ weight.double().T
    return logits if bias is None else logits + bias.double()


OPTIONS = {
    "plain": {},
    "greedy": {"temperature": 0.0},
    "hot": {"temperature": 3.0, "statistics": "sampling"},
    "cold": {"temperature": 1e-3, "statistics": "sampling"},
    "top_k": {"top_k": 7, "statistics": "sampling"},
    "top_p": {"top_p": 0.8},
    "top_p_sampling": {"top_p": 0.8, "temperature": 0.7, "statistics": "sampling"},
    "min_p": {"min_p": 0.05, "statistics": "sampling"},
    "k_then_p": {"top_k": 20, "top_p": 0.7, "statistics": "sampling"},
    "joint": {"top_k": 20, "top_p": 0.7, "filter_order": "joint", "statistics": "sampling"},
    "p_then_k": {"top_k": 5, "top_p": 0.7, "filter_order": "top_p_first", "min_p": 0.01, "temperature": 1.5},
    "greedy_filtered": {"temperature": 0.0, "top_k": 9, "top_p": 0.9, "statistics": "sampling"},
    "softcap": {"logit_softcap": 2.5, "temperature": 0.5},
}


def with_rows(options, rows, mask_id):
    """The options plus what belongs to each row: seed, position, step, given tokens."""
    tokens = torch.full((rows,), mask_id)
    tokens[2::3] = torch.arange(rows)[2::3] % mask_id
    return {
        "tokens": tokens,
        "mask_id": mask_id,
        "seed": torch.randint(-(2**62), 2**62, (rows,)),
        "positions": torch.randint(100_000, (rows,)),
        "step": 3,
        **options,
    }


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options(backend, options):
    hidden, weight, bias = lm_head(7, 48, 611)
    options = with_rows(options, 7, mask_id=610)
    gold, clear = oracle(exact_logits(hidden, weight, bias), **options)
    plain = unmask_sample(hidden, weight, bias, **options, **ALL, backend="reference")
    out = unmask_sample(hidden, weight, bias, **options, **ALL, backend=backend)
    assert_matches(out, gold, plain, clear)


SHAPES = [
    (1, 8, 2),
    (1, 64, 257),
    (2, 24, 1024),
    (4, 7, 31),
    (5, 129, 1031),
    (16, 256, 515),
    (17, 40, 2049),
    (67, 33, 130),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize(("rows", "hidden_size", "vocab"), SHAPES)
@pytest.mark.parametrize("filtered", [False, True], ids=["all", "filtered"])
def test_shapes_and_dtypes(backend, rows, hidden_size, vocab, dtype, filtered):
    hidden, weight, bias = lm_head(rows, hidden_size, vocab, dtype, bias=rows % 2 == 0)
    options = {"top_k": 40, "top_p": 0.9, "min_p": 0.001, "statistics": "sampling"} if filtered else {}
    options = with_rows(options, rows, mask_id=vocab // 2)
    logits = exact_logits(hidden, weight, bias)
    gold, clear = oracle(logits, **options)
    if rows == 1:
        clear[:] = clear | (gold.tokens >= 0)  # one row: let it speak, whatever its gap
    plain = unmask_sample(hidden, weight, bias, **options, **ALL, backend="reference")
    out = unmask_sample(hidden, weight, bias, **options, **ALL, backend=backend)
    assert_matches(out, gold, plain, clear)

    logits = logits.to(dtype)
    gold, clear = oracle(logits, **options)
    plain = unmask_sample_from_logits(logits, **options, **ALL, backend="reference")
    out = unmask_sample_from_logits(logits, **options, **ALL, backend=backend)
    clear |= rows == 1
    assert_matches(out, gold, plain, clear)


def test_options_per_row(backend):
    rows, vocab = 12, 700
    hidden, weight, bias = lm_head(rows, 32, vocab)
    options = {
        "temperature": torch.linspace(0, 2, rows),
        "top_k": torch.tensor([0, 1, 5, -1] * 3, dtype=torch.int32),
        "top_p": torch.linspace(1, 0.3, rows),
        "min_p": torch.tensor([0.0, 0.2, 0.01] * 4),
        "seed": torch.arange(rows) * 7 - 30,
        "step": torch.arange(rows, dtype=torch.int32),
        "positions": torch.arange(rows, dtype=torch.int32).flip(0),
        "mask_id": 3,
        "statistics": "sampling",
    }
    gold, clear = oracle(exact_logits(hidden, weight, bias), **options)
    plain = unmask_sample(hidden, weight, bias, **options, **ALL, backend="reference")
    out = unmask_sample(hidden, weight, bias, **options, **ALL, backend=backend)
    assert_matches(out, gold, plain, clear)
    for row in range(rows):  # a number for a single row is the same as the tensor's entry
        alone = {
            name: value[row].item() if isinstance(value, torch.Tensor) else value for name, value in options.items()
        }
        alone["positions"] = options["positions"][row : row + 1]
        single = unmask_sample(hidden[row : row + 1], weight, bias, **alone, **ALL, backend=backend)
        if backend != "reference":
            assert all(same_bits(a, b[row : row + 1]) for a, b in zip(single, out, strict=True))
        assert single.tokens[0] == out.tokens[row]


# ---- bit for bit -----------------------------------------------------------------------------------------------


@pytest.fixture
def compiled(backend):
    if backend == "reference":
        pytest.skip("a promise of the compiled back ends")
    return backend


def assert_same(a: UnmaskSample, b: UnmaskSample, pick=slice(None)) -> None:
    for name, left, right in zip(a._fields, a, b, strict=True):
        assert same_bits(left, right[pick]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("filtered", [False, True], ids=["all", "filtered"])
def test_row_alone_in_any_order_on_any_threads(compiled, dtype, filtered):
    rows = 37
    hidden, weight, bias = lm_head(rows, 65, 1500, dtype)
    filters = {"top_p": 0.95, "top_k": 300} if filtered else {}
    position, seed = torch.randperm(rows), torch.arange(rows) * 11

    def draw(pick):
        return unmask_sample(
            hidden[pick], weight, bias, mask_id=17, seed=seed[pick], positions=position[pick], step=2, **filters, **ALL,
            backend=compiled,
        )  # fmt: skip

    torch.set_num_threads(1)
    whole = draw(torch.arange(rows))
    for count in (1, 2, 3, 8, 16, 17):
        assert_same(draw(torch.arange(count)), whole, slice(count))
    for row in (0, 5, 36):
        assert_same(draw(torch.tensor([row])), whole, slice(row, row + 1))
    torch.set_num_threads(2)
    shuffled = torch.randperm(rows)
    assert_same(draw(shuffled), whole, shuffled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("statistics", ["model", "sampling"])
def test_vocab_shards(backend, dtype, temperature, statistics):
    rows, vocab = 9, 1003
    hidden, weight, bias = lm_head(rows, 48, vocab, dtype)
    tokens = torch.full((rows,), vocab - 1)
    tokens[4] = 8
    options = {
        "tokens": tokens,
        "mask_id": vocab - 1,
        "temperature": temperature,
        "seed": 5,
        "positions": torch.arange(rows),
        "statistics": statistics,
        "return_prob": True,
        "return_entropy": True,
        "return_lse": True,
        "return_score": True,
        "backend": backend,
    }
    whole = unmask_sample(hidden, weight, bias, **options)
    cuts = {
        1: [0, vocab],
        2: [0, 501, vocab],
        3: [0, vocab - 1, vocab],  # the last shard holds nothing but the mask token
        4: [0, 250, 502, 751, vocab],
        8: [0, 1, 126, 251, 377, 503, 630, 875, vocab],
    }
    for shards, edges in cuts.items():
        parts = [
            unmask_sample(hidden, weight[start:stop], bias[start:stop], vocab_start=start, vocab_size=vocab, **options)
            for start, stop in itertools.pairwise(edges)
        ]
        merged = merge_vocab_shards(parts[::-1])
        assert torch.equal(merged.tokens, whole.tokens), shards
        assert not merged.invalid.any()
        if backend == "reference":  # its matmul may add in another order for another shape
            torch.testing.assert_close(merged.score, whole.score, rtol=1e-6, atol=2e-5)
        else:
            assert torch.equal(merged.score, whole.score), shards
        for name in ("logprob", "prob", "entropy", "lse"):
            torch.testing.assert_close(getattr(merged, name), getattr(whole, name), rtol=1e-5, atol=1e-5)


def test_merge_of_invalid_and_empty_shards():
    logits = torch.randn(4, 20)
    logits[1, 15] = math.nan
    logits[2] = -math.inf
    logits[3, :10] = -math.inf
    options = {"positions": torch.arange(4), "return_score": True, "return_lse": True, "return_prob": True}
    parts = [
        unmask_sample_from_logits(logits[:, start : start + 10], vocab_start=start, vocab_size=20, **options)
        for start in (0, 10)
    ]
    merged = merge_vocab_shards(parts)
    whole = unmask_sample_from_logits(logits, **options)
    assert merged.invalid.tolist() == [False, True, True, False] == whole.invalid.tolist()
    assert torch.equal(merged.tokens, whole.tokens)
    for name in ("logprob", "prob", "lse", "score"):
        torch.testing.assert_close(getattr(merged, name), getattr(whole, name), equal_nan=True)


def test_merge_ties_go_to_the_lowest_id():
    logits = torch.zeros(1, 4)
    parts = [
        unmask_sample_from_logits(logits, vocab_start=start, temperature=0, return_score=True, return_logprob=False)
        for start in (8, 0, 4)
    ]
    merged = merge_vocab_shards(parts)
    assert merged.tokens.item() == 0
    assert merged.logprob is None
    assert merged.lse is None


# ---- filters at a large vocabulary -----------------------------------------------------------------------------


def allowed_set(logits: torch.Tensor, top_k=0, top_p=1.0, min_p=0.0, filter_order="top_k_first") -> set[int]:
    """Which ids of one row the filters keep, by a float64 sort."""
    logits = logits.double().cpu().numpy()
    ids = np.lexsort((np.arange(len(logits)), -logits))
    p = np.exp(logits[ids] - logits[ids[0]])
    k = top_k if top_k > 0 else len(ids)
    mass = np.where(np.arange(len(ids)) < k, p, 0.0) if filter_order == "top_k_first" else p
    mass = mass / math.fsum(mass)
    kept = (np.arange(len(ids)) < k) & (p >= min_p)
    if top_p < 1:
        kept &= np.concatenate([[0.0], np.cumsum(mass)[:-1]]) < top_p
    return set(ids[kept].tolist())


def tied_logits(vocab: int) -> torch.Tensor:
    """5 ids at 3, 20,000 at 1, the rest at 0, scattered."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(vocab)
    logits = torch.zeros(vocab)
    scattered = torch.randperm(vocab, generator=generator)
    logits[scattered[:20_000]] = 1.0
    logits[scattered[:5]] = 3.0
    return logits


def fraction(logits: torch.Tensor, head: float, tied: float) -> float:
    """The mass of `head` ids at 3 and `tied` ids at 1."""
    total = logits.double().exp().sum().item()
    return (head * math.exp(3) + tied * math.e) / total


TIED_FILTERS = {
    "k": lambda logits: {"top_k": 5},
    "k-tie": lambda logits: {"top_k": 13},  # cuts the tie: the lowest ids stay
    "p": lambda logits: {"top_p": fraction(logits, 2.5, 0)},
    "p-tie": lambda logits: {"top_p": fraction(logits, 5, 7.5)},  # cuts the tie 8 ids in
    "min_p": lambda logits: {"min_p": 1.01 * math.exp(-2)},
    "k-p": lambda logits: {"top_k": 10, "top_p": 0.85},
    "joint": lambda logits: {"top_k": 10, "top_p": fraction(logits, 5, 2.5), "filter_order": "joint"},
    "p-k": lambda logits: {"top_k": 4, "top_p": fraction(logits, 5, 2.5), "filter_order": "top_p_first"},
    "all": lambda logits: {"top_k": 30_000, "top_p": 0.999, "min_p": 0.9},
}


@pytest.mark.parametrize("make", TIED_FILTERS.values(), ids=TIED_FILTERS.keys())
def test_allowed_set(backend, make):
    """By its mass: one id more or less would move lse by at least 2e-2."""
    logits, draws = tied_logits(151_936), 3
    filters = make(logits)
    expected = allowed_set(logits, **filters)
    drawn = unmask_sample_from_logits(
        logits.expand(draws, -1), **filters, positions=torch.arange(draws), statistics="sampling", return_lse=True,
        backend=backend,
    )  # fmt: skip
    assert set(drawn.tokens.tolist()) <= expected
    exact = torch.logsumexp(logits[sorted(expected)].double(), 0)
    torch.testing.assert_close(drawn.lse.double(), exact.expand(draws), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["k-tie", "p-tie", "joint"])
def test_allowed_set_id_by_id(name):
    """By the draws: no other id, and nearly all of the set (of the tie, the lowest ids)."""
    logits, draws = tied_logits(262_144), 150
    filters = TIED_FILTERS[name](logits)
    expected = allowed_set(logits, **filters)
    tokens = unmask_sample_from_logits(
        logits.expand(draws, -1), **filters, positions=torch.arange(draws), seed=3, return_logprob=False
    ).tokens
    rarest = (1 - logits[sorted(expected)].double().logsumexp(0)).exp().item()
    assert draws * rarest > 2.5  # so an id of the set stays out with a probability below 8 %
    drawn = set(tokens.tolist())
    assert drawn <= expected
    assert len(drawn) >= 0.8 * len(expected)


def test_flat_vocabulary_keeps_the_lowest_ids(backend):
    vocab, draws = 151_936, 3
    drawn = unmask_sample_from_logits(
        torch.full((1, vocab), -1000.0).expand(draws, -1), top_p=10.5 / vocab, positions=torch.arange(draws),
        statistics="sampling", return_lse=True, return_margin=True, backend=backend,
    )  # fmt: skip
    assert drawn.tokens.max() < 11
    torch.testing.assert_close(drawn.lse, torch.full((draws,), -1000 + math.log(11)))
    assert (drawn.margin == 0).all()


# ---- limits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"top_k": 1}, {"top_p": 1e-9}, {"top_p": 1e-300}, {"min_p": 1.0}, {"temperature": 0.0}, {"temperature": 1e-6},
     {"temperature": 1e-38}, {"temperature": 1e-6, "top_p": 0.5, "min_p": 0.1}, {"temperature": 1e30, "top_k": 1}],
    ids=str,
)  # fmt: skip
def test_limits_are_argmax(backend, options):
    hidden, weight, _ = lm_head(6, 32, 900)
    logits = hidden @ weight.T
    logits[:, 700:] = logits[:, :200]  # every id of the first 200 has an equal one further up
    logits[:, 300] = logits[:, 3] = logits.amax(1) + 0.5
    drawn = unmask_sample_from_logits(logits, positions=torch.arange(6), **options, **ALL, backend=backend)
    if (
        "min_p" not in options
        and options.get("temperature", 1) > 0
        and "top_k" not in options
        and "top_p" not in options
    ):
        assert set(drawn.tokens.tolist()) <= {3, 300}  # the noise decides between the two
    elif options == {"min_p": 1.0} or options.get("top_p") == 0.5:
        assert set(drawn.tokens.tolist()) <= {3, 300}
    else:
        assert drawn.tokens.tolist() == [3] * 6
    assert not drawn.invalid.any()
    for name in STATISTICS:
        assert getattr(drawn, name).isfinite().all()


def test_filters_that_keep_all_change_nothing(compiled):
    hidden, weight, bias = lm_head(5, 32, 900)
    options = {"positions": torch.arange(5), "mask_id": 0, **ALL, "backend": compiled}
    whole = unmask_sample(hidden, weight, bias, **options)
    for filters in ({"top_p": 1.0}, {"top_k": 0}, {"top_k": -1}, {"top_k": 900}, {"top_k": 5000}, {"min_p": 0.0}):
        assert_same(unmask_sample(hidden, weight, bias, **filters, **options), whole)
        as_tensors = {name: torch.full((5,), value) for name, value in filters.items()}
        assert_same(unmask_sample(hidden, weight, bias, **as_tensors, **options), whole)


def test_statistics_of_all_negative_logits(backend):
    logits = torch.tensor([[-5000.0, -5001.0, -5003.0]])
    drawn = unmask_sample_from_logits(logits, temperature=0, **ALL, backend=backend)
    p = torch.tensor([0.0, -1.0, -3.0], dtype=torch.float64).softmax(0)
    assert drawn.tokens.item() == 0
    assert drawn.prob.item() == pytest.approx(p[0].item(), rel=1e-5)
    assert drawn.margin.item() == pytest.approx((p[0] - p[1]).item(), rel=1e-5)
    assert drawn.entropy.item() == pytest.approx(-(p * p.log()).sum().item(), rel=1e-4)
    assert drawn.lse.item() == pytest.approx(-5000 - p[0].log().item(), rel=1e-6)


@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("statistics", ["model", "sampling"])
def test_rows_without_a_distribution(backend, filters, temperature, statistics):
    """NaN, +inf or nothing finite: flagged, the token untouched, the rows beside it undisturbed."""
    vocab, mask_id = 300, 299
    logits = torch.randn(8, vocab)
    clean = logits.clone()
    logits[0, 7] = math.nan
    logits[1] = math.nan
    logits[2, 250] = math.inf
    logits[3] = -math.inf
    logits[4, mask_id] = math.nan  # the mask token's logit is nobody's business
    logits[5, : vocab - 2] = -math.inf  # one candidate left
    logits[6, 100] = math.nan  # carried over: not looked at
    tokens = torch.full((8,), mask_id)
    tokens[6] = 42
    options = {
        "tokens": tokens,
        "mask_id": mask_id,
        "temperature": temperature,
        "positions": torch.arange(8),
        "statistics": statistics,
        "backend": backend,
        **filters,
        **ALL,
    }
    drawn = unmask_sample_from_logits(logits, **options)
    assert drawn.invalid.tolist() == [True, True, True, True, False, False, False, False]
    assert drawn.tokens[:4].tolist() == [mask_id] * 4
    assert drawn.tokens[5].item() == vocab - 2
    assert drawn.tokens[6].item() == 42
    for name in ("logprob", "prob", "margin", "entropy"):
        assert getattr(drawn, name)[:4].isnan().all(), name
    for name in ("lse", "score"):
        assert getattr(drawn, name)[:3].isnan().all(), name
        assert getattr(drawn, name)[3] == -math.inf, name
    assert [getattr(drawn, name)[5].item() for name in ("logprob", "prob", "margin", "entropy")] == [0, 1, 1, 0]
    assert [getattr(drawn, name)[6].item() for name in STATISTICS] == [0, 1, 1, 0, 0, math.inf]
    beside = unmask_sample_from_logits(clean, **options)
    for name in ("tokens", *STATISTICS):
        assert same_bits(getattr(drawn, name)[[4, 7]], getattr(beside, name)[[4, 7]]), name


def test_invalid_rows_of_the_fused_head(backend):
    hidden, weight, bias = lm_head(5, 32, 200)
    hidden[1, 3] = math.nan
    hidden[2] = math.inf
    drawn = unmask_sample(hidden, weight, bias, positions=torch.arange(5), mask_id=199, top_p=0.9, backend=backend)
    assert drawn.invalid.tolist() == [False, True, True, False, False]
    assert drawn.tokens[1:3].tolist() == [199, 199]
    # Without tokens and mask_id the id is 0: always a legal one.
    drawn = unmask_sample(hidden, weight, bias, positions=torch.arange(5), vocab_start=1000, backend=backend)
    assert drawn.tokens[1:3].tolist() == [0, 0]


def test_mask_token_is_never_drawn(backend):
    logits = torch.zeros(200, 5)
    logits[:, 3] = 50.0
    options = {"positions": torch.arange(200), "backend": backend}
    assert (unmask_sample_from_logits(logits, **options).tokens == 3).all()
    drawn = unmask_sample_from_logits(logits, mask_id=3, return_lse=True, return_margin=True, **options)
    assert (drawn.tokens != 3).all()
    torch.testing.assert_close(drawn.lse, torch.full((200,), math.log(4)))
    assert (drawn.margin == 0).all()
    assert (unmask_sample_from_logits(logits, mask_id=3, temperature=0, backend=backend).tokens == 0).all()
    # A mask token outside of the head suppresses nothing, but still says which rows are drawn.
    tokens = torch.tensor([9, 1] * 100)
    drawn = unmask_sample_from_logits(logits, tokens=tokens, mask_id=9, **options)
    assert (drawn.tokens[::2] == 3).all()
    assert (drawn.tokens[1::2] == 1).all()


def test_carry_over(backend):
    hidden, weight, bias = lm_head(6, 32, 100)
    tokens = torch.tensor([99, 1, 99, 2, 99, 3])
    before = tokens.clone()
    options = {"positions": torch.arange(6), "backend": backend}
    drawn = unmask_sample(hidden, weight, bias, tokens=tokens, mask_id=99, **options)
    assert torch.equal(tokens, before)
    assert drawn.tokens[1::2].tolist() == [1, 2, 3]
    assert (drawn.tokens[::2] < 99).all()
    everything = unmask_sample(hidden, weight, bias, mask_id=99, **options)
    assert torch.equal(drawn.tokens[::2], everything.tokens[::2])
    as_int32 = unmask_sample(hidden, weight, bias, tokens=tokens.int(), mask_id=99, **options)
    assert as_int32.tokens.dtype == torch.int32
    assert torch.equal(as_int32.tokens.long(), drawn.tokens)
    strided = torch.stack([tokens, tokens], 1)[:, 0]
    assert torch.equal(unmask_sample(hidden, weight, bias, tokens=strided, mask_id=99, **options).tokens, drawn.tokens)
    # Without a mask_id every row is drawn and every id may be.
    redrawn = unmask_sample(hidden, weight, bias, tokens=tokens, **options)
    assert torch.equal(redrawn.tokens, unmask_sample(hidden, weight, bias, **options).tokens)
    nothing_to_do = unmask_sample(hidden, weight, bias, tokens=tokens, mask_id=98, **options)
    assert torch.equal(nothing_to_do.tokens, tokens)


def test_strided_inputs(backend):
    hidden, weight, bias = lm_head(6, 32, 100)
    options = {"positions": torch.arange(6), "backend": backend}
    expected = unmask_sample(hidden, weight, bias, **options)
    wide_hidden, wide_weight = torch.full((12, 50), math.nan), torch.full((100, 47), math.nan)
    wide_hidden[::2, 5:37], wide_weight[:, :32] = hidden, weight
    drawn = unmask_sample(wide_hidden[::2, 5:37], wide_weight[:, :32], bias, **options)
    torch.testing.assert_close(drawn.logprob, expected.logprob)
    assert torch.equal(drawn.tokens, expected.tokens)
    logits = hidden @ weight.T
    wide_logits = torch.full((6, 300), math.nan)
    wide_logits[:, 100:200] = logits
    from_view = unmask_sample_from_logits(wide_logits[:, 100:200], **options)
    assert torch.equal(from_view.tokens, unmask_sample_from_logits(logits, **options).tokens)


def test_no_rows(backend):
    drawn = unmask_sample(torch.randn(0, 8), torch.randn(20, 8), positions=torch.arange(0), **ALL, backend=backend)
    assert [field.shape for field in drawn] == [(0,)] * 8
    drawn = unmask_sample_from_logits(torch.randn(0, 8), positions=torch.arange(0), top_p=0.5, backend=backend)
    assert drawn.tokens.shape == (0,)


def test_only_what_is_asked_for(backend):
    logits = torch.randn(2, 9)
    drawn = unmask_sample_from_logits(logits, temperature=0, return_logprob=False, backend=backend)
    assert drawn[1:7] == (None,) * 6
    full = unmask_sample_from_logits(logits, temperature=0, **ALL, backend=backend)
    for name in STATISTICS:
        options = {"return_logprob": False, f"return_{name}": True}
        only = unmask_sample_from_logits(logits, temperature=0, **options, backend=backend)
        assert torch.equal(getattr(only, name), getattr(full, name))
        assert sum(field is not None for field in only) == 3


# ---- errors ----------------------------------------------------------------------------------------------------

HIDDEN, WEIGHT, POSITIONS = torch.zeros(3, 4), torch.zeros(9, 4), torch.arange(3)
ERRORS = [
    ({"hidden": torch.zeros(3, 5)}, ValueError, r"hidden: must be \[rows, 4\] for a weight \[9, 4\], got \[3, 5\]"),
    ({"hidden": torch.zeros(4)}, ValueError, r"hidden: must be \[rows, hidden_size\], got \[4\]"),
    ({"hidden": torch.zeros(3, 4, dtype=torch.float64)}, TypeError, "hidden: got torch.float64, supported are"),
    ({"hidden": torch.zeros(4, 3).T}, ValueError, "hidden: the last dimension must be contiguous"),
    ({"weight": torch.zeros(9, 4, dtype=torch.bfloat16)}, TypeError, "weight: must have the dtype of hidden"),
    ({"weight": torch.zeros(0, 4)}, ValueError, "weight: the vocabulary is empty"),
    ({"bias": torch.zeros(8)}, ValueError, r"bias: must be \[9\], got \[8\]"),
    ({"bias": torch.zeros(9, dtype=torch.float16)}, TypeError, "bias: must have the dtype of hidden"),
    ({"tokens": torch.zeros(2, dtype=torch.int64)}, ValueError, r"tokens: must be \[3\], got \[2\]"),
    ({"tokens": torch.zeros(3)}, TypeError, "tokens: must be int64 or int32, got torch.float32"),
    ({"mask_id": -1}, ValueError, "mask_id: must be >= 0 or None, got -1"),
    ({"temperature": -0.5}, ValueError, r"temperature: must be in \[0.0, 1e\+30\], got -0.5"),
    ({"temperature": math.nan}, ValueError, "temperature: must be in .*, got nan"),
    ({"temperature": math.inf}, ValueError, "temperature: must be in .*, got inf"),
    ({"temperature": torch.tensor([1.0, math.nan, 1.0])}, ValueError, "temperature: must be in .*, got nan"),
    ({"temperature": torch.tensor([1.0, 1.0])}, ValueError, r"temperature: must be a number or \[3\], got \[2\]"),
    ({"temperature": torch.tensor([1, 1, 1])}, TypeError, "temperature: must be floating-point, got torch.int64"),
    ({"top_k": 2.5}, TypeError, "top_k: must be an int or an integer tensor"),
    ({"top_p": 0.0}, ValueError, r"top_p: must be in \(0, 1\], got 0.0"),
    ({"top_p": torch.tensor([0.5, 1.5, 1.0])}, ValueError, r"top_p: must be in \(0, 1\], got 1.5"),
    ({"min_p": 1.1}, ValueError, r"min_p: must be in \[0.0, 1.0\], got 1.1"),
    ({"filter_order": "min_p_first"}, ValueError, "filter_order: got 'min_p_first', supported are top_k_first"),
    ({"seed": 2**64}, ValueError, "seed: must be in"),
    ({"seed": torch.zeros(4, dtype=torch.int64)}, ValueError, r"seed: must be a number or \[3\], got \[4\]"),
    ({"positions": None}, ValueError, "positions: needed when a temperature is > 0"),
    ({"positions": None, "temperature": torch.tensor([0.0, 0.0, 1.0])}, ValueError, "positions: needed when"),
    ({"positions": torch.zeros(3)}, TypeError, "positions: must be int64 or int32, got torch.float32"),
    ({"positions": 3}, TypeError, "positions: must be an int64 or int32 tensor"),
    ({"step": -1}, ValueError, "step: must be in"),
    ({"logit_softcap": 0.0}, ValueError, "logit_softcap: must be finite and > 0, or None, got 0.0"),
    ({"vocab_start": -4}, ValueError, "vocab_start: ids -4 .. 4 must lie in the vocabulary"),
    ({"vocab_start": 4, "vocab_size": 12}, ValueError, "vocab_start: ids 4 .. 12 must lie .* vocab_size 12"),
    ({"vocab_start": 4, "top_p": 0.5}, ValueError, "filters need the whole vocabulary"),
    ({"vocab_size": 12, "top_k": 2}, ValueError, "filters need the whole vocabulary"),
    ({"statistics": "both"}, ValueError, "statistics: got 'both', supported are model, sampling"),
    ({"backend": "tpu"}, ValueError, "backend: got 'tpu'"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), ERRORS, ids=[message[:40] for _, _, message in ERRORS])
def test_errors(change, error, message):
    arguments = {"hidden": HIDDEN, "weight": WEIGHT, "positions": POSITIONS, **change}
    with pytest.raises(error, match=f"unmask_sample: .*{message}"):
        unmask_sample(**arguments)


def test_errors_of_logits():
    with pytest.raises(ValueError, match=r"logits: must be \[rows, vocab\], got \[9\]"):
        unmask_sample_from_logits(torch.zeros(9), temperature=0)
    with pytest.raises(TypeError, match=r"logits: got torch\.int64"):
        unmask_sample_from_logits(torch.zeros(1, 9, dtype=torch.int64), temperature=0)
    with pytest.raises(ValueError, match="logits: the vocabulary is empty"):
        unmask_sample_from_logits(torch.zeros(1, 0), temperature=0)


def test_errors_of_merging():
    options = {"temperature": 0, "return_score": True}
    part = unmask_sample_from_logits(torch.zeros(2, 5), **options, return_logprob=False)
    with pytest.raises(ValueError, match="shards: got none"):
        merge_vocab_shards([])
    with pytest.raises(ValueError, match=r"shards\[1\]: has no score"):
        merge_vocab_shards([part, part._replace(score=None)])
    with pytest.raises(ValueError, match="logprob, prob and entropy need"):
        merge_vocab_shards([unmask_sample_from_logits(torch.zeros(2, 5), **options)])
    with pytest.raises(ValueError, match="has a margin"):
        merge_vocab_shards([unmask_sample_from_logits(torch.zeros(2, 5), **options, return_margin=True)])
    with pytest.raises(ValueError, match="lse: given by some shards"):
        merge_vocab_shards([part, part._replace(lse=part.score)])
    with pytest.raises(ValueError, match=r"shards\[1\]: has 1 rows, shards\[0\] 2"):
        merge_vocab_shards([part, unmask_sample_from_logits(torch.zeros(1, 5), **options, return_logprob=False)])


def test_gradients():
    hidden, weight, _ = lm_head(3, 8, 20)
    weight.requires_grad_()
    with pytest.raises(ValueError, match="an input requires grad"):
        unmask_sample(hidden, weight, temperature=0)
    drawn = unmask_sample(hidden, weight, temperature=0, backend="reference")
    drawn.logprob.sum().backward()
    expected = torch.autograd.functional.jacobian(
        lambda w: (hidden @ w.T).log_softmax(1).gather(1, drawn.tokens[:, None]).sum(), weight.detach()
    )
    torch.testing.assert_close(weight.grad, expected)
    with torch.no_grad():
        assert torch.equal(unmask_sample(hidden, weight, temperature=0).tokens, drawn.tokens)
