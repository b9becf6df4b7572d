"""Denoising schedules: which positions are decoded in which step, drawn before the first forward pass.

Algorithm 2 of Eso-LMs (arXiv 2506.01928): at t = 1, 1 - 1/T, ..., 1/T every position that is still masked is decoded
with probability (alpha_s - alpha_t) / (1 - alpha_t), s = t - 1/T; what remains is decoded one by one from left to
right. With alpha_t = alpha_0 (1 - (1 - eps) t) that probability is such that a position is decoded

    in step k of the diffusion phase with probability alpha_0 (1 - eps) / (1 - alpha_0 eps) / T, the same for every k,

so each position draws its own step (or the sequential phase) independently, and a step with no positions costs nothing.
MDLM's ancestral sampler is the case alpha_0 = 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

EPS = 1e-3  # alpha_1 = alpha_0 * EPS, as in the published code
_COUNTS, _ORDER = 0, 1  # what a random stream decides


@dataclass(frozen=True, eq=False)
class Schedule:
    """Positions to decode, in order, and how many of them each step takes.

    order:         int64 [batch, max_masked], row b holds its masked positions in the order they are decoded, then -1
    counts:        int64 [batch, num_steps], positions decoded by row b in each step; zeros only at the end
    num_diffusion: int64 [batch], how many leading steps of row b belong to the diffusion phase
    """

    order: np.ndarray
    counts: np.ndarray
    num_diffusion: np.ndarray

    def __post_init__(self) -> None:
        for name, ndim in (("order", 2), ("counts", 2), ("num_diffusion", 1)):
            array = getattr(self, name)
            if not isinstance(array, np.ndarray) or array.dtype != np.int64 or array.ndim != ndim:
                raise ValueError(f"Schedule: {name} must be an int64 array with {ndim} axes, got {array!r}")
        if not len(self.order) == len(self.counts) == len(self.num_diffusion):
            raise ValueError("Schedule: order, counts and num_diffusion must have the same batch")
        num_masked = (self.order >= 0).sum(1)
        if not np.array_equal(self.counts.sum(1), num_masked):
            raise ValueError(f"Schedule: counts sum to {self.counts.sum(1).tolist()}, order has {num_masked.tolist()}")
        if (self.counts < 0).any() or (np.diff((self.counts > 0).astype(np.int8), axis=1) > 0).any():
            raise ValueError("Schedule: counts must be positive, with zeros only after a row's last step")
        for row, used in zip(self.order, num_masked, strict=True):
            if len(np.unique(row[:used])) != used or (row[:used] < 0).any():
                raise ValueError("Schedule: a position occurs twice in order, or a -1 stands before the end")

    @property
    def batch(self) -> int:
        """Rows."""
        return len(self.order)

    @property
    def nfe(self) -> int:
        """Forward passes (number of function evaluations): the steps of the longest row."""
        return self.counts.shape[1]

    @property
    def num_masked(self) -> np.ndarray:
        """int64 [batch]: positions to decode per row."""
        return self.counts.sum(1)

    @property
    def uniform(self) -> bool:
        """All rows decode the same number of positions in every step."""
        return bool((self.counts == self.counts[:1]).all())

    def steps(self, row: int = 0) -> list[tuple[int, ...]]:
        """The positions of each step of one row."""
        ends = self.counts[row][self.counts[row] > 0].cumsum()
        return [tuple(self.order[row][begin:end].tolist()) for begin, end in zip([0, *ends], ends, strict=False)]

    def decode_step(self, length: int) -> np.ndarray:
        """int64 [batch, length]: the step that decodes each position, -1 = none does."""
        result = np.full((self.batch, length), -1, dtype=np.int64)
        for row in range(self.batch):
            used = self.num_masked[row]
            result[row, self.order[row][:used]] = np.repeat(np.arange(self.nfe), self.counts[row])
        return result

    def check_covers(self, masked: np.ndarray) -> None:
        """ValueError unless the schedule decodes exactly the masked positions, bool [batch, length], of every row."""
        if len(masked) != self.batch:
            raise ValueError(f"schedule: has {self.batch} rows, the tokens have {len(masked)}")
        for row, (mask, order) in enumerate(zip(masked, self.order, strict=True)):
            if not np.array_equal(np.sort(order[order >= 0]), np.flatnonzero(mask)):
                raise ValueError(f"schedule: row {row} must decode exactly its masked positions")

    @classmethod
    def from_steps(cls, steps: Sequence[Sequence[Sequence[int]]], num_diffusion: Sequence[int]) -> Schedule:
        """From explicit lists: steps[b][k] = positions that row b decodes in step k; num_diffusion[b] leading steps are
        the diffusion phase. Empty steps are dropped."""
        orders, counts, diffusion = [], [], []
        for row, leading in zip(steps, num_diffusion, strict=True):
            diffusion.append(sum(1 for step in row[:leading] if len(step)))
            kept = [list(step) for step in row if len(step)]
            orders.append(np.array([position for step in kept for position in step], dtype=np.int64))
            counts.append(np.array([len(step) for step in kept], dtype=np.int64))
        return _assemble(orders, counts, diffusion)


def denoising_schedule(
    masked: torch.Tensor | np.ndarray,
    *,
    alpha_0: float = 1.0,
    num_steps: float = math.inf,
    seeds: Sequence[int],
    schedule_seed: int | None = None,
    stream: int = 0,
) -> Schedule:
    """Eso-LM's schedule (Algorithm 2) for the masked positions of each row.

    masked: bool [batch, length], True = to be decoded.
    alpha_0: expected fraction decoded by diffusion, in [0, 1].
    num_steps: T >= 1 steps of the diffusion phase; math.inf = one position at a time (first hitting).
    seeds: one integer per row; decides which positions.
    schedule_seed: decides how many positions each step takes, so rows with equally many masked positions have equal
        counts, as in the published sampler; None = drawn from the row's own seed.
    stream: several schedules of one seed differ by it (BD3-LM: the block).

    A row's schedule is a function of its mask, its seed and schedule_seed alone.
    """
    masked = _as_masked(masked)
    _check_alpha_0(alpha_0)
    _check_num_steps(num_steps)
    seeds = check_seeds(seeds, len(masked))
    fraction = alpha_0 * (1.0 - EPS) / (1.0 - alpha_0 * EPS) if alpha_0 < 1.0 else 1.0
    orders, counts, diffusion = [], [], []
    for row, seed in zip(masked, seeds, strict=True):
        positions = np.flatnonzero(row)
        rng = _generator(seed if schedule_seed is None else schedule_seed, 2 * stream + _COUNTS)
        num_parallel = int(np.count_nonzero(rng.random(len(positions)) < fraction))
        if math.isinf(num_steps):
            parallel = np.ones(num_parallel, dtype=np.int64)
        else:
            drawn = rng.integers(int(num_steps), size=num_parallel)
            parallel = np.unique(drawn, return_counts=True)[1].astype(np.int64)
        shuffled = _generator(seed, 2 * stream + _ORDER).permutation(positions)
        orders.append(np.concatenate([shuffled[:num_parallel], np.sort(shuffled[num_parallel:])]))
        counts.append(np.concatenate([parallel, np.ones(len(positions) - num_parallel, dtype=np.int64)]))
        diffusion.append(len(parallel))
    return _assemble(orders, counts, diffusion)


def block_schedule(
    masked: torch.Tensor | np.ndarray, *, num_steps: int, alpha_0: float = 1.0, schedule_seed: int = 0
) -> Schedule:
    """The block ("subcontext") schedule (section 5.2): each step decodes evenly spaced positions, far from each other.

    The n masked positions of a row fall into num_steps groups, group g = positions g, g + num_steps, ... of them; the
    groups come in random order, one a step. With alpha_0 < 1 only the first floor(n alpha_0) positions of that order
    are decoded so, the rest one by one from left to right. Rows with equally many masked positions share the order, as
    in the published sampler.
    """
    masked = _as_masked(masked)
    _check_alpha_0(alpha_0)
    if isinstance(num_steps, bool) or not isinstance(num_steps, (int, np.integer)) or num_steps < 1:
        raise ValueError(f"num_steps: the block schedule needs an integer of at least 1, got {num_steps!r}")
    orders, counts, diffusion = [], [], []
    for row in masked:
        positions = np.flatnonzero(row)
        rng = _generator(schedule_seed, _ORDER)
        groups = [
            rng.permutation(np.arange(g, len(positions), num_steps)) for g in range(min(num_steps, len(positions)))
        ]
        groups = [groups[g] for g in rng.permutation(len(groups))]
        places = np.concatenate(groups) if groups else np.zeros(0, dtype=np.int64)
        num_parallel = math.floor(len(positions) * alpha_0)
        ends = np.minimum(np.cumsum([len(group) for group in groups], dtype=np.int64), num_parallel)
        parallel = np.diff(ends, prepend=0)
        parallel = parallel[parallel > 0]
        orders.append(positions[np.concatenate([places[:num_parallel], np.sort(places[num_parallel:])])])
        counts.append(np.concatenate([parallel, np.ones(len(positions) - num_parallel, dtype=np.int64)]))
        diffusion.append(len(parallel))
    return _assemble(orders, counts, diffusion)


def check_seeds(seeds: Sequence[int], batch: int) -> list[int]:
    """One integer in [-2**63, 2**64) per row, or ValueError."""
    values = [int(seed) for seed in seeds]
    if len(values) != batch:
        raise ValueError(f"seeds: one per row is needed, got {len(values)} for a batch of {batch}")
    for value in values:
        if not -(2**63) <= value < 2**64:
            raise ValueError(f"seeds: must fit in 64 bits, got {value}")
    return values


def _generator(seed: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, stream], dtype=np.uint64)))


def _assemble(orders: list[np.ndarray], counts: list[np.ndarray], diffusion: list[int]) -> Schedule:
    def padded(rows: list[np.ndarray], fill: int) -> np.ndarray:
        result = np.full((len(rows), max(map(len, rows), default=0)), fill, dtype=np.int64)
        for target, row in zip(result, rows, strict=True):
            target[: len(row)] = row
        return result

    return Schedule(padded(orders, -1), padded(counts, 0), np.array(diffusion, dtype=np.int64))


def _as_masked(masked: torch.Tensor | np.ndarray) -> np.ndarray:
    array = masked.cpu().numpy() if isinstance(masked, torch.Tensor) else np.asarray(masked)
    if array.dtype != np.bool_ or array.ndim != 2:
        raise ValueError(f"masked: must be bool [batch, length], got {array.dtype} {array.shape}")
    return array


def _check_alpha_0(alpha_0: float) -> None:
    if not 0.0 <= alpha_0 <= 1.0:  # also refuses NaN
        raise ValueError(f"alpha_0: must lie in [0, 1], got {alpha_0}")


def _check_num_steps(num_steps: float) -> None:
    if not num_steps >= 1 or (not math.isinf(num_steps) and int(num_steps) != num_steps):
        raise ValueError(f"num_steps: must be an integer of at least 1 or math.inf, got {num_steps}")
