"""Unbiased draws of the variational bound on -log p(x): Eso-LM (arXiv 2506.01928), MDLM, BD3-LM.

What to evaluate with, where `esokern.objectives` is what to train with. With alpha_t = alpha_0 (1 - t), MDLM being
alpha_0 = 1, the integral over t in closed form leaves a sum over the number of masks m of L tokens,

    sum_{m=1..L} P(Binomial(L, 1 - alpha_0) < m) E_{|M| = m}[mean over M of -log p(x_i | z_M)],

whose weights add up to alpha_0 L. So m is drawn in proportion to them, then M uniformly, and the draw is alpha_0 L
times the mean: exact, and free of the weight -alpha'_t / (1 - alpha_t), whose variance is infinite at alpha_0 = 1.

The published estimator draws t from [eps, 1] under alpha_t = alpha_0 (1 - (1 - eps) t), eps = 1e-3. That leaves out
both ends of the integral, so it is not quite a bound: with f(l) the cross-entropy of a mask when a share l is masked,
it is smaller by eps alpha_0 (f(1 - alpha_0) + f(1) - mean f) nats per token, up to terms in eps^2.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from esokern import objectives
from esokern.objectives import AnyNetwork, clean_first_order

MAX_TOKENS = 1 << 15  # forwarded at once by evaluations, both halves of a doubled sequence counted


def in_chunks(function: Callable[..., Tensor], rows: int, *tensors: Tensor, progress: bool = False) -> Tensor:
    """torch.cat of `function` over groups of at most `rows` (at least 1) rows of the tensors, [N, ...] each."""
    starts = range(0, max(len(tensors[0]), 1), max(rows, 1))
    bar = tqdm(starts, leave=False, disable=not progress)
    return torch.cat([function(*(t[start : start + starts.step] for t in tensors)) for start in bar])


def _evenly_spaced(draws: int, rows: int, blocks: int, generator: torch.Generator | None) -> Tensor:
    """float64 [draws, rows, blocks] in [0, 1): a grid under one random shift, dealt out.

    Each entry is uniform, so estimates are unbiased; but the draws of a block are evenly spaced, so are those of all
    blocks of a row, and so are all. Which of its values a block gets in which draw is random.
    """
    shape = (draws, blocks, rows)
    grid = torch.arange(math.prod(shape), dtype=torch.float64).view(shape) / math.prod(shape)
    u = (grid + torch.rand((), dtype=torch.float64, generator=generator)) % 1
    return u.gather(0, torch.rand(shape, generator=generator).argsort(0)).transpose(1, 2)


def _quantile(weights: Tensor, u: Tensor) -> Tensor:
    """int64: the index drawn with probability proportional to float64 `weights` by each u in [0, 1)."""
    cumulative = weights.cumsum(0)
    return torch.searchsorted(cumulative, u * cumulative[-1], right=True).clamp(max=len(weights) - 1)


def _binomial_cdf(n: int, p: float) -> Tensor:
    """float64 [n + 1]: P(Binomial(n, p) <= k)."""
    k = torch.arange(n + 1, dtype=torch.float64)
    p = torch.tensor(p, dtype=torch.float64)
    choose = torch.lgamma(k[-1] + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    return (choose + torch.xlogy(k, p) + torch.xlogy(n - k, 1 - p)).exp().cumsum(0)


def _check_block_size(block_size: int) -> None:
    if block_size < 1:
        raise ValueError(f"block_size: must be at least 1, got {block_size}")


def rank_in_block(rank: Tensor, block_size: int) -> Tensor:
    """int64 [B, L]: the place of each token within its block of the text when they are sorted by rank [B, L]."""
    _check_block_size(block_size)
    batch, length = rank.shape
    padded = F.pad(rank.double(), (0, -length % block_size), value=torch.inf).view(batch, -1, block_size)
    return padded.argsort(-1).argsort(-1).view(batch, -1)[:, :length]


def _mask_exactly(
    x: Tensor, counts: Tensor, block_size: int, mask_id: int, generator: torch.Generator | None
) -> Tensor:
    """x [B, L] with exactly counts[b, i] tokens, chosen at random, of its i-th block masked."""
    rank = rank_in_block(torch.rand(x.shape, generator=generator), block_size)
    masked = rank < counts.repeat_interleave(block_size, dim=1)[:, : x.shape[1]]
    return torch.where(masked.to(x.device), mask_id, x)


def _repeat(x: Tensor, draws: int | None) -> Tensor:
    """[(draws or 1) * B, L] of x [B, L]."""
    if draws is not None and draws < 1:
        raise ValueError(f"draws: must be at least 1, got {draws}")
    return x if draws is None else x.repeat(draws, 1)


def _by_row(nll: Tensor, batch: int, draws: int | None) -> Tensor:
    """nll [(draws or 1) * batch] as a NELBO function returns it."""
    return nll if draws is None else nll.view(draws, batch).T


@torch.no_grad()
def esolm_nelbo(
    network: AnyNetwork,
    x: Tensor,
    alpha_0: float,
    generator: torch.Generator | None = None,
    *,
    variant: str = "B",
    draws: int | None = None,
    max_tokens: int = MAX_TOKENS,
    progress: bool = False,
) -> Tensor:
    """Draws of Eso-LM's NELBO (eq. 7) of every row of x int64 [B, L]: float32 nats, [B], or [B, draws] if asked for.

    alpha_0: in [0, 1]; 0 is exact, -log p from left to right. variant: "A" or "B". A row's draws, and those of all
    rows, are evenly spaced in m and in the number of masks of the sequential term: their mean is less noisy than that
    of as many calls, and their spread overstates its noise. max_tokens: to forward at once. progress: show bars.

    Raises ValueError for alpha_0, variant or draws out of range.
    """
    if not 0.0 <= alpha_0 <= 1.0:
        raise ValueError(f"alpha_0: must lie in [0, 1], got {alpha_0}")
    batch, length = len(x), row_length(x)
    mask_id, x = network.config.mask_id, _repeat(x, draws)
    nll = torch.zeros(len(x), device=x.device)
    sequential_cdf = _binomial_cdf(length, 1 - alpha_0)  # of the number of tokens that the sequential phase decodes
    if alpha_0 > 0:
        m = 1 + _quantile(sequential_cdf[:-1], _evenly_spaced(draws or 1, batch, 1, generator).reshape(-1))
        zt = _mask_exactly(x, m[:, None], length, mask_id, generator)
        order = clean_first_order(zt == mask_id, generator, shuffle_masks=True)

        def diffusion(x: Tensor, zt: Tensor, order: Tensor) -> Tensor:
            return objectives.esolm_cross_entropy(network, x, zt, order, variant=variant).sum(-1)

        summed = in_chunks(diffusion, max_tokens // length, x, zt, order, progress=progress)
        nll = nll + summed * (alpha_0 * length / m).to(summed)
    if alpha_0 < 1:
        pmf = sequential_cdf.diff(prepend=sequential_cdf.new_zeros(1))
        n = _quantile(pmf, _evenly_spaced(draws or 1, batch, 1, generator).reshape(-1))
        z0 = _mask_exactly(x, n[:, None], length, mask_id, generator)
        order = clean_first_order(z0 == mask_id, generator, shuffle_masks=False)

        def sequential(x: Tensor, z0: Tensor, order: Tensor) -> Tensor:
            return objectives.esolm_sequential_nll(network, x, z0, order, variant=variant).sum(-1)

        nll = nll + in_chunks(sequential, max_tokens // (2 * length), x, z0, order, progress=progress)
    return _by_row(nll, batch, draws)


@torch.no_grad()
def mdlm_nelbo(
    network: AnyNetwork,
    x: Tensor,
    generator: torch.Generator | None = None,
    *,
    draws: int | None = None,
    max_tokens: int = MAX_TOKENS,
    progress: bool = False,
) -> Tensor:
    """Draws of MDLM's NELBO of every row of x [B, L]: L times the mean nats of m masks, m uniform in 1..L.

    Results and options as in esolm_nelbo.
    """

    def cross_entropy(x: Tensor, zt: Tensor) -> Tensor:
        return objectives.mdlm_cross_entropy(network, x, zt)

    rows = max_tokens // row_length(x)
    return _block_nelbo(cross_entropy, x, x.shape[1], network.config.mask_id, generator, draws, rows, progress)


@torch.no_grad()
def bd3lm_nelbo(
    network: AnyNetwork,
    x: Tensor,
    block_size: int,
    generator: torch.Generator | None = None,
    *,
    draws: int | None = None,
    max_tokens: int = MAX_TOKENS,
    progress: bool = False,
) -> Tensor:
    """Draws of BD3-LM's NELBO of every row of x [B, L]: mdlm_nelbo's, block by block, from one pass over 2 L tokens.

    Results and options as in esolm_nelbo. The last block may be shorter.
    """

    def cross_entropy(x: Tensor, zt: Tensor) -> Tensor:
        return objectives.bd3lm_cross_entropy(network, x, zt, block_size)

    rows = max_tokens // (2 * row_length(x))
    return _block_nelbo(cross_entropy, x, block_size, network.config.mask_id, generator, draws, rows, progress)


def row_length(x: Tensor) -> int:
    """L of tokens x [B, L]. Raises ValueError for another shape and for rows of no tokens."""
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"x: must be [batch, length] with a length of at least 1, got {list(x.shape)}")
    return x.shape[1]


def _block_nelbo(
    cross_entropy: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    block_size: int,
    mask_id: int,
    generator: torch.Generator | None,
    draws: int | None,
    rows: int,
    progress: bool,
) -> Tensor:
    _check_block_size(block_size)
    batch, length = x.shape
    x = _repeat(x, draws)
    sizes = torch.tensor([min(block_size, length - begin) for begin in range(0, length, block_size)])
    u = _evenly_spaced(draws or 1, batch, len(sizes), generator).reshape(len(x), -1)
    m = 1 + (u * sizes).long()
    zt = _mask_exactly(x, m, block_size, mask_id, generator)
    weight = (sizes / m).repeat_interleave(block_size, dim=1)[:, :length].to(x.device)

    def weighted(x: Tensor, zt: Tensor, weight: Tensor) -> Tensor:
        return (cross_entropy(x, zt) * weight).sum(-1)

    return _by_row(in_chunks(weighted, rows, x, zt, weight, progress=progress), batch, draws)
