"""Op card: rotary + append + attend + commit against a KV cache, in one call.

Row i of batch row b is rotated by its own position, its key and value go into the cache, and it attends to the cache.
Rows are appended in denoising order: behind the cache_seqlens[b] committed rows come the clean rows of this call and
then its masks, whose rows the next call overwrites. With `slots` every row has its place instead (text-order caches).
"""

from __future__ import annotations

import itertools

import torch

from esokern import backend as backends
from esokern.arrays import accept_arrays
from esokern.attention import (
    attend,
    check_compiled,
    check_contiguous,
    check_cu_seqlens,
    check_dims,
    check_floats,
    check_heads,
    check_int32,
    check_out,
    check_scale,
    compute_dtype,
    mask_tensors,
    read_cu_seqlens,
)
from esokern.masks import RankMask

_OP = "attention_with_kvcache"
_CHUNK_MASKS = {"causal": 0, "independent": 1, "bidirectional": 2}
_EXPLICIT_RANK = 3
_ROTARY_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@accept_arrays(writes=("k_cache", "v_cache", "cache_seqlens", "out"))
def attention_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    *,
    cache_seqlens: torch.Tensor,
    positions: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    rotary_interleaved: bool = False,
    mask: str | RankMask = "causal",
    num_clean: int | torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    commit: bool = False,
    page_table: torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    seqused_q: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of new tokens over a KV cache that they join, at any positions and in any denoising order.

    n_b is the number of rows of batch row b: seqlen_q, seqused_q[b] or cu_seqlens_q[b + 1] - cu_seqlens_q[b]. Its keys
    are the cache rows [0, cache_seqlens[b] + n_b), or [0, cache_seqlens[b]) if nothing is appended or slots are given.

    Args:
        q: [batch, seqlen_q, heads, head_dim], or packed [total_q, heads, head_dim] with cu_seqlens_q; last dimension
            contiguous, so for the next four. float32, bfloat16 or float16 (the reference also float64), head_dim a
            multiple of 8 up to 256 (the reference: any). Not yet rotated if rotary_cos is given.
        k_cache, v_cache: [batch, max_seqlen, kv_heads, head_dim], or [pages, page_size, kv_heads, head_dim] with
            page_table; written in place. Rows that are no keys of this call are never read.
        k, v: the new keys and values, like q with kv_heads heads; None = append nothing.
        cache_seqlens: int32 [batch], committed rows before this call.
        positions: int32 [batch, seqlen_q] or [total_q], place of each token in the text; needed for rotary.
        rotary_cos, rotary_sin: [max_position, rotary_dim / 2], rotary_dim <= head_dim, float32, bfloat16 or float16;
            q and k are rotated in float32.
        rotary_interleaved: pairs (2i, 2i + 1) if true, else (i, i + rotary_dim / 2).
        mask: how the rows of this call see each other; all see the keys of the cache.
            "causal": a row sees the rows up to itself (Eso-LM sampling, autoregressive models)
            "independent": the first num_clean rows as causal; a mask sees them and itself, not the other masks
            "bidirectional": every row sees every row (BD3-LM blocks, text-order caches)
            a RankMask: its bounds, [batch or 1, seqlen_q] or [total_q], against its k_rank, [batch or 1, max_seqlen]
            (max_pages * page_size if paged), or against cache row numbers if its k_rank is None; it alone decides
        num_clean: int or int32 [batch], how many of a row's leading tokens are clean, default n_b. Used by
            "independent" and by commit.
        slots: int32 [batch, seqlen_q] or [total_q], the cache row each token is written to, -1 = nowhere; distinct
            within a batch row. mask must then be "bidirectional" or a RankMask.
        commit: advance cache_seqlens in place by num_clean, after attending. A model of several layers leaves it off
            and advances once per step (`KVCache.commit`).
        page_table: int32 [batch, max_pages], the page that holds rows [i * page_size, (i + 1) * page_size).
        cache_batch_idx: int32 [batch], which row of a contiguous cache belongs to a batch row; default: the same.
        cu_seqlens_q: int32 [batch + 1], where each batch row begins in a packed layout: 0, ..., total_q.
        seqused_q: int32 [batch], rows in use of a padded layout; the rest is neither read nor written.
        softmax_scale: default 1 / sqrt(head_dim).
        return_lse: also return the log-sum-exp.
        out: tensor of q's shape, dtype and device to write into; it must not overlap the inputs.
        backend: None (compiled, chosen by device), "cpu", "cuda" or "reference" (plain torch).

    NumPy and CuPy arrays are taken for tensors and given back; a mask's own tensors stay torch's.

    Returns:
        out, of q's shape and dtype (rows not in use: zero, or as they were in `out`); with return_lse also lse,
        natural logarithm, float32 (float64 for float64 inputs), [batch, heads, seqlen_q] or [heads, total_q].

    Raises:
        TypeError, ValueError: naming the argument, what came and what is supported; ValueError for a cache that would
            overflow. Nothing has been written then.

    >>> cache = KVCache(1, batch=1, max_seqlen=8, kv_heads=2, head_dim=8, dtype=torch.float32, device="cpu")
    >>> q = k = v = torch.randn(1, 3, 2, 8)  # two clean tokens, one mask
    >>> out = attention_with_kvcache(q, *cache.layer(0), k, v, cache_seqlens=cache.cache_seqlens)
    >>> cache.commit(2)
    """
    packed = cu_seqlens_q is not None
    if k is None and v is None:
        check_floats(_OP, ("q", "k_cache", "v_cache"), (q, k_cache, v_cache))
    elif k is None or v is None:
        raise ValueError(f"{_OP}: k and v go together; {'k' if k is None else 'v'} is missing")
    else:
        check_floats(_OP, ("q", "k_cache", "v_cache", "k", "v"), (q, k_cache, v_cache, k, v))
    q_shape = q.shape
    rows_words = ("total_q",) if packed else ("batch", "seqlen_q")
    check_dims(_OP, "q", q_shape, (*rows_words, "heads", "head_dim"))
    head_dim = q_shape[-1]
    rows_shape = (q_shape[0],) if packed else (q_shape[0], q_shape[1])
    batch = _batch_size(q_shape, cu_seqlens_q, seqused_q)
    capacity = _check_cache(q_shape, batch, k_cache, v_cache, cache_seqlens, page_table, cache_batch_idx)
    if k is not None:
        new_shape = (*rows_shape, k_cache.shape[2], head_dim)
        if k.shape != new_shape:
            raise ValueError(f"{_OP}: k: must be {list(new_shape)}, got {list(k.shape)}")
        if v.shape != new_shape:
            raise ValueError(f"{_OP}: v: must be {list(new_shape)}, got {list(v.shape)}")
    if positions is not None:
        check_int32(_OP, "positions", positions, rows_shape, rows_words)
    if rotary_cos is not None or rotary_sin is not None:
        _check_rotary(head_dim, positions, rotary_cos, rotary_sin)
    if slots is not None:
        check_int32(_OP, "slots", slots, rows_shape, rows_words)
        if k is None:
            raise ValueError(f"{_OP}: slots: say where k and v go, but k and v are None")
    if commit and (k is None or slots is not None):
        reason = "k and v are None" if k is None else "slots are given, so no row is appended"
        raise ValueError(f"{_OP}: commit: nothing to commit, {reason}")

    bounds = (None, None, None, None)
    if isinstance(mask, RankMask):
        chunk_mask = _EXPLICIT_RANK
        bounds = mask_tensors(_OP, mask, rows_shape, (batch, capacity))
    else:
        chunk_mask = _chunk_mask(mask, slots)
    if num_clean is not None:
        needed = commit or chunk_mask == _CHUNK_MASKS["independent"]
        num_clean = _num_clean(num_clean, batch, q, packed, needed)
    scale = check_scale(_OP, softmax_scale, head_dim)
    if out is not None:
        check_out(_OP, out, q)
    if torch.is_grad_enabled():
        _refuse_grad(q, k_cache, v_cache, k, v)
    arguments = (
        q,
        k_cache,
        v_cache,
        k,
        v,
        cache_seqlens,
        positions,
        rotary_cos,
        rotary_sin,
        num_clean,
        slots,
        page_table,
        cache_batch_idx,
        cu_seqlens_q,
        seqused_q,
        *bounds,
    )
    # The usual case in short, since this runs per layer and step; a tensor on another device makes the kernel raise.
    chosen = "cpu" if backend is None and q.is_cpu else backends.select(backend, _OP, out, *arguments)
    if chosen != "reference":
        check_compiled(_OP, q.dtype, head_dim)

    if out is None:
        out = torch.empty_like(q) if seqused_q is None else torch.zeros_like(q)
    lse = None
    if return_lse:
        shape = (q_shape[1], q_shape[0]) if packed else (batch, q_shape[2], q_shape[1])
        lse = torch.full(shape, -torch.inf, dtype=compute_dtype(q.dtype), device=q.device)
    if chosen == "reference":
        _check_values(*arguments)
        _reference(out, lse, *arguments, chunk_mask, rotary_interleaved, commit, scale)
    elif torch.compiler.is_compiling():
        backends.run(chosen, _OP, out, lse, *arguments, chunk_mask, rotary_interleaved, commit, scale)
    else:
        try:
            backends.run(chosen, _OP, out, lse, *arguments, chunk_mask, rotary_interleaved, commit, scale)
        except (ValueError, RuntimeError):
            # The kernel only says that it refuses; these name the argument and its value.
            backends.select(backend, _OP, out, *arguments)
            check_contiguous(_OP, q=q, k_cache=k_cache, v_cache=v_cache, k=k, v=v, out=out)
            _check_values(*arguments)
            raise
    return out if lse is None else (out, lse)


# --- checks


def _batch_size(q_shape: torch.Size, cu_seqlens_q: torch.Tensor | None, seqused_q: torch.Tensor | None) -> int:
    if cu_seqlens_q is None:
        if seqused_q is not None:
            check_int32(_OP, "seqused_q", seqused_q, (q_shape[0],), ("batch",))
        return q_shape[0]
    if seqused_q is not None:
        raise ValueError(f"{_OP}: seqused_q: is for padded layouts; in a packed one cu_seqlens_q gives the lengths")
    return check_cu_seqlens(_OP, "cu_seqlens_q", cu_seqlens_q)


def _check_cache(
    q_shape: torch.Size,
    batch: int,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    page_table: torch.Tensor | None,
    cache_batch_idx: torch.Tensor | None,
) -> int:
    """Checks the cache; returns how many rows it holds per batch row."""
    shape = k_cache.shape
    check_dims(_OP, "k_cache", shape, ("batch or pages", "max_seqlen or page_size", "kv_heads", "head_dim"))
    if v_cache.shape != shape:
        raise ValueError(f"{_OP}: v_cache: must have the shape of k_cache {list(shape)}, got {list(v_cache.shape)}")
    check_heads(_OP, "k_cache", q_shape, shape)
    check_int32(_OP, "cache_seqlens", cache_seqlens, (batch,), ("batch",))
    if page_table is not None:
        if cache_batch_idx is not None:
            raise ValueError(f"{_OP}: cache_batch_idx: is for contiguous caches; with page_table choose its rows")
        max_pages = page_table.shape[-1] if isinstance(page_table, torch.Tensor) and page_table.dim() == 2 else 0
        check_int32(_OP, "page_table", page_table, (batch, max_pages), ("batch", "max_pages"))
        return max_pages * shape[1]
    if cache_batch_idx is not None:
        check_int32(_OP, "cache_batch_idx", cache_batch_idx, (batch,), ("batch",))
    elif shape[0] != batch:
        raise ValueError(
            f"{_OP}: k_cache: must have one row per batch row, {batch}, got {shape[0]}; cache_batch_idx chooses rows"
        )
    return shape[1]


def _chunk_mask(mask: object, slots: torch.Tensor | None) -> int:
    chunk_mask = _CHUNK_MASKS.get(mask) if isinstance(mask, str) else None
    if chunk_mask is None:
        raise ValueError(
            f'{_OP}: mask: got {mask!r}, supported are "causal", "independent", "bidirectional" or a RankMask'
        )
    if slots is not None and mask != "bidirectional":
        raise ValueError(
            f'{_OP}: mask: must be "bidirectional" or a RankMask with slots, which have no order, got {mask!r}'
        )
    return chunk_mask


def _check_rotary(
    head_dim: int,
    positions: torch.Tensor | None,
    rotary_cos: torch.Tensor | None,
    rotary_sin: torch.Tensor | None,
) -> None:
    if rotary_cos is None or rotary_sin is None:
        missing = "rotary_cos" if rotary_cos is None else "rotary_sin"
        raise ValueError(f"{_OP}: rotary_cos and rotary_sin go together; {missing} is missing")
    if rotary_cos.dtype not in _ROTARY_DTYPES or rotary_cos.dtype != rotary_sin.dtype:
        raise TypeError(
            f"{_OP}: rotary_cos and rotary_sin: must both be float32, bfloat16 or float16, got "
            f"{rotary_cos.dtype} and {rotary_sin.dtype}"
        )
    if rotary_cos.dim() != 2 or 2 * rotary_cos.shape[1] > head_dim:
        raise ValueError(
            f"{_OP}: rotary_cos: must be [max_position, rotary_dim / 2] with rotary_dim up to head_dim "
            f"{head_dim}, got {list(rotary_cos.shape)}"
        )
    if rotary_sin.shape != rotary_cos.shape:
        raise ValueError(
            f"{_OP}: rotary_sin: must have the shape of rotary_cos {list(rotary_cos.shape)}, got "
            f"{list(rotary_sin.shape)}"
        )
    if positions is None:
        raise ValueError(
            f"{_OP}: positions: must be given with rotary_cos; in the order of the cache rows they are "
            "cache_seqlens[:, None] + arange(seqlen_q)"
        )


def _num_clean(
    num_clean: int | torch.Tensor, batch: int, q: torch.Tensor, packed: bool, needed: bool
) -> torch.Tensor | None:
    if isinstance(num_clean, torch.Tensor):
        check_int32(_OP, "num_clean", num_clean, (batch,), ("batch",))
        return num_clean
    if isinstance(num_clean, bool) or not isinstance(num_clean, int):
        raise TypeError(f"{_OP}: num_clean: must be an int or int32 [batch], got {type(num_clean).__name__}")
    if num_clean < 0 or (not packed and num_clean > q.shape[1]):
        raise ValueError(f"{_OP}: num_clean: must lie in 0 .. {q.shape[1]} rows of this call, got {num_clean}")
    return torch.full((batch,), num_clean, dtype=torch.int32, device=q.device) if needed else None


def _refuse_grad(*tensors: torch.Tensor | None) -> None:
    for name, tensor in zip(("q", "k_cache", "v_cache", "k", "v"), tensors, strict=True):
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{_OP}: {name}: requires grad, and this op has no gradient, since it writes into the cache. "
                "Call it under torch.no_grad() or torch.inference_mode(), or train with esokern.attention."
            )


def _row_slices(
    q: torch.Tensor, cu_seqlens_q: torch.Tensor | None, seqused_q: torch.Tensor | None
) -> list[tuple[tuple, int]]:
    """For every batch row the index of its rows in a padded or packed tensor, and how many they are."""
    if cu_seqlens_q is not None:
        ends = read_cu_seqlens(_OP, "cu_seqlens_q", cu_seqlens_q, q.shape[0])
        return [((slice(a, b),), b - a) for a, b in itertools.pairwise(ends)]
    used = [q.shape[1]] * q.shape[0] if seqused_q is None else seqused_q.tolist()
    for b, rows in enumerate(used):
        if not 0 <= rows <= q.shape[1]:
            raise ValueError(f"{_OP}: seqused_q[{b}]: must lie in 0 .. {q.shape[1]}, got {rows}")
    return [((b, slice(0, rows)), rows) for b, rows in enumerate(used)]


def _check_values(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    cache_seqlens: torch.Tensor,
    positions: torch.Tensor | None,
    rotary_cos: torch.Tensor | None,
    rotary_sin: torch.Tensor | None,
    num_clean: torch.Tensor | None,
    slots: torch.Tensor | None,
    page_table: torch.Tensor | None,
    cache_batch_idx: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    seqused_q: torch.Tensor | None,
    *bounds: torch.Tensor | None,
) -> None:
    """Every integer where it must be. Reads the tensors: for the reference and to explain a kernel's
    refusal."""
    capacity = k_cache.shape[1] * (1 if page_table is None else page_table.shape[1])
    appended = k is not None and slots is None

    def check_range(name: str, values: torch.Tensor, low: int, high: int) -> None:
        for value in values.flatten().tolist():
            if not low <= value <= high:
                raise ValueError(f"{_OP}: {name}: must lie in {low} .. {high}, got {value}")

    for b, (index, rows) in enumerate(_row_slices(q, cu_seqlens_q, seqused_q)):
        cached = int(cache_seqlens[b])
        keys = cached + (rows if appended else 0)
        if cached < 0 or keys > capacity:
            raise ValueError(
                f"{_OP}: cache_seqlens[{b}]: the cache holds {capacity} rows; got {cached} committed and "
                f"{rows if appended else 0} rows to append"
            )
        if num_clean is not None:
            check_range(f"num_clean[{b}]", num_clean[b], 0, rows)
        if rotary_cos is not None:
            check_range(f"positions[{b}]", positions[index], 0, rotary_cos.shape[0] - 1)
        if cache_batch_idx is not None:
            check_range(f"cache_batch_idx[{b}]", cache_batch_idx[b], 0, k_cache.shape[0] - 1)
        written = slots[index] if slots is not None else None
        if written is not None:
            check_range(f"slots[{b}]", written, -1, capacity - 1)
        if page_table is not None:
            page_size = k_cache.shape[1]
            used = page_table[b, : -(-keys // page_size)]
            if written is not None:
                used = torch.cat([used, page_table[b, written[written >= 0].long() // page_size]])
            check_range(f"page_table[{b}]", used, 0, k_cache.shape[0] - 1)


# --- reference


def rotate(
    x: torch.Tensor,
    positions: torch.Tensor,
    rotary_cos: torch.Tensor,
    rotary_sin: torch.Tensor,
    interleaved: bool,
) -> torch.Tensor:
    """Rotary embedding of x [..., heads, head_dim] at positions [...], in x's dtype; dims past rotary_dim
    stay."""
    index = positions.long()
    cos, sin = (table[index].to(x.dtype).unsqueeze(-2) for table in (rotary_cos, rotary_sin))
    half = rotary_cos.shape[1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., :half], turned[..., half:]
    first, second = first * cos - second * sin, second * cos + first * sin
    turned = torch.stack([first, second], -1).flatten(-2) if interleaved else torch.cat([first, second], -1)
    return torch.cat([turned, rest], -1)


def _reference(
    out: torch.Tensor,
    lse: torch.Tensor | None,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    cache_seqlens: torch.Tensor,
    positions: torch.Tensor | None,
    rotary_cos: torch.Tensor | None,
    rotary_sin: torch.Tensor | None,
    num_clean: torch.Tensor | None,
    slots: torch.Tensor | None,
    page_table: torch.Tensor | None,
    cache_batch_idx: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    seqused_q: torch.Tensor | None,
    k_rank: torch.Tensor | None,
    prefix_end: torch.Tensor | None,
    window_start: torch.Tensor | None,
    window_end: torch.Tensor | None,
    chunk_mask: int,
    rotary_interleaved: bool,
    commit: bool,
    softmax_scale: float,
) -> None:
    dtype = compute_dtype(q.dtype)
    page_size = k_cache.shape[1]

    def cache_index(b: int, row: torch.Tensor) -> tuple:
        if page_table is not None:
            return page_table[b].long()[row // page_size], row % page_size
        return (b if cache_batch_idx is None else int(cache_batch_idx[b])), row

    for b, (index, rows) in enumerate(_row_slices(q, cu_seqlens_q, seqused_q)):
        cached = int(cache_seqlens[b])
        clean = rows if num_clean is None else int(num_clean[b])
        row = torch.arange(rows, device=q.device)
        new_q = q[index].to(dtype)
        if rotary_cos is not None:
            new_q = rotate(new_q, positions[index], rotary_cos, rotary_sin, rotary_interleaved)
        keys = cached
        if k is not None:
            new_k, new_v = k[index], v[index]
            if rotary_cos is not None:
                new_k = rotate(new_k.to(dtype), positions[index], rotary_cos, rotary_sin, rotary_interleaved)
            if slots is None:
                target = cached + row
                keys = cached + rows
            else:
                stored = slots[index] >= 0
                target, new_k, new_v = slots[index][stored].long(), new_k[stored], new_v[stored]
            k_cache[cache_index(b, target)] = new_k.to(k_cache.dtype)
            v_cache[cache_index(b, target)] = new_v

        key = torch.arange(keys, device=q.device)
        if chunk_mask == _EXPLICIT_RANK:
            visible = RankMask(
                key.int() if k_rank is None else k_rank[b, :keys],
                prefix_end[index],
                None if window_start is None else window_start[index],
                None if window_end is None else window_end[index],
            ).dense()
        else:
            own = key[None, :] - cached  # < 0: a row of the cache
            if chunk_mask == _CHUNK_MASKS["bidirectional"]:
                visible = torch.ones(rows, keys, dtype=torch.bool, device=q.device)
            elif chunk_mask == _CHUNK_MASKS["independent"]:
                is_mask = row[:, None] >= clean
                visible = torch.where(is_mask, (own < clean) | (own == row[:, None]), own <= row[:, None])
            else:
                visible = own <= row[:, None]
        where = cache_index(b, key)
        result, row_lse = attend(new_q, k_cache[where].to(dtype), v_cache[where].to(dtype), visible, softmax_scale)
        out[index] = result.to(out.dtype)
        if lse is not None:
            if cu_seqlens_q is None:
                lse[b, :, :rows] = row_lse
            else:
                lse[:, index[0]] = row_lse
        if commit:
            cache_seqlens[b] += clean
