"""What a decoder is: how tokens are drawn in a step, which of them stay, and in what windows the text is taken."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

Option = float | Sequence[float] | torch.Tensor | None
PER_ROW = ("temperature", "top_k", "top_p", "min_p")  # options of every decoder


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """Base of the decoders of bidirectional networks. A subclass has the published names and defaults as its fields.

    temperature: 0 = the most likely token. top_k, top_p, min_p: filters of `unmask_sample`. Each a number, or one per
    row of the batch.
    """

    temperature: Option = 0.0
    top_k: Option = None
    top_p: Option = None
    min_p: Option = None

    # How confidence is measured: "prob", "margin", "neg_entropy", or "random" (positions are chosen before tokens are
    # drawn), of the distribution `statistics` names, filtered in `filter_order` (see unmask_sample).
    confidence: ClassVar[str] = "prob"
    statistics: ClassVar[str] = "model"
    filter_order: ClassVar[str] = "top_k_first"
    whole_text: ClassVar[bool] = True  # False: what lies behind the current window does not exist yet

    @property
    def guidance(self) -> float:
        """Scale of classifier-free guidance; 0 = none."""
        return 0.0

    @property
    def measure(self) -> str:
        """The kind of confidence in use."""
        return self.confidence

    @property
    def edits(self) -> bool:
        """May tokens change again?"""
        return False

    def refines(self, step: int, without_masks: np.ndarray) -> np.ndarray | bool:
        """bool [rows]: does a window without masks, in which `step` changed something, take another step?
        without_masks: int [rows], how many of its steps began without a mask."""
        return False

    def windows(self, begin: int, end: int) -> list[tuple[int, int]]:
        """The windows of a text whose masks lie in [begin, end), left to right."""
        return [(begin, end)]

    def options(self, masked: np.ndarray, num_windows: int, start: int = 0) -> Iterator[dict[str, object]]:
        """What `unmask_select` is asked for in the steps of a window with `masked` int [rows] masks, from step `start`
        on: its options, numbers or [rows] arrays. Ends when no mask can be left, or goes on for ever."""
        raise NotImplementedError


def per_row(name: str, value: Option, batch: int) -> float | torch.Tensor | None:
    """A number, or a tensor [batch]; ValueError for other shapes."""
    if value is None or isinstance(value, (int, float)):
        return value
    tensor = torch.as_tensor(value)
    if tensor.shape != (batch,):
        raise ValueError(f"{name}: must be a number or [batch] = [{batch}], got shape {list(tensor.shape)}")
    return tensor


def blocks(begin: int, end: int, block_length: int | None) -> list[tuple[int, int]]:
    """[begin, end) in pieces of block_length, the last of which may be shorter."""
    if block_length is None:
        return [(begin, end)]
    return [(first, min(first + block_length, end)) for first in range(begin, end, block_length)]


def steps_per_window(steps: int, num_windows: int) -> int:
    """steps / num_windows; ValueError if that is no integer."""
    if steps % num_windows:
        raise ValueError(f"steps: must be a multiple of the number of blocks, {num_windows}, got {steps}")
    return steps // num_windows


def above(threshold: float) -> float:
    """The float32 from which on a confidence is greater than `threshold`: kernels compare with >=."""
    return float(np.nextafter(np.float32(threshold), np.float32(math.inf)))


def check_count(name: str, value: int | None, optional: bool = False) -> None:
    """ValueError unless value is an integer of at least 1 (or None, if optional)."""
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: must be an integer of at least 1{' or None' if optional else ''}, got {value!r}")


def check_choice(name: str, value: str, supported: Sequence[str]) -> None:
    """ValueError unless value is one of the supported words."""
    if value not in supported:
        raise ValueError(f"{name}: got {value!r}, supported are {', '.join(supported)}")


def check_range(name: str, value: float | None, low: float, high: float) -> None:
    """ValueError unless value lies in [low, high] or is None."""
    if value is not None and not low <= value <= high:
        raise ValueError(f"{name}: must lie in [{low}, {high}], got {value!r}")
