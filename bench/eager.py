"""The baseline: Eso-LM's cached sampler as eager code does it, with the same operations per step as the published one.

Per step it evaluates the adaLN network of every layer, builds the mask of every layer on the spot, materialises scores,
runs the LM head on clean rows too, and draws with a float64 Gumbel over all logits. It shares the checkpoint's
parameters and the schedule with the samplers under test, nothing else.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional


class EagerEsoLM:
    """Cached Eso-LM sampling over the parameters of an `esokern.models.Network`."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.config = network.config
        self.parameters = {name: tensor.detach() for name, tensor in network.state_dict().items()}
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.parameters[f"{name}.weight"], self.parameters.get(f"{name}.bias"))

    def _condition(self, batch: int) -> torch.Tensor:
        half = self.parameters["sigma_map.mlp.0.weight"].shape[1] // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
        angles = torch.zeros(batch)[:, None] * frequencies[None]
        embedded = torch.cat([angles.cos(), angles.sin()], -1)
        hidden = functional.silu(self._linear("sigma_map.mlp.0", embedded))
        return functional.silu(self._linear("sigma_map.mlp.2", hidden))

    def _norm(self, name: str, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        normed = functional.layer_norm(x.float(), (x.shape[-1],)) * self.parameters[f"{name}.weight"]
        return normed * (1 + scale) + shift

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
        cos, sin = angles.cos()[:, :, None], angles.sin()[:, :, None]
        for layer in range(self.config.n_blocks):
            block = f"blocks.{layer}"
            modulation = self._linear(f"{block}.adaLN_modulation", condition)[:, None].chunk(6, -1)
            shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation
            qkv = self._linear(f"{block}.attn_qkv", self._norm(f"{block}.norm1", x, shift_attn, scale_attn))
            q, k, v = qkv.view(batch, rows, 3, heads, head_dim).unbind(2)
            q, k = self._rotate(q, cos, sin), self._rotate(k, cos, sin)
            if len(self.keys) == layer:
                shape = (batch, self.config.length, heads, head_dim)
                self.keys.append(torch.zeros(shape))
                self.values.append(torch.zeros(shape))
            end = num_cached + rows
            self.keys[layer][:, num_cached:end] = k
            self.values[layer][:, num_cached:end] = v
            keys = self.keys[layer][:, :end].transpose(1, 2)
            values = self.values[layer][:, :end].transpose(1, 2)
            scores = q.transpose(1, 2) @ keys.transpose(-1, -2) / math.sqrt(head_dim)
            mask = torch.zeros(rows, end)
            mask[:, num_cached:] = torch.triu(torch.ones(rows, rows), 1) * -1e6
            attended = ((scores + mask).softmax(-1) @ values).transpose(1, 2).reshape(batch, rows, -1)
            x = x + gate_attn * self._linear(f"{block}.attn_out", attended)
            hidden = self._linear(f"{block}.mlp.0", self._norm(f"{block}.norm2", x, shift_mlp, scale_mlp))
            x = x + gate_mlp * self._linear(f"{block}.mlp.2", functional.gelu(hidden, approximate="tanh"))
        shift, scale = self._linear("output_layer.adaLN_modulation", condition)[:, None].chunk(2, -1)
        return self._linear("output_layer.linear", self._norm("output_layer.norm_final", x, shift, scale))

    def generate(self, order: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """Tokens [batch, seqlen]: step s decodes the next counts[s] positions of `order` [batch, seqlen]."""
        batch, seqlen = order.shape
        tokens = torch.full((batch, seqlen), self.config.mask_id)
        done = previous = 0
        for count in counts:
            positions = order[:, done - previous : done + count]
            logits = self.step(tokens.gather(1, positions), positions, done - previous)[:, previous:]
            logits[..., self.config.mask_id] = -1e6
            logits = logits.double()
            noise = -(-torch.rand_like(logits).log()).log()
            tokens.scatter_(1, positions[:, previous:], (logits + noise).argmax(-1))
            done, previous = done + count, count
        return tokens
