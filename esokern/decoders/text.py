"""The texts that a decoder fills in, and the part of them that a step looks at."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from esokern.samplers.run import on_device


class Text:
    """The texts of a batch on their way, with a spare column behind them where padding may point.

    tokens:  int64 [batch, length + 1]; mask_id where a token is to come
    given:   bool [batch, length + 1], tokens that were there from the beginning
    lengths: of each row, int64 [batch] on the host
    """

    def __init__(self, tokens: Tensor, lengths: np.ndarray, mask_id: int) -> None:
        self.tokens = torch.nn.functional.pad(tokens, (0, 1), value=mask_id)
        self.given = self.tokens != mask_id
        self.lengths, self.mask_id = lengths, mask_id
        self.spare = tokens.shape[1]
        self.other = 0 if mask_id else 1  # some token that is no mask


def end_of_text(tokens: Tensor, given: Tensor, eos_id: int, mask_id: int) -> Tensor:
    """int64 [n]: where rows of tokens [n, length] end, at the first eos_id that was not given; length if there is none,
    or a mask before it."""
    length = tokens.shape[1]
    found = (tokens == eos_id) & ~given
    first = torch.where(found.any(1), found.to(torch.uint8).argmax(1), length)
    masked = (tokens == mask_id) & (torch.arange(length, device=tokens.device) < first[:, None])
    return torch.where(masked.any(1), length, first)


class Window:
    """A view of steps: `rows` [n] of the batch and their positions [begin, end), `positions` int64 [n, width] with the
    spare column behind a row's end, and the `tokens` there at the last `look`. seeds: int64 [n], and [n * width] of
    every token. begin and end are on the host, the rest on the device."""

    def __init__(self, text: Text, seeds: Tensor, rows: np.ndarray, begin: np.ndarray, end: np.ndarray) -> None:
        device = text.tokens.device
        self.begin, self.end = begin, end
        self.rows, self.starts, self.lengths = (on_device(values, device) for values in (rows, begin, end - begin))
        columns = torch.arange(int((end - begin).max()), device=device)
        self.inside = columns < self.lengths[:, None]
        self.positions = torch.where(self.inside, self.starts[:, None] + columns, text.spare)
        self.seeds = seeds[self.rows]
        self.token_seeds = self.seeds.repeat_interleave(len(columns))
        self.look(text)

    def look(self, text: Text) -> None:
        """Take the text's tokens as they are now."""
        tokens = text.tokens[self.rows[:, None], self.positions]
        self.tokens = torch.where(self.inside, tokens, text.other)
