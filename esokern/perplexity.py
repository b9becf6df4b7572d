"""How likely a model finds a text: perplexity and bits per byte, exact or bounded, and how sure each figure is.

Two errors stand beside a figure: "rows", the standard error from the choice of rows (another text of the kind would
give another figure; it contains the second), and "noise", that of the random draws and orders for these very rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esokern import distributed, likelihood, nelbo, objectives
from esokern.objectives import AnyNetwork

MODELS = (*likelihood.MODELS, "ar")
CHUNK = 16  # rows that share their noise and stay with one process


@dataclass(frozen=True)
class Model:
    """What a network was trained as, and at which settings to evaluate it. ValueError for settings that do not fit.

    name: "esolm", "mdlm", "bd3lm" or "ar". alpha_0, variant: of Eso-LM. block_size: of BD3-LM, needed there.
    """

    name: str
    alpha_0: float = 1.0
    variant: str = "B"
    block_size: int | None = None

    def __post_init__(self) -> None:
        if self.name not in MODELS:
            raise ValueError(f"model: got {self.name!r}, supported are {', '.join(MODELS)}")
        if not 0.0 <= self.alpha_0 <= 1.0:
            raise ValueError(f"alpha_0: must lie in [0, 1], got {self.alpha_0}")
        if self.variant not in ("A", "B"):
            raise ValueError(f"variant: got {self.variant!r}, supported are A and B")
        if self.name == "bd3lm" and (self.block_size is None or self.block_size < 1):
            raise ValueError(f"block_size: BD3-LM needs one of at least 1, got {self.block_size}")

    def __str__(self) -> str:
        return {
            "esolm": f"Eso-LM ({self.variant}), alpha_0 = {self.alpha_0:g}",
            "mdlm": "MDLM",
            "bd3lm": f"BD3-LM, blocks of {self.block_size}",
            "ar": "autoregressive",
        }[self.name]

    @property
    def exact(self) -> bool:
        """There is one order, from left to right, so that one pass gives -log p itself."""
        return (
            self.name == "ar"
            or (self.name, self.alpha_0) == ("esolm", 0)
            or (self.name, self.block_size) == ("bd3lm", 1)
        )

    @property
    def has_orders(self) -> bool:
        """The likelihood given an order is to be had. Not in Eso-LM (A), whose clean tokens change as others join."""
        return not self.exact and (self.name, self.variant) != ("esolm", "A")

    def num_predicted(self, rows: Tensor) -> int:
        """Tokens per row that count: all, but for the first of an autoregressive model, which is given."""
        return rows.shape[1] - (self.name == "ar")


@dataclass(frozen=True)
class Estimate:
    """-log p(row) or a bound on it, for every row.

    kind: "exact", "nelbo" or "importance_weighted". samples: draws, or orders. nll: float64 [rows] nats.
    noise: float64 [rows], its standard error for the choice of draws or orders; 0 if exact, NaN if one cannot tell.
    """

    kind: str
    samples: int
    nll: Tensor
    noise: Tensor

    @property
    def label(self) -> str:
        """For a table."""
        plural = "" if self.samples == 1 else "s"
        return {
            "exact": "exact",
            "nelbo": f"NELBO, {self.samples} draw{plural}",
            "importance_weighted": f"{self.samples} order{plural}",
        }[self.kind]


def split_rows(stream: Sequence[int] | np.ndarray, length: int, max_rows: int | None = None) -> list[Tensor]:
    """The stream in rows of `length`, int64 [n, length], and if a shorter row is left, [1, shorter] behind them.

    max_rows: so many of them, evenly spread; None = all. ValueError for an empty stream.
    """
    tokens = torch.as_tensor(np.asarray(stream, dtype=np.int64))
    if not len(tokens):
        raise ValueError("the text is empty")
    rows = tokens.split(length)
    if max_rows is not None and max_rows < len(rows):
        rows = [rows[i] for i in np.linspace(0, len(rows) - 1, max_rows).round().astype(int)]
    groups = [[row for row in rows if len(row) == length], [row for row in rows if len(row) < length]]
    return [torch.stack(group) for group in groups if group]


def estimates(
    network: AnyNetwork,
    rows: Sequence[Tensor],
    model: Model,
    *,
    draws: int = 4,
    num_orders: int = 16,
    seed: int = 0,
    max_tokens: int = nelbo.MAX_TOKENS,
    progress: bool = False,
) -> list[Estimate]:
    """Estimates of -log p of every row: exact, or the NELBO and the importance-weighted bound of 1, 2, 4, .. K orders.

    rows: groups of int64 [n, length], each of its own length, on the network's device.
    draws: of the NELBO, 0 = leave it out. num_orders: K, 0 = leave the bound out.
    max_tokens: to forward at once. progress: show a bar.

    Of several processes (esokern.distributed) each takes a share of the rows, and all get the result, which is a
    function of seed, rows, draws and K alone. ValueError for what is not had.
    """
    if draws < 0 or num_orders < 0:
        raise ValueError(f"draws and num_orders: must be at least 0, got {draws} and {num_orders}")
    if num_orders and not model.exact and not model.has_orders:
        raise ValueError("num_orders: Eso-LM (A) has no likelihood given an order; 0 leaves it out")
    if any(model.num_predicted(group) == 0 for group in rows):
        raise ValueError("rows: an autoregressive model predicts nothing in a row of one token")
    chunks = [chunk for group in rows if len(group) for chunk in group.split(CHUNK)]

    def estimate(index: int) -> list[Estimate]:
        generator = objectives.seeded(seed, index)
        return list(_estimates(network, chunks[index], model, draws, num_orders, generator, max_tokens))

    parts = distributed.dealt(len(chunks), estimate, progress=progress)
    return [
        Estimate(
            kinds[0].kind, kinds[0].samples, *(torch.cat([getattr(e, n) for e in kinds]) for n in ("nll", "noise"))
        )
        for kinds in zip(*parts, strict=True)
    ]


def _estimates(
    network: AnyNetwork,
    x: Tensor,
    model: Model,
    draws: int,
    num_orders: int,
    generator: torch.Generator,
    max_tokens: int,
) -> Iterator[Estimate]:
    if model.exact:
        nll = _exact_nll(network, x, model, max_tokens).double().cpu()
        yield Estimate("exact", 1, nll, torch.zeros_like(nll))
        return
    if draws:
        nll = _nelbo(model)(network, x, generator=generator, draws=draws, max_tokens=max_tokens).double().cpu()
        noise = nll.std(1) / math.sqrt(draws) if draws > 1 else torch.full_like(nll[:, 0], math.nan)
        yield Estimate("nelbo", draws, nll.mean(1), noise)
    if num_orders:
        result = likelihood.importance_weighted(
            network,
            x,
            num_orders,
            model=model.name,
            alpha_0=model.alpha_0 if model.name == "esolm" else 1.0,
            block_size=model.block_size if model.name == "bd3lm" else None,
            generator=generator,
            max_tokens=max_tokens,
        )
        for k in sorted({*(1 << i for i in range(num_orders.bit_length())), num_orders}):
            yield Estimate("importance_weighted", k, result.nll(k).cpu(), result.standard_error(k).cpu())


@torch.no_grad()
def _exact_nll(network: AnyNetwork, x: Tensor, model: Model, max_tokens: int) -> Tensor:
    """[rows]: -log p from left to right."""
    order = torch.arange(x.shape[1], device=x.device)[None]
    row_nll: dict[str, Callable[[Tensor], Tensor]] = {
        "ar": lambda x: objectives.ar_nll(network, x).sum(1),
        "esolm": lambda x: -objectives.any_order_logp(network, x, order),
        "bd3lm": lambda x: objectives.bd3lm_cross_entropy(
            network, x, torch.full_like(x, network.config.mask_id), 1
        ).sum(1),
    }
    return nelbo.in_chunks(row_nll[model.name], max_tokens // (2 * x.shape[1]), x)


def _nelbo(model: Model) -> Callable[..., Tensor]:
    if model.name == "mdlm":
        return nelbo.mdlm_nelbo
    if model.name == "bd3lm":
        return lambda network, x, **options: nelbo.bd3lm_nelbo(network, x, model.block_size, **options)
    return lambda network, x, **options: nelbo.esolm_nelbo(network, x, model.alpha_0, variant=model.variant, **options)


def figures(estimate: Estimate, num_tokens: Tensor, num_bytes: Tensor | None) -> dict[str, Any]:
    """Nats per token, bits per byte and perplexity of an estimate, for JSON; None where there is no such figure.

    num_tokens, num_bytes: int64 [rows]; no bytes where the vocabulary does not tell them.
    """
    nats = _ratio(estimate.nll, estimate.noise, num_tokens)
    bits = (None,) * 3
    if num_bytes is not None:
        bits = _ratio(estimate.nll / math.log(2), estimate.noise / math.log(2), num_bytes)
    perplexity = math.exp(nats[0])
    names = [
        f"{name}{error}" for name in ("nats_per_token", "bits_per_byte") for error in ("", "_se_rows", "_se_noise")
    ]
    return {
        "kind": estimate.kind,
        "samples": estimate.samples,
        **dict(zip(names, (*nats, *bits), strict=True)),
        "perplexity": perplexity,
        "perplexity_se_rows": None if nats[1] is None else perplexity * nats[1],
        "perplexity_se_noise": None if nats[2] is None else perplexity * nats[2],
    }


def _ratio(total: Tensor, noise: Tensor, count: Tensor) -> tuple[float, float | None, float | None]:
    """sum(total) / sum(count), and its standard errors from the rows and from the noise of each row."""
    n, whole = len(total), count.sum()
    ratio = total.sum() / whole
    rows = ((total - ratio * count).square().sum() * n / (n - 1)).sqrt() / whole if n > 1 else torch.tensor(math.nan)
    values = (ratio, rows, noise.square().sum().sqrt() / whole)
    return tuple(None if math.isnan(value) else float(value) for value in values)
