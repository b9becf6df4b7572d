"""unmask_select against an oracle (select_cases.py): equal in every output, whatever the values."""

import math

import pytest
import torch
from scipy.stats import chisquare

from esokern.testing import POISON_INT
from esokern.unmask_select import UnmaskSelect, unmask_select
from select_cases import MASK, assert_as_oracle, hostile_call, scattered_masks

RULES = {
    "num_select": {"num_select": 3},
    "threshold": {"threshold": 0.6},
    "at_least_one": {"threshold": 0.999, "num_select": 1},
    "factor": {"factor": 0.9},
    "factor_of_many": {"factor": 30.0},
    "entropy_bound": {"entropy_bound": 0.8},
    "all_rules": {"num_select": 2, "threshold": 0.8, "factor": 0.7, "entropy_bound": 0.3},
    "temperature": {"num_select": 4, "temperature": 0.3, "seed": 5, "step": 2},
    "random": {"num_select": 4, "temperature": math.inf, "seed": -6, "step": 2**32 - 1},
    "noisy_threshold": {"threshold": 1.5, "temperature": 0.5, "seed": 2**64 - 1},
    "noisy_factor": {"factor": 2.0, "entropy_bound": 1.0, "temperature": 0.05},
    "edit": {"num_select": 1, "edit_threshold": 0.7},
    "remask": {"num_select": 1, "remask_threshold": 0.3},
    "edit_and_remask": {"threshold": 0.9, "edit_threshold": 0.9, "remask_threshold": 0.4},
}


@pytest.mark.parametrize("options", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("width", [1, 2, 33, 200])
def test_rules(backend, options, width):
    batch, length = 4, width + 5
    arguments = {
        "tokens": scattered_masks(batch, length),
        "proposed": torch.randint(MASK + 1, (batch, width)),
        "confidence": torch.rand(batch, width),
        "mask_id": MASK,
        "entropy": torch.rand(batch, width) if "entropy_bound" in options else None,
        "window_start": 3,
        "done": torch.tensor([False, False, True, False]),
    }
    assert_as_oracle(backend, **arguments, **options)
    assert_as_oracle(backend, **arguments, **options, editable=torch.rand(batch, length) < 0.5)
    arguments["proposed"] = torch.randint(MASK, (batch, width))
    arguments["tokens"].fill_(MASK)
    assert_as_oracle(backend, **arguments, **options)


@pytest.mark.parametrize("part", range(4))
def test_hostile_values(backend, part):
    for number in range(part, 120, 4):
        assert_as_oracle(backend, **hostile_call(number))


def test_numbers_are_the_same_for_all_rows(backend):
    batch, width = 3, 40
    numbers = {
        "window_start": 2, "window_length": 37, "num_select": 2, "threshold": 0.9, "factor": 1.5, "entropy_bound": 0.4,
        "temperature": 0.1, "seed": 12, "step": 3, "edit_threshold": 0.95, "remask_threshold": 0.05,
    }  # fmt: skip
    call = {
        "tokens": scattered_masks(batch, width + 2),
        "proposed": torch.randint(MASK, (batch, width)),
        "confidence": torch.rand(batch, width),
        "entropy": torch.rand(batch, width),
        "mask_id": MASK,
    }
    expected = assert_as_oracle(backend, **call, **numbers)
    for tensors in (
        {name: torch.tensor(value) for name, value in numbers.items()},
        {name: torch.full((batch,), value) for name, value in numbers.items()},
        {name: torch.full((batch, 2), value)[:, 0] for name, value in numbers.items()},
    ):
        result = assert_as_oracle(backend, **call, **tensors)
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_strides(backend):
    """Inputs of any strides; what lies between their elements and outside of windows is not read."""
    batch, width = 4, 50
    arguments = {
        "tokens": scattered_masks(batch, width + 10),
        "proposed": torch.randint(MASK + 1, (batch, width)),
        "confidence": torch.rand(batch, width),
        "entropy": torch.rand(batch, width),
        "editable": torch.rand(batch, width + 10) < 0.5,
        "mask_id": MASK, "window_start": 6, "num_select": 2, "factor": 1.0, "entropy_bound": 0.7,
        "edit_threshold": 0.8, "remask_threshold": 0.2,
    }  # fmt: skip
    expected = assert_as_oracle(backend, **arguments)

    def every_other(tensor):
        nothing = {torch.int64: POISON_INT, torch.float32: math.nan, torch.bool: True}[tensor.dtype]
        wide = torch.full((2 * batch + 1, 3 * tensor.shape[1] + 1), nothing, dtype=tensor.dtype)
        wide[1::2, 1::3] = tensor
        return wide[1::2, 1::3]

    names = ("proposed", "confidence", "entropy", "editable")
    for change in (every_other, lambda tensor: tensor.T.contiguous().T):
        result = assert_as_oracle(backend, **arguments)
        changed = arguments | {name: change(arguments[name]) for name in names}
        result = assert_as_oracle(backend, **changed)
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_columns_behind_the_window_are_not_read(backend):
    batch, width = 3, 24
    lengths = torch.tensor([24, 5, 0])
    unused = torch.arange(width) >= lengths[:, None]
    arguments = {
        "tokens": scattered_masks(batch, 30),
        "proposed": torch.randint(MASK, (batch, width)).masked_fill(unused, POISON_INT),
        "confidence": torch.rand(batch, width).masked_fill(unused, math.inf),
        "entropy": torch.rand(batch, width).masked_fill(unused, math.nan),
        "mask_id": MASK, "window_length": lengths, "window_start": torch.tensor([0, 25, 30]), "threshold": 0.5,
        "entropy_bound": 0.5, "edit_threshold": 0.5,
    }  # fmt: skip
    result = assert_as_oracle(backend, **arguments)
    assert not result.transfer_index[unused].any()
    assert result.num_masked[2] == 0


@pytest.mark.parametrize("temperature", [None, 0.5, math.inf])
def test_row_alone_in_any_order_on_any_threads(backend, temperature):
    batch, width = 150, 250
    tokens = scattered_masks(batch, width + 8)
    given = {
        "proposed": torch.randint(MASK + 1, (batch, width)),
        "confidence": torch.rand(batch, width),
        "window_start": torch.randint(9, (batch,)),
        "num_select": torch.randint(20, (batch,), dtype=torch.int32),
        "factor": 20 * torch.rand(batch),
        "seed": torch.arange(batch),
    }

    def run(rows):
        text = tokens[rows].clone()
        arguments = {name: value[rows] for name, value in given.items()}
        result = unmask_select(
            text, **arguments, mask_id=MASK, temperature=temperature, return_transfer_index=True, backend=backend
        )
        return (text, *result)

    torch.set_num_threads(1)
    whole = run(torch.arange(batch))
    torch.set_num_threads(2)
    for rows in (torch.randperm(batch), torch.arange(3), torch.tensor([149]), torch.tensor([7])):
        for name, part, all_rows in zip(("tokens", *UnmaskSelect._fields), run(rows), whole, strict=True):
            assert torch.equal(part, all_rows[rows]), name


def test_far_positions(backend):
    """The noise takes the low 32 bits of a position, wherever the window begins."""
    length = 2**21
    tokens = torch.zeros(1, length, dtype=torch.int64)
    tokens[0, -40:] = MASK
    proposed, confidence = torch.ones(1, 40, dtype=torch.int64), torch.zeros(1, 40)
    options = {"mask_id": MASK, "num_select": 11, "temperature": math.inf, "seed": 3}
    assert_as_oracle(backend, tokens, proposed, confidence, window_start=length - 40, **options)
    short = torch.full((1, 40), MASK)
    unmask_select(short, proposed, confidence, **options, backend=backend)
    unmask_select(tokens, proposed, confidence, window_start=length - 40, **options, backend=backend)
    assert not torch.equal(short[0], tokens[0, -40:])


def test_equal_keys_go_to_the_lower_position(backend):
    tokens = torch.full((3, 300), MASK)
    confidence = torch.full((3, 300), 0.5)
    confidence[1] = torch.tensor([0.0, -0.0]).repeat(150)  # one value
    confidence[2] = torch.tensor([math.nan, -math.inf, -math.inf]).repeat(100)  # another
    unmask_select(
        tokens, torch.zeros(3, 300, dtype=torch.int64), confidence, mask_id=MASK, num_select=100, backend=backend
    )
    assert (tokens[:, :100] == 0).all()
    assert (tokens[:, 100:] == MASK).all()


def test_entropies_are_summed_in_float64(backend):
    """1 + 3 * 2^-25 - 1 is 3 * 2^-25, which a bound of just that allows, and nothing more."""
    entropy = torch.full((2, 40), 2.0**-25)
    entropy[:, 0] = 1.0
    confidence = torch.linspace(1, 0, 40).expand(2, -1)
    bound = torch.full((2,), 3 * 2.0**-25)
    tokens, proposed = torch.full((2, 40), MASK), torch.zeros(2, 40, dtype=torch.int64)
    bound[1] = torch.nextafter(bound[0], torch.zeros(()))
    options = {"mask_id": MASK, "entropy": entropy, "entropy_bound": bound}
    assert assert_as_oracle(backend, tokens, proposed, confidence, **options).num_transferred.tolist() == [4, 3]


def test_a_whole_generation(backend):
    """Rows get done on their own, at their own pace, and stay as they are then."""
    batch, length = 4, 20
    tokens = torch.full((batch, length), MASK)
    tokens[:, :4] = 1
    done = torch.zeros(batch, dtype=torch.bool)
    pace = torch.tensor([1, 2, 5, 16], dtype=torch.int32)
    for step in range(16):
        proposed = torch.randint(MASK, (batch, 16))
        before = tokens.clone()
        result = unmask_select(
            tokens, proposed, torch.rand(batch, 16), mask_id=MASK, window_start=4, num_select=pace, done=done,
            backend=backend,
        )  # fmt: skip
        left = (16 - pace * (step + 1)).clamp(min=0)
        assert torch.equal(result.num_masked, left)
        assert torch.equal(done, left == 0)
        assert torch.equal(result.num_transferred, (before != tokens).sum(1).int())
    assert not (tokens == MASK).any()


def test_editing_ends_when_nothing_changes(backend):
    """A block without masks is not done as long as tokens are edited in it."""
    tokens, done = torch.tensor([[1, 2, 3]]), torch.zeros(1, dtype=torch.bool)
    proposed, sure = torch.tensor([[1, 5, 6]]), torch.tensor([[1.0, 0.95, 0.5]])
    options = {"mask_id": MASK, "edit_threshold": 0.9, "done": done, "return_transfer_index": True, "backend": backend}
    result = unmask_select(tokens, proposed, sure, **options)
    assert tokens.tolist() == [[1, 5, 3]]
    assert result.transfer_index.tolist() == [[False, True, False]]
    assert (result.num_masked.item(), result.num_transferred.item(), done.item()) == (0, 1, False)
    result = unmask_select(tokens, proposed, sure, **options)
    assert tokens.tolist() == [[1, 5, 3]]
    assert (result.num_masked.item(), result.num_transferred.item(), done.item()) == (0, 0, True)


def test_remasking_gets_ahead(backend):
    """Two tokens taken back: three positions are chosen, whatever num_select says, and masks become fewer."""
    tokens = torch.tensor([[0, 1, MASK, MASK, 4]])
    proposed, sure = torch.tensor([[5, 5, 5, 5, 5]]), torch.tensor([[0.2, 0.1, 0.3, 0.05, 0.8]])
    result = unmask_select(tokens, proposed, sure, mask_id=MASK, num_select=1, remask_threshold=0.5, backend=backend)
    assert tokens.tolist() == [[5, 5, 5, MASK, 4]]
    assert (result.num_masked.item(), result.num_transferred.item()) == (1, 3)
    assert result.transfer_index is None


def test_empty(backend):
    for batch, length, width in [(0, 5, 3), (2, 5, 0), (2, 0, 0), (0, 0, 0), (1, 1, 1)]:
        arguments = {
            "tokens": torch.zeros(batch, length, dtype=torch.int64),
            "proposed": torch.zeros(batch, width, dtype=torch.int64),
            "confidence": torch.zeros(batch, width),
            "entropy": torch.zeros(batch, width),
            "done": torch.zeros(batch, dtype=torch.bool),
        }
        assert_as_oracle(
            backend, **arguments, mask_id=MASK, num_select=1, factor=1.0, entropy_bound=1.0, temperature=1.0
        )


# ---- distribution ----------------------------------------------------------------------------------------------


def frequency_of_sets(confidence, count, *, draws=40_000, **options):
    """How often each set of columns is chosen out of masks with that confidence: {columns: draws}."""
    width = len(confidence)
    tokens = torch.full((draws, width), MASK)
    unmask_select(
        tokens, torch.zeros(draws, width, dtype=torch.int64), torch.tensor(confidence).expand(draws, -1), mask_id=MASK,
        num_select=count, seed=torch.arange(draws), **options,
    )  # fmt: skip
    rows, counts = (tokens == 0).unique(dim=0, return_counts=True)
    return {tuple(row.nonzero()[:, 0].tolist()): n for row, n in zip(rows, counts.tolist(), strict=True)}


def probabilities_of_sets(p, count, before=()):
    """Draws without replacement, each from what is left of p."""
    if count == 0:
        return {tuple(sorted(before)): 1.0}
    left = 1 - sum(p[i] for i in before)
    total = {}
    for i in set(range(len(p))) - set(before):
        for chosen, probability in probabilities_of_sets(p, count - 1, (*before, i)).items():
            total[chosen] = total.get(chosen, 0.0) + p[i] / left * probability
    return total


def agrees(counts: dict, probabilities: dict) -> bool:
    assert set(counts) <= set(probabilities)
    draws = sum(counts.values())
    observed = [counts.get(chosen, 0) for chosen in probabilities]
    return chisquare(observed, [draws * probability for probability in probabilities.values()]).pvalue > 1e-3


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0, math.inf])
def test_draws_without_replacement(count, temperature):
    confidence = [0.9, 0.1, -0.4, 0.5, 0.5, 0.0]
    p = (torch.tensor(confidence, dtype=torch.float64) / temperature).softmax(0).tolist()
    counts = frequency_of_sets(confidence, count, temperature=temperature, step=count)
    assert agrees(counts, probabilities_of_sets(p, count))
    if temperature == 0.5:  # the test sees a wrong temperature
        flatter = (torch.tensor(confidence, dtype=torch.float64) / 0.55).softmax(0).tolist()
        assert not agrees(counts, probabilities_of_sets(flatter, count))


def test_positions_and_steps_draw_anew():
    """Uniform over columns for every window and step of one seed, and windows that overlap agree where they do."""
    draws, width = 6000, 5
    tokens, proposed = torch.full((draws, 40), MASK), torch.zeros(draws, width, dtype=torch.int64)
    unmask_select(
        tokens, proposed, torch.zeros(draws, width), mask_id=MASK, num_select=1, temperature=math.inf, seed=9,
        window_start=torch.arange(draws) % 36, step=torch.arange(draws) // 36,
    )  # fmt: skip
    rows, positions = (tokens == 0).nonzero(as_tuple=True)
    columns = positions - rows % 36
    assert chisquare(torch.bincount(columns, minlength=width).tolist()).pvalue > 1e-3
    first, again = torch.full((1, 40), MASK), torch.full((1, 40), MASK)
    options = {"mask_id": MASK, "num_select": 0, "threshold": 1.0, "temperature": math.inf, "seed": 4}
    unmask_select(first, proposed[:1].expand(1, 5), torch.zeros(1, 5), **options, window_start=10)
    unmask_select(again, torch.zeros(1, 30, dtype=torch.int64), torch.zeros(1, 30), **options)
    assert torch.equal(first[0, 10:15], again[0, 10:15])


@pytest.mark.parametrize("p", [0.1, 0.5, 0.97])
def test_threshold_on_noise_keeps_each_with_probability_p(p):
    """temperature inf and threshold -log(-log(1 - p)): every mask falls on its own (ancestral unmasking)."""
    width = 4
    threshold = -math.log(-math.log1p(-p))
    counts = frequency_of_sets([0.3, 0.9, -5.0, 2.0], 0, threshold=threshold, temperature=math.inf)
    every = range(2**width)
    sets = {tuple(i for i in range(width) if bits >> i & 1) for bits in every}
    assert agrees(counts, {chosen: p ** len(chosen) * (1 - p) ** (width - len(chosen)) for chosen in sets})


# ---- errors ----------------------------------------------------------------------------------------------------

INTEGERS, FLOATS = torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 4)
ERRORS = [
    ({"tokens": torch.zeros(4, dtype=torch.int64)}, ValueError, r"tokens, proposed: .*, got \[4\] and \[2, 4\]"),
    ({"tokens": torch.zeros(3, 4, dtype=torch.int64)}, ValueError, r"got \[3, 4\] and \[2, 4\]"),
    ({"tokens": INTEGERS.int()}, TypeError, "tokens: must be torch.int64, got torch.int32"),
    ({"tokens": torch.zeros(2, 8, dtype=torch.int64)[:, ::2]}, ValueError, r"tokens: .*, got strides \[8, 2\]"),
    ({"proposed": FLOATS}, TypeError, "proposed: must be torch.int64, got torch.float32"),
    ({"confidence": FLOATS.bfloat16()}, TypeError, "confidence: must be torch.float32, got torch.bfloat16"),
    ({"confidence": torch.zeros(2, 5)}, ValueError, r"confidence: must be \[2, 4\], got \[2, 5\]"),
    ({"entropy": FLOATS.double()}, TypeError, "entropy: must be torch.float32, got torch.float64"),
    ({"entropy_bound": 0.1}, ValueError, r"entropy: needed with entropy_bound, float32 \[2, 4\]"),
    ({"editable": INTEGERS}, TypeError, "editable: must be torch.bool, got torch.int64"),
    ({"editable": torch.zeros(2, 3, dtype=torch.bool)}, ValueError, r"editable: must be \[2, 4\], got \[2, 3\]"),
    ({"done": torch.zeros(2)}, TypeError, "done: must be torch.bool, got torch.float32"),
    ({"done": torch.zeros(2, 3, dtype=torch.bool)[:, 0]}, ValueError, r"done: .* contiguous, got strides \[3\]"),
    ({"done": torch.zeros(3, dtype=torch.bool)}, ValueError, r"done: must be \[2\], got \[3\]"),
    ({"mask_id": -1}, ValueError, "mask_id: must be >= 0, got -1"),
    ({"num_select": None}, ValueError, "nothing would be chosen: give num_select, threshold"),
    ({"num_select": 1.5}, TypeError, r"num_select: must be an int or an integer tensor \[rows\], got float"),
    ({"num_select": 2**31}, ValueError, r"num_select: must be in \[-2147483648, 2147483647\], got 2147483648"),
    ({"num_select": torch.tensor([1, 2**40])}, ValueError, "num_select: must be in .*, got 1099511627776"),
    ({"num_select": FLOATS[:, 0]}, TypeError, "num_select: must be int64 or int32, got torch.float32"),
    ({"threshold": "high"}, TypeError, r"threshold: must be a number or a floating-point tensor \[rows\], got str"),
    ({"threshold": torch.zeros(3)}, ValueError, r"threshold: must be a number or \[2\], got \[3\]"),
    ({"factor": torch.ones(2, dtype=torch.int64)}, TypeError, "factor: must be floating-point, got torch.int64"),
    ({"temperature": -0.5}, ValueError, r"temperature: must be in \[0.0, inf\], got -0.5"),
    ({"temperature": math.nan}, ValueError, r"temperature: must be in \[0.0, inf\], got nan"),
    ({"temperature": torch.tensor([1.0, -2.0])}, ValueError, r"temperature: must be in \[0.0, inf\], got -2"),
    ({"temperature": 1.0, "seed": 2**64}, ValueError, "seed: must be in"),
    ({"temperature": 1.0, "step": 0.5}, TypeError, "step: must be an int"),
    ({"window_start": 1}, ValueError, "window_start: .* got 1 with a width of 4 and a text of 4"),
    ({"window_start": -1, "window_length": 2}, ValueError, "window_start: the window must lie in the text.*got -1"),
    ({"backend": "tpu"}, ValueError, "backend: got 'tpu'"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), ERRORS, ids=[message[:40] for _, _, message in ERRORS])
def test_errors(change, error, message):
    arguments = {"tokens": INTEGERS.clone(), "proposed": INTEGERS, "confidence": FLOATS, "mask_id": 0, "num_select": 1}
    with pytest.raises(error, match=f"unmask_select: .*{message}"):
        unmask_select(**arguments | change)


BAD_WINDOWS = [
    ({"window_start": [0, 3]}, r"window_start: the window must lie in the text.*got 3"),
    ({"window_start": [-1, 0]}, r"window_start: the window must lie in the text.*got -1"),
    ({"window_start": [0, 2**63 - 2]}, r"window_start: the window must lie in the text"),
    ({"window_length": [4, 5]}, r"window_length: must be from 0 to width.*got 5"),
    ({"window_length": [-1, 2]}, r"window_length: must be from 0 to width.*got -1"),
    ({"window_length": [2, 2], "window_start": [5, 4]}, r"window_start: the window must lie in the text.*got 5"),
]


@pytest.mark.parametrize(("windows", "message"), BAD_WINDOWS, ids=[message[:50] for _, message in BAD_WINDOWS])
def test_windows_outside_of_the_text(backend, windows, message):
    """Refused before anything is written; the CUDA kernels say -1 for such a row, and leave it alone."""
    tokens, done = torch.full((2, 6), MASK), torch.zeros(2, dtype=torch.bool)
    proposed, confidence = torch.zeros(2, 4, dtype=torch.int64), torch.ones(2, 4)
    options = {name: torch.tensor(value) for name, value in windows.items()}
    options |= {"mask_id": MASK, "num_select": 9, "done": done, "return_transfer_index": True, "backend": backend}
    if backend != "cuda":
        with pytest.raises(ValueError, match=f"unmask_select: {message}"):
            unmask_select(tokens, proposed, confidence, **options)
        assert (tokens == MASK).all()
        assert not done.any()
        return
    result = unmask_select(tokens, proposed, confidence, **options)
    bad = [
        not (0 <= length <= 4 and 0 <= start <= 6 - length)
        for start, length in zip(windows.get("window_start", [0, 0]), windows.get("window_length", [4, 4]), strict=True)
    ]
    assert (result.num_masked == -1).tolist() == bad
    assert (tokens == MASK).all(1).tolist() == bad
    assert result.transfer_index.any(1).tolist() == [not b for b in bad]
    assert done.tolist() == [not b for b in bad]
    assert (result.num_transferred[torch.tensor(bad)] == 0).all()


def test_proposals_in_the_memory_of_tokens():
    memory = torch.zeros(2, 10, dtype=torch.int64)
    with pytest.raises(ValueError, match="proposed shares memory with tokens"):
        unmask_select(memory, memory[:, 2:6], torch.zeros(2, 4), mask_id=0, num_select=1)


def test_gradients_are_refused():
    confidence = torch.zeros(2, 4, requires_grad=True)
    with pytest.raises(ValueError, match="an input requires grad"):
        unmask_select(INTEGERS.clone(), INTEGERS, confidence, mask_id=0, num_select=1)
