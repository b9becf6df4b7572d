"""The attention function of transformers on the ops of this package, and what a denoising step makes of it.

A model's layer calls `attention_forward` with the mask that `transformers_masks` made once for all layers; while
`denoising_step` is active it does what the step says instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from esokern import masks
from esokern.attention import attention, serves
from esokern.attention_with_kvcache import attention_with_kvcache
from esokern.integrations.transformers_masks import HIDDEN, USE_OTHER, AttentionMask
from esokern.masks import RankMask
from esokern.models.denoiser import Step


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: AttentionMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that `register` registers: query [batch, heads, q_length, head_dim], key and value
    [batch, kv_heads, kv_length, head_dim]; returns [batch, q_length, heads, head_dim] and no weights.

    A mask of None leaves it to is_causal, by default the module's. Inside `denoising_step` the step decides instead.

    Raises TypeError, ValueError or NotImplementedError for what is not served, with what to use.
    """
    _check(module, query, key, value, dropout, kwargs)
    if torch.is_autocast_enabled(query.device.type):  # as for torch's own attention
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    active = _active_step()
    if active is not None:
        return active.attend(module, q, k, v, scaling, kwargs.get("sliding_window")), None
    if attention_mask is None and kwargs.get("cu_seq_lens_q") is not None:
        raise NotImplementedError(f"esokern: cu_seq_lens_q: without a mask sequences cannot be packed; {USE_OTHER}")
    mask = _mask(module, attention_mask, is_causal, q.shape[1], k.shape[1], q.device)
    return attention(q, k, v, mask=mask, softmax_scale=scaling), None


def _mask(
    module: nn.Module,
    given: AttentionMask | None,
    is_causal: bool | None,
    q_length: int,
    kv_length: int,
    device: torch.device,
) -> RankMask | None:
    """The mask of this call, from the model's or from is_causal."""
    if isinstance(given, AttentionMask):
        return given.mask
    if given is not None:
        raise NotImplementedError(
            f"esokern: attention_mask: a dense mask, here {list(given.shape)} of {given.dtype}, is not served; give "
            f"the model a mask of padding [batch, seqlen] or none. {USE_OTHER}"
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not causal or q_length == 1:
        return None
    if q_length != kv_length:
        raise ValueError(
            f"esokern: attention_mask: must be given for {q_length} causal queries and {kv_length} keys, got None"
        )
    return masks.causal(q_length, device=device)


def _check(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, dropout: float, kwargs: dict) -> None:
    """What the op does not compute, in the words of transformers."""
    if dropout > 0:
        raise ValueError(
            f"esokern: dropout: must be 0, got {dropout}; set config.attention_dropout = 0, or {USE_OTHER}"
        )
    for name, what in _REFUSED.items():
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise NotImplementedError(f"esokern: {name}: {what}")
    if value.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"esokern: value: must have the head_dim of query {query.shape[-1]}, got {value.shape[-1]}; {USE_OTHER}"
        )
    if query.dtype == torch.float64:
        raise TypeError(f"esokern: query: must be float32, bfloat16 or float16, got float64; {USE_OTHER}")
    if not serves(query.dtype, query.shape[-1]):
        raise ValueError(
            f"esokern: query: head_dim must be a multiple of 8 up to 256, got {query.shape[-1]} "
            f"({type(module).__name__}); {USE_OTHER}"
        )


_REFUSED = {
    "softcap": 'soft-capped scores are not served; attn_implementation="eager" or "flex_attention" serves them',
    "s_aux": 'attention sinks are not served; attn_implementation="eager" or "flex_attention" serves them',
    "sinks": 'attention sinks are not served; attn_implementation="eager" serves them',
    "position_bias": f"a bias of the scores is not served; {USE_OTHER}",
    "indices": f"keys chosen per query are not served; {USE_OTHER}",
    "block_indices": f"blocks of keys chosen per query are not served; {USE_OTHER}",
    "output_attentions": 'the weights are never in memory; attn_implementation="eager" returns them',
}


# --- denoising steps


class ActiveStep:
    """What `denoising_step` puts in place of a model's own masks; its masks are made by the first layer that asks."""

    def __init__(self, step: Step, positions: Tensor | None) -> None:
        self.step = step
        self.positions = positions
        self._masks: dict[int | None, RankMask | str] = {}

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scale: float | None, sliding: int | None):
        """out of q, k, v [batch, seqlen, heads, head_dim] in a layer; sliding: its window, None = it has none."""
        step = self.step
        if k.shape[1] != q.shape[1]:
            raise ValueError(
                f"denoising_step: a call has the keys of its own tokens, {q.shape[1]}, got {k.shape[1]}; call the "
                "model with use_cache=False"
            )
        # The bidirectional reach of a layer is the config's; what a layer passes on may count the token itself.
        window = None if sliding is None else module.config.sliding_window
        if window not in self._masks:
            self._masks[window] = self._mask(window, q)
        mask = self._masks[window]
        if step.cache is None:
            return attention(q, k, v, mask=mask, softmax_scale=scale)
        return attention_with_kvcache(
            q,
            *step.cache.layer(module.layer_idx),
            k,
            v,
            cache_seqlens=step.lengths,
            mask=mask,
            slots=step.slots,
            page_table=step.cache.page_table,
            cache_batch_idx=step.cache_batch_idx,
            seqused_q=step.seqused,
            softmax_scale=scale,
        )

    def _mask(self, window: int | None, q: Tensor) -> RankMask | str:
        step, seqlen = self.step, q.shape[1]
        if window is None:
            if step.cache is not None:
                return "bidirectional"
            return masks.bidirectional(seqlen, kv_lengths=step.lengths) if step.mask is None else step.mask
        if step.mask is not None:
            raise NotImplementedError("denoising_step: step.mask: must be None for a model with sliding-window layers")
        if step.cache is not None:  # the rank of a key is its row in the cache, which is its position
            k_rank, position = None, step.slots
        else:
            index = torch.arange(seqlen, dtype=torch.int32, device=q.device)[None]
            position = index if self.positions is None else self.positions.to(torch.int32)
            k_rank = torch.where(index < step.lengths[:, None], position, HIDDEN)
        return RankMask(k_rank, torch.full_like(position, -1), position - window, position + window)


_active: ContextVar[ActiveStep | None] = ContextVar("esokern_denoising_step", default=None)
_num_active = 0  # in all threads
_counting = Lock()


def _active_step() -> ActiveStep | None:
    if torch.compiler.is_compiling():  # which cannot read a ContextVar, but is guarded by an integer
        if _num_active > 0:
            raise RuntimeError("denoising_step: is not for compiled models")
        return None
    return _active.get()


@contextmanager
def denoising_step(step: Step, *, positions: Tensor | None = None) -> Iterator[None]:
    """While it is active, attention of transformers models on "esokern" does what `step` says, whatever mask the model
    makes: every token sees the first step.lengths[b] keys of its row (those of the cache, if there is one).

    positions: int [batch, seqlen], the text positions of the call's tokens, for layers with a sliding window; default:
    their order. Tokens from step.lengths[b] on get some finite value. Raises ValueError for a cache without slots or
    with a mask.
    """
    if (step.cache is None) != (step.slots is None):
        missing = "slots" if step.slots is None else "cache"
        raise ValueError(f"denoising_step: step.cache and step.slots go together; {missing} is missing")
    if step.cache is not None and step.mask is not None:
        raise ValueError("denoising_step: step.mask: must be None with a cache, whose tokens see all of it")
    with activated(ActiveStep(step, positions)):
        yield


@contextmanager
def activated(active: ActiveStep) -> Iterator[None]:
    global _num_active
    token = _active.set(active)
    with _counting:
        _num_active += 1
    try:
        yield
    finally:
        with _counting:
            _num_active -= 1
        _active.reset(token)
