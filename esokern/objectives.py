"""Training losses and what they are made of: Eso-LM (arXiv 2506.01928) A and B at any alpha_0, MDLM, BD3-LM, AR.

Every `*_nll` returns nats per token in text order, [B, L], zero where nothing is predicted; its sum over a row is an
estimate of (a bound on) that row's negative log-likelihood (`esokern.nelbo` draws better ones). `order[b, r]` is the
position of the token with rank r.

A network is a `Network`, through which gradients flow, or a `FoldedNetwork`, which only evaluates and is faster.
Randomness comes from a `torch.Generator` that the caller passes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from esokern import masks
from esokern.masked_cross_entropy import masked_cross_entropy
from esokern.masks import RankMask
from esokern.models.network import FoldedNetwork, Network

NOISE_EPS = 1e-3  # log-linear schedule: alpha_1 = NOISE_EPS * alpha_0, not 0
VARIANTS = ("A", "B", "mixed")
IGNORE_INDEX = -100  # the target of a token that is not predicted
AnyNetwork = Network | FoldedNetwork


def mixed_seed(*numbers: int) -> int:
    """One seed for a random generator out of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 2)


def seeded(*numbers: int) -> torch.Generator:
    """A generator whose stream is a function of these numbers."""
    return torch.Generator().manual_seed(mixed_seed(*numbers))


def log_linear(t: Tensor, alpha_0: float | Tensor, eps: float = NOISE_EPS) -> tuple[Tensor, Tensor]:
    """alpha_t = alpha_0 (1 - (1 - eps) t) and its derivative in t (section 2.2)."""
    alpha_0 = torch.as_tensor(alpha_0, dtype=t.dtype, device=t.device)
    return alpha_0 * (1 - (1 - eps) * t), (-alpha_0 * (1 - eps)).expand_as(t)


def _nelbo_weight(t: Tensor, alpha_0: float | Tensor) -> Tensor:
    """-alpha'_t / (1 - alpha_t), the weight of the NELBO's cross-entropy; 1 / t at alpha_0 = 1."""
    alpha_t, derivative = log_linear(t, alpha_0)
    return -derivative / (1 - alpha_t)


def antithetic_t(batch: int, generator: torch.Generator | None = None, eps: float = 1e-3) -> Tensor:
    """float32 [batch] in [eps, 1]: one random offset per equal slice of the unit interval (low-discrepancy)."""
    t = (torch.rand(batch, generator=generator) / batch + torch.arange(batch) / batch) % 1
    return (1 - eps) * t + eps


def mask_tokens(x: Tensor, keep: float | Tensor, mask_id: int, generator: torch.Generator | None = None) -> Tensor:
    """Each token of x [B, L] stays with probability `keep` (a number, or one per row, or per token), else `mask_id`."""
    keep = torch.as_tensor(keep, dtype=torch.float32)
    if keep.dim() == 1:
        keep = keep[:, None]
    kept = torch.rand(x.shape, generator=generator) < keep
    return torch.where(kept.to(x.device), x, mask_id)


def clean_first_order(
    masked: Tensor,
    generator: torch.Generator | None = None,
    *,
    shuffle_clean: bool | Tensor = True,
    shuffle_masks: bool,
) -> Tensor:
    """int64 [B, L]: an order with clean tokens first. Each group is shuffled or left in text order.

    masked: bool [B, L]. shuffle_clean may be a bool per row, [B].
    """
    batch, length = masked.shape
    natural = torch.arange(length) / length
    noise = torch.rand(batch, length, generator=generator)
    shuffle_clean = torch.as_tensor(shuffle_clean).expand(batch)[:, None]
    clean_key = torch.where(shuffle_clean, noise, natural)
    mask_key = noise if shuffle_masks else natural.expand(batch, length)
    cpu_masked = masked.cpu()
    key = torch.where(cpu_masked, 1 + mask_key, clean_key)
    return key.argsort(dim=-1).to(masked.device)


def hidden_states(network: AnyNetwork, tokens: Tensor, positions: Tensor, mask: RankMask | str) -> Tensor:
    """[B, S, hidden]: what the head takes. `mask` may be "causal" or "bidirectional"."""
    if not isinstance(network, FoldedNetwork):
        return network.hidden(tokens, positions, mask)
    if isinstance(mask, str):
        constructor = {"causal": masks.causal, "bidirectional": masks.bidirectional}[mask]
        mask = constructor(tokens.shape[1], device=tokens.device)
    return network(tokens, positions, mask=mask)


def _head(network: AnyNetwork) -> tuple[Tensor, Tensor]:
    """Weight [vocab, hidden] and bias [vocab] of the last layer."""
    if isinstance(network, FoldedNetwork):
        return network.head_weight, network.head_bias
    return network.output_layer.linear.weight, network.output_layer.linear.bias


def _logits(network: AnyNetwork, hidden: Tensor) -> Tensor:
    return F.linear(hidden, *_head(network))


def cross_entropy(network: AnyNetwork, hidden: Tensor, targets: Tensor, select: Tensor | None = None) -> Tensor:
    """Nats [B, L] of targets [B, L] given hidden [B, L, hidden]; the mask is never predicted.

    With `select` (bool [B, L]) only those rows go through the head; the others are 0.
    """
    weight, bias = _head(network)
    if select is not None:
        targets = torch.where(select, targets, IGNORE_INDEX)
    return masked_cross_entropy(
        hidden,
        weight,
        targets,
        bias=bias,
        mask_id=network.config.mask_id,
        ignore_index=IGNORE_INDEX,
        backend="reference" if hidden.dtype == torch.float64 else None,
    )


def _to_text_order(values: Tensor, order: Tensor) -> Tensor:
    """Undo a gather by `order` along dim 1."""
    index = order if values.dim() == 2 else order.unsqueeze(-1).expand_as(values)
    return torch.empty_like(values).scatter_(1, index, values)


def _variant(name: str, allowed: tuple[str, ...] = VARIANTS) -> str:
    if name not in allowed:
        raise ValueError(f"variant is {name!r}; supported: {', '.join(allowed)}")
    return name


def _diffusion_hidden(network: AnyNetwork, zt: Tensor, order: Tensor, variant: str) -> Tensor:
    tokens = zt.gather(1, order)
    if _variant(variant) == "B":
        mask = "causal"  # in rank order
    else:
        rank = torch.arange(zt.shape[1], device=zt.device).expand_as(zt)
        mask = masks.esolm_diffusion(rank, (zt != network.config.mask_id).sum(1), variant=variant)
    return hidden_states(network, tokens, order, mask)


def diffusion_logits(network: AnyNetwork, zt: Tensor, order: Tensor, *, variant: str = "B") -> Tensor:
    """Logits [B, L, vocab] in text order of one pass of the diffusion phase over zt [B, L].

    variant "B": causal in rank; "A": clean tokens also see all clean tokens; "mixed": masks see everything.
    """
    hidden = _diffusion_hidden(network, zt, order, variant)
    return _to_text_order(_logits(network, hidden), order)


def _sequential_hidden(network: AnyNetwork, z0: Tensor, x: Tensor, order: Tensor, variant: str) -> Tensor:
    """Hidden rows of the z0 half, in rank order."""
    length = x.shape[1]
    tokens = torch.cat((z0.gather(1, order), x.gather(1, order)), dim=1)
    if _variant(variant, ("A", "B")) == "B":
        rank = torch.arange(length, device=x.device)[None]  # one mask for the whole batch
        mask = masks.esolm_sequential(rank)
    else:
        rank = torch.arange(length, device=x.device).expand_as(x)
        mask = masks.esolm_sequential(rank, (z0 != network.config.mask_id).sum(1), variant="A")
    return hidden_states(network, tokens, torch.cat((order, order), dim=1), mask)[:, :length]


def sequential_logits(network: AnyNetwork, z0: Tensor, x: Tensor, order: Tensor, *, variant: str = "B") -> Tensor:
    """Logits [B, L, vocab] in text order of the sequential phase: one pass over [z0, x], outputs of the first half.

    `order`: clean tokens of z0 first, then the masks in text order. Variant "A": clean tokens see each other.
    """
    hidden = _sequential_hidden(network, z0, x, order, variant)
    return _to_text_order(_logits(network, hidden), order)


def esolm_cross_entropy(network: AnyNetwork, x: Tensor, zt: Tensor, order: Tensor, *, variant: str = "B") -> Tensor:
    """-log p(x_i | zt) at the masks of zt, in the diffusion phase under `order`."""
    masked = (zt == network.config.mask_id).gather(1, order)
    nll = cross_entropy(network, _diffusion_hidden(network, zt, order, variant), x.gather(1, order), masked)
    return _to_text_order(nll, order)


def esolm_diffusion_nll(
    network: AnyNetwork,
    x: Tensor,
    zt: Tensor,
    order: Tensor,
    t: Tensor,
    alpha_0: float | Tensor,
    *,
    variant: str = "B",
    low_var: bool = False,
) -> Tensor:
    """The diffusion term of the NELBO (eq. 7): -alpha'_t / (1 - alpha_t) * -log p(x) at the masks of zt.

    t and alpha_0: one per row (alpha_0 may be a number). `low_var` replaces the weight by 1, a training objective of
    lower variance that is no bound.
    """
    nll = esolm_cross_entropy(network, x, zt, order, variant=variant)
    return nll if low_var else nll * _nelbo_weight(t, alpha_0).to(nll.device)[:, None]


def esolm_sequential_nll(network: AnyNetwork, x: Tensor, z0: Tensor, order: Tensor, *, variant: str = "B") -> Tensor:
    """The sequential term of the NELBO (eq. 7): -log p(x_i | clean tokens of z0, x_j with j < i) at the masks of z0."""
    masked = (z0 == network.config.mask_id).gather(1, order)
    nll = cross_entropy(network, _sequential_hidden(network, z0, x, order, variant), x.gather(1, order), masked)
    return _to_text_order(nll, order)


def any_order_logp(network: AnyNetwork, x: Tensor, order: Tensor) -> Tensor:
    """log p [B] of x [B, L] decoded one token at a time in `order` ([B, L] or [1, L]), from one pass (section 3.3)."""
    order = order.expand_as(x)
    z = torch.full_like(x, network.config.mask_id)
    hidden = _sequential_hidden(network, z, x, order, "B")
    return -cross_entropy(network, hidden, x.gather(1, order)).sum(-1)


def ar_logits(network: AnyNetwork, x: Tensor) -> Tensor:
    """Logits [B, L, vocab] of the autoregressive model; row i predicts token i + 1."""
    return _logits(network, hidden_states(network, x, torch.arange(x.shape[1], device=x.device), "causal"))


def ar_nll(network: AnyNetwork, x: Tensor) -> Tensor:
    """-log p(x_i | x_<i) for i >= 1; the first token is given (0)."""
    positions = torch.arange(x.shape[1] - 1, device=x.device)
    nll = cross_entropy(network, hidden_states(network, x[:, :-1], positions, "causal"), x[:, 1:])
    return F.pad(nll, (1, 0))


def _mdlm_hidden(network: AnyNetwork, zt: Tensor) -> Tensor:
    return hidden_states(network, zt, torch.arange(zt.shape[1], device=zt.device), "bidirectional")


def mdlm_logits(network: AnyNetwork, zt: Tensor) -> Tensor:
    """Logits [B, L, vocab] of masked diffusion: bidirectional over zt."""
    return _logits(network, _mdlm_hidden(network, zt))


def mdlm_cross_entropy(network: AnyNetwork, x: Tensor, zt: Tensor, select: Tensor | None = None) -> Tensor:
    """-log p(x_i | zt) where `select` (bool [B, L]) says, by default at all masks of zt."""
    select = zt == network.config.mask_id if select is None else select
    return cross_entropy(network, _mdlm_hidden(network, zt), x, select)


def mdlm_nll(network: AnyNetwork, x: Tensor, zt: Tensor, t: Tensor, *, low_var: bool = False) -> Tensor:
    """MDLM's NELBO (arXiv 2406.07524): bidirectional attention, alpha_0 = 1."""
    nll = mdlm_cross_entropy(network, x, zt)
    return nll if low_var else nll * _nelbo_weight(t, 1.0).to(nll.device)[:, None]


def _bd3lm_hidden(network: AnyNetwork, zt: Tensor, x: Tensor, block_size: int) -> Tensor:
    length = x.shape[1]
    positions = torch.arange(length, device=x.device).repeat(2)
    mask = masks.block_diffusion(length, block_size, device=x.device)
    return hidden_states(network, torch.cat((zt, x), dim=1), positions, mask)[:, :length]


def bd3lm_logits(network: AnyNetwork, zt: Tensor, x: Tensor, block_size: int) -> Tensor:
    """Logits [B, L, vocab] of block diffusion (arXiv 2503.09573): one pass over [zt, x], outputs of the first half."""
    return _logits(network, _bd3lm_hidden(network, zt, x, block_size))


def bd3lm_cross_entropy(
    network: AnyNetwork, x: Tensor, zt: Tensor, block_size: int, select: Tensor | None = None
) -> Tensor:
    """-log p(x_i | its block of zt, the blocks of x before) where `select` says, by default at all masks of zt."""
    select = zt == network.config.mask_id if select is None else select
    return cross_entropy(network, _bd3lm_hidden(network, zt, x, block_size), x, select)


def bd3lm_nll(
    network: AnyNetwork, x: Tensor, zt: Tensor, t: Tensor, block_size: int, *, low_var: bool = False
) -> Tensor:
    """BD3-LM's NELBO. t: noise time per block, [B, ceil(L / block_size)]."""
    nll = bd3lm_cross_entropy(network, x, zt, block_size)
    if low_var:
        return nll
    weight = _nelbo_weight(t, 1.0).repeat_interleave(block_size, dim=1)[:, : x.shape[1]]
    return nll * weight.to(nll.device)


@dataclass(frozen=True)
class EsoLMObjective:
    """What `esolm_loss` draws at random, and how.

    alpha_0:         expected share of tokens that diffusion produces
    kappa:           share of the batch that goes to the diffusion term, the rest to the sequential term
    variant:         "A" or "B"
    low_var:         unit weight in the diffusion term (training only)
    infill_fraction: share of rows trained on a given context: all tokens outside one contiguous span are clean from
                     the start (half of these spans reach the end of the row, as in continuing a prompt). Such a row's
                     loss bounds the conditional likelihood of its span, at an alpha_0 drawn from [0, alpha_0]. Half of
                     them order their clean tokens as in the text, half at random.
    """

    alpha_0: float = 1.0
    kappa: float = 0.5
    variant: str = "B"
    low_var: bool = False
    infill_fraction: float = 0.0

    def __post_init__(self):
        for name in ("alpha_0", "kappa", "infill_fraction"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie in [0, 1]")
        _variant(self.variant, ("A", "B"))


def _draw_context(
    objective: EsoLMObjective, batch: int, length: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor]:
    """given [batch, length] bool, alpha_0 [batch], shuffle_clean [batch] bool."""
    u = torch.rand(6, batch, generator=generator)
    infill = u[0] < objective.infill_fraction
    span = 1 + (u[1] * length).floor().clamp(max=length - 1)  # 1..length
    to_end = u[2] < 0.5
    start = torch.where(to_end, length - span, ((length - span + 1) * u[3]).floor())
    positions = torch.arange(length)[None]
    inside = (positions >= start[:, None]) & (positions < (start + span)[:, None])
    given = infill[:, None] & ~inside
    alpha_0 = torch.where(infill, u[4] * objective.alpha_0, torch.tensor(objective.alpha_0))
    return given, alpha_0, ~infill | (u[5] < 0.5)


def _rows_of_term(name: str, rows: Tensor) -> Tensor:
    if len(rows) == 0:
        raise ValueError(f"rows: the slice has none of the batch's rows of the {name} term")
    return rows


def esolm_loss(
    network: Network,
    x: Tensor,
    objective: EsoLMObjective,
    generator: torch.Generator | None = None,
    *,
    rows: slice = slice(None),
) -> tuple[Tensor, dict[str, Tensor]]:
    """The Eso-LM training loss of x [B, L], in nats per token, and its two terms (section 4.1).

    The first kappa * B rows take the diffusion term, the others the sequential term; with alpha_0 = 1 or 0 all rows
    take the one term there is. Rows with a given context are averaged over the tokens of their span.

    rows: only these go through the network. All noise is drawn for the whole batch and the terms are divided by the
        whole batch's tokens, so the losses and gradients of disjoint slices add up to those of the batch. A slice must
        have rows of both terms (every n-th row has).
    """
    batch, length = x.shape
    mask_id, variant = network.config.mask_id, objective.variant
    n_diffusion = round(objective.kappa * batch)
    if objective.alpha_0 in (0.0, 1.0):
        n_diffusion = batch if objective.alpha_0 == 1.0 else 0
    elif not 0 < n_diffusion < batch:
        raise ValueError(f"a batch of {batch} with kappa {objective.kappa} leaves one of the two losses without rows")
    chosen = torch.arange(batch)[rows]
    given, alpha_0, shuffle_clean = _draw_context(objective, batch, length, generator)
    terms = {}
    if n_diffusion:
        part = slice(0, n_diffusion)
        t = antithetic_t(n_diffusion, generator)
        alpha_t, _ = log_linear(t, alpha_0[part])
        zt = mask_tokens(x[part], torch.where(given[part], 1.0, alpha_t[:, None]), mask_id, generator)
        order = clean_first_order(zt == mask_id, generator, shuffle_clean=shuffle_clean[part], shuffle_masks=True)
        own = _rows_of_term("diffusion", chosen[chosen < n_diffusion])
        nll = esolm_diffusion_nll(
            network, x[own], zt[own], order[own], t[own], alpha_0[own], variant=variant, low_var=objective.low_var
        )
        terms["diffusion"] = nll.sum() / (~given[part]).sum()
    if n_diffusion < batch:
        part = slice(n_diffusion, batch)
        z0 = mask_tokens(x[part], torch.where(given[part], 1.0, alpha_0[part, None]), mask_id, generator)
        order = clean_first_order(z0 == mask_id, generator, shuffle_clean=shuffle_clean[part], shuffle_masks=False)
        own = _rows_of_term("sequential", chosen[chosen >= n_diffusion] - n_diffusion)
        nll = esolm_sequential_nll(network, x[part][own], z0[own], order[own], variant=variant)
        terms["sequential"] = nll.sum() / (~given[part]).sum()
    return torch.stack(list(terms.values())).sum(), terms
