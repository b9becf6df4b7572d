"""The transformer that Eso-LM, MDLM, BD3-LM and AR models share, and its folded form for inference.

`Network` has the parameter names and shapes of the published checkpoints and is what training uses. The timestep input
of the published models is always zero, so everything adaLN computes is a constant: `Network.fold` moves it, together
with the LayerNorm weights, into the neighbouring linear layers and returns a `FoldedNetwork` that runs on the ops of
this package.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esokern import masks
from esokern.add_norm import add_norm
from esokern.attention import attention, serves
from esokern.attention_with_kvcache import attention_with_kvcache
from esokern.fused_linear import fused_linear

if TYPE_CHECKING:
    from esokern.kv_cache import KVCache
    from esokern.masks import RankMask
    from esokern.models.denoiser import Step
    from esokern.unmask_sample import UnmaskSample

NORM_EPS = 1e-5
FREQUENCY_SIZE = 256  # width of the sinusoidal timestep embedding
MASK_LOGIT = -1e6  # the mask is never predicted
LINEAR = ("auto", "fused", "torch")  # see FoldedNetwork
FUSED_ROWS = 64  # "auto": rows up to which a GPU call uses the fused layers; a guess that is not yet measured


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes of a network. `vocab_size` includes the mask, which is the last id."""

    vocab_size: int
    hidden_size: int
    n_blocks: int
    n_heads: int
    length: int
    cond_dim: int = 128
    adaln: bool = True
    dropout: float = 0.0
    mlp_ratio: int = 4
    rope_base: float = 10000.0

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "n_blocks", "n_heads", "length", "cond_dim", "mlp_ratio"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; a positive integer is needed")
        if self.hidden_size % self.n_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of n_heads {self.n_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary embedding needs an even one")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout}; it must lie in [0, 1)")

    @property
    def mask_id(self) -> int:
        return self.vocab_size - 1

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.n_heads

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> NetworkConfig:
        """From a dict with exactly these fields or fewer; unknown names are refused."""
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"unknown network settings: {', '.join(unknown)}")
        return cls(**values)


def rotary_frequencies(head_dim: int, base: float) -> Tensor:
    """float32 [head_dim / 2]: radians per position."""
    return 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def rotary_tables(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [..., head_dim/2] at integer `positions` [...]."""
    angles = positions.to(inv_freq.dtype).unsqueeze(-1) * inv_freq
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, S, H, D] by cos/sin [B or 1, S, D/2], first half against second half (not interleaved)."""
    half = x.shape[-1] // 2
    cos, sin = cos.unsqueeze(-2).to(x.dtype), sin.unsqueeze(-2).to(x.dtype)
    # Whole rows at a time: the same products and sums as by halves, in fewer strided passes.
    swapped = torch.cat((x[..., half:], x[..., :half]), dim=-1)
    return x * torch.cat((cos, cos), dim=-1) + swapped * torch.cat((-sin, sin), dim=-1)


class LayerNorm(nn.Module):
    """LayerNorm with a weight and no bias, computed in float32."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), (x.shape[-1],), self.weight.float(), None, NORM_EPS)


class VocabEmbedding(nn.Module):
    def __init__(self, vocab_size: int, hidden_size: int):
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(vocab_size, hidden_size))
        nn.init.normal_(self.embedding, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.embedding)


class TimestepEmbedder(nn.Module):
    """The published timestep MLP. Its input is always timestep 0, whose embedding is 128 ones and 128 zeros."""

    def __init__(self, cond_dim: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCY_SIZE, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim))

    def forward(self) -> Tensor:
        """[cond_dim]: the condition every adaLN layer reads."""
        frequencies = self.mlp[0].weight.new_zeros(FREQUENCY_SIZE)
        frequencies[: FREQUENCY_SIZE // 2] = 1.0
        return F.silu(self.mlp(frequencies))


class Rotary(nn.Module):
    inv_freq: Tensor

    def __init__(self, head_dim: int, base: float):
        super().__init__()
        self.register_buffer("inv_freq", rotary_frequencies(head_dim, base))

    def _apply(self, fn, recurse=True):
        """Follow moves to other devices, but stay float32: half formats cannot tell far positions apart."""
        kept = self.inv_freq
        super()._apply(fn, recurse)
        self.inv_freq = kept.to(self.inv_freq.device)
        return self


class Block(nn.Module):
    def __init__(self, config: NetworkConfig):
        super().__init__()
        size = config.hidden_size
        self.n_heads = config.n_heads
        self.dropout = config.dropout
        self.norm1 = LayerNorm(size)
        self.attn_qkv = nn.Linear(size, 3 * size, bias=False)
        self.attn_out = nn.Linear(size, size, bias=False)
        self.norm2 = LayerNorm(size)
        self.mlp = nn.Sequential(
            nn.Linear(size, config.mlp_ratio * size),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.mlp_ratio * size, size),
        )
        self.adaLN_modulation = nn.Linear(config.cond_dim, 6 * size) if config.adaln else None

    def modulation(self, condition: Tensor | None) -> tuple[Tensor | None, ...]:
        """shift, scale, gate [hidden] of the attention half, then of the MLP half; Nones without adaLN."""
        if self.adaLN_modulation is None:
            return (None,) * 6
        return self.adaLN_modulation(condition).chunk(6, dim=-1)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, condition: Tensor | None, attend) -> Tensor:
        batch, length, size = x.shape
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)
        qkv = self.attn_qkv(_modulate(self.norm1(x), shift1, scale1)).view(batch, length, 3, self.n_heads, -1)
        q, k = apply_rotary(qkv[:, :, :2].flatten(2, 3), cos, sin).split(self.n_heads, dim=2)
        out = attend(q, k, qkv[:, :, 2]).reshape(batch, length, size)
        x = x + self._branch(self.attn_out(out), gate1)
        return x + self._branch(self.mlp(_modulate(self.norm2(x), shift2, scale2)), gate2)

    def _branch(self, y: Tensor, gate: Tensor | None) -> Tensor:
        y = F.dropout(y, self.dropout, self.training)
        return y if gate is None else gate * y


class OutputLayer(nn.Module):
    def __init__(self, config: NetworkConfig):
        super().__init__()
        self.norm_final = LayerNorm(config.hidden_size)
        self.linear = nn.Linear(config.hidden_size, config.vocab_size)
        self.adaLN_modulation = nn.Linear(config.cond_dim, 2 * config.hidden_size) if config.adaln else None

    def modulation(self, condition: Tensor | None) -> tuple[Tensor | None, ...]:
        if self.adaLN_modulation is None:
            return None, None
        return self.adaLN_modulation(condition).chunk(2, dim=-1)


def _modulate(x: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
    return x if shift is None or scale is None else torch.addcmul(shift, x, 1 + scale)


class Network(nn.Module):
    """The trainable network, with the published parameter names. Which model it is depends on mask and sampler."""

    def __init__(self, config: NetworkConfig):
        super().__init__()
        self.config = config
        self.vocab_embed = VocabEmbedding(config.vocab_size, config.hidden_size)
        self.sigma_map = TimestepEmbedder(config.cond_dim) if config.adaln else None
        self.rotary_emb = Rotary(config.head_dim, config.rope_base)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_blocks))
        self.output_layer = OutputLayer(config)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """Small normal weights, residual branches scaled down by depth, adaLN starting as the identity."""
        std = 0.02 if self.config.hidden_size >= 512 else 0.5 / math.sqrt(self.config.hidden_size)
        for block in self.blocks:
            nn.init.normal_(block.attn_qkv.weight, std=std)
            nn.init.normal_(block.mlp[0].weight, std=std)
            for linear in (block.attn_out, block.mlp[2]):
                nn.init.normal_(linear.weight, std=std / math.sqrt(2 * self.config.n_blocks))
            nn.init.zeros_(block.mlp[0].bias)
            nn.init.zeros_(block.mlp[2].bias)
            if block.adaLN_modulation is not None:
                nn.init.zeros_(block.adaLN_modulation.weight)
                nn.init.zeros_(block.adaLN_modulation.bias)
                gates = block.adaLN_modulation.bias.view(6, -1)
                gates[2], gates[5] = 1.0, 1.0
        self._initialise_neighbour_heads()
        nn.init.zeros_(self.output_layer.linear.weight)
        nn.init.zeros_(self.output_layer.linear.bias)
        if self.output_layer.adaLN_modulation is not None:
            nn.init.zeros_(self.output_layer.adaLN_modulation.weight)
            nn.init.zeros_(self.output_layer.adaLN_modulation.bias)

    @torch.no_grad()
    def _initialise_neighbour_heads(self) -> None:
        """Heads of the first block start out attending by relative position: 1, 2, .. to the left, one to the right.

        A mask token knows nothing but its position, so the first thing any of these models must learn is to look at
        the neighbours; from random weights that takes hundreds of steps in which nothing else is learned. With adaLN a
        constant reaches q and k through the shift s: q0 = W_q s, k0 = W_k s, and two constant vectors score relative
        positions only. Their phases are set to peak at the wanted offset.
        """
        block, config = self.blocks[0], self.config
        if block.adaLN_modulation is None:
            return
        size, dim = config.hidden_size, config.head_dim
        shift = torch.randn(size)
        shift *= 10.0 / shift.norm()  # far above what the normalised input has along it, so that q0 and k0 rule
        block.adaLN_modulation.bias.view(6, size)[0] = shift
        frequencies = self.rotary_emb.inv_freq
        strength = 5.0 * (frequencies > 0.05).float()
        q, k, _ = block.attn_qkv.weight.view(3, config.n_heads, dim, size)
        offsets = [*range(1, config.n_heads), -1] if config.n_heads > 1 else [1]
        for head, offset in enumerate(offsets):
            angle = -offset * frequencies
            for matrix, phase in ((q, angle), (k, torch.zeros_like(angle))):
                wanted = torch.cat((strength * phase.cos(), strength * phase.sin()))
                matrix[head] += torch.outer(wanted - matrix[head] @ shift, shift / shift.square().sum())

    def n_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def hidden(self, tokens: Tensor, positions: Tensor, mask: RankMask | Tensor | str) -> Tensor:
        """float [B, S, hidden]: the input of the last linear layer (final norm and adaLN applied)."""
        _check_tokens(tokens, self.config)
        attend = _attend_by_torch(mask) if isinstance(mask, Tensor) else _attend_by_rank(mask, tokens)
        condition = None if self.sigma_map is None else self.sigma_map()
        cos, sin = rotary_tables(_batched(positions, tokens), self.rotary_emb.inv_freq)
        x = self.vocab_embed(tokens)
        for block in self.blocks:
            x = block(x, cos, sin, condition, attend)
        return _modulate(self.output_layer.norm_final(x), *self.output_layer.modulation(condition))

    def forward(self, tokens: Tensor, positions: Tensor, mask: RankMask | Tensor | str) -> Tensor:
        """Logits [B, S, vocab_size] of int64 `tokens` [B, S] at `positions` ([B, S] or [S]).

        `mask`: a `RankMask`; or a bool tensor [S, S] or [B, S, S], True where row may see column; or "causal" (in the
        given order) or "bidirectional". The mask token's logit is returned as computed, not suppressed.
        """
        return self.output_layer.linear(self.hidden(tokens, positions, mask))

    @torch.no_grad()
    def fold(self, dtype: torch.dtype | None = None) -> FoldedNetwork:
        """Weights for inference: adaLN, norm weights and residual gates folded in, computed in float64.

        `dtype` is the storage type of the result; by default that of the parameters.
        """
        target = dtype if dtype is not None else self.vocab_embed.embedding.dtype
        wide = copy.deepcopy(self).to(torch.float64)
        condition = None if wide.sigma_map is None else wide.sigma_map()

        def through_norm(norm: LayerNorm, shift: Tensor | None, scale: Tensor | None, linear: nn.Linear):
            """linear(norm(x)*(1+scale) + shift) as a weight and bias that take the plainly normalised x."""
            gain = norm.weight if scale is None else norm.weight * (1 + scale)
            bias = linear.bias if linear.bias is not None else linear.weight.new_zeros(linear.out_features)
            return linear.weight * gain, bias if shift is None else bias + linear.weight @ shift

        def gated(linear: nn.Linear, gate: Tensor | None):
            weight, bias = linear.weight, linear.bias
            if gate is None:
                return weight, bias
            return weight * gate[:, None], None if bias is None else bias * gate

        blocks = []
        for block in wide.blocks:
            shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(condition)
            qkv, qkv_bias = through_norm(block.norm1, shift1, scale1, block.attn_qkv)
            mlp1, mlp1_bias = through_norm(block.norm2, shift2, scale2, block.mlp[0])
            mlp2, mlp2_bias = gated(block.mlp[2], gate2)
            folded = (qkv, qkv_bias, gated(block.attn_out, gate1)[0], mlp1, mlp1_bias, mlp2, mlp2_bias)
            blocks.append(FoldedBlock(*(value.to(target).contiguous() for value in folded)))
        out = wide.output_layer
        head, head_bias = through_norm(out.norm_final, *out.modulation(condition), out.linear)
        return FoldedNetwork(
            self.config,
            wide.vocab_embed.embedding.detach().to(target),
            blocks,
            head.to(target).contiguous(),
            head_bias.to(target),
            self.rotary_emb.inv_freq.float(),
        )


def _check_tokens(tokens: Tensor, config: NetworkConfig) -> None:
    if tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"tokens must be int64 [batch, length]; got {tokens.dtype} {tuple(tokens.shape)}")


def _batched(positions: Tensor, tokens: Tensor) -> Tensor:
    """positions as [1 or B, S]."""
    if positions.dim() == 1:
        positions = positions.unsqueeze(0)
    if positions.dim() != 2 or positions.shape[1] != tokens.shape[1]:
        raise ValueError(
            f"positions {tuple(positions.shape)} do not fit tokens {tuple(tokens.shape)}; [S] or [B, S] is needed"
        )
    return positions


def _attend_by_rank(mask: RankMask | str, tokens: Tensor):
    """attend(q, k, v), each [B, S, H, D], by `attention`; what its kernels do not serve (float64, odd head
    dimensions) goes to its reference."""
    if isinstance(mask, str):
        if mask not in ("causal", "bidirectional"):
            raise ValueError(f"mask is {mask!r}; as a word it may be 'causal' or 'bidirectional'")
        ranks = masks.causal(tokens.shape[1], device=tokens.device) if mask == "causal" else None
    else:
        ranks = mask

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, mask=ranks, backend=None if serves(q.dtype, q.shape[-1]) else "reference")

    return attend


def _attend_by_torch(allowed: Tensor):
    """attend(q, k, v), each [B, S, H, D], by torch's scaled_dot_product_attention under a bool mask."""
    if allowed.dtype != torch.bool or allowed.dim() not in (2, 3):
        raise ValueError(f"mask must be bool [S, S] or [B, S, S]; got {allowed.dtype} {tuple(allowed.shape)}")
    allowed = allowed[None, None] if allowed.dim() == 2 else allowed[:, None]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2)

    return attend


def _linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(x weight^T + bias), the tanh form."""
    if x.device.type == "cuda":  # in one kernel there, and always the tanh form; on other devices it is not
        return torch._addmm_activation(bias, x.flatten(0, -2), weight.mT, use_gelu=True).unflatten(0, x.shape[:-1])
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


# The attention half of a block between its two linear layers: attend(layer, qkv [..., 3 hidden]) -> [..., hidden].
Attend = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class FoldedBlock:
    """Inference weights of one block; `mlp2` and `out` carry the residual gates, `qkv` and `mlp1` the norms."""

    qkv_weight: Tensor
    qkv_bias: Tensor
    out_weight: Tensor
    mlp1_weight: Tensor
    mlp1_bias: Tensor
    mlp2_weight: Tensor
    mlp2_bias: Tensor

    def to(self, *args: Any) -> FoldedBlock:
        return FoldedBlock(*(getattr(self, field.name).to(*args) for field in dataclasses.fields(self)))


class HeadShard(Protocol):
    """Which part of the LM head a process holds, and how draws from the parts become one."""

    start: int

    def merge(self, drawn: UnmaskSample) -> UnmaskSample: ...


class FoldedNetwork:
    """The network for inference: plain tensors, run by this package's ops, no gradients.

    A block is y = x + out(attend(rotary(qkv(normalize(x))))), then y + mlp2(gelu(mlp1(normalize(y)))), where normalize
    has neither scale nor shift. Get one from `Network.fold`. Rotary tables are float32 whatever the weights' type.

    `linear` says what runs the linear layers: "fused" this package's fused_linear, whose rows are bitwise the same in
    every batch; "torch" torch's own matrix products with add_norm between them, the faster way for many rows on a GPU;
    "auto" "fused" on the CPU and for few rows on a GPU, "torch" for many there.

    `head_shard` is None where the head is whole; else `head_weight` and `head_bias` are the rows of the ids from
    `head_shard.start` on, and samplers draw through `head_shard.merge` (see esokern.distributed.shard_head).
    """

    def __init__(
        self,
        config: NetworkConfig,
        embedding: Tensor,
        blocks: Sequence[FoldedBlock],
        head_weight: Tensor,
        head_bias: Tensor,
        inv_freq: Tensor,
        linear: str = "auto",
        head_shard: HeadShard | None = None,
    ):
        self.config = config
        self.head_shard = head_shard
        self.embedding = embedding
        self.blocks = tuple(blocks)
        self.head_weight, self.head_bias = head_weight, head_bias
        self.inv_freq = inv_freq
        self.linear = linear
        self.rotary_cos = self.rotary_sin = inv_freq.new_empty(0, len(inv_freq))
        self.reserve_positions(config.length)

    @property
    def linear(self) -> str:
        return self._linear

    @linear.setter
    def linear(self, value: str) -> None:
        if value not in LINEAR:
            raise ValueError(f"linear is {value!r}; it may be {', '.join(map(repr, LINEAR))}")
        self._linear = value

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    def to(self, *args: torch.dtype | torch.device | str) -> FoldedNetwork:
        """A copy with weights of another dtype and/or on another device."""
        dtypes = [a for a in args if isinstance(a, torch.dtype)]
        devices = [torch.device(a) for a in args if not isinstance(a, torch.dtype)]
        if len(dtypes) > 1 or len(devices) > 1:
            raise ValueError(f"to: one dtype and one device at most; got {args}")
        dtype, device = (dtypes or [self.dtype])[0], (devices or [self.device])[0]
        return FoldedNetwork(
            self.config,
            self.embedding.to(device, dtype),
            [block.to(device, dtype) for block in self.blocks],
            self.head_weight.to(device, dtype),
            self.head_bias.to(device, dtype),
            self.inv_freq.to(device),
            self.linear,
            self.head_shard,
        )

    def with_head(self, weight: Tensor, bias: Tensor, shard: HeadShard) -> FoldedNetwork:
        """The same network with a part of the head; everything else is shared with this one."""
        return FoldedNetwork(self.config, self.embedding, self.blocks, weight, bias, self.inv_freq, self.linear, shard)

    def n_bytes(self) -> int:
        """Bytes of the weights one forward pass reads (the embedding's rows aside)."""
        tensors = [self.head_weight, self.head_bias]
        for block in self.blocks:
            tensors += [getattr(block, field.name) for field in dataclasses.fields(block)]
        return sum(t.numel() * t.element_size() for t in tensors)

    def reserve_positions(self, length: int) -> None:
        """Make the rotary tables [>= length, head_dim / 2]. On CPU tensors `forward` sees to it itself."""
        if length <= len(self.rotary_cos):
            return
        length = max(length, 2 * len(self.rotary_cos))
        positions = torch.arange(length, device=self.device)
        self.rotary_cos, self.rotary_sin = rotary_tables(positions, self.inv_freq)

    @torch.no_grad()
    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        *,
        mask: RankMask | None = None,
        cache: KVCache | None = None,
        cache_mask: str = "causal",
        num_clean: int | Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        step: Step | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """Final hidden states, normalised: what `logits`, or `unmask_sample` with `head_weight`, takes.

        Args:
            tokens: integer [B, S]; with `cu_seqlens_q` packed, [T].
            positions: places in the text, integer, shape of `tokens` or [S].
            mask: without a cache: who sees whom.
            cache: a KV cache with one layer per block. The rows of this call are written behind its committed rows;
                `cache.commit` makes them permanent. Not committed here.
            cache_mask: how the rows of this call see each other: "causal", "independent" or "bidirectional".
            num_clean: int, or int32 [B]: leading rows of each sequence that are clean ("independent" treats the
                others as masks); default: all.
            cu_seqlens_q: int32 [B + 1], start of each sequence of a packed call; with a cache only.
            step: who sees whom for a decoder of bidirectional networks, instead of mask and cache.
            backend: back end of every op; None picks the compiled one for the device.

        Returns:
            [B, S, hidden] or [T, hidden] in the weights' dtype.
        """
        if step is not None:
            mask, cache, cache_mask = step.mask, step.cache, "bidirectional"
            if mask is cache is None:
                return self._forward_texts(tokens, positions, step, backend)
        self._check(tokens, positions, mask, cache, cu_seqlens_q)
        if positions.dim() < tokens.dim():
            positions = positions.expand_as(tokens)
        self._reserve(positions)
        if cache is None:
            attend = self._attend_masked(positions, mask, None, backend)
        else:
            positions = positions.to(torch.int32)
            attend = self._attend_cached(positions, cache, cache_mask, num_clean, cu_seqlens_q, step, backend)
        return self._run(tokens, attend, backend)

    __call__ = forward

    def _forward_texts(self, tokens: Tensor, positions: Tensor, step: Step, backend: str | None) -> Tensor:
        """Whole texts in both directions, packed if their lengths differ: a text's bits do not depend on the others."""
        lengths, (batch, seqlen) = step.length_list(), tokens.shape
        self._reserve(positions)
        if min(lengths) == seqlen:
            return self._run(tokens, self._attend_masked(positions, None, None, backend), backend)
        filled = torch.arange(seqlen) < torch.tensor(lengths)[:, None]
        places = filled.flatten().nonzero()[:, 0].to(tokens.device, non_blocking=True)
        cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=tokens.device)
        attend = self._attend_masked(positions.flatten()[places], None, cu_seqlens, backend)
        hidden = self._run(tokens.flatten()[places], attend, backend)
        out = hidden.new_zeros(batch * seqlen, hidden.shape[-1])
        return out.index_copy_(0, places, hidden).view(batch, seqlen, -1)

    def _reserve(self, positions: Tensor) -> None:
        if positions.device.type == "cpu" and positions.numel():
            self.reserve_positions(int(positions.max()) + 1)

    def _run(self, tokens: Tensor, attend: Attend, backend: str | None) -> Tensor:
        if self._layers_by_torch(tokens.numel(), backend):
            return self._run_torch(tokens, attend, backend)
        return self._run_fused(tokens, attend, backend)

    @torch.no_grad()
    def logits(self, hidden: Tensor, backend: str | None = None) -> Tensor:
        """[..., vocab_size] of hidden [..., hidden_size]; the mask's logit as computed, not suppressed."""
        if self.head_shard is not None:
            raise ValueError("logits: the head is split over processes; ask a network with a whole one")
        return fused_linear(hidden, self.head_weight, self.head_bias, backend=backend)

    def _layers_by_torch(self, rows: int, backend: str | None) -> bool:
        if self.linear == "auto":
            return self.device.type == "cuda" and backend != "reference" and rows > FUSED_ROWS
        return self.linear == "torch"

    def _run_fused(self, tokens: Tensor, attend: Attend, backend: str | None) -> Tensor:
        """All blocks by fused_linear: normalisation, activation and residual belong to the linear layers."""
        x = F.embedding(tokens, self.embedding)
        for i, block in enumerate(self.blocks):
            qkv = fused_linear(x, block.qkv_weight, block.qkv_bias, normalize_eps=NORM_EPS, backend=backend)
            x = fused_linear(attend(i, qkv), block.out_weight, residual=x, backend=backend)
            inner = fused_linear(
                x, block.mlp1_weight, block.mlp1_bias, normalize_eps=NORM_EPS, activation="gelu_tanh", backend=backend
            )
            x = fused_linear(inner, block.mlp2_weight, block.mlp2_bias, residual=x, backend=backend)
        return add_norm(x, eps=NORM_EPS, return_sum=False, backend=backend)

    def _run_torch(self, tokens: Tensor, attend: Attend, backend: str | None) -> Tensor:
        """All blocks by torch's linear layers: embedding, residual and normalisation stand between them."""
        normed, x = add_norm(self.embedding, tokens=tokens, eps=NORM_EPS, backend=backend)
        for i, block in enumerate(self.blocks):
            attended = attend(i, F.linear(normed, block.qkv_weight, block.qkv_bias))
            normed, x = add_norm(F.linear(attended, block.out_weight), x, eps=NORM_EPS, backend=backend)
            inner = _linear_gelu(normed, block.mlp1_weight, block.mlp1_bias)
            outer = F.linear(inner, block.mlp2_weight, block.mlp2_bias)
            normed, x = add_norm(outer, x, eps=NORM_EPS, backend=backend)
        return normed

    def _attend_masked(
        self, positions: Tensor, mask: RankMask | None, cu_seqlens: Tensor | None, backend: str | None
    ) -> Attend:
        cos, sin = (F.embedding(positions, table) for table in (self.rotary_cos, self.rotary_sin))

        def attend(layer: int, qkv: Tensor) -> Tensor:
            qkv = self._split_heads(qkv)
            rotated = apply_rotary(qkv[..., :2, :, :].flatten(-3, -2).float(), cos, sin).to(qkv.dtype)
            q, k = rotated.split(self.config.n_heads, dim=-2)
            packing = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
            return attention(q, k, qkv[..., 2, :, :], mask=mask, **packing, backend=backend).flatten(-2)

        return attend

    def _attend_cached(
        self,
        positions: Tensor,
        cache: KVCache,
        cache_mask: str | RankMask,
        num_clean: int | Tensor | None,
        cu_seqlens_q: Tensor | None,
        step: Step | None,
        backend: str | None,
    ) -> Attend:
        def attend(layer: int, qkv: Tensor) -> Tensor:
            q, k, v = self._split_heads(qkv).unbind(-3)
            return attention_with_kvcache(
                q,
                *cache.layer(layer),
                k,
                v,
                cache_seqlens=cache.cache_seqlens if step is None else step.lengths,
                positions=positions,
                rotary_cos=self.rotary_cos,
                rotary_sin=self.rotary_sin,
                mask=cache_mask,
                num_clean=num_clean,
                page_table=cache.page_table,
                slots=None if step is None else step.slots,
                cache_batch_idx=None if step is None else step.cache_batch_idx,
                seqused_q=None if step is None else step.seqused,
                cu_seqlens_q=cu_seqlens_q,
                backend=backend,
            ).flatten(-2)

        return attend

    def _split_heads(self, qkv: Tensor) -> Tensor:
        """[..., 3 hidden] as [..., 3, heads, head_dim]."""
        return qkv.view(*qkv.shape[:-1], 3, self.config.n_heads, self.config.head_dim)

    def _check(
        self,
        tokens: Tensor,
        positions: Tensor,
        mask: RankMask | None,
        cache: KVCache | None,
        cu_seqlens_q: Tensor | None,
    ) -> None:
        if tokens.dim() != (2 if cu_seqlens_q is None else 1):
            layout = "[batch, length]" if cu_seqlens_q is None else "[total] with cu_seqlens_q"
            raise ValueError(f"tokens must be {layout}; got {tuple(tokens.shape)}")
        if tokens.dtype not in (torch.int64, torch.int32) or positions.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"tokens and positions must be int64 or int32; got {tokens.dtype} and {positions.dtype}")
        if not tokens.device == positions.device == self.device:
            raise ValueError(
                f"tokens and positions must be on the network's device {self.device}; got {tokens.device} and "
                f"{positions.device}"
            )
        if positions.shape not in (tokens.shape, tokens.shape[-1:]):
            raise ValueError(f"positions {tuple(positions.shape)} do not fit tokens {tuple(tokens.shape)}")
        if cache is None and mask is None:
            raise ValueError("mask is None; without a cache it must say who sees whom (esokern.masks has them)")
        if cache is None and cu_seqlens_q is not None:
            raise ValueError("cu_seqlens_q was given without a cache; packed calls need one")
        if cache is not None and mask is not None:
            raise ValueError("mask was given with a cache; there `cache_mask` says how the new rows see each other")
