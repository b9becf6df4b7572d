"""How the attention of other code bases is served: their shapes, masks and caches on the ops, their methods with other
names in them. `published` says which method of which family."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from esokern.attention import attention
from esokern.attention_with_kvcache import attention_with_kvcache
from esokern.integrations.dense_mask import understand
from esokern.masks import RankMask


class _Kept:
    """What was last made of an object, for as long as it is the same object: made once for all layers."""

    def __init__(self) -> None:
        self._last: tuple[object, object, Any] = (None, None, None)

    def get(self, source: object, make: Callable[[], Any]) -> Any:
        key: object = id(source)
        if isinstance(source, Tensor):  # a view made anew per layer is the same mask
            version = None if source.is_inference() else source._version
            key = (source.data_ptr(), source.shape, source.stride(), version)
        last_key, _, made = self._last
        if key != last_key:
            made = make()
            self._last = (key, source, made)  # keeping the source keeps its address from being given away
        return made

    def forget(self) -> None:
        self._last = (None, None, None)


class Served:
    """Attention in the shapes in which these models ask for it."""

    def __init__(self, backend: str | None) -> None:
        self.backend = backend
        self._masks, self._rotary = _Kept(), _Kept()

    def begin(self, *_: object) -> None:
        self._masks.forget()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: object = None, scale: float | None = None) -> Tensor:
        """[batch, seqlen, heads, head_dim]; mask: a RankMask, a tensor, a BlockMask or None."""
        if torch.is_autocast_enabled(q.device.type):  # as for torch's own attention
            dtype = torch.get_autocast_dtype(q.device.type)
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        if mask is not None and not isinstance(mask, RankMask):
            mask = self._masks.get(mask, partial(understand, mask, q.shape[1], k.shape[1]))
        return attention(q, k, v, mask=mask, softmax_scale=scale, backend=self.backend)

    def sdpa(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: object = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """F.scaled_dot_product_attention, [batch, heads, seqlen, head_dim]; kv_heads may always be fewer."""
        if dropout_p:
            raise ValueError(
                f"swap_attention: attention dropout is not served, got {dropout_p}; set the model's attention_dropout "
                "to 0 or call model.eval()"
            )
        if is_causal:
            raise ValueError("swap_attention: is_causal: must be False in these models, got True")
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return self.attend(q, k, v, attn_mask, scale).transpose(1, 2)

    def flex(self, q: Tensor, k: Tensor, v: Tensor, mask: object, dynamic_shape: bool = False) -> Tensor:
        """q, k, v [batch, seqlen, heads, head_dim] -> [batch, seqlen, heads * head_dim]."""
        return self.attend(q, k, v, mask).flatten(2)

    def cached(self, qkv: Tensor, k_cache: Tensor, v_cache: Tensor, cached: int, rotary_cos_sin: tuple) -> Tensor:
        """New tokens qkv [batch, seqlen, 3, heads, head_dim], not yet rotated, behind `cached` rows of the caches: each
        sees these and the new ones up to itself. rotary_cos_sin: two [batch or 1, seqlen, 3, 1, head_dim], by token."""
        batch, seqlen = qkv.shape[:2]

        def tables() -> tuple[Tensor, Tensor, Tensor]:
            cos, sin = (table[:, :, 0, 0, : table.shape[-1] // 2].flatten(0, 1) for table in rotary_cos_sin)
            row = torch.arange(cos.shape[0], dtype=torch.int32, device=qkv.device).view(-1, seqlen)
            return cos, sin, row.expand(batch, seqlen)

        cos, sin, row = self._rotary.get(rotary_cos_sin, tables)
        q, k, v = qkv.unbind(2)
        out = attention_with_kvcache(
            q,
            k_cache,
            v_cache,
            k,
            v,
            cache_seqlens=torch.full((batch,), cached, dtype=torch.int32, device=qkv.device),
            positions=row,
            rotary_cos=cos,
            rotary_sin=sin,
            backend=self.backend,
        )
        return out.flatten(2)


class Namespace:
    """A module or package with some of its names meaning something else."""

    def __init__(self, inner: object, **names: object) -> None:
        self.__dict__.update(names, _inner=inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_inner"], name)


def rebound(module: nn.Module, method: str, **names: object) -> MethodType:
    """The method of module's class, bound to module, with some global names meaning something else in it."""
    function = inspect.unwrap(getattr(type(module), method))
    missing = [name for name in names if name not in function.__code__.co_names]
    if missing:
        raise TypeError(
            f"swap_attention: {type(module).__name__}.{method} does not use {', '.join(missing)}: this revision of the "
            "code is not served"
        )
    copy = FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return MethodType(copy, module)
