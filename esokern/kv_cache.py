"""The KV cache that a model owns: storage of every layer, and how many rows of each batch row are committed.

Rows below `cache_seqlens[b]` are final; rows above are scratch that the next call overwrites. A step of a
model is

    cache.check_room(rows)
    for each layer i: attention_with_kvcache(q, *cache.layer(i), k, v, cache_seqlens=cache.cache_seqlens,
                                             page_table=cache.page_table, ...)
    cache.commit(num_clean)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from esokern.attention import FLOAT_DTYPES


class KVCache:
    """Keys and values of `num_layers` layers for `batch` rows of up to `max_seqlen` tokens each.

    Attributes:
        cache_seqlens: int32 [batch] on `device`, committed rows; read by the kernels, advanced by `commit`.
        page_table: int32 [batch, max_pages] if page_size was given (row b owns its pages from the start),
            else None.

    Raises TypeError for a dtype that no kernel stores, ValueError for a size below 1.
    """

    def __init__(
        self,
        num_layers: int,
        batch: int,
        max_seqlen: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        page_size: int | None = None,
    ) -> None:
        sizes = {
            "num_layers": num_layers,
            "batch": batch,
            "max_seqlen": max_seqlen,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "page_size": 1 if page_size is None else page_size,
        }
        for name, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(f"KVCache: {name}: must be an int, got {type(size).__name__}")
            if size < 1:
                raise ValueError(f"KVCache: {name}: must be at least 1, got {size}")
        if dtype not in (*FLOAT_DTYPES, torch.float64):
            raise TypeError(
                f"KVCache: dtype: must be float32, bfloat16, float16 or, for the reference, float64, got {dtype}"
            )
        self.batch = batch
        self.max_seqlen = max_seqlen
        self.page_size = page_size
        self._bounds = [0] * batch  # no row is longer; kept on the host because reading a device tensor would stall it
        # Ordinary tensors even if made under inference_mode: a cache may outlive it.
        with torch.inference_mode(False):
            if page_size is None:
                rows = (batch, max_seqlen)
                self.page_table = None
            else:
                max_pages = -(-max_seqlen // page_size)
                rows = (batch * max_pages, page_size)
                self.page_table = torch.arange(rows[0], dtype=torch.int32, device=device).view(batch, max_pages)
            # Zeros, because a text-order cache may be attended to before every row has been written.
            shape = (num_layers, *rows, kv_heads, head_dim)
            self.k_cache = torch.zeros(shape, dtype=dtype, device=device)
            self.v_cache = torch.zeros(shape, dtype=dtype, device=device)
            self.cache_seqlens = torch.zeros(batch, dtype=torch.int32, device=device)
            self._layers = list(zip(self.k_cache.unbind(), self.v_cache.unbind(), strict=True))

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the stored keys and values."""
        return self.k_cache.dtype

    @property
    def device(self) -> torch.device:
        """Where the cache lies."""
        return self.k_cache.device

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self._layers)

    @property
    def memory_bytes(self) -> int:
        """Bytes of keys and values."""
        return 2 * self.k_cache.numel() * self.k_cache.element_size()

    @property
    def longest(self) -> int:
        """Rows committed in the longest batch row; on other devices than the CPU an upper bound, read without
        a sync."""
        return max(self._lengths())

    def _lengths(self) -> list[int]:
        """Rows committed in each batch row, or bounds of them where reading the device would stall it."""
        return self.cache_seqlens.tolist() if self.cache_seqlens.device.type == "cpu" else self._bounds

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """k_cache and v_cache of one layer, [batch, max_seqlen, kv_heads, head_dim] or
        [pages, page_size, kv_heads, head_dim]; views, written by attention_with_kvcache."""
        if not 0 <= index < len(self._layers):
            raise ValueError(f"KVCache.layer: index: must lie in 0 .. {len(self._layers) - 1}, got {index}")
        return self._layers[index]

    def check_room(self, rows: int) -> None:
        """ValueError if `rows` more rows per batch row would not fit."""
        longest = self.longest
        if rows < 0 or longest + rows > self.max_seqlen:
            raise ValueError(
                f"KVCache: the cache holds max_seqlen = {self.max_seqlen} rows; got {longest} committed and "
                f"{rows} to append"
            )

    def commit(self, num: int | torch.Tensor, *, at_most: int | Sequence[int] | None = None) -> None:
        """Make the first `num` rows behind cache_seqlens final: cache_seqlens += num, in place.

        num: int, or int32 [batch]. at_most: what num is at most, known to the host, one number or one per batch
        row; needed if num is a tensor on another device than the CPU (reading it would stall the device), and
        unused otherwise. Raises ValueError if the cache would overflow; it is unchanged then.
        """
        if isinstance(num, torch.Tensor):
            if num.dtype != torch.int32:
                raise TypeError(f"KVCache.commit: num: must be int32, got {num.dtype}")
            if num.shape != (self.batch,):
                raise ValueError(f"KVCache.commit: num: must be [batch] = [{self.batch}], got {list(num.shape)}")
            if num.device != self.cache_seqlens.device:
                raise ValueError(f"KVCache.commit: num: must be on {self.cache_seqlens.device}, got {num.device}")
            if num.device.type == "cpu":
                added = num.tolist()
                if min(added) < 0:
                    raise ValueError(f"KVCache.commit: num: must be at least 0, got {added}")
            elif at_most is None:
                raise ValueError(f"KVCache.commit: at_most: must be given for a num on {num.device}")
            else:
                added = [at_most] * self.batch if isinstance(at_most, int) else list(at_most)
                if len(added) != self.batch:
                    raise ValueError(f"KVCache.commit: at_most: must be a number or {self.batch} of them, got {added}")
        elif isinstance(num, bool) or not isinstance(num, int):
            raise TypeError(f"KVCache.commit: num: must be an int or int32 [batch], got {type(num).__name__}")
        elif num < 0:
            raise ValueError(f"KVCache.commit: num: must be at least 0, got {num}")
        else:
            added = [num] * self.batch
        after = [length + more for length, more in zip(self._lengths(), added, strict=True)]
        if max(after) > self.max_seqlen:
            raise ValueError(
                f"KVCache.commit: num: the cache holds max_seqlen = {self.max_seqlen} rows; got {self.longest} "
                f"committed and {added if isinstance(num, torch.Tensor) else num} to commit"
            )
        self.cache_seqlens += num
        self._bounds = after

    def crop(self, max_length: int) -> None:
        """Forget the committed rows from max_length on, in every batch row."""
        if not 0 <= max_length <= self.max_seqlen:
            raise ValueError(f"KVCache.crop: max_length: must lie in 0 .. {self.max_seqlen}, got {max_length}")
        self.cache_seqlens.clamp_(max=max_length)
        self._bounds = [min(bound, max_length) for bound in self._bounds]

    def reset(self) -> None:
        """Forget every row. The memory is kept; what lies in it is never read again."""
        self.cache_seqlens.zero_()
        self._bounds = [0] * self.batch

    def __repr__(self) -> str:
        kind = "contiguous" if self.page_size is None else f"page_size={self.page_size}"
        heads, head_dim = self.k_cache.shape[-2:]
        return (
            f"KVCache(num_layers={self.num_layers}, batch={self.batch}, max_seqlen={self.max_seqlen}, "
            f"kv_heads={heads}, head_dim={head_dim}, {self.dtype}, {self.device}, {kind}, "
            f"longest={self.longest}, {self.memory_bytes / 2**20:.1f} MiB)"
        )
