"""Approximate caches for bidirectional networks: which tokens a step computes again.

In a bidirectional network every key and value changes with every token, so nothing can be cached exactly. These
policies keep keys and values of an earlier step for part of the text, in a text-order cache with overwritable rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from esokern.samplers.run import check_count, on_device


@dataclass(frozen=True)
class Prefix:
    """Fast-dLLM's prefix cache (arXiv 2505.22618): the first step of a block computes everything, the others the block
    and all behind it; what stands before the block is as the first step left it."""

    window_only: ClassVar[bool] = True  # do other steps than the first leave out the token before the block?

    def rows(self, state: BlockState) -> Tensor | None:
        if state.step == 0:
            return None
        return _span(state.begin, state.lengths, state.settled.device)


@dataclass(frozen=True)
class Dual:
    """Fast-dLLM's dual cache: the first step of a block computes everything, the others the block alone."""

    window_only: ClassVar[bool] = True

    def rows(self, state: BlockState) -> Tensor | None:
        if state.step == 0:
            return None
        return _span(state.begin, state.end, state.settled.device)


@dataclass(frozen=True)
class Delayed:
    """dKV-Cache (arXiv 2505.15781): a token's keys and values are kept from the step after it was decoded; masks and
    what the last step decoded are computed again, with their neighbours on the left if the network predicts the next
    token. Every `interval` steps, and in a block's first two, everything is."""

    interval: int = 4

    window_only: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_count("interval", self.interval)

    def rows(self, state: BlockState) -> Tensor | None:
        if state.step < 2 or state.step % self.interval == 0:
            return None
        device = state.settled.device
        places = torch.arange(state.settled.shape[1], device=device)
        fresh = ~state.settled & (places < on_device(state.lengths, device)[:, None])
        if state.shift:
            fresh |= torch.nn.functional.pad(fresh[:, 1:], (0, 1))
        counts = fresh.sum(1)
        first = (~fresh).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(counts.max())]
        return torch.where(places[: first.shape[1]] < counts[:, None], first, -1)


Policy = Prefix | Dual | Delayed
POLICIES: dict[str, Policy] = {"prefix": Prefix(), "dual": Dual(), "delayed": Delayed()}


@dataclass(frozen=True)
class BlockState:
    """What a policy decides by.

    step:       of this block, from 0
    begin, end: of the block, int64 [rows] on the host
    lengths:    tokens of each row's text, int64 [rows] on the host
    settled:    bool [rows, length + 1] on the device, what was no mask two steps ago
    shift:      does the network predict the next token?
    """

    step: int
    begin: np.ndarray
    end: np.ndarray
    lengths: np.ndarray
    settled: Tensor
    shift: bool


def _span(begin: np.ndarray, end: np.ndarray, device: torch.device) -> Tensor:
    """Positions [begin, end) of each row, int64 [rows, longest], -1 behind them."""
    positions = begin[:, None] + np.arange((end - begin).max())
    return on_device(np.where(positions < end[:, None], positions, -1), device)
