"""BD3-LM generation: blocks from left to right, each denoised by diffusion (arXiv 2503.09573).

A block sees the blocks before it and itself in both directions. Its keys and values are scratch while it is denoised;
once it is clean they are computed again and committed, so the cache is exact. That is no pass of its own: the clean
block rides along with the first pass of the next one, which saves the published sampler's extra evaluation per block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from esokern.masks import RankMask
from esokern.samplers.run import Callback, GenerationResult, Option, Run, check_count, row_seeds, starting_tokens
from esokern.samplers.schedule import denoising_schedule

if TYPE_CHECKING:
    from esokern.models.network import FoldedNetwork


def generate(
    network: FoldedNetwork,
    tokens: torch.Tensor | Sequence | None = None,
    *,
    length: int | None = None,
    batch: int | None = None,
    block_size: int = 16,
    num_steps: float = 16,
    seed: int | Sequence[int] | torch.Tensor = 0,
    temperature: Option = 1.0,
    top_k: Option = None,
    top_p: Option = None,
    min_p: Option = None,
    cached: bool = True,
    return_logprob: bool = False,
    callback: Callback | None = None,
    backend: str | None = None,
) -> GenerationResult:
    """Generate block by block.

    block_size: L' of the network; the last block may be shorter.
    num_steps: T' ancestral steps per block, or math.inf for one position at a time (first hitting).
    tokens: as in esolm.generate; given tokens right of a block are kept, but the block does not see them.
    cached: False recomputes all blocks so far in every step, and draws the same tokens.
    The rest as in esolm.generate. Returns a GenerationResult; ValueError for arguments out of range.
    """
    check_count("block_size", block_size)
    start = starting_tokens(network, tokens, length, batch)
    seeds = row_seeds(seed, len(start))
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    run = Run(network, start, seeds, options, return_logprob, callback, backend)
    masked = (start == network.config.mask_id).cpu().numpy()
    with torch.inference_mode():
        final = _decode(run, start.clone(), masked, block_size, num_steps, seeds, cached)
    return run.result(final)


def _decode(
    run: Run,
    tokens: torch.Tensor,
    masked: np.ndarray,
    block_size: int,
    num_steps: float,
    seeds: list[int],
    cached: bool,
) -> torch.Tensor:
    text = torch.arange(run.length, dtype=torch.int32, device=run.device).expand(run.batch, -1)
    block_of = text[:1] // block_size
    cache = run.new_cache() if cached else None
    index = num_cached = 0
    for block, begin in enumerate(range(0, run.length, block_size)):
        end = min(begin + block_size, run.length)
        schedule = denoising_schedule(masked[:, begin:end], num_steps=num_steps, seeds=seeds, stream=block)
        decoded = schedule.counts.cumsum(1)
        for step in range(schedule.nfe):
            first = num_cached if cached else 0  # of the text forwarded: clean blocks to store, or all of them
            attend = {"mask": RankMask(block_of[:, :end], block_of[:, :end])}
            if cached and first == begin:
                attend = {"cache": cache, "cache_mask": "bidirectional"}
            elif cached:
                attend = {"cache": cache, "cache_mask": RankMask(block_of, block_of[:, first:end])}
            hidden = run.forward(tokens[:, first:end], text[:, first:end], **attend)
            if cached:
                cache.commit(begin - first)
                num_cached = begin
            counts = schedule.counts[:, step]
            at = [schedule.order[b, decoded[b, step] - n : decoded[b, step]] for b, n in enumerate(counts)]
            at, rows = np.concatenate(at) + begin, np.repeat(np.arange(run.batch), counts)
            run.decode_step.numpy()[rows, at] = index
            at, rows = run.on_device(at), run.on_device(rows)
            drawn = run.draw(hidden[rows * (end - first) + at - first], rows, at)
            tokens[rows, at] = drawn
            run.report(index, "diffusion", rows, at, drawn)
            index += 1
    return tokens
