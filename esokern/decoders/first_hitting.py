"""First-hitting decoding (Zheng et al., arXiv 2409.02908; BD3-LM, arXiv 2503.09573): one position at a time.

The next position that the diffusion process unmasks is uniform among the masks, so it is drawn first and the network's
token for it alone is computed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from esokern.decoders.base import Decoder
from esokern.samplers.run import Option


@dataclass(frozen=True, kw_only=True)
class FirstHitting(Decoder):
    """One token a step, from anywhere in the block."""

    temperature: Option = 1.0

    @property
    def measure(self) -> str:
        return "random"

    def options(self, masked: np.ndarray, num_windows: int, start: int = 0) -> Iterator[dict[str, object]]:
        return itertools.repeat({"num_select": 1})
