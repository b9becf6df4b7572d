"""Stand-ins for the published code of other models: the class names, method signatures and global names that
`swap_attention` goes by, around a few lines of plain attention each.

A network maps x [batch, seqlen, heads * head_dim] to the same shape; its blocks add attention of x to x.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, create_mask

HEADS, HEAD_DIM = 4, 16
DIM = HEADS * HEAD_DIM


def angles(length: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.outer(torch.arange(length), 10000 ** (-torch.arange(HEAD_DIM // 2) / (HEAD_DIM // 2)))
    angle = torch.cat([angle, angle], -1).to(dtype)
    return tuple(table[None, :, None, None].repeat(1, 1, 3, 1, 1) for table in (angle.cos(), angle.sin()))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class Block(nn.Module):
    def __init__(self, kv_heads: int = HEADS) -> None:
        super().__init__()
        self.kv_heads = kv_heads
        self.attn_qkv = nn.Linear(DIM, (HEADS + 2 * kv_heads) * HEAD_DIM)

    def qkv(self, x):
        return self.attn_qkv(x).unflatten(-1, (3, HEADS, HEAD_DIM))


class Network(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x, *args, **kwargs):
        for block in self.blocks:
            x = x + block(x, *args, **kwargs)
        return x


# --- LLaDA


class LLaDABlock(Block):
    dropout = 0.0

    def _scaled_dot_product_attention(self, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p)

    def forward(self, x):
        sizes = [HEADS * HEAD_DIM] + [self.kv_heads * HEAD_DIM] * 2
        q, k, v = (part.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for part in self.attn_qkv(x).split(sizes, -1))
        dropout = self.dropout if self.training else 0.0
        out = self._scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=dropout, is_causal=False)
        return out.transpose(1, 2).flatten(2)


class LLaDALlamaBlock(LLaDABlock):
    pass


# --- Dream


def repeat_kv(states, n_rep):
    return states.repeat_interleave(n_rep, 1)


class DreamAttention(Block):
    def forward(self, x, attention_mask=None):
        raise NotImplementedError


class DreamSdpaAttention(DreamAttention):
    def forward(self, x, attention_mask=None):
        sizes = [HEADS * HEAD_DIM] + [self.kv_heads * HEAD_DIM] * 2
        q, k, v = (part.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for part in self.attn_qkv(x).split(sizes, -1))
        out = torch.nn.functional.scaled_dot_product_attention(
            q,
            repeat_kv(k, HEADS // self.kv_heads),
            repeat_kv(v, HEADS // self.kv_heads),
            attn_mask=attention_mask if isinstance(attention_mask, torch.Tensor) else None,
            dropout_p=0.0,
            is_causal=False,
        )
        return out.transpose(1, 2).flatten(2)


# --- Eso-LM


def _get_causal_mask(seq_len):
    return create_block_mask(lambda b, h, q, k: q >= k, None, None, seq_len, seq_len, device="cpu")


def _get_bidirectional_mask(seq_len):
    return create_block_mask(lambda b, h, q, k: q == q, None, None, seq_len, seq_len, device="cpu")


def _get_mixed_mask(seq_len, cutoffs):
    def visible(b, h, q, k):
        return (q >= k) | (q >= cutoffs[b])

    return create_block_mask(visible, len(cutoffs), None, seq_len, seq_len, device="cpu")


def _get_mixed2_mask(seq_len, cutoffs):
    def visible(b, h, q, k):
        return (q >= k) | ((q < cutoffs[b]) & (k < cutoffs[b]))

    return create_block_mask(visible, len(cutoffs), None, seq_len, seq_len, device="cpu")


def _get_seq_mask_prefix_lm(seq_len, cutoffs):
    def visible(b, h, q, k):
        q_rank, k_rank = q % seq_len, k % seq_len
        noisy_q, noisy_k = q < seq_len, k < seq_len
        clean = ~noisy_q & ~noisy_k & ((q_rank >= k_rank) | ((q_rank < cutoffs[b]) & (k_rank < cutoffs[b])))
        return clean | (noisy_q & ~noisy_k & (q_rank > k_rank)) | (noisy_q & (q == k))

    return create_block_mask(visible, len(cutoffs), None, 2 * seq_len, 2 * seq_len, device="cpu")


def _get_seq_mask(seq_len):
    return _get_seq_mask_prefix_lm(seq_len, torch.zeros(1, dtype=torch.long))


def flex_attention_multi_headed(q, k, v, mask, dynamic_shape):
    """Differentiable on a CPU, which FlexAttention is not."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    visible = create_mask(mask.mask_mod, mask.shape[0], 1, q.shape[2], k.shape[2], device="cpu")
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible).transpose(1, 2).flatten(2)


class EsoLM:
    """Namespace of the classes, since other code bases use the same class names."""

    class DDiTBlock(Block):
        num_tokens = 32

        def reset_kv_cache(self):
            self.k_cache, self.v_cache, self.num_clean_cached = None, None, 0

        def _attention_with_kv_cache(self, qkv, rotary_cos_sin, num_clean, num_clean_and_mask):
            q, k, v = rotated(qkv, rotary_cos_sin)
            if num_clean:
                if self.k_cache is None:
                    self.k_cache, self.v_cache = (x.new_empty(len(x), self.num_tokens, HEADS, HEAD_DIM) for x in (k, v))
                end = self.num_clean_cached + k.shape[1]
                for cache, new in ((self.k_cache, k), (self.v_cache, v)):
                    cache[:, self.num_clean_cached : end] = new
                self.num_clean_cached += num_clean
                k, v = self.k_cache[:, :end], self.v_cache[:, :end]
            return causal_behind(q, k, v)

        def forward(self, x, rotary_cos_sin, attn_mask=None, kv_cache=False, num_clean=None, num_clean_and_mask=None):
            qkv = self.qkv(x)
            if kv_cache:
                return self._attention_with_kv_cache(
                    qkv.detach(), rotary_cos_sin, num_clean=num_clean, num_clean_and_mask=num_clean_and_mask
                )
            q, k, v = rotated(qkv, rotary_cos_sin)
            return flex_attention_multi_headed(q, k, v, attn_mask, True)

    class DDiTBlockCausal(Block):
        num_tokens = 32

        def reset_kv_cache(self):
            self.k_cache, self.v_cache, self.pointer = None, None, -1

        def _attention_with_kv_cache(self, qkv, rotary_cos_sin):
            q, k, v = rotated(qkv, rotary_cos_sin)
            if self.k_cache is None:
                self.k_cache, self.v_cache = (x.new_empty(len(x), self.num_tokens, HEADS, HEAD_DIM) for x in (k, v))
            self.pointer += 1
            self.k_cache[:, self.pointer], self.v_cache[:, self.pointer] = k[:, 0], v[:, 0]
            return causal_behind(q, self.k_cache[:, : self.pointer + 1], self.v_cache[:, : self.pointer + 1])

        def forward(self, x, rotary_cos_sin, kv_cache=False):
            qkv = self.qkv(x)
            if kv_cache:
                return self._attention_with_kv_cache(qkv.detach(), rotary_cos_sin)
            return flex_attention_multi_headed(*rotated(qkv, rotary_cos_sin), _get_causal_mask(x.shape[1]), True)

    class EsoLMDiT(Network):
        def __init__(self, *blocks, diffusion_attn_mode="causal", sequential_attn_mode="causal"):
            super().__init__(*blocks)
            self.diffusion_attn_mode, self.sequential_attn_mode = diffusion_attn_mode, sequential_attn_mode
            self.mdlm_mask = self.seq_mask = None

        def _get_attention_mask(self, seq_len, attn_mode=None, cutoffs=None):
            if attn_mode in ("causal", "bidirectional"):
                if self.mdlm_mask is None:
                    causal = attn_mode == "causal"
                    self.mdlm_mask = _get_causal_mask(seq_len) if causal else _get_bidirectional_mask(seq_len)
                return self.mdlm_mask
            if attn_mode == "mixed":
                return _get_mixed_mask(seq_len=seq_len, cutoffs=cutoffs)
            return _get_mixed2_mask(seq_len=seq_len, cutoffs=cutoffs)

        def _sequential_features(self, x, cutoffs):
            if self.sequential_attn_mode == "causal":
                if self.seq_mask is None:
                    self.seq_mask = _get_seq_mask(x.shape[1] // 2)
                return self.seq_mask
            return _get_seq_mask_prefix_lm(x.shape[1] // 2, cutoffs=cutoffs)

        def forward(self, x, cutoffs, sequential=False):
            length = x.shape[1] // 2 if sequential else x.shape[1]
            tables = angles(length, x.dtype)
            if sequential:
                mask, tables = self._sequential_features(x, cutoffs), tuple(torch.cat([t, t], 1) for t in tables)
            else:
                mask = self._get_attention_mask(length, self.diffusion_attn_mode, cutoffs)
            return super().forward(x, tables, attn_mask=mask)


def rotated(qkv, rotary_cos_sin):
    cos, sin = (table[:, :, 0] for table in rotary_cos_sin)
    q, k, v = qkv.unbind(2)
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def causal_behind(q, k, v):
    """Every query sees the keys up to its own; the queries are the last of the keys."""
    rows, keys = q.shape[1], k.shape[1]
    visible = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible).transpose(1, 2).flatten(2)


# --- BD3-LM


class BD3LM:
    class DDiTBlock(Block):
        def __init__(self, attn_backend="sdpa", block_size=8):
            super().__init__()
            self.attn_backend, self.block_size = attn_backend, block_size
            self.kv_cache, self.cache_idx = None, 0

        def cross_attn(self, qkv, mask=None):
            q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)

        def cross_attn_flex(self, qkv, mask=None):
            return flex_attention_multi_headed(*qkv.unbind(2), mask, True)

        def forward(self, x, mask=None):
            qkv = self.qkv(x)
            if self.kv_cache is not None:
                end = self.cache_idx + self.block_size
                self.kv_cache[:, self.cache_idx : end] = qkv
                qkv = self.kv_cache[:, :end].clone()
            out = self.cross_attn_flex(qkv, mask) if self.attn_backend == "flex" else self.cross_attn(qkv, mask=mask)
            return out[:, -self.block_size :] if self.kv_cache is not None else out

    class Exported:
        class DDiTBlock(Block):
            attn_backend, kv_cache, block_size = "sdpa", None, 8

            def __init__(self, causal=False):
                super().__init__()
                self.causal = causal

            def cross_attn(self, x, qkv, mask=None):
                q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)
                return out.transpose(1, 2).flatten(2)

            def forward(self, x, mask=None):
                return self.cross_attn(x, self.qkv(x), mask=mask)

    class DDiTBlockCausal(Block):
        attn_backend, kv_cache = "sdpa", None

        def cross_attn(self, qkv, mask=None):
            q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=True).transpose(1, 2).flatten(2)

        def forward(self, x, c=None):
            return self.cross_attn(self.qkv(x), c)


# --- Set Diffusion


class SetDiffusion:
    class DDiTBlock(Block):
        def __init__(self, attn_backend="sdpa"):
            super().__init__()
            self.attn_backend = attn_backend
            self.k_cache, self.v_cache, self.num_clean_cached = None, None, 0

        def cross_attn(self, qkv, mask=None, causal=False):
            return self.cross_attn_with_cache(*qkv.unbind(2), mask=mask, causal=causal)

        def cross_attn_flex(self, qkv, mask=None):
            return flex_attention_multi_headed(*qkv.unbind(2), mask, True)

        def cross_attn_with_cache(self, q, k, v, mask=None, causal=False):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
            return out.transpose(1, 2).flatten(2)

        def _ensure_kv_cache_capacity(self, k, required_length):
            if self.k_cache is None or self.k_cache.shape[1] < required_length:
                longer = [k.new_empty(len(k), 2 * required_length, HEADS, HEAD_DIM) for _ in range(2)]
                if self.k_cache is not None:
                    for new, old in zip(longer, (self.k_cache, self.v_cache), strict=True):
                        new[:, : old.shape[1]] = old
                self.k_cache, self.v_cache = longer

        def _attention_with_kv_cache(self, qkv, rotary_cos_sin, num_clean, num_clean_and_mask):
            q, k, v = rotated(qkv, rotary_cos_sin)
            end = self.num_clean_cached + k.shape[1]
            self._ensure_kv_cache_capacity(k=k, required_length=end)
            for cache, new in ((self.k_cache, k), (self.v_cache, v)):
                cache[:, self.num_clean_cached : end] = new
            self.num_clean_cached += num_clean
            return causal_behind(q, self.k_cache[:, :end], self.v_cache[:, :end])

        def forward(self, x, mask=None, kv_cache=None, num_clean=None, past=None):
            qkv = self.qkv(x)
            if kv_cache is not None:
                return self._attention_with_kv_cache(
                    qkv.detach(), kv_cache, num_clean=num_clean, num_clean_and_mask=x.shape[1]
                )
            if past is not None:
                q, k, v = qkv.unbind(2)
                k, v = (torch.cat([old.expand(len(new), -1, -1, -1), new], 1) for old, new in ((past, k), (past, v)))
                return self.cross_attn_with_cache(q, k, v, mask=mask)
            return (
                self.cross_attn_flex(qkv, mask) if self.attn_backend == "flex_attention" else self.cross_attn(qkv, mask)
            )

    class DDiTBlockCausal(Block):
        attn_backend = "sdpa"

        def cross_attn(self, qkv, mask=None, causal=False):
            return self.cross_attn_with_cache(*qkv.unbind(2), causal=causal)

        def cross_attn_with_cache(self, q, k, v, mask=None, causal=False):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
            return out.transpose(1, 2).flatten(2)

        def forward(self, x, mask=None):
            return self.cross_attn(self.qkv(x), mask=mask, causal=True)


UNKNOWN = SimpleNamespace(DDiTBlock=type("DDiTBlock", (Block,), {}), Other=type("Other", (Block,), {}))
