"""Eso-LM generation with an exact KV cache in any denoising order (arXiv 2506.01928, section 4.2, Algorithm 3).

Tokens are kept by rank, their place in the denoising order; given tokens come first, in text order. Step k forwards

    [clean tokens of step k - 1 | masks of step k]

at their own positions, causally in rank over the cache. The clean rows are committed, the masks' rows are scratch that
the next step overwrites. So every token is forwarded at most twice, whatever the schedule, and both phases share one
cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from esokern.masks import RankMask
from esokern.samplers.run import Callback, GenerationResult, Option, Run, row_seeds, starting_tokens
from esokern.samplers.schedule import Schedule, denoising_schedule

if TYPE_CHECKING:
    from esokern.models.network import FoldedNetwork

CHUNK_MASKS = ("causal", "independent")


def generate(
    network: FoldedNetwork,
    tokens: torch.Tensor | Sequence | None = None,
    *,
    length: int | None = None,
    batch: int | None = None,
    alpha_0: float = 1.0,
    num_steps: float = 128,
    schedule: Schedule | None = None,
    schedule_seed: int | None = None,
    seed: int | Sequence[int] | torch.Tensor = 0,
    temperature: Option = 1.0,
    top_k: Option = None,
    top_p: Option = None,
    min_p: Option = None,
    cached: bool = True,
    chunk_mask: str = "causal",
    return_logprob: bool = False,
    callback: Callback | None = None,
    backend: str | None = None,
) -> GenerationResult:
    """Generate with Eso-LM's two phases: `num_steps` steps of parallel diffusion, then the rest from left to right.

    tokens: int64 [prompt_length] or [batch, prompt_length]; every id but mask_id is given (a prompt, or the text
        around a gap), mask_id means "generate here", and so do positions beyond them up to `length`. Rows may differ.
    alpha_0: expected fraction of tokens that the diffusion phase decodes, in [0, 1].
    num_steps: T of the diffusion phase, or math.inf for one position at a time.
    schedule: which positions each step decodes (see samplers.schedule), instead of alpha_0 and num_steps.
    seed: of row b is seed + b, or seed[b]. schedule_seed (default: the first row's seed) decides how many positions
        each step takes. A row's tokens depend on its given tokens, its seed and schedule_seed, not on the batch.
    temperature, top_k, top_p, min_p: numbers or [batch]; see unmask_sample.
    cached: False recomputes every decoded token in every step, and draws the same tokens.
    chunk_mask: "causal": masks of a step see earlier masks of it, as in the paper; "independent": only themselves.
    callback: called after every step with a StepInfo.

    Returns a GenerationResult. Raises ValueError for arguments out of range.
    """
    if chunk_mask not in CHUNK_MASKS:
        raise ValueError(f"chunk_mask: got {chunk_mask!r}, supported are {', '.join(map(repr, CHUNK_MASKS))}")
    start = starting_tokens(network, tokens, length, batch)
    seeds = row_seeds(seed, len(start))
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    run = Run(network, start, seeds, options, return_logprob, callback, backend)
    masked = (start == network.config.mask_id).cpu().numpy()
    if schedule is None:
        schedule_seed = seeds[0] if schedule_seed is None else schedule_seed
        schedule = denoising_schedule(
            masked, alpha_0=alpha_0, num_steps=num_steps, seeds=seeds, schedule_seed=schedule_seed
        )
    else:
        schedule.check_covers(masked)
    with torch.inference_mode():
        order = run.on_device(_by_rank(schedule, masked))
        by_rank = start.gather(1, order)
        decode = _decode_cached if cached else _decode_recomputed
        decode(run, by_rank, order, schedule, (~masked).sum(1), chunk_mask)
        final = start.scatter(1, order, by_rank)
    run.decode_step = torch.from_numpy(schedule.decode_step(run.length))
    return run.result(final)


def _decode_cached(
    run: Run,
    by_rank: torch.Tensor,
    order: torch.Tensor,
    schedule: Schedule,
    num_given: np.ndarray,
    chunk_mask: str,
) -> None:
    """Fill in by_rank, int64 [batch, length] tokens in rank order, forwarding each token twice at most."""
    tokens = by_rank.view(-1)
    cache = run.new_cache()
    for index, step in enumerate(_steps(run, schedule, num_given, order)):
        hidden = run.forward(
            tokens.take(step.rows),
            step.positions,
            cache=cache,
            cache_mask=chunk_mask,
            num_clean=step.num_clean,
            cu_seqlens_q=step.cu_seqlens_q,
        )
        drawn = run.draw(hidden.index_select(0, step.masks_in_chunk), step.masks_batch, step.masks_positions)
        tokens.index_copy_(0, step.masks, drawn)
        cache.commit(step.commit, at_most=step.commit_by_row)
        if run.callback is not None:
            run.report(index, _phase(schedule, index), step.masks_batch, step.masks_positions, drawn)


def _decode_recomputed(
    run: Run,
    by_rank: torch.Tensor,
    order: torch.Tensor,
    schedule: Schedule,
    num_given: np.ndarray,
    chunk_mask: str,
) -> None:
    """The same with every decoded token forwarded in every step."""
    bound = num_given + schedule.counts.T.cumsum(0) - schedule.counts.T  # [num_steps, batch]: rank of the first mask
    for index, counts in enumerate(schedule.counts.T):
        masks = run.on_device(_ranges(np.arange(run.batch) * run.length + bound[index], counts))
        batch_row, rank = masks // run.length, masks % run.length
        num_rows = int((bound[index] + counts).max())
        first_mask = run.on_device(bound[index])
        hidden = run.forward(
            by_rank[:, :num_rows], order[:, :num_rows], mask=_rank_mask(num_rows, first_mask, chunk_mask)
        )
        at = order[batch_row, rank]
        drawn = run.draw(hidden[batch_row * num_rows + rank], batch_row, at)
        by_rank[batch_row, rank] = drawn
        if run.callback is not None:
            run.report(index, _phase(schedule, index), batch_row, at, drawn)


def _rank_mask(num_rows: int, first_mask: torch.Tensor, chunk_mask: str) -> RankMask:
    """Causal over num_rows ranks, where in row b of the batch the ranks from first_mask[b] on are masks. What a row
    holds beyond its own masks has higher ranks, so nothing sees it."""
    rank = torch.arange(num_rows, dtype=torch.int32, device=first_mask.device)[None]
    if chunk_mask == "causal":
        return RankMask(rank, rank)
    first_mask = first_mask[:, None].int()
    is_mask = rank >= first_mask
    return RankMask(
        k_rank=rank,
        prefix_end=torch.where(is_mask, first_mask - 1, rank),
        window_start=torch.where(is_mask, rank, 0),
        window_end=torch.where(is_mask, rank, -1),
    )


class _Step(NamedTuple):
    """The rows of one cached forward pass. Indices are into [batch * length] arrays in rank order."""

    rows: torch.Tensor  # int64 [batch, n] where all batch rows have n, else packed [total]
    positions: torch.Tensor  # int32, like rows
    cu_seqlens_q: torch.Tensor | None  # int32 [batch + 1] where batch rows differ
    num_clean: torch.Tensor  # int32 [batch]: leading rows that are clean
    commit: int | torch.Tensor  # num_clean, as an int where batch rows agree
    commit_by_row: list[int]  # the same on the host
    masks: torch.Tensor  # int64 [num_masks]: those of `rows` to decode
    masks_in_chunk: torch.Tensor  # int64 [num_masks]: where they are among `rows`, flattened
    masks_batch: torch.Tensor  # int64 [num_masks]: their batch row
    masks_positions: torch.Tensor  # int64 [num_masks]


def _steps(run: Run, schedule: Schedule, num_given: np.ndarray, order: torch.Tensor) -> Iterator[_Step]:
    """The forward passes of a schedule. All index tensors are made here at once, a step then only slices."""
    counts = schedule.counts.T  # [num_steps, batch], like the arrays below
    num_steps, batch = counts.shape
    bound = num_given + counts.cumsum(0) - counts  # rank of the step's first mask
    begin = np.zeros_like(bound)  # rank of the first row: where the masks of the step before began
    begin[1:] = bound[:-1]
    done = counts == 0  # such batch rows forward nothing
    begin, bound = np.where(done, 0, begin), np.where(done, 0, bound)
    lengths = bound + counts - begin
    cu_seqlens = np.zeros((num_steps, batch + 1), dtype=np.int32)
    lengths.cumsum(1, out=cu_seqlens[:, 1:])
    num_clean = (bound - begin).astype(np.int32)
    row_start = np.arange(batch) * order.shape[1]
    batch_row = np.broadcast_to(np.arange(batch), counts.shape)
    rows = run.on_device(_ranges(row_start + begin, lengths))
    masks = run.on_device(_ranges(row_start + bound, counts))
    masks_in_chunk = run.on_device(_ranges(cu_seqlens[:, :-1] + num_clean, counts))
    masks_batch = run.on_device(np.repeat(batch_row.ravel(), counts.ravel()))
    num_rows, num_masks = lengths.sum(1).tolist(), counts.sum(1).tolist()
    by_step = [tensor.split(num_rows) for tensor in (rows, order.take(rows).int())]
    by_step += [tensor.split(num_masks) for tensor in (masks, masks_in_chunk, masks_batch, order.take(masks))]
    num_clean_tensors = run.on_device(num_clean).unbind()
    if (lengths == lengths[:, :1]).all() and (counts == counts[:, :1]).all():
        by_step[:2] = [[part.view(batch, -1) for part in parts] for parts in by_step[:2]]
        cu_seqlens_q, commit = [None] * num_steps, num_clean[:, 0].tolist()
    else:
        cu_seqlens_q, commit = run.on_device(cu_seqlens).unbind(), num_clean_tensors
    return map(_Step, *by_step[:2], cu_seqlens_q, num_clean_tensors, commit, num_clean.tolist(), *by_step[2:])


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """int64: start, start + 1, ... (length of them) for each start, all behind each other."""
    starts, lengths = starts.ravel().astype(np.int64), lengths.ravel()
    return np.repeat(starts - (lengths.cumsum() - lengths), lengths) + np.arange(lengths.sum())


def _by_rank(schedule: Schedule, masked: np.ndarray) -> np.ndarray:
    """int64 [batch, length]: the position of each rank; given tokens first, in text order."""
    order = np.empty(masked.shape, dtype=np.int64)
    for row, mask in enumerate(masked):
        given = np.flatnonzero(~mask)
        order[row, : len(given)] = given
        order[row, len(given) :] = schedule.order[row, : len(mask) - len(given)]
    return order


def _phase(schedule: Schedule, index: int) -> str:
    """Phase of a step over the rows that take part in it."""
    diffusion = index < schedule.num_diffusion[schedule.counts[:, index] > 0]
    return "diffusion" if diffusion.all() else "mixed" if diffusion.any() else "sequential"
