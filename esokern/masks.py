"""Attention masks as integers: one rank per key, up to three bounds per query.

    visible(i, j) = k_rank[j] <= prefix_end[i]  or  window_start[i] <= k_rank[j] <= window_end[i]

Every mask of autoregressive, masked-diffusion, block-diffusion and Eso-LM models is of this form, on keys in any order,
without a mask tensor. `rank` is a token's place in the denoising order, at least 0 and below 2^30 (only compared, gaps
do not matter); `position` is its place in the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

INT32_MAX = 2**31 - 1
# Ranks of the noisy half of [noisy | clean] lie this far above those of the clean half.
_NOISY_OFFSET = 2**30


@dataclass(frozen=True, eq=False)
class RankMask:
    """A rank-integer mask. All tensors int32.

    k_rank:       [batch, seqlen_kv], [1, seqlen_kv] (shared by the batch), or [total_k] for packed inputs.
                  None, in `attention_with_kvcache` only: the rank of a key is its row number in the cache
    prefix_end:   [batch, seqlen_q], [1, seqlen_q] or [total_q]; every key with a rank up to it is visible
    window_start: like prefix_end, or None; with window_end, keys with a rank in [start, end] are visible too
    window_end:   like prefix_end, or None

    Raises TypeError for a tensor that is not int32, ValueError for shapes that do not fit together.
    """

    k_rank: torch.Tensor | None
    prefix_end: torch.Tensor
    window_start: torch.Tensor | None = None
    window_end: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if (self.window_start is None) != (self.window_end is None):
            raise ValueError("RankMask: window_start and window_end go together; got only one of them")
        for name in ("k_rank", "prefix_end", "window_start", "window_end"):
            tensor = getattr(self, name)
            if tensor is None and name != "prefix_end":
                continue
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"RankMask: {name} must be an int32 tensor, got {type(tensor).__name__}")
            if tensor.dtype != torch.int32:
                raise TypeError(f"RankMask: {name} must be int32, got {tensor.dtype}")
            if tensor.dim() not in (1, 2):
                raise ValueError(f"RankMask: {name} must be [batch, seqlen] or [total], got {tuple(tensor.shape)}")
        for name in ("window_start", "window_end"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape != self.prefix_end.shape:
                raise ValueError(
                    f"RankMask: {name} must have the shape of prefix_end {tuple(self.prefix_end.shape)}, "
                    f"got {tuple(tensor.shape)}"
                )

    def dense(self) -> torch.Tensor:
        """The same mask as booleans [batch, seqlen_q, seqlen_kv] (or [total_q, total_k]); True = visible.

        For tests and for plain torch; the kernels never build it. Packed masks are compared across sequences
        too.
        """
        if self.k_rank is None:
            raise ValueError("RankMask: a mask whose k_rank is None has no dense form without a cache")
        k_rank = self.k_rank.unsqueeze(-2)
        visible = k_rank <= self.prefix_end.unsqueeze(-1)
        if self.window_start is not None:
            visible = visible | (
                (self.window_start.unsqueeze(-1) <= k_rank) & (k_rank <= self.window_end.unsqueeze(-1))
            )
        return visible

    def to(self, device: torch.device | str) -> RankMask:
        """The mask on another device."""
        tensors = (self.k_rank, self.prefix_end, self.window_start, self.window_end)
        return RankMask(*(None if tensor is None else tensor.to(device) for tensor in tensors))


def pack(masks: Sequence[RankMask]) -> RankMask:
    """The mask of a packed batch out of the masks of its sequences, each of batch 1, in the order of
    cu_seqlens."""
    if not masks:
        raise ValueError("masks: got none, at least one is needed")
    tensors = [tensor for mask in masks for tensor in (mask.k_rank, mask.prefix_end)]
    if any(tensor is None or tensor.numel() != tensor.shape[-1] for tensor in tensors):
        raise ValueError("masks: each must be the mask of one sequence, [1, seqlen] or [seqlen]")
    windows = any(mask.window_start is not None for mask in masks)

    def joined(name: str, absent: int) -> torch.Tensor:
        parts = []
        for mask in masks:
            tensor = getattr(mask, name)
            parts.append(torch.full_like(mask.prefix_end, absent) if tensor is None else tensor)
        return torch.cat([part.reshape(-1) for part in parts])

    return RankMask(
        joined("k_rank", 0),
        joined("prefix_end", 0),
        joined("window_start", 0) if windows else None,
        joined("window_end", -1) if windows else None,
    )


def _arange(length: int, device: torch.device | str | None, start: int = 0) -> torch.Tensor:
    return torch.arange(start, start + length, dtype=torch.int32, device=device)[None]


def _check_seqlen(name: str, seqlen: int) -> None:
    if seqlen < 0:
        raise ValueError(f"{name}: must be at least 0, got {seqlen}")


def _as_rank(name: str, rank: torch.Tensor) -> torch.Tensor:
    if not isinstance(rank, torch.Tensor) or rank.dtype not in (torch.int32, torch.int64):
        got = rank.dtype if isinstance(rank, torch.Tensor) else type(rank).__name__
        raise TypeError(f"{name}: must be an int32 or int64 tensor, got {got}")
    if rank.dim() not in (1, 2):
        raise ValueError(f"{name}: must be [batch, seqlen] or [seqlen], got {tuple(rank.shape)}")
    return rank.to(torch.int32).expand(1, -1) if rank.dim() == 1 else rank.to(torch.int32)


def _as_lengths(
    name: str, lengths: int | Sequence[int] | torch.Tensor, most: int, device: torch.device | str | None
) -> torch.Tensor:
    """Lengths as int32 [batch, 1] or [1, 1]; a tensor keeps its device. Values are checked if that needs no
    sync."""
    if isinstance(lengths, torch.Tensor):
        if lengths.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name}: must be int32 or int64, got {lengths.dtype}")
        lengths = lengths.to(torch.int32)
    else:
        lengths = torch.as_tensor(lengths, dtype=torch.int32, device=device)
    if lengths.dim() > 1:
        raise ValueError(f"{name}: must be an int or [batch], got shape {tuple(lengths.shape)}")
    if lengths.device.type == "cpu" and lengths.numel() and not torch.compiler.is_compiling():
        low, high = (int(bound) for bound in lengths.aminmax())
        if low < 0 or high > most:
            raise ValueError(f"{name}: must lie in 0 .. {most}, got {low if low < 0 else high}")
    return lengths.reshape(-1, 1)


def _check_batch(name: str, lengths: torch.Tensor, rank: torch.Tensor) -> None:
    if lengths.shape[0] not in (1, rank.shape[0]) and rank.shape[0] != 1:
        raise ValueError(f"{name}: must be an int or [batch] = [{rank.shape[0]}], got [{lengths.shape[0]}]")


def causal(seqlen_q: int, seqlen_kv: int | None = None, *, device: torch.device | str | None = None) -> RankMask:
    """Causal, bottom-right aligned: query i sees keys up to i + seqlen_kv - seqlen_q (default: seqlen_q)."""
    seqlen_kv = seqlen_q if seqlen_kv is None else seqlen_kv
    _check_seqlen("seqlen_q", seqlen_q)
    _check_seqlen("seqlen_kv", seqlen_kv)
    return RankMask(_arange(seqlen_kv, device), _arange(seqlen_q, device, seqlen_kv - seqlen_q))


def bidirectional(
    seqlen_q: int,
    seqlen_kv: int | None = None,
    *,
    kv_lengths: int | Sequence[int] | torch.Tensor | None = None,
    device: torch.device | str | None = None,
) -> RankMask:
    """Every query sees every key (MDLM, LLaDA, Dream); with kv_lengths (int or [batch]), the first
    kv_lengths[b] keys.

    Raises ValueError if a length is not in 0 .. seqlen_kv (checked for CPU tensors; elsewhere it would stall
    the device).
    """
    seqlen_kv = seqlen_q if seqlen_kv is None else seqlen_kv
    _check_seqlen("seqlen_q", seqlen_q)
    _check_seqlen("seqlen_kv", seqlen_kv)
    if kv_lengths is None:
        return RankMask(
            torch.zeros(1, seqlen_kv, dtype=torch.int32, device=device),
            torch.zeros(1, seqlen_q, dtype=torch.int32, device=device),
        )
    last = _as_lengths("kv_lengths", kv_lengths, seqlen_kv, device) - 1
    return RankMask(_arange(seqlen_kv, last.device), last.expand(-1, seqlen_q))


def any_order(q_rank: torch.Tensor, k_rank: torch.Tensor | None = None) -> RankMask:
    """Causal in denoising order: a query sees keys of rank up to its own (ties see each other).

    q_rank [batch, seqlen_q], k_rank [batch, seqlen_kv] (default: q_rank); tokens may lie in memory in any
    order.
    """
    q_rank = _as_rank("q_rank", q_rank)
    return RankMask(q_rank if k_rank is None else _as_rank("k_rank", k_rank), q_rank)


def prefix_lm(
    seqlen: int,
    prefix_lengths: int | Sequence[int] | torch.Tensor,
    *,
    device: torch.device | str | None = None,
) -> RankMask:
    """Bidirectional over the first prefix_lengths[b] tokens (int or [batch]), causal after them."""
    _check_seqlen("seqlen", seqlen)
    last = _as_lengths("prefix_lengths", prefix_lengths, seqlen, device) - 1
    rank = _arange(seqlen, last.device)
    return RankMask(rank, torch.maximum(rank, last))


def esolm_diffusion(rank: torch.Tensor, num_clean: int | torch.Tensor | None = None, *, variant: str = "B") -> RankMask:
    """Eso-LM's diffusion phase (arXiv 2506.01928 section 4.1 and suppl. D). rank [batch, seqlen]: clean tokens first.

    variant "B": causal in rank. "A": the same, but clean tokens see all clean tokens, num_clean (int or [batch]) of
    them. "mixed": causal among clean tokens, masks see everything.
    """
    rank = _as_rank("rank", rank)
    if variant == "B":
        return RankMask(rank, rank)
    if variant not in ("A", "mixed"):
        raise ValueError(f'variant: got {variant!r}, supported are "A", "B" and "mixed"')
    if num_clean is None:
        raise ValueError(f'num_clean: variant "{variant}" needs the number of clean tokens per row')
    num_clean = _as_lengths("num_clean", num_clean, rank.shape[-1], rank.device)
    _check_batch("num_clean", num_clean, rank)
    if variant == "A":
        return RankMask(rank, torch.maximum(rank, num_clean - 1))
    return RankMask(rank, torch.where(rank >= num_clean, INT32_MAX, rank))


def esolm_sequential(
    rank: torch.Tensor, num_clean: int | torch.Tensor | None = None, *, variant: str = "B"
) -> RankMask:
    """Eso-LM's sequential phase over [z0 | x], 2 * seqlen tokens (arXiv 2506.01928 eqs. 26-32).

    rank [batch, seqlen]: clean tokens of z0 first, then its masks from left to right. A z0 token sees itself and the x
    tokens of lower rank; x is causal in rank (variant "B"), with its num_clean clean tokens seeing each other too
    (variant "A"); x sees nothing of z0.
    """
    rank = _as_rank("rank", rank)
    if variant not in ("A", "B"):
        raise ValueError(f'variant: got {variant!r}, supported are "A" and "B"')
    if variant == "A" and num_clean is None:
        raise ValueError('num_clean: variant "A" needs the number of clean tokens per row')
    clean_end = rank
    if variant == "A":
        num_clean = _as_lengths("num_clean", num_clean, rank.shape[-1], rank.device)
        _check_batch("num_clean", num_clean, rank)
        clean_end = torch.maximum(rank, num_clean - 1)
    return _noisy_then_clean(rank, rank, clean_end)


def _noisy_then_clean(
    rank: torch.Tensor, own_rank: torch.Tensor, clean_end: torch.Tensor, window: tuple | None = None
) -> RankMask:
    """[noisy | clean] of 2 * seqlen: noisy tokens see clean ones of lower rank and a window of noisy ranks.

    `own_rank` orders the noisy tokens among themselves; the window defaults to the tokens of the same
    own_rank.
    """
    rank, own_rank, clean_end = torch.broadcast_tensors(rank, own_rank, clean_end)
    noisy_rank = own_rank + _NOISY_OFFSET
    start, end = (noisy_rank, noisy_rank) if window is None else (bound + _NOISY_OFFSET for bound in window)
    return RankMask(
        k_rank=torch.cat([noisy_rank, rank], -1),
        prefix_end=torch.cat([rank - 1, clean_end], -1),
        window_start=torch.cat([start, torch.zeros_like(rank)], -1),
        window_end=torch.cat([end, torch.full_like(rank, -1)], -1),
    )


def any_order_likelihood(rank: torch.Tensor) -> RankMask:
    """Single-pass any-order likelihood over [all masks | x], 2 * seqlen tokens (arXiv 2506.01928 section 3.3).

    rank [batch, seqlen]: any order. Each mask sees itself and the x tokens of lower rank, so one forward gives every
    log p(x[order[l]] | x[order[<l]]).
    """
    return esolm_sequential(rank)


def esolm_steps(step_start: torch.Tensor, *, noisy: str = "causal") -> RankMask:
    """All steps of Eso-LM's cached sampler at once, over [masks | x] in rank order, 2 * seqlen tokens (arXiv 2506.01928
    section 4.2).

    step_start [batch, seqlen]: for each rank, the rank at which the step that decodes it begins. x is causal in rank. A
    mask sees the x tokens of earlier steps and, of the masks of its own step, those up to itself (noisy="causal", the
    published sampler) or itself alone (noisy="independent"). With one token a step both are any_order_likelihood.
    """
    start = _as_rank("step_start", step_start)
    if noisy not in ("independent", "causal"):
        raise ValueError(f'noisy: got {noisy!r}, supported are "independent" and "causal"')
    rank = _arange(start.shape[-1], start.device).expand_as(start)
    first_seen = start if noisy == "causal" else rank
    return RankMask(
        k_rank=torch.cat([rank + _NOISY_OFFSET, rank], -1),
        prefix_end=torch.cat([start - 1, rank], -1),
        window_start=torch.cat([first_seen + _NOISY_OFFSET, torch.zeros_like(rank)], -1),
        window_end=torch.cat([rank + _NOISY_OFFSET, torch.full_like(rank, -1)], -1),
    )


def _blocks(seqlen: int, block_size: int, device: torch.device | str | None) -> torch.Tensor:
    _check_seqlen("seqlen", seqlen)
    if block_size < 1:
        raise ValueError(f"block_size: must be at least 1, got {block_size}")
    return _arange(seqlen, device) // block_size


def block_diffusion(seqlen: int, block_size: int, *, device: torch.device | str | None = None) -> RankMask:
    """BD3-LM's training mask over [x_t | x_0], 2 * seqlen tokens (arXiv 2503.09573).

    x_t sees its own block of x_t and the earlier blocks of x_0; x_0 is block-causal. The last block may be shorter.
    """
    block = _blocks(seqlen, block_size, device)
    return _noisy_then_clean(block, block, block)


def block_causal(seqlen: int, block_size: int, *, device: torch.device | str | None = None) -> RankMask:
    """Bidirectional inside a block, causal between blocks (BD3-LM sampling, SDAR, LLaDA2)."""
    block = _blocks(seqlen, block_size, device)
    return RankMask(block, block)


def set_causal(rank: torch.Tensor, *, noisy: str = "independent") -> RankMask:
    """Set Diffusion's mask over [x_t | x_0], 2 * seqlen tokens (arXiv 2607.01775).

    rank [batch, seqlen]: the set a token is denoised in; equal ranks form one set. x_0 sees sets up to its own; x_t
    sees strictly earlier sets of x_0 and, of x_t, itself alone (noisy="independent", the published mask) or every token
    of a set up to its own (noisy="causal").
    """
    rank = _as_rank("rank", rank)
    if noisy not in ("independent", "causal"):
        raise ValueError(f'noisy: got {noisy!r}, supported are "independent" and "causal"')
    if noisy == "causal":
        return _noisy_then_clean(rank, rank, rank, window=(torch.zeros_like(rank), rank))
    return _noisy_then_clean(rank, _arange(rank.shape[-1], rank.device).expand_as(rank), rank)


def sliding_window(
    seqlen_q: int,
    seqlen_kv: int | None = None,
    *,
    window_size: tuple[int, int],
    num_prefix: int = 0,
    device: torch.device | str | None = None,
) -> RankMask:
    """Query i (bottom-right aligned) sees keys i - left .. i + right, window_size = (left, right), -1 = no
    bound on that side, and always the first num_prefix keys."""
    seqlen_kv = seqlen_q if seqlen_kv is None else seqlen_kv
    _check_seqlen("seqlen_q", seqlen_q)
    _check_seqlen("seqlen_kv", seqlen_kv)
    left, right = window_size
    if left < -1 or right < -1:
        raise ValueError(f"window_size: (left, right) must each be -1 or more, got {window_size}")
    if num_prefix < 0:
        raise ValueError(f"num_prefix: must be at least 0, got {num_prefix}")
    left, right = (min(side, seqlen_q + seqlen_kv) for side in (left, right))  # no int32 overflow
    query = _arange(seqlen_q, device, seqlen_kv - seqlen_q)
    start = torch.zeros_like(query) if left < 0 else query - left
    end = torch.full_like(query, seqlen_kv - 1) if right < 0 else query + right
    return RankMask(_arange(seqlen_kv, device), torch.full_like(query, num_prefix - 1), start, end)
