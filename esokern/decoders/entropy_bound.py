"""Entropy-bounded unmasking (Ben-Hamu et al., arXiv 2505.24857): as many tokens as are nearly independent.

The tokens of a step are drawn independently of each other. What that gets wrong is at most the sum of their entropies
minus the largest, so the most certain tokens are kept as long as that is at most gamma.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from esokern.decoders.base import Decoder, check_choice, check_range


@dataclass(frozen=True, kw_only=True)
class EntropyBound(Decoder):
    """gamma: nats; 0 = one token a step (and those that are certain).

    order: what positions are sorted by: "neg_entropy", "prob" or "margin"
    Entropy and order are of the distribution that tokens are drawn from.
    """

    gamma: float = 0.1
    order: str = "neg_entropy"
    statistics = "sampling"

    def __post_init__(self) -> None:
        check_range("gamma", self.gamma, 0.0, float("inf"))
        check_choice("order", self.order, ("neg_entropy", "prob", "margin"))
        super().__post_init__()

    @property
    def measure(self) -> str:
        return self.order

    def options(self, masked: np.ndarray, num_windows: int, start: int = 0) -> Iterator[dict[str, object]]:
        return itertools.repeat({"entropy_bound": self.gamma})
