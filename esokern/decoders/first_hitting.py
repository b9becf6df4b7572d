"""First-hitting decoding (Zheng et al., arXiv 2409.02908; BD3-LM, arXiv 2503.09573): one position at a time.

The next position that the diffusion process unmasks is uniform among the masks, so it is drawn first and the network's
token for it alone is computed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from esokern.decoders.base import Decoder, Option, blocks, check_count


@dataclass(frozen=True, kw_only=True)
class FirstHitting(Decoder):
    """block_length: None = all that is to be generated in one block, else blocks from left to right."""

    temperature: Option = 1.0
    block_length: int | None = None

    def __post_init__(self) -> None:
        check_count("block_length", self.block_length, optional=True)

    @property
    def measure(self) -> str:
        return "random"

    def windows(self, begin: int, end: int) -> list[tuple[int, int]]:
        return blocks(begin, end, self.block_length)

    def options(self, masked: np.ndarray, num_windows: int, start: int = 0) -> Iterator[dict[str, object]]:
        return itertools.repeat({"num_select": 1})
