"""Likelihoods of any-order models, exact given an order: of denoising schedules, and importance-weighted over orders.

A model that decodes x in a random order sigma has p(x) = E_sigma[p(x | sigma)], and for K orders

    -log p(x) <= E[-log(1/K sum_k p(x | sigma_k))],

a bound that falls with K to -log p(x) (arXiv 2506.01928, section 3.3). Eso-LM gives log p(x | sigma) in one pass over
2 L tokens (`objectives.any_order_logp`), MDLM in L passes over L, BD3-LM in block_size passes over 2 L.

What a mask sees of other masks comes in two conventions: "independent", itself alone, which is what p(x | sigma) above
means; and "causal", the masks of its own step that come before it too, which is what Eso-LM's published sampler
computes. With one token a step they are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from esokern import masks, objectives
from esokern.nelbo import MAX_TOKENS, in_chunks, rank_in_block, row_length
from esokern.objectives import AnyNetwork, clean_first_order
from esokern.samplers.schedule import Schedule

MODELS = ("esolm", "mdlm", "bd3lm")  # of which an order is drawn; "ar" has one, see objectives.ar_nll


def random_orders(batch: int, length: int, alpha_0: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """int64 [batch, length]: sigma ~ P^alpha_0 (eq. 22), the position of each rank.

    A token is decoded by diffusion with probability alpha_0; those come first, in random order, then the others from
    left to right.
    """
    if not 0.0 <= alpha_0 <= 1.0:
        raise ValueError(f"alpha_0: must lie in [0, 1], got {alpha_0}")
    sequential = torch.rand(batch, length, generator=generator) >= alpha_0
    return clean_first_order(sequential, generator, shuffle_masks=False)


@torch.no_grad()
def mdlm_order_logp(network: AnyNetwork, x: Tensor, order: Tensor, *, max_tokens: int = MAX_TOKENS) -> Tensor:
    """log p [B] of x int64 [B, L] under MDLM, decoded one token at a time in `order` ([B, L] or [1, L]); L passes.

    order[b, r] is the position decoded r-th. max_tokens: to forward at once.
    """

    def nll(x: Tensor, zt: Tensor, select: Tensor) -> Tensor:
        return objectives.mdlm_cross_entropy(network, x, zt, select)

    return -_one_by_one(network, x, order, x.shape[1], nll, max_tokens // x.shape[1]).sum(-1)


@torch.no_grad()
def bd3lm_order_logp(
    network: AnyNetwork, x: Tensor, order: Tensor, block_size: int, *, max_tokens: int = MAX_TOKENS
) -> Tensor:
    """log p [B, blocks] of every block of x int64 [B, L] given the blocks before it, each decoded one token at a time.

    Only the order of the tokens within each block counts, of `order` ([B, L] or [1, L]). All blocks advance together,
    so it takes block_size passes over 2 L tokens. max_tokens: to forward at once.
    """

    def nll(x: Tensor, zt: Tensor, select: Tensor) -> Tensor:
        return objectives.bd3lm_cross_entropy(network, x, zt, block_size, select)

    by_token = _one_by_one(network, x, order, block_size, nll, max_tokens // (2 * x.shape[1]))
    return -F.pad(by_token, (0, -x.shape[1] % block_size)).unflatten(-1, (-1, block_size)).sum(-1)


def _one_by_one(
    network: AnyNetwork, x: Tensor, order: Tensor, block_size: int, nll: Callable[..., Tensor], rows: int
) -> Tensor:
    """Nats [B, L] of every token: pass j predicts the j-th token of each block, the j before it being clean.

    nll(x, zt, select): nats at the positions that bool `select` marks, 0 elsewhere. rows: to forward at once.
    """
    batch, length = x.shape
    rank = rank_in_block(order.expand_as(x).argsort(-1), block_size)[:, None]
    step = torch.arange(min(block_size, length), device=x.device)[:, None]
    every = x[:, None].expand(-1, len(step), -1)
    zt = torch.where(rank < step, every, network.config.mask_id)
    by_pass = in_chunks(nll, rows, *(tensor.reshape(-1, length) for tensor in (every, zt, rank == step)))
    return by_pass.view(batch, -1, length).sum(1)


@dataclass(frozen=True)
class OrderLikelihoods:
    """What `importance_weighted` returns: log p(x | order) of the K random orders of every row.

    logp: float64 [B, K, parts]. The parts are factors of the likelihood that are bounded each on its own: the blocks of
        BD3-LM, which makes the bound much tighter; one for the other models.
    """

    logp: Tensor

    def nll(self, num_orders: int | None = None) -> Tensor:
        """float64 [B] nats: the bound with `num_orders` orders (default: all K).

        The mean over the K // num_orders groups of that many orders: one run gives the whole curve, which never rises
        from one number to a multiple of it if both divide K.
        """
        return self._by_group(num_orders).mean(1)

    def standard_error(self, num_orders: int | None = None) -> Tensor:
        """float64 [B] nats: how far `nll(num_orders)` is off for the choice of orders; NaN for a single order.

        From the spread of the groups; with one group, by the jackknife over its orders.
        """
        groups = self._by_group(num_orders)
        if groups.shape[1] > 1:
            return groups.std(1) / math.sqrt(groups.shape[1])
        logp = self.logp[:, : num_orders or self.logp.shape[1]]
        k = logp.shape[1]
        if k == 1:
            return torch.full_like(groups[:, 0], math.nan)
        none = torch.full_like(logp[:, :1], -math.inf)
        before = torch.cat((none, logp.logcumsumexp(1)[:, :-1]), 1)
        after = torch.cat((logp.flip(1).logcumsumexp(1).flip(1)[:, 1:], none), 1)
        without = torch.logaddexp(before, after)  # of all orders but one
        return ((k - 1) * without.var(1, correction=0).sum(-1)).sqrt()

    def _by_group(self, num_orders: int | None) -> Tensor:
        """[B, groups]: the bound from each group of num_orders orders."""
        available = self.logp.shape[1]
        size = available if num_orders is None else num_orders
        if not 1 <= size <= available:
            raise ValueError(f"num_orders: must lie in 1 .. {available}, the orders there are; got {num_orders}")
        groups = self.logp[:, : available // size * size].unflatten(1, (-1, size))
        return (math.log(size) - groups.logsumexp(2)).sum(-1)


@torch.no_grad()
def importance_weighted(
    network: AnyNetwork,
    x: Tensor,
    num_orders: int,
    *,
    model: str = "esolm",
    alpha_0: float = 1.0,
    block_size: int | None = None,
    generator: torch.Generator | None = None,
    max_tokens: int = MAX_TOKENS,
    progress: bool = False,
) -> OrderLikelihoods:
    """log p(x | order) of `num_orders` random orders of every row of x int64 [B, L]; `.nll(k)` is the bound.

    model: "esolm" (one pass over 2 L tokens an order), "mdlm" (L passes over L), "bd3lm" (block_size passes over 2 L).
    alpha_0: of Eso-LM, orders are drawn from P^alpha_0 (eq. 22); 0 has one order, and so is exact. Eso-LM (B) only.
    block_size: of BD3-LM. max_tokens: to forward at once; the orders do not depend on it. progress: show a bar.

    Raises ValueError for arguments out of range.
    """
    if num_orders < 1:
        raise ValueError(f"num_orders: must be at least 1, got {num_orders}")
    if model not in MODELS:
        raise ValueError(f"model: got {model!r}, supported are {', '.join(MODELS)}")
    if (model == "bd3lm") != (block_size is not None):
        raise ValueError(f"block_size: goes with model 'bd3lm' and only with it, got {block_size} with {model!r}")
    batch, length = len(x), row_length(x)

    def logp(x: Tensor, order: Tensor) -> Tensor:
        if model == "bd3lm":
            return bd3lm_order_logp(network, x, order, block_size, max_tokens=max_tokens)
        if model == "mdlm":
            return mdlm_order_logp(network, x, order, max_tokens=max_tokens)[:, None]
        return objectives.any_order_logp(network, x, order)[:, None]

    tokens = {"esolm": 2 * length, "mdlm": length * length, "bd3lm": 2 * length * (block_size or 0)}[model]
    rows = max(max_tokens // max(tokens, 1), 1)
    at_once = max(rows // max(batch, 1), 1)  # orders
    parts = []
    with tqdm(total=num_orders, unit=" orders", leave=False, disable=not progress) as bar:
        for first in range(0, num_orders, at_once):
            count = min(at_once, num_orders - first)
            orders = [random_orders(batch, length, alpha_0, generator) for _ in range(count)]
            several = in_chunks(logp, rows, x.repeat(count, 1), torch.cat(orders).to(x.device))
            parts.append(several.double().view(count, batch, -1))
            bar.update(count)
    return OrderLikelihoods(torch.cat(parts).transpose(0, 1))


def schedule_logp(network: AnyNetwork, x: Tensor, schedule: Schedule, *, chunk_mask: str = "causal") -> Tensor:
    """float32 [B, L]: log-probability with which Eso-LM's sampler draws each token of x by `schedule`; 0 where given.

    One pass over 2 L tokens for all steps, whatever number of tokens each decodes. It is what samplers.esolm.generate
    returns as `logprob` with the same schedule and chunk_mask; the sum over a row is the log-probability of the whole
    generation at temperature 1 without filters. Differentiable through a `Network`.

    x: int64 [B, L], the finished text. chunk_mask: "causal" or "independent", see the top of this module.
    Raises ValueError if the schedule does not fit x.
    """
    order, step_start, given = (torch.from_numpy(a).to(x.device) for a in _by_rank(schedule, *x.shape))
    mask = masks.esolm_steps(step_start, noisy=chunk_mask)
    clean = x.gather(1, order)
    noisy = torch.full_like(clean, network.config.mask_id)
    hidden = objectives.hidden_states(network, torch.cat((noisy, clean), 1), torch.cat((order, order), 1), mask)
    nll = objectives.cross_entropy(network, hidden[:, : x.shape[1]], clean, ~given)
    return -torch.empty_like(nll).scatter_(1, order, nll)


def _by_rank(schedule: Schedule, batch: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[batch, length] by rank, given tokens first in text order: position, first rank of the step, is it given."""
    if schedule.batch != batch:
        raise ValueError(f"schedule: has {schedule.batch} rows, x has {batch}")
    if schedule.order.max(initial=-1) >= length:
        raise ValueError(f"schedule: decodes position {schedule.order.max()}, x has {length} tokens a row")
    order = np.empty((batch, length), dtype=np.int64)
    step_start = np.tile(np.arange(length), (batch, 1))
    num_given = length - schedule.num_masked
    for row, given in enumerate(num_given):
        decoded = schedule.order[row, : length - given]
        order[row] = np.concatenate([np.setdiff1d(np.arange(length), decoded), decoded])
        counts = schedule.counts[row]
        step_start[row, given:] = given + np.repeat(counts.cumsum() - counts, counts)
    return order, step_start, np.arange(length) < num_given[:, None]
