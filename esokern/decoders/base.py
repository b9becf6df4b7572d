"""What a decoder is: how tokens are drawn in a step, which of them stay, and in what windows the text is taken."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from esokern.samplers.run import Option, check_count

PER_ROW = ("temperature", "top_k", "top_p", "min_p")  # options of every decoder


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """Base of the decoders of bidirectional networks. A subclass has the published names and defaults as its fields.

    temperature: 0 = the most likely token. top_k, top_p, min_p: filters of `unmask_sample`. Each a number, or one per
    row of the batch. block_length: the masks are taken in blocks of it; None = all in one.
    """

    temperature: Option = 0.0
    top_k: Option = None
    top_p: Option = None
    min_p: Option = None
    block_length: int | None = None

    # Of which distribution confidence is measured, and how it is filtered (see unmask_sample).
    statistics: ClassVar[str] = "model"
    filter_order: ClassVar[str] = "top_k_first"
    whole_text: ClassVar[bool] = True  # False: what lies behind the current window does not exist yet

    def __post_init__(self) -> None:
        check_count("block_length", self.block_length, optional=True)

    @property
    def guidance(self) -> float:
        """Scale of classifier-free guidance; 0 = none."""
        return 0.0

    @property
    def measure(self) -> str:
        """How confidence is measured: "prob", "margin", "neg_entropy", or "random" (positions are chosen before tokens
        are drawn)."""
        return "prob"

    @property
    def edits(self) -> bool:
        """May tokens change again?"""
        return False

    def refines(self, step: int, without_masks: np.ndarray) -> np.ndarray | bool:
        """bool [rows]: does a window without masks, in which `step` changed something, take another step?
        without_masks: int [rows], how many of its steps began without a mask."""
        return False

    def windows(self, begin: int, end: int) -> list[tuple[int, int]]:
        """The windows of a text whose masks lie in [begin, end), left to right; the last may be shorter."""
        length = self.block_length or end - begin
        return [(first, min(first + length, end)) for first in range(begin, end, length)]

    def options(self, masked: np.ndarray, num_windows: int, start: int = 0) -> Iterator[dict[str, object]]:
        """What `unmask_select` is asked for in the steps of a window with `masked` int [rows] masks, from step `start`
        on: its options, numbers or [rows] arrays. Ends when no mask can be left, or goes on for ever."""
        raise NotImplementedError


def steps_per_window(steps: int, num_windows: int) -> int:
    """steps / num_windows; ValueError if that is no integer."""
    if steps % num_windows:
        raise ValueError(f"steps: must be a multiple of the number of blocks, {num_windows}, got {steps}")
    return steps // num_windows


def above(threshold: float) -> float:
    """The float32 from which on a confidence is greater than `threshold`: kernels compare with >=."""
    return float(np.nextafter(np.float32(threshold), np.float32(math.inf)))


def check_choice(name: str, value: str, supported: Sequence[str]) -> None:
    """ValueError unless value is one of the supported words."""
    if value not in supported:
        raise ValueError(f"{name}: got {value!r}, supported are {', '.join(supported)}")


def check_range(name: str, value: float | None, low: float, high: float) -> None:
    """ValueError unless value lies in [low, high] or is None."""
    if value is not None and not low <= value <= high:
        raise ValueError(f"{name}: must lie in [{low}, {high}], got {value!r}")
