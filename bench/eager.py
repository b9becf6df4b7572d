"""The baselines: samplers as eager code does them, with the same operations per step as the published ones.

Eso-LM's cached sampler evaluates the adaLN network of every layer in every step, builds the mask of every layer on the
spot, materialises scores, runs the LM head on clean rows too, and draws with a float64 Gumbel over all logits. It
shares the checkpoint's parameters and the schedule with the samplers under test, nothing else. In half precision,
weights and activations are stored so and norms are float32; the published code reaches the same types through autocast,
with more conversions. LLaDA's decoder has the logits of the whole text in every step.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.nn import functional


def gumbel_max(logits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A draw from softmax(logits), the last id excluded, with noise of this dtype."""
    logits = logits.to(dtype)
    logits[..., -1] = -1e6
    tiny = 1e-10
    noise = torch.rand_like(logits)
    return (logits - (tiny - (noise + tiny).log()).log()).argmax(-1)


def nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """float64 logits with -1e6 outside the nucleus."""
    ordered, index = logits.double().softmax(-1).sort(descending=True)
    kept = ordered.cumsum(-1) - ordered < top_p
    keep = torch.zeros_like(kept).scatter(-1, index, kept)
    return logits.double().masked_fill(~keep, -1e6)


def cached_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, num_cached: int
) -> torch.Tensor:
    """Append k, v [batch, rows, heads, head_dim] at num_cached, attend causally; [batch, rows, heads, head_dim]."""
    rows, head_dim = q.shape[1], q.shape[3]
    end = num_cached + rows
    k_cache[:, num_cached:end] = k
    v_cache[:, num_cached:end] = v
    keys, values = k_cache[:, :end].transpose(1, 2), v_cache[:, :end].transpose(1, 2)
    scores = q.transpose(1, 2) @ keys.transpose(-1, -2) / math.sqrt(head_dim)
    mask = torch.zeros(rows, end, dtype=q.dtype, device=q.device)
    mask[:, num_cached:] = torch.triu(torch.ones(rows, rows, dtype=q.dtype, device=q.device), 1) * -1e6
    return ((scores + mask).softmax(-1) @ values).transpose(1, 2)


class EagerEsoLM:
    """Cached Eso-LM sampling over the parameters of an `esokern.models.Network`."""

    def __init__(self, network: torch.nn.Module, dtype: torch.dtype = torch.float32) -> None:
        self.config, self.dtype = network.config, dtype
        self.parameters = {
            name: tensor.detach().to(tensor.dtype if name == "rotary_emb.inv_freq" else dtype)
            for name, tensor in network.state_dict().items()
        }
        self.device = self.parameters["rotary_emb.inv_freq"].device
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.parameters[f"{name}.weight"], self.parameters.get(f"{name}.bias"))

    def _condition(self, batch: int) -> torch.Tensor:
        half = self.parameters["sigma_map.mlp.0.weight"].shape[1] // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=self.device) / half)
        angles = torch.zeros(batch, device=self.device)[:, None] * frequencies[None]
        embedded = torch.cat([angles.cos(), angles.sin()], -1).to(self.dtype)
        hidden = functional.silu(self._linear("sigma_map.mlp.0", embedded))
        return functional.silu(self._linear("sigma_map.mlp.2", hidden))

    def _norm(self, name: str, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        normed = functional.layer_norm(x.float(), (x.shape[-1],)) * self.parameters[f"{name}.weight"]
        return (normed * (1 + scale) + shift).to(self.dtype)

    def _rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    def step(self, tokens: torch.Tensor, positions: torch.Tensor, num_cached: int) -> torch.Tensor:
        """Logits [batch, rows, vocab] of the new rows, whose keys and values go to cache rows num_cached.. ."""
        batch, rows = tokens.shape
        heads, head_dim = self.config.n_heads, self.config.hidden_size // self.config.n_heads
        x = self.parameters["vocab_embed.embedding"][tokens]
        condition = self._condition(batch)
        angles = positions[..., None].float() * self.parameters["rotary_emb.inv_freq"]
        angles = torch.cat([angles, angles], -1)
        cos, sin = (table[:, :, None].to(self.dtype) for table in (angles.cos(), angles.sin()))
        for layer in range(self.config.n_blocks):
            block = f"blocks.{layer}"
            modulation = self._linear(f"{block}.adaLN_modulation", condition)[:, None].chunk(6, -1)
            shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation
            qkv = self._linear(f"{block}.attn_qkv", self._norm(f"{block}.norm1", x, shift_attn, scale_attn))
            q, k, v = qkv.view(batch, rows, 3, heads, head_dim).unbind(2)
            q, k = self._rotate(q, cos, sin), self._rotate(k, cos, sin)
            attended = cached_attention(q, k, v, self.keys[layer], self.values[layer], num_cached).flatten(2)
            x = x + gate_attn * self._linear(f"{block}.attn_out", attended)
            hidden = self._linear(f"{block}.mlp.0", self._norm(f"{block}.norm2", x, shift_mlp, scale_mlp))
            x = x + gate_mlp * self._linear(f"{block}.mlp.2", functional.gelu(hidden, approximate="tanh"))
        shift, scale = self._linear("output_layer.adaLN_modulation", condition)[:, None].chunk(2, -1)
        return self._linear("output_layer.linear", self._norm("output_layer.norm_final", x, shift, scale))

    def generate(self, order: torch.Tensor, counts: list[int], begin: int = 0) -> torch.Tensor:
        """Tokens [batch, seqlen]: step s decodes the next counts[s] positions of `order` [batch, seqlen].

        With `begin` the first ones of `order` count as decoded; what the cache holds of them is random.
        """
        batch, seqlen = order.shape
        heads = self.config.n_heads
        shape = (batch, self.config.length, heads, self.config.hidden_size // heads)
        fill = torch.randn if begin else torch.empty
        self.keys, self.values = (
            [fill(shape, dtype=self.dtype, device=self.device) for _ in range(self.config.n_blocks)] for _ in range(2)
        )
        tokens = torch.full((batch, seqlen), self.config.mask_id, device=self.device)
        done, previous = begin, 0
        for count in counts:
            positions = order[:, done - previous : done + count]
            logits = self.step(tokens.gather(1, positions), positions, done - previous)[:, previous:]
            tokens.scatter_(1, positions[:, previous:], gumbel_max(logits, torch.float64))
            done, previous = done + count, count
        return tokens


def llada(
    network: Callable[[torch.Tensor], torch.Tensor],
    tokens: torch.Tensor,
    mask_id: int,
    *,
    steps: int,
    block_length: int,
    temperature: float,
) -> torch.Tensor:
    """LLaDA's low-confidence decoding (arXiv 2502.09992): every step has the logits of the whole text, float64 noise
    and a softmax over all of them, and a top-k per row.

    network: tokens [batch, length] -> logits [batch, length, vocab]. The masks of tokens are the last columns of every
    row, steps a multiple of the number of blocks.
    """
    tokens = tokens.clone()
    begin = int((tokens[0] == mask_id).nonzero()[0])
    blocks = range(begin, tokens.shape[1], block_length)
    columns = torch.arange(tokens.shape[1], device=tokens.device)
    for block in blocks:
        for steps_left in range(steps // len(blocks), 0, -1):
            masked = (tokens == mask_id) & (columns < block + block_length)
            logits = network(tokens)
            noisy = logits
            if temperature > 0:
                noisy = logits.double()
                noisy = noisy.exp() / (-torch.rand_like(noisy).log()) ** temperature
            drawn = noisy.argmax(-1)
            confidence = logits.softmax(-1).gather(-1, drawn[..., None])[..., 0].masked_fill(~masked, -math.inf)
            for row, own in enumerate(confidence):
                kept = own.topk(-(-int(masked[row].sum()) // steps_left)).indices
                tokens[row, kept] = drawn[row, kept]
    return tokens
