"""Small bidirectional models for the tests of decoders: a Llama on this package's attention, and tables of logits."""

from __future__ import annotations

import torch
from torch.nn import functional as F

import esokern
from decoder_goldens import SIZES, weights
from esokern import decoders as d
from esokern.masks import RankMask
from esokern.models.denoiser import Step
from esokern.models.network import FoldedNetwork, Network, NetworkConfig


class ToyDenoiser:
    """The toy model `name` of the goldens as decoders see it: with a text-order cache, and Dream's shift.

    causal_block: tokens see no block of that length behind their own (LLaDA2). limit: nobody sees tokens from there on.
    Neither with a cache.
    """

    head_bias = logit_softcap = None

    def __init__(self, name: str, backend: str | None = None, causal_block: int = 1000, limit: int = 1000) -> None:
        self.sizes, self.weights, self.backend = SIZES[name], weights(name), backend
        self.causal_block, self.limit = causal_block, limit
        self.shift = name == "dream"
        self.vocab_size, self.mask_id, self.eos_id = (self.sizes[k] for k in ("vocab_size", "mask_id", "eos_id"))
        self.head_weight = self.weights["lm_head.weight"]
        self.device = self.head_weight.device
        self.head_dim = self.sizes["hidden_size"] // self.sizes["num_heads"]
        frequency = self.sizes["rope_theta"] ** (-torch.arange(0, self.head_dim, 2).float() / self.head_dim)
        self.angles = torch.outer(torch.arange(256.0), frequency)

    def new_cache(self, batch: int, length: int) -> esokern.KVCache:
        return esokern.KVCache(self.sizes["num_layers"], batch, length, self.sizes["num_kv_heads"], self.head_dim)

    def hidden(self, tokens: torch.Tensor, positions: torch.Tensor, step: Step) -> torch.Tensor:
        x = F.embedding(tokens, self.weights["model.embed_tokens.weight"])
        for index in range(self.sizes["num_layers"]):
            layer = f"model.layers.{index}."
            y = self._norm(x, layer + "input_layernorm")
            q, k, v = (
                self._linear(y, f"{layer}self_attn.{name}_proj").unflatten(-1, (-1, self.head_dim)) for name in "qkv"
            )
            y = self._attend(index, q, k, v, positions, step)
            x = x + self._linear(y.flatten(-2), layer + "self_attn.o_proj")
            y = self._norm(x, layer + "post_attention_layernorm")
            y = F.silu(self._linear(y, layer + "mlp.gate_proj")) * self._linear(y, layer + "mlp.up_proj")
            x = x + self._linear(y, layer + "mlp.down_proj")
        return self._norm(x, "model.norm")

    def _attend(self, layer, q, k, v, positions, step):
        cos, sin = self.angles.cos(), self.angles.sin()
        if step.cache is None:
            q, k = (_rotated(tensor, cos[positions], sin[positions]) for tensor in (q, k))
            block, seen = positions // self.causal_block, step.lengths[:, None].clamp(max=self.limit)
            mask = RankMask(torch.where(positions < seen, block, 1000).int(), block.int())
            return esokern.attention(q, k, v, mask=mask, backend=self.backend)
        return esokern.attention_with_kvcache(
            q,
            *step.cache.layer(layer),
            k,
            v,
            cache_seqlens=step.lengths,
            positions=positions.int(),
            rotary_cos=cos,
            rotary_sin=sin,
            mask="bidirectional",
            slots=step.slots,
            cache_batch_idx=step.cache_batch_idx,
            backend=self.backend,
        )

    def _norm(self, x, name):
        return F.rms_norm(x, x.shape[-1:], self.weights[name + ".weight"], self.sizes["rms_norm_eps"])

    def _linear(self, x, name):
        return F.linear(x, self.weights[name + ".weight"], self.weights.get(name + ".bias"))


def _rotated(x, cos, sin):
    first, second = x.chunk(2, -1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


MASK_ID = 23  # of tiny networks

# One of each kind, for texts of any length up to some dozen.
DECODERS = {
    "llada": d.LLaDA(steps=12, block_length=6),
    "llada random": d.LLaDA(steps=12, block_length=6, remasking="random", temperature=1.0),
    "llada guided": d.LLaDA(steps=12, block_length=6, cfg_scale=1.0),
    "fast_dllm": d.FastDLLM(block_length=6, threshold=0.4),
    "fast_dllm factor": d.FastDLLM(block_length=6, factor=1.0),
    "dream": d.Dream(steps=12, alg="entropy"),
    "dream origin": d.Dream(steps=12, alg="origin", temperature=0.7, block_length=6),
    "dream margin": d.Dream(steps=12, alg="topk_margin", alg_temp=0.5, top_p=0.9, temperature=0.5),
    "entropy_bound": d.EntropyBound(gamma=2.0, temperature=1.0),
    "first_hitting": d.FirstHitting(block_length=4, top_k=10),
    "block_refinement": d.BlockRefinement(block_length=6, steps=6, threshold=0.4, edit_threshold=0.4),
    "joint_threshold": d.JointThreshold(block_length=6, threshold=0.4, edit_threshold=0.3, max_post_steps=3),
}


def tiny_network(n_blocks: int = 2) -> FoldedNetwork:
    """A network of this package, of 24 ids with the mask, whose predictions depend strongly on all tokens."""
    torch.manual_seed(0)
    network = Network(NetworkConfig(vocab_size=24, hidden_size=32, n_blocks=n_blocks, n_heads=2, length=48, cond_dim=8))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.9 if "attn" in name else 0.2 if "output_layer" in name else 0.3)
    folded = network.fold()
    folded.linear = "fused"  # with rows that are the same bits in every batch
    return folded


def ranks(steps: list[int]) -> list[int]:
    """Steps by their order: [7, 2, 7] -> [1, 0, 1]."""
    order = sorted(set(steps))
    return [order.index(step) for step in steps]


def as_function(network: FoldedNetwork):
    """The network as a function that returns logits."""

    def function(tokens, positions, cache):
        assert cache is None
        lengths = torch.full((len(tokens),), tokens.shape[1], dtype=torch.int32)
        return network.logits(network.forward(tokens, positions, step=Step(lengths)))

    return function
