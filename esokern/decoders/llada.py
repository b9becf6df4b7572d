"""LLaDA (arXiv 2502.09992) and Fast-dLLM (arXiv 2505.22618): block after block, the most confident tokens first.

Confidence is the probability of the drawn token at temperature 1, before any noise or filter.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from esokern.decoders.base import Decoder, check_choice, check_range, steps_per_window
from esokern.samplers.run import check_count


@dataclass(frozen=True, kw_only=True)
class LLaDA(Decoder):
    """LLaDA's `generate`: a fixed number of tokens per step.

    steps:        over all blocks; a multiple of their number
    remasking:    "low_confidence", or "random" positions
    cfg_scale:    of classifier-free guidance, whose other half sees no given token; 0 = none
    """

    steps: int = 128
    remasking: str = "low_confidence"
    cfg_scale: float = 0.0

    def __post_init__(self) -> None:
        check_count("steps", self.steps)
        super().__post_init__()
        check_choice("remasking", self.remasking, ("low_confidence", "random"))
        check_range("cfg_scale", self.cfg_scale, 0.0, 1e6)

    @property
    def guidance(self) -> float:
        return self.cfg_scale

    @property
    def measure(self) -> str:
        return "random" if self.remasking == "random" else "prob"

    def options(self, masked: np.ndarray, num_windows: int, start: int = 0) -> Iterator[dict[str, object]]:
        steps = max(steps_per_window(self.steps, num_windows) - start, 1)
        for step in range(steps):
            yield {"num_select": masked // steps + (step < masked % steps)}


@dataclass(frozen=True, kw_only=True)
class FastDLLM(Decoder):
    """Fast-dLLM's parallel decoding: in every step all tokens that the model is sure of, and at least one.

    threshold:    keep tokens of at least this probability
    factor:       in place of the threshold: keep n tokens while the n-th probability is at least 1 - factor / (n + 1)
    """

    block_length: int | None = 32
    threshold: float = 0.9
    factor: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("threshold", self.threshold, 0.0, 1.0)
        check_range("factor", self.factor, 0.0, float("inf"))

    def options(self, masked: np.ndarray, num_windows: int, start: int = 0) -> Iterator[dict[str, object]]:
        if self.factor is not None:
            return itertools.repeat({"factor": self.factor})
        return itertools.repeat({"num_select": 1, "threshold": self.threshold})
