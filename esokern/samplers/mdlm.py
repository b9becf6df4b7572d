"""MDLM generation: ancestral sampling with a bidirectional network (arXiv 2406.07524).

Every step forwards the whole text, since every token sees every other and nothing can be cached; only the positions
that the step unmasks go to the LM head. Steps that unmask nothing cost nothing: the network has no time input, so its
output would not have changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from esokern import masks
from esokern.samplers.run import Callback, GenerationResult, Option, Run, row_seeds, starting_tokens
from esokern.samplers.schedule import Schedule, denoising_schedule

if TYPE_CHECKING:
    from esokern.models.network import FoldedNetwork


def generate(
    network: FoldedNetwork,
    tokens: torch.Tensor | Sequence | None = None,
    *,
    length: int | None = None,
    batch: int | None = None,
    num_steps: float = 128,
    schedule: Schedule | None = None,
    schedule_seed: int | None = None,
    seed: int | Sequence[int] | torch.Tensor = 0,
    temperature: Option = 1.0,
    top_k: Option = None,
    top_p: Option = None,
    min_p: Option = None,
    return_logprob: bool = False,
    callback: Callback | None = None,
    backend: str | None = None,
) -> GenerationResult:
    """Generate in `num_steps` ancestral steps: a masked position is unmasked with probability
    (alpha_s - alpha_t) / (1 - alpha_t) in each, alpha_t = 1 - (1 - eps) t.

    tokens, length, batch, seed, temperature .. min_p, return_logprob, callback: as in esolm.generate.
    num_steps: T, or math.inf for one position at a time. schedule: which positions each step decodes, instead.
    schedule_seed: rows with equally many masked positions decode equally many per step, drawn from it; None = each row
        draws its own from its seed.

    In a batch, row b's k-th non-empty step runs in forward pass k. Returns a GenerationResult; ValueError for arguments
    out of range.
    """
    start = starting_tokens(network, tokens, length, batch)
    seeds = row_seeds(seed, len(start))
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    run = Run(network, start, seeds, options, return_logprob, callback, backend)
    masked = (start == network.config.mask_id).cpu().numpy()
    if schedule is None:
        schedule = denoising_schedule(masked, num_steps=num_steps, seeds=seeds, schedule_seed=schedule_seed)
    else:
        schedule.check_covers(masked)
    with torch.inference_mode():
        final = _decode(run, start.clone(), schedule)
    run.decode_step = torch.from_numpy(schedule.decode_step(run.length))
    return run.result(final)


def _decode(run: Run, tokens: torch.Tensor, schedule: Schedule) -> torch.Tensor:
    text = torch.arange(run.length, dtype=torch.int32, device=run.device).expand(run.batch, -1)
    mask = masks.bidirectional(run.length, device=run.device)
    decoded = schedule.counts.cumsum(1)
    for index in range(schedule.nfe):
        counts = schedule.counts[:, index]
        active = np.flatnonzero(counts)
        at = np.concatenate([schedule.order[b, decoded[b, index] - counts[b] : decoded[b, index]] for b in active])
        place = run.on_device(np.repeat(np.arange(len(active)), counts[active]))
        at = run.on_device(at)
        if len(active) == run.batch:
            rows, batch = place, tokens
        else:
            rows = run.on_device(active)
            rows, batch = rows[place], tokens[rows]
        hidden = run.forward(batch, text[: len(active)], mask=mask)
        drawn = run.draw(hidden[place * run.length + at], rows, at)
        tokens[rows, at] = drawn
        run.report(index, "diffusion", rows, at, drawn)
    return tokens
