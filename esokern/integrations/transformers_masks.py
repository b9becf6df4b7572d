"""What a mask function of transformers means, as integers: one interval of key indices per query.

transformers describes a mask by a function of (batch, head, query, key) that its attention back ends evaluate for all
pairs. What it builds itself is a conjunction of a few known functions, each of which lets a query see the keys of one
interval; so does the conjunction. The parts are known by the code they run: a function that is none of them is refused,
since what it means could only be guessed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import masking_utils as hf

from esokern.masks import RankMask

HIDDEN = 2**30  # the rank of a padded key, above the end of every interval
USE_OTHER = 'attn_implementation="sdpa" (or "eager", "flex_attention") serves it'


@dataclass(frozen=True, eq=False)
class AttentionMask:
    """The mask of one forward, made once and given to every layer.

    mask: a RankMask over the keys of a call, or None if every query sees every key
    """

    mask: RankMask | None
    # Models ask a mask for its dimensions to know whether it is of padding (2) or ready for the layers.
    ndim: ClassVar[int] = 4

    def to(self, device: torch.device | str) -> AttentionMask:
        """The mask on another device, for models that are spread over several."""
        return AttentionMask(None if self.mask is None else self.mask.to(device))

    def contiguous(self) -> AttentionMask:
        """Itself: transformers up to 5.23 asks the masks of a static cache for it."""
        return self


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = hf.causal_mask_function,
    attention_mask: Tensor | AttentionMask | None = None,
    device: torch.device | str = "cpu",
    **_: Any,
) -> AttentionMask:
    """The mask function that `register` registers: transformers calls it once per forward and kind of layer.

    Query i and key j have the indices q_offset + i and kv_offset + j; attention_mask is bool [batch, indices], True for
    tokens, False for padding, which indices beyond it are too (or a mask made by an earlier call). Raises
    NotImplementedError for a mask_function that is not of transformers' own parts.
    """
    if isinstance(attention_mask, AttentionMask):
        return attention_mask
    padding = _padding(attention_mask, kv_length, kv_offset)
    query = torch.arange(q_length, dtype=torch.int32, device=device)[None] + q_offset
    start, end = _interval(mask_function, query.to(torch.int32))
    if q_length == 1 and start is None and _is_last(q_offset, kv_length + kv_offset):
        end = None  # the newest token sees all before it
    if padding is None and start is None and end is None:
        return AttentionMask(None)
    k_rank = torch.arange(kv_offset, kv_offset + kv_length, dtype=torch.int32, device=device)[None]
    if padding is not None:
        k_rank = torch.where(padding, k_rank, HIDDEN)
    if end is None:
        end = torch.full_like(query, HIDDEN - 1, dtype=torch.int32)
    if start is None:
        return AttentionMask(RankMask(k_rank, end))
    start, end = torch.broadcast_tensors(start, end)
    return AttentionMask(RankMask(k_rank, torch.full_like(end, -1), start, end))


def _padding(attention_mask: Tensor | None, kv_length: int, kv_offset: int) -> Tensor | None:
    """bool [batch, kv_length], True = a token; None if known to be all true (a GPU is not asked: it would stall)."""
    if attention_mask is None:
        return None
    padding = attention_mask[:, kv_offset : kv_offset + kv_length]
    if padding.shape[1] < kv_length:
        padding = torch.nn.functional.pad(padding, (0, kv_length - padding.shape[1]))
    elif padding.device.type == "cpu" and not torch.compiler.is_compiling() and padding.all():
        return None
    return padding


def _is_last(q_offset: int | Tensor, kv_end: int) -> bool:
    """Is the query at q_offset known to be the newest key?"""
    return isinstance(q_offset, int) and q_offset + 1 == kv_end


# --- reading a mask function

_Interval = tuple[Tensor | None, Tensor | None]  # int32 [batch or 1, q_length] each, None = no bound

# All functions of a factory run one code object, whatever they close over.
_CODE = {
    "and": hf.and_masks().__code__,
    "sliding": hf.sliding_window_overlay(1).__code__,
    "sliding, bidirectional": hf.sliding_window_bidirectional_overlay(1).__code__,
    "chunked": hf.chunked_overlay(1, torch.zeros(1)).__code__,
    "packed": hf.packed_sequence_mask_function(torch.zeros(1, 1)).__code__,
}
if hasattr(hf, "remap_positions_for_packed_sequence"):  # from 5.23 on
    _CODE["positions"] = hf.remap_positions_for_packed_sequence(hf.causal_mask_function, torch.zeros(1, 1)).__code__


def _interval(function: Callable, query: Tensor) -> _Interval:
    """The first and last key index that each query, at indices `query` [batch or 1, q_length], sees."""
    if function is hf.causal_mask_function:
        return None, query
    if function is hf.bidirectional_mask_function:
        return None, None
    return _interval_of_parts(function, query)


@torch.compiler.disable(reason="what a function closes over cannot be traced")
def _interval_of_parts(function: Callable, query: Tensor) -> _Interval:
    code = getattr(function, "__code__", None)
    name = next((name for name, known in _CODE.items() if code is known), None)
    if name is None:
        raise NotImplementedError(
            f"esokern: mask_function: {getattr(function, '__qualname__', function)} is none that this attention can "
            "read; it serves causal, bidirectional, sliding-window, chunked and packed masks, each with padding. "
            f"{USE_OTHER}"
        )
    held = dict(zip(code.co_freevars, (cell.cell_contents for cell in function.__closure__), strict=True))
    if name == "and":
        starts, ends = zip(*(_interval(part, query) for part in held["mask_functions"]), strict=True)
        return _tightest(torch.maximum, starts), _tightest(torch.minimum, ends)
    if name == "sliding":
        return query - held["sliding_window"] + 1, None
    if name == "sliding, bidirectional":
        return query - held["sliding_window"], query + held["sliding_window"]
    if name == "chunked":
        left = held["left_padding"].to(query)[:, None]
        start = query - (query - left) % held["chunk_size"]
        return start, start + held["chunk_size"] - 1
    if name == "packed":  # sequences lie one behind the other, numbered from left to right
        sequence = held["packed_sequence_mask"].contiguous()
        start, end = (torch.searchsorted(sequence, sequence, side=side) for side in ("left", "right"))
        return start.to(query), end.to(query) - 1
    # Positions begin anew with every sequence and rise by one in it, so that bounds in them are bounds in indices.
    position = held["position_ids"].to(query)
    return tuple(
        None if bound is None else bound + (query - position) for bound in _interval(held["mask_function"], position)
    )


def _tightest(choose: Callable, bounds: tuple[Tensor | None, ...]) -> Tensor | None:
    given = [bound for bound in bounds if bound is not None]
    return functools.reduce(choose, given) if given else None
