"""Training losses and likelihoods: Eso-LM (arXiv 2506.01928) A and B at any alpha_0, MDLM, BD3-LM, AR.

Every `*_nll` returns nats per token in text order, [B, L], zero where nothing is predicted; its sum over a row is an
estimate of (a bound on) that row's negative log-likelihood. `order[b, r]` is the position of the token with rank r.
Randomness comes from a `torch.Generator` that the caller passes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from esokern import masks
from esokern.models.network import MASK_LOGIT, Network

NOISE_EPS = 1e-3  # log-linear schedule: alpha_1 = NOISE_EPS * alpha_0, not 0
VARIANTS = ("A", "B", "mixed")


def log_linear(t: Tensor, alpha_0: float | Tensor, eps: float = NOISE_EPS) -> tuple[Tensor, Tensor]:
    """alpha_t = alpha_0 (1 - (1 - eps) t) and its derivative in t (section 2.2)."""
    alpha_0 = torch.as_tensor(alpha_0, dtype=t.dtype, device=t.device)
    return alpha_0 * (1 - (1 - eps) * t), (-alpha_0 * (1 - eps)).expand_as(t)


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


def _cross_entropy(network: Network, hidden: Tensor, targets: Tensor, select: Tensor | None = None) -> Tensor:
    """Nats [B, L] of targets [B, L] given hidden [B, L, hidden]; the mask is never predicted.

    With `select` (bool [B, L]) only those rows go through the head; the others are 0.
    """
    chosen = hidden if select is None else hidden[select]
    logits = network.output_layer.linear(chosen).float()
    column = torch.arange(logits.shape[-1], device=logits.device) == network.config.mask_id
    logits = logits.masked_fill(column, MASK_LOGIT)
    wanted = (targets if select is None else targets[select]).reshape(-1)
    nll = F.cross_entropy(logits.reshape(wanted.numel(), -1), wanted.long(), reduction="none")
    if select is None:
        return nll.view(targets.shape)
    return nll.new_zeros(targets.shape).masked_scatter(select, nll)


def _to_text_order(values: Tensor, order: Tensor) -> Tensor:
    """Undo a gather by `order` along dim 1."""
    index = order if values.dim() == 2 else order.unsqueeze(-1).expand_as(values)
    return torch.empty_like(values).scatter_(1, index, values)


def _variant(name: str, allowed: tuple[str, ...] = VARIANTS) -> str:
    if name not in allowed:
        raise ValueError(f"variant is {name!r}; supported: {', '.join(allowed)}")
    return name


def _diffusion_hidden(network: Network, zt: Tensor, order: Tensor, variant: str) -> Tensor:
    tokens = zt.gather(1, order)
    if _variant(variant) == "B":
        mask = "causal"  # in rank order
    else:
        rank = torch.arange(zt.shape[1], device=zt.device).expand_as(zt)
        mask = masks.esolm_diffusion(rank, (zt != network.config.mask_id).sum(1), variant=variant)
    return network.hidden(tokens, order, mask)


def diffusion_logits(network: Network, zt: Tensor, order: Tensor, *, variant: str = "B") -> Tensor:
    """Logits [B, L, vocab] in text order of one pass of the diffusion phase over zt [B, L].

    variant "B": causal in rank; "A": clean tokens also see all clean tokens; "mixed": masks see everything.
    """
    hidden = _diffusion_hidden(network, zt, order, variant)
    return _to_text_order(network.output_layer.linear(hidden), order)


def _sequential_hidden(network: Network, z0: Tensor, x: Tensor, order: Tensor, variant: str) -> Tensor:
    """Hidden rows of the z0 half, in rank order."""
    length = x.shape[1]
    tokens = torch.cat((z0.gather(1, order), x.gather(1, order)), dim=1)
    if _variant(variant, ("A", "B")) == "B":
        rank = torch.arange(length, device=x.device)[None]  # one mask for the whole batch
        mask = masks.esolm_sequential(rank)
    else:
        rank = torch.arange(length, device=x.device).expand_as(x)
        mask = masks.esolm_sequential(rank, (z0 != network.config.mask_id).sum(1), variant="A")
    return network.hidden(tokens, torch.cat((order, order), dim=1), mask)[:, :length]


def sequential_logits(network: Network, z0: Tensor, x: Tensor, order: Tensor, *, variant: str = "B") -> Tensor:
    """Logits [B, L, vocab] in text order of the sequential phase: one pass over [z0, x], outputs of the first half.

    `order`: clean tokens of z0 first, then the masks in text order. Variant "A": clean tokens see each other.
    """
    hidden = _sequential_hidden(network, z0, x, order, variant)
    return _to_text_order(network.output_layer.linear(hidden), order)


def esolm_diffusion_nll(
    network: Network,
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
    masked = (zt == network.config.mask_id).gather(1, order)
    nll = _cross_entropy(network, _diffusion_hidden(network, zt, order, variant), x.gather(1, order), masked)
    if not low_var:
        alpha_t, derivative = log_linear(t, alpha_0)
        nll = nll * (-derivative / (1 - alpha_t))[:, None]
    return _to_text_order(nll, order)


def esolm_sequential_nll(network: Network, x: Tensor, z0: Tensor, order: Tensor, *, variant: str = "B") -> Tensor:
    """The sequential term of the NELBO (eq. 7): -log p(x_i | clean tokens of z0, x_j with j < i) at the masks of z0."""
    masked = (z0 == network.config.mask_id).gather(1, order)
    nll = _cross_entropy(network, _sequential_hidden(network, z0, x, order, variant), x.gather(1, order), masked)
    return _to_text_order(nll, order)


def any_order_logp(network: Network, x: Tensor, order: Tensor) -> Tensor:
    """log p [B] of x [B, L] decoded one token at a time in `order` ([B, L] or [1, L]), from one pass (section 3.3)."""
    order = order.expand_as(x)
    z = torch.full_like(x, network.config.mask_id)
    hidden = _sequential_hidden(network, z, x, order, "B")
    return -_cross_entropy(network, hidden, x.gather(1, order)).sum(-1)


def ar_logits(network: Network, x: Tensor) -> Tensor:
    """Logits [B, L, vocab] of the autoregressive model; row i predicts token i + 1."""
    return network(x, torch.arange(x.shape[1], device=x.device), "causal")


def ar_nll(network: Network, x: Tensor) -> Tensor:
    """-log p(x_i | x_<i) for i >= 1; the first token is given (0)."""
    positions = torch.arange(x.shape[1] - 1, device=x.device)
    nll = _cross_entropy(network, network.hidden(x[:, :-1], positions, "causal"), x[:, 1:])
    return F.pad(nll, (1, 0))


def mdlm_logits(network: Network, zt: Tensor) -> Tensor:
    """Logits [B, L, vocab] of masked diffusion: bidirectional over zt."""
    return network(zt, torch.arange(zt.shape[1], device=zt.device), "bidirectional")


def mdlm_nll(network: Network, x: Tensor, zt: Tensor, t: Tensor, *, low_var: bool = False) -> Tensor:
    """MDLM's NELBO (arXiv 2406.07524): bidirectional attention, alpha_0 = 1."""
    hidden = network.hidden(zt, torch.arange(x.shape[1], device=x.device), "bidirectional")
    nll = _cross_entropy(network, hidden, x, zt == network.config.mask_id)
    if not low_var:
        alpha_t, derivative = log_linear(t, 1.0)
        nll = nll * (-derivative / (1 - alpha_t))[:, None]
    return nll


def _bd3lm_hidden(network: Network, zt: Tensor, x: Tensor, block_size: int) -> Tensor:
    length = x.shape[1]
    positions = torch.arange(length, device=x.device).repeat(2)
    mask = masks.block_diffusion(length, block_size, device=x.device)
    return network.hidden(torch.cat((zt, x), dim=1), positions, mask)[:, :length]


def bd3lm_logits(network: Network, zt: Tensor, x: Tensor, block_size: int) -> Tensor:
    """Logits [B, L, vocab] of block diffusion (arXiv 2503.09573): one pass over [zt, x], outputs of the first half."""
    return network.output_layer.linear(_bd3lm_hidden(network, zt, x, block_size))


def bd3lm_nll(network: Network, x: Tensor, zt: Tensor, t: Tensor, block_size: int, *, low_var: bool = False) -> Tensor:
    """BD3-LM's NELBO. t: noise time per block, [B, ceil(L / block_size)]."""
    nll = _cross_entropy(network, _bd3lm_hidden(network, zt, x, block_size), x, zt == network.config.mask_id)
    if not low_var:
        alpha_t, derivative = log_linear(t, 1.0)
        weight = (-derivative / (1 - alpha_t)).repeat_interleave(block_size, dim=1)
        nll = nll * weight[:, : x.shape[1]]
    return nll


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


def esolm_loss(
    network: Network, x: Tensor, objective: EsoLMObjective, generator: torch.Generator | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The Eso-LM training loss of x [B, L], in nats per token, and its two terms (section 4.1).

    The first kappa * B rows take the diffusion term, the others the sequential term; with alpha_0 = 1 or 0 all rows
    take the one term there is. Rows with a given context are averaged over the tokens of their span.
    """
    batch, length = x.shape
    mask_id, variant = network.config.mask_id, objective.variant
    n_diffusion = round(objective.kappa * batch)
    if objective.alpha_0 in (0.0, 1.0):
        n_diffusion = batch if objective.alpha_0 == 1.0 else 0
    elif not 0 < n_diffusion < batch:
        raise ValueError(f"a batch of {batch} with kappa {objective.kappa} leaves one of the two losses without rows")
    given, alpha_0, shuffle_clean = _draw_context(objective, batch, length, generator)
    terms = {}
    if n_diffusion:
        rows = slice(0, n_diffusion)
        t = antithetic_t(n_diffusion, generator)
        alpha_t, _ = log_linear(t, alpha_0[rows])
        zt = mask_tokens(x[rows], torch.where(given[rows], 1.0, alpha_t[:, None]), mask_id, generator)
        order = clean_first_order(zt == mask_id, generator, shuffle_clean=shuffle_clean[rows], shuffle_masks=True)
        nll = esolm_diffusion_nll(
            network, x[rows], zt, order, t, alpha_0[rows], variant=variant, low_var=objective.low_var
        )
        terms["diffusion"] = nll.sum() / (~given[rows]).sum()
    if n_diffusion < batch:
        rows = slice(n_diffusion, batch)
        z0 = mask_tokens(x[rows], torch.where(given[rows], 1.0, alpha_0[rows, None]), mask_id, generator)
        order = clean_first_order(z0 == mask_id, generator, shuffle_clean=shuffle_clean[rows], shuffle_masks=False)
        nll = esolm_sequential_nll(network, x[rows], z0, order, variant=variant)
        terms["sequential"] = nll.sum() / (~given[rows]).sum()
    return torch.stack(list(terms.values())).sum(), terms


@torch.no_grad()
def esolm_nelbo(
    network: Network, x: Tensor, alpha_0: float, generator: torch.Generator | None = None, *, variant: str = "B"
) -> Tensor:
    """[B] nats: one draw of the full NELBO (eq. 7, true weights) of every row of x [B, L]."""
    mask_id = network.config.mask_id
    nll = torch.zeros(x.shape[0], device=x.device)
    if alpha_0 > 0:
        t = antithetic_t(x.shape[0], generator)
        zt = mask_tokens(x, log_linear(t, alpha_0)[0], mask_id, generator)
        order = clean_first_order(zt == mask_id, generator, shuffle_masks=True)
        nll = nll + esolm_diffusion_nll(network, x, zt, order, t, alpha_0, variant=variant).sum(-1)
    if alpha_0 < 1:
        z0 = mask_tokens(x, alpha_0, mask_id, generator)
        order = clean_first_order(z0 == mask_id, generator, shuffle_masks=False)
        nll = nll + esolm_sequential_nll(network, x, z0, order, variant=variant).sum(-1)
    return nll
