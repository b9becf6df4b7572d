"""Dream (arXiv 2508.15487): a share of the masks per step, the most confident first.

Confidence is taken after temperature and filters, top_p before top_k. The network's rows predict the next token, which
is a property of the model (`Denoiser.shift`), not of the decoder.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from esokern.decoders.base import Decoder, check_choice, check_range, steps_per_window
from esokern.samplers.run import check_count

_MEASURES = {
    "origin": "random",
    "maskgit_plus": "prob",
    "topk_margin": "margin",
    "entropy": "neg_entropy",
    "confidence_threshold": "prob",
}


@dataclass(frozen=True, kw_only=True)
class Dream(Decoder):
    """Dream's `diffusion_generate`, and by blocks Fast-dLLM's version of it.

    steps:        over all blocks; a multiple of their number
    alg:          "origin": every mask is kept with the probability of the step, wherever it stands; "maskgit_plus" (by
                  probability), "topk_margin" (first minus second), "entropy": the most confident ones;
                  "confidence_threshold": all of at least the probability `threshold`, and at least one a step, in
                  however many steps that takes (Fast-dLLM's, by blocks)
    alg_temp:     choose by confidence / alg_temp + noise instead: a draw without replacement from its softmax
    eps:          the schedule's last time
    threshold:    of "confidence_threshold"
    """

    steps: int = 512
    alg: str = "origin"
    alg_temp: float | None = None
    eps: float = 1e-3
    threshold: float = 0.9

    statistics: ClassVar[str] = "sampling"
    filter_order: ClassVar[str] = "top_p_first"

    def __post_init__(self) -> None:
        check_count("steps", self.steps)
        super().__post_init__()
        check_choice("alg", self.alg, tuple(_MEASURES))
        check_range("alg_temp", self.alg_temp, 0.0, float("inf"))
        check_range("eps", self.eps, 0.0, 1.0)
        check_range("threshold", self.threshold, 0.0, 1.0)
        if self.alg_temp and self.alg in ("origin", "confidence_threshold"):
            raise ValueError(f"alg_temp: alg {self.alg!r} chooses by itself, got alg_temp {self.alg_temp!r}")

    @property
    def measure(self) -> str:
        return _MEASURES[self.alg]

    def options(self, masked: np.ndarray, num_windows: int, start: int = 0) -> Iterator[dict[str, object]]:
        if self.alg == "confidence_threshold":
            yield from itertools.repeat({"num_select": 1, "threshold": self.threshold})
        times = torch.linspace(1, self.eps, steps_per_window(self.steps, num_windows) + 1)
        shares = (1 - times[1:] / times[:-1]).tolist()  # of the masks that are left; float32, as published
        left = masked.astype(np.float32)
        for share in (*shares[start:-1], 1.0):
            if self.alg == "origin" and share < 1:
                if share > 0:  # each mask by itself: noise above its quantile
                    yield {"temperature": math.inf, "threshold": -math.log(-math.log1p(-share))}
                continue
            count = np.floor(left * np.float32(share))
            left = left - count
            yield {"num_select": count.astype(np.int32), "temperature": self.alg_temp or None}
