"""Dense attention masks, and those of FlexAttention, as the rank integers they stand for.

A mask that a model brings as a tensor is read once and written as a `RankMask` that says the same, pair by pair; one
that cannot be written so is refused, never approximated.
"""

from __future__ import annotations

import torch
from torch.nn.attention.flex_attention import BlockMask, create_mask

from esokern.masks import RankMask

# What is added to a hidden score: the least number of a dtype, -inf, -1e9. From here on exp() of it is 0.
_HIDDEN = -1e4


def rank_mask(visible: torch.Tensor) -> RankMask:
    """The RankMask whose `dense()` is `visible`, bool [batch, seqlen_q, seqlen_kv].

    Two orders of the keys are tried: as they lie, and those seen by most queries first; keys that no query sees come
    last in both. In one of them the keys of every query must be a beginning and one further run: causal, padded,
    block-causal, prefix-LM and [x_t | x_0] masks and slices of them are. O(batch * seqlen_q * seqlen_kv).

    Raises ValueError for other masks.
    """
    keys = visible.shape[-1]
    place = torch.arange(keys, device=visible.device)
    seen_by = visible.sum(1)  # [batch, keys]
    for sort_key in (place, -seen_by):
        order = torch.where(seen_by > 0, sort_key, keys).argsort(dim=-1, stable=True)
        found = _in_order(visible.gather(-1, order[:, None].expand_as(visible)), order)
        if found is not None:
            return found
    raise ValueError(
        f"attention mask: {list(visible.shape)} has queries whose keys are not a beginning and one further run, in any "
        "order of the keys that is tried; esokern.attention with a RankMask of your own may serve it"
    )


def _in_order(visible: torch.Tensor, order: torch.Tensor) -> RankMask | None:
    """The mask of keys already sorted, order[b, r] being the key of rank r; None if a query has a third run."""
    batch, queries, keys = visible.shape
    if keys == 0:
        nothing = torch.full((batch, queries), -1, dtype=torch.int32, device=visible.device)
        return RankMask(order.int(), nothing)
    place = torch.arange(keys, device=visible.device)
    count = visible.sum(-1)
    prefix = torch.where(count == keys, keys, visible.byte().argmin(-1))  # keys before the first hidden one
    rest = (visible & (place >= prefix[..., None])).byte()
    start, end = rest.argmax(-1), keys - 1 - rest.flip(-1).argmax(-1)
    has_rest = count > prefix
    if not torch.equal(count - prefix, torch.where(has_rest, end - start + 1, 0)):
        return None
    k_rank = torch.empty_like(order).scatter_(1, order, place.expand(batch, keys)).int()
    prefix_end = (prefix - 1).int()
    if not has_rest.any():
        return RankMask(k_rank, prefix_end)
    return RankMask(k_rank, prefix_end, torch.where(has_rest, start, 0).int(), torch.where(has_rest, end, -1).int())


def understand(mask: torch.Tensor | BlockMask, seqlen_q: int, seqlen_kv: int) -> RankMask:
    """The RankMask of what F.scaled_dot_product_attention or flex_attention takes as a mask.

    mask: bool, True = visible, or float, 0 = visible and -1e4 or less = hidden; [seqlen_q, seqlen_kv] or
    [batch or 1, 1, seqlen_q or 1, seqlen_kv]. Or a BlockMask without heads. A query that sees no key gives 0.

    Raises TypeError, ValueError for what is no rank mask: a bias, a mask per head, a further run of keys.
    """
    if isinstance(mask, BlockMask):
        batch, heads = mask.shape[:2]
        _check_one_head(heads)
        device = mask.kv_indices.device
        return rank_mask(create_mask(mask.mask_mod, batch, 1, seqlen_q, seqlen_kv, device)[:, 0])
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"attention mask: must be a tensor or a BlockMask, got {type(mask).__name__}")
    if mask.dim() not in (2, 4):
        raise ValueError(f"attention mask: must be [seqlen_q, seqlen_kv] or 4-D, got {list(mask.shape)}")
    if mask.dtype != torch.bool:
        if not mask.is_floating_point():
            raise TypeError(f"attention mask: must be bool or float, got {mask.dtype}")
        visible = mask == 0
        if not (visible | (mask <= _HIDDEN)).all():
            raise ValueError(
                f"attention mask: a bias is not served; a float mask must be 0 where visible and at most {_HIDDEN:g} "
                "where hidden"
            )
        mask = visible
    if mask.dim() == 4:
        _check_one_head(mask.shape[1])
        mask = mask[:, 0]
    return rank_mask(mask.expand(mask.shape[0] if mask.dim() == 3 else 1, seqlen_q, seqlen_kv))


def _check_one_head(heads: int) -> None:
    if heads != 1:
        raise ValueError(f"attention mask: must be the same for all heads, got one for each of {heads}")
