"""Denoising schedules against the paper: its table of network evaluations, its example, its algorithm step by step."""

import math
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from esokern.samplers.schedule import EPS, Schedule, block_schedule, denoising_schedule

# arXiv 2506.01928, tables 13 and 14, L = 1024: (alpha_0, T) -> number of network evaluations
PUBLISHED_NFE = {
    (1.0, 16): 16,
    (1.0, 32): 32,
    (1.0, 64): 64,
    (1.0, 128): 128,
    (1.0, 256): 251,
    (1.0, 1024): 646,
    (1.0, 4096): 906,
    (0.5, 16): 529,
    (0.5, 128): 639,
    (0.5, 1024): 913,
    (0.25, 16): 784,
    (0.25, 128): 879,
    (0.25, 1024): 994,
    (0.0625, 16): 976,
    (0.0625, 128): 1010,
    (0.0625, 1024): 1022,
}


def all_masked(batch, length):
    return np.ones((batch, length), dtype=bool)


@pytest.mark.parametrize(("alpha_0", "num_steps"), PUBLISHED_NFE)
def test_published_number_of_evaluations(alpha_0, num_steps):
    draws = np.array(
        [
            denoising_schedule(
                all_masked(1, 1024), alpha_0=alpha_0, num_steps=num_steps, seeds=[seed], schedule_seed=seed
            ).nfe
            for seed in range(20)
        ]
    )
    standard_error = draws.std(ddof=1) / math.sqrt(len(draws))
    assert abs(draws.mean() - PUBLISHED_NFE[alpha_0, num_steps]) <= 4 * standard_error + 0.5  # printed without decimals


def algorithm_2(length, alpha_0, num_steps, rng):
    """Positions per step, literally: a binomial draw at t = 1, 1 - 1/T, ..., then one by one."""

    def alpha(t):
        return alpha_0 * (1 - (1 - EPS) * t)

    counts, left = [], length
    for k in range(num_steps, 0, -1):
        now, after = alpha(k / num_steps), alpha((k - 1) / num_steps)
        drawn = rng.binomial(left, (after - now) / (1 - now))
        counts += [drawn] * (drawn > 0)
        left -= drawn
    return tuple(counts + [1] * left)


@pytest.mark.parametrize(("alpha_0", "num_steps"), [(1.0, 3), (0.6, 2), (0.3, 4)])
def test_counts_are_distributed_as_algorithm_2_says(alpha_0, num_steps):
    length, draws = 4, 6000
    rng = np.random.default_rng(0)
    literal = Counter(algorithm_2(length, alpha_0, num_steps, rng) for _ in range(draws))
    ours = Counter()
    schedule = denoising_schedule(all_masked(draws, length), alpha_0=alpha_0, num_steps=num_steps, seeds=range(draws))
    for row in range(draws):
        ours[tuple(map(len, schedule.steps(row)))] += 1
    common = [outcome for outcome in literal | ours if literal[outcome] + ours[outcome] >= 20]
    table = [[counter[outcome] for outcome in common] for counter in (literal, ours)]
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_positions_of_the_first_step_are_uniform():
    schedule = denoising_schedule(all_masked(8000, 5), num_steps=math.inf, seeds=range(8000))
    assert stats.chisquare(np.bincount(schedule.order[:, 0])).pvalue > 1e-3
    pairs = np.bincount(schedule.order[:, 0] * 5 + schedule.order[:, 1])
    assert stats.chisquare(pairs[pairs > 0]).pvalue > 1e-3


def test_example_of_the_paper():
    """Suppl. B.5: L = 8, five tokens by diffusion, S = ((3, 1), (6), (4, 7), (2), (5), (8)): six evaluations."""
    schedule = Schedule.from_steps([[(2, 0), (5,), (), (3, 6), (1,), (4,), (7,)]], [4])
    assert schedule.nfe == 6
    assert schedule.order.tolist() == [[2, 0, 5, 3, 6, 1, 4, 7]]
    assert schedule.counts.tolist() == [[2, 1, 2, 1, 1, 1]]
    assert schedule.num_diffusion.tolist() == [3]
    assert schedule.steps(0) == [(2, 0), (5,), (3, 6), (1,), (4,), (7,)]
    assert schedule.decode_step(8).tolist() == [[0, 3, 0, 2, 4, 1, 2, 5]]


@pytest.mark.parametrize("alpha_0", [0.0, 1e-9, 0.2, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 1000, math.inf])
def test_every_masked_position_is_decoded_once_and_given_ones_never(alpha_0, num_steps):
    masked = np.random.default_rng(1).random((4, 33)) < 0.7
    schedule = denoising_schedule(masked, alpha_0=alpha_0, num_steps=num_steps, seeds=[3, 1, 4, 1], schedule_seed=5)
    schedule.check_covers(masked)
    for row in range(4):
        steps = schedule.steps(row)
        sequential = steps[schedule.num_diffusion[row] :]
        assert all(len(step) == 1 for step in sequential)
        assert sequential == sorted(sequential)
        assert schedule.num_diffusion[row] <= num_steps
    if alpha_0 == 1.0:
        assert schedule.num_diffusion.tolist() == [len(schedule.steps(row)) for row in range(4)]
    if alpha_0 == 0.0:
        assert not schedule.num_diffusion.any()
        assert [step[0] for step in schedule.steps(2)] == np.flatnonzero(masked[2]).tolist()


def test_counts_are_shared_by_rows_and_orders_are_not():
    schedule = denoising_schedule(all_masked(3, 50), alpha_0=0.5, num_steps=8, seeds=[1, 2, 3], schedule_seed=9)
    assert schedule.uniform
    assert not np.array_equal(schedule.order[0], schedule.order[1])
    own = denoising_schedule(all_masked(3, 50), alpha_0=0.5, num_steps=8, seeds=[1, 2, 3])
    assert not own.uniform


@pytest.mark.parametrize("schedule_seed", [None, 7])
def test_a_row_does_not_depend_on_its_batch(schedule_seed):
    masked = np.random.default_rng(2).random((5, 40)) < np.array([0.2, 0.9, 0.9, 1.0, 0.0])[:, None]
    options = {"alpha_0": 0.6, "num_steps": 9, "schedule_seed": schedule_seed}
    whole = denoising_schedule(masked, seeds=[10, 11, 12, 13, 14], **options)
    assert whole.steps(4) == []
    for row in range(5):
        alone = denoising_schedule(masked[row : row + 1], seeds=[10 + row], **options)
        assert alone.steps(0) == whole.steps(row)
        assert alone.num_diffusion[0] == whole.num_diffusion[row]


def test_streams_of_one_seed_differ():
    first, second = (denoising_schedule(all_masked(1, 60), seeds=[0], stream=stream).order for stream in (0, 1))
    assert not np.array_equal(first, second)


def test_block_schedule_is_the_published_construction():
    """Steps are the rows of arange(L).view(L / steps, steps).t(), rows and what is in them shuffled."""
    schedule = block_schedule(all_masked(2, 24), num_steps=6, schedule_seed=3)
    assert schedule.nfe == 6
    groups = np.arange(24).reshape(4, 6).T
    assert sorted(sorted(step) for step in schedule.steps(0)) == groups.tolist()
    assert schedule.steps(0) == schedule.steps(1)
    assert [sorted(step)[0] for step in schedule.steps(0)] != list(range(6))


def test_block_schedule_with_a_sequential_phase():
    masked = all_masked(1, 20)
    masked[0, 4:7] = False
    schedule = block_schedule(masked, num_steps=5, alpha_0=0.5)
    schedule.check_covers(masked)
    steps = schedule.steps(0)
    assert sum(map(len, steps[: schedule.num_diffusion[0]])) == 8  # floor(17 / 2)
    assert steps[schedule.num_diffusion[0] :] == sorted(steps[schedule.num_diffusion[0] :])


def test_empty_and_tiny():
    nothing = denoising_schedule(np.zeros((2, 5), dtype=bool), seeds=[0, 1], schedule_seed=0)
    assert nothing.nfe == 0
    assert nothing.steps(0) == []
    assert block_schedule(np.zeros((1, 5), dtype=bool), num_steps=3).nfe == 0
    assert denoising_schedule(all_masked(1, 1), num_steps=1000, seeds=[0]).nfe == 1
    assert block_schedule(all_masked(1, 2), num_steps=8).nfe == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha_0": 1.5}, r"alpha_0: must lie in \[0, 1\], got 1.5"),
        ({"alpha_0": math.nan}, "alpha_0"),
        ({"num_steps": 0}, "num_steps: must be an integer of at least 1 or math.inf, got 0"),
        ({"num_steps": 2.5}, "num_steps"),
        ({"num_steps": math.nan}, "num_steps"),
        ({"seeds": [1]}, "seeds: one per row is needed, got 1 for a batch of 2"),
        ({"seeds": [1, 2**64]}, "64 bits"),
        ({"masked": np.ones((2, 3))}, "masked: must be bool"),
        ({"masked": np.ones(3, dtype=bool)}, "masked: must be bool"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        denoising_schedule(**{"masked": all_masked(2, 3), "seeds": [0, 1], **arguments})


def test_errors_of_explicit_schedules():
    with pytest.raises(ValueError, match="twice"):
        Schedule.from_steps([[(1, 2), (2,)]], [1])
    with pytest.raises(ValueError, match="num_steps"):
        block_schedule(all_masked(1, 4), num_steps=0)
    with pytest.raises(ValueError, match="row 0 must decode exactly its masked positions"):
        Schedule.from_steps([[(0, 1)]], [1]).check_covers(all_masked(1, 3))
    with pytest.raises(ValueError, match="has 1 rows, the tokens have 2"):
        Schedule.from_steps([[(0, 1)]], [1]).check_covers(all_masked(2, 2))
