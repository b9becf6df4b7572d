"""What a decoder asks of a network: hidden states of tokens at positions, anew or over a cache in text order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from esokern.kv_cache import KVCache
from esokern.masks import RankMask

if TYPE_CHECKING:
    from esokern.models.network import FoldedNetwork


@dataclass(frozen=True)
class Step:
    """Who sees whom in one forward pass of a bidirectional network: every token sees the keys [0, lengths[b]).

    lengths:         int32 [batch], tokens of each row's text; keys beyond are not seen
    cache:           text-order cache: row p of it is position p. The tokens of the call are written to their slots
                     first, then all of [0, lengths[b]) is seen. None: the call holds the whole text, from position 0
    slots:           int32 [batch, seqlen], cache row of each token of the call, -1 = padding; with a cache
    seqused:         int32 [batch], tokens of each row of the call, in front of the padding; with a cache
    cache_batch_idx: int32 [batch], which rows of the cache the batch rows are; None = the same
    mask:            who sees whom instead, [batch or 1, seqlen]; without a cache
    host_lengths:    the lengths where the host knows them; None: reading them waits for the device
    """

    lengths: Tensor
    cache: KVCache | None = None
    slots: Tensor | None = None
    seqused: Tensor | None = None
    cache_batch_idx: Tensor | None = None
    mask: RankMask | None = None
    host_lengths: list[int] | None = None

    def length_list(self) -> list[int]:
        """The lengths on the host."""
        return self.lengths.tolist() if self.host_lengths is None else self.host_lengths


class Denoiser(Protocol):
    """A bidirectional network as decoders see it.

    head_weight: [vocab, hidden_size] of the LM head, so that logits exist only where tokens are drawn; None if `hidden`
    returns logits itself. head_bias: [vocab] or None. logit_softcap: c of c tanh(logit / c), or None.
    shift: is row i of the output about token i + 1, as in Dream?
    """

    vocab_size: int
    device: torch.device
    head_weight: Tensor | None
    head_bias: Tensor | None
    logit_softcap: float | None
    shift: bool

    def new_cache(self, batch: int, length: int) -> KVCache | None:
        """A text-order cache for `batch` texts of up to `length` tokens; None if the network cannot use one."""

    def hidden(self, tokens: Tensor, positions: Tensor, step: Step) -> Tensor:
        """[batch, seqlen, hidden_size] (or logits) of tokens int64 [batch, seqlen] at positions int64 of that shape."""


class NetworkDenoiser:
    """A network of this package (an MDLM) as decoders see it."""

    logit_softcap = None
    shift = False

    def __init__(self, network: FoldedNetwork, backend: str | None = None) -> None:
        if network.head_shard is not None:
            raise ValueError("model: the head is split over processes; decoders need a network with a whole one")
        self.network, self.backend = network, backend
        self.vocab_size, self.device = network.config.vocab_size, network.device
        self.head_weight, self.head_bias = network.head_weight, network.head_bias

    def new_cache(self, batch: int, length: int) -> KVCache:
        config = self.network.config
        return KVCache(
            config.n_blocks, batch, length, config.n_heads, config.head_dim, self.network.dtype, self.network.device
        )

    def hidden(self, tokens: Tensor, positions: Tensor, step: Step) -> Tensor:
        return self.network.forward(tokens, positions, step=step, backend=self.backend)


class CallableDenoiser:
    """Any function (tokens, positions, cache) -> logits [batch, seqlen, vocab], or hidden states with `head_weight`.

    The function gets int64 [batch, seqlen] tokens and positions, and None for the cache, or with `new_cache` the `Step`
    that says which rows of which cache the tokens are (and what they see). Without `new_cache` it never sees padding:
    texts of different lengths come in separate calls.
    """

    def __init__(
        self,
        function: Callable[[Tensor, Tensor, Step | None], Tensor],
        *,
        vocab_size: int,
        head_weight: Tensor | None = None,
        head_bias: Tensor | None = None,
        logit_softcap: float | None = None,
        shift: bool = False,
        new_cache: Callable[[int, int], KVCache] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.function, self.vocab_size, self.shift = function, vocab_size, shift
        self.head_weight, self.head_bias, self.logit_softcap = head_weight, head_bias, logit_softcap
        self.device = torch.device(device) if head_weight is None else head_weight.device
        self._new_cache = new_cache

    def new_cache(self, batch: int, length: int) -> KVCache | None:
        return None if self._new_cache is None else self._new_cache(batch, length)

    def hidden(self, tokens: Tensor, positions: Tensor, step: Step) -> Tensor:
        if self._new_cache is not None:
            return self.function(tokens, positions, step)
        lengths = step.length_list()
        if min(lengths) == tokens.shape[1]:
            return self._logits(tokens, positions)
        out: Tensor | None = None
        for length in sorted(set(lengths)):
            rows = torch.tensor([row for row, own in enumerate(lengths) if own == length], device=tokens.device)
            part = self._logits(tokens[rows, :length], positions[rows, :length])
            if out is None:
                out = part.new_zeros(*tokens.shape, part.shape[-1])
            out[rows, :length] = part
        return out

    def _logits(self, tokens: Tensor, positions: Tensor) -> Tensor:
        out = self.function(tokens, positions, None)
        width = self.vocab_size if self.head_weight is None else self.head_weight.shape[1]
        if not isinstance(out, Tensor) or out.shape != (*tokens.shape, width):
            got = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(
                f"model: must return a tensor {[*tokens.shape, width]} for tokens {list(tokens.shape)}, got {got}"
            )
        return out
