"""LLaDA2.x (arXiv 2512.15745, 2602.08676): blocks on a fixed grid, thresholds, and tokens that may be edited.

The text ends with the current block: what follows does not exist yet. A proposal replaces a mask from one threshold on
and, with token editing, another token of the block from a second one on; tokens of the prompt stay.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from esokern.decoders.base import Decoder, above, check_range
from esokern.samplers.run import check_count


@dataclass(frozen=True, kw_only=True)
class _Refinement(Decoder):
    """What the two have in common."""

    block_length: int = 32
    threshold: float = 0.5
    edit_threshold: float | None = None
    max_post_steps: int = 16

    statistics: ClassVar[str] = "sampling"
    whole_text: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_count("block_length", self.block_length)
        check_range("threshold", self.threshold, 0.0, 1.0)
        check_range("edit_threshold", self.edit_threshold, 0.0, 1.0)
        check_range("max_post_steps", self.max_post_steps, 0, 2**20)

    @property
    def edits(self) -> bool:
        return self.edit_threshold is not None

    def windows(self, begin: int, end: int) -> list[tuple[int, int]]:
        length = self.block_length
        return [(first, min(first + length, end)) for first in range(begin // length * length, end, length)]

    def _thresholds(self) -> dict[str, object]:
        edit = {"edit_threshold": above(self.edit_threshold)} if self.edits else {}
        return {"threshold": above(self.threshold), **edit}


@dataclass(frozen=True, kw_only=True)
class BlockRefinement(_Refinement):
    """LLaDA2's published pipeline: in each step all tokens above the threshold, and at least its share of the block.

    block_length:   of the grid, which begins with the text; a prompt may end inside of a block
    steps:          per block. The pipeline lowers it to the number of new tokens, if those are fewer
    threshold:      keep tokens of a probability above it
    edit_threshold: replace a token where another one has a probability above it; None or 0 = tokens are final
    max_post_steps: steps that may follow when no mask is left, as long as they edit; one more is the last. None follows
                    where the masks took all `steps`
    """

    steps: int = 32
    threshold: float = 0.95
    edit_threshold: float | None = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("steps", self.steps)

    @property
    def edits(self) -> bool:
        return bool(self.edit_threshold)

    def refines(self, step: int, without_masks: np.ndarray) -> np.ndarray | bool:
        in_time = (without_masks > 0) | (step + 1 < self.steps)
        return self.edits & in_time & (without_masks <= self.max_post_steps)

    def options(self, masked: np.ndarray, num_windows: int, start: int = 0) -> Iterator[dict[str, object]]:
        share, rest = divmod(self.block_length, self.steps)
        for step in itertools.count():
            yield {"num_select": share + (step < rest), **self._thresholds()}


@dataclass(frozen=True, kw_only=True)
class JointThreshold(_Refinement):
    """LLaDA2.1 as serving engines run it: at least one token a step, and edits from the first step on.

    block_length, threshold: as above
    edit_threshold: as above, but 0 = replace whatever the model would rather have; None = tokens are final
    max_post_steps: steps that may follow when no mask is left, as long as they edit
    """

    edit_threshold: float | None = 0.0

    def refines(self, step: int, without_masks: np.ndarray) -> np.ndarray | bool:
        return self.edits & (without_masks < self.max_post_steps)

    def options(self, masked: np.ndarray, num_windows: int, start: int = 0) -> Iterator[dict[str, object]]:
        return itertools.repeat({"num_select": 1, **self._thresholds()})
