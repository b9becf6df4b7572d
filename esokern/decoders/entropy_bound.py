"""Entropy-bounded unmasking (Ben-Hamu et al., arXiv 2505.24857): as many tokens as are nearly independent.

The tokens of a step are drawn independently of each other. What that gets wrong is at most the sum of their entropies
minus the largest, so the most certain tokens are kept as long as that is at most gamma.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from esokern.decoders.base import Decoder, blocks, check_choice, check_count, check_range


@dataclass(frozen=True, kw_only=True)
class EntropyBound(Decoder):
    """gamma: nats; 0 = one token a step (and those that are certain).

    order:        what positions are sorted by: "neg_entropy", "prob" or "margin"
    block_length: None = all that is to be generated in one block
    Entropy and order are of the distribution that tokens are drawn from.
    """

    gamma: float = 0.1
    order: str = "neg_entropy"
    block_length: int | None = None
    statistics = "sampling"

    def __post_init__(self) -> None:
        check_range("gamma", self.gamma, 0.0, float("inf"))
        check_choice("order", self.order, ("neg_entropy", "prob", "margin"))
        check_count("block_length", self.block_length, optional=True)

    @property
    def measure(self) -> str:
        return self.order

    def windows(self, begin: int, end: int) -> list[tuple[int, int]]:
        return blocks(begin, end, self.block_length)

    def options(self, masked: np.ndarray, num_windows: int, start: int = 0) -> Iterator[dict[str, object]]:
        return itertools.repeat({"entropy_bound": self.gamma})
