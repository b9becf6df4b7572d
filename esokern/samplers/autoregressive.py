"""Autoregressive generation, one token a step from left to right: the output at a token predicts the next one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from esokern import masks
from esokern.samplers.run import Callback, GenerationResult, Option, Run, row_seeds, starting_tokens

if TYPE_CHECKING:
    from esokern.models.network import FoldedNetwork


def generate(
    network: FoldedNetwork,
    tokens: torch.Tensor | Sequence | None = None,
    *,
    length: int | None = None,
    batch: int | None = None,
    start_token: int = 0,
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
    """Generate from left to right.

    tokens: as in esolm.generate. Given tokens right of a gap are kept, but the gap does not see them.
    start_token: stands first in rows whose first token is not given, since the network predicts the token after each.
        0 separates documents in this package's tokenizers; for checkpoints over GPT-2's vocabulary it is 50256.
    cached: False recomputes the whole prefix in every step, and draws the same tokens.
    The rest as in esolm.generate. Returns a GenerationResult; ValueError for arguments out of range.
    """
    start = starting_tokens(network, tokens, length, batch)
    mask_id = network.config.mask_id
    if isinstance(start_token, bool) or not isinstance(start_token, int) or not 0 <= start_token < mask_id:
        raise ValueError(f"start_token: must be an id in [0, {mask_id}), got {start_token!r}")
    start[:, 0] = torch.where(start[:, 0] == mask_id, start_token, start[:, 0])
    seeds = row_seeds(seed, len(start))
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    run = Run(network, start, seeds, options, return_logprob, callback, backend)
    masked = start == mask_id
    with torch.inference_mode():
        final = _decode(run, start.clone(), masked.cpu(), cached)
    return run.result(final)


def _decode(run: Run, tokens: torch.Tensor, masked: torch.Tensor, cached: bool) -> torch.Tensor:
    text = torch.arange(run.length, dtype=torch.int32, device=run.device).expand(run.batch, -1)
    everyone = torch.arange(run.batch, device=run.device)
    cache = run.new_cache() if cached else None
    num_cached = 0
    for index, position in enumerate(masked.any(0).nonzero()[:, 0].tolist()):
        run.decode_step[masked[:, position], position] = index
        rows = everyone
        if not masked[:, position].all():
            rows = run.on_device(masked[:, position].nonzero()[:, 0].numpy())
        if cached:
            chunk = slice(num_cached, position)
            hidden = run.forward(tokens[:, chunk], text[:, chunk], cache=cache, cache_mask="causal")
            cache.commit(position - num_cached)
            num_cached = position
        else:
            chunk = slice(0, position)
            mask = masks.causal(position, device=run.device)
            hidden = run.forward(tokens[:, chunk], text[:, chunk], mask=mask)
        last = hidden.view(run.batch, -1, hidden.shape[-1])[:, -1]
        at = torch.full_like(rows, position)
        drawn = run.draw(last if len(rows) == run.batch else last[rows], rows, at)
        tokens[rows, position] = drawn
        run.report(index, "sequential", rows, at, drawn)
    return tokens
