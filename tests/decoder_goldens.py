"""The toy models and recorded runs of published decoders (tests/goldens/README.md says what each file holds)."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn import functional as F

GOLDENS = Path(__file__).parent / "goldens"
SIZES = json.loads((GOLDENS / "decoders-models.json").read_text())


def load(name: str) -> list[dict]:
    """The cases of tests/goldens/decoders-<name>.json."""
    return json.loads((GOLDENS / f"decoders-{name}.json").read_text())["cases"]


def tensors(name: str) -> dict[str, torch.Tensor]:
    """The tensors of tests/goldens/decoders-<name>.safetensors."""
    return load_file(GOLDENS / f"decoders-{name}.safetensors")


def weights(name: str) -> dict[str, torch.Tensor]:
    """Weights of the toy model `name` ("llada" or "dream") in float32 under the names of transformers."""
    return {key: value.float() for key, value in tensors(f"{name}-weights").items()}


def llada_model(attn_implementation: str = "sdpa"):
    """transformers' LlamaForCausalLM with the toy LLaDA's weights; bidirectional only if its attention mask is."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return _hf_model("llada", LlamaConfig, LlamaForCausalLM, attn_implementation)


def dream_model(attn_implementation: str = "sdpa"):
    """transformers' Qwen2ForCausalLM with the toy Dream's weights; bidirectional only if its attention mask is."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return _hf_model("dream", Qwen2Config, Qwen2ForCausalLM, attn_implementation)


def _hf_model(name, config_class, model_class, attn_implementation):
    s = SIZES[name]
    config = config_class(
        vocab_size=s["vocab_size"],
        hidden_size=s["hidden_size"],
        intermediate_size=s["intermediate_size"],
        num_hidden_layers=s["num_layers"],
        num_attention_heads=s["num_heads"],
        num_key_value_heads=s["num_kv_heads"],
        rms_norm_eps=s["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": s["rope_theta"]},
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=s["eos_id"],
        pad_token_id=None,
        attn_implementation=attn_implementation,
    )
    model = model_class(config).eval()
    model.load_state_dict(weights(name))
    return model


class ToyNetwork:
    """The toy model `name` in plain torch, float32, bidirectional.

    Attributes: `vocab_size`, `mask_id`, `eos_id`, `head` [vocab, hidden], which maps hidden states to logits, and
    `calls`, the number of forwards so far.
    """

    def __init__(self, name: str, device: str | torch.device = "cpu"):
        self.sizes = SIZES[name]
        self.vocab_size, self.mask_id, self.eos_id = (self.sizes[k] for k in ("vocab_size", "mask_id", "eos_id"))
        self.weights = {key: value.to(device) for key, value in weights(name).items()}
        self.head = self.weights["lm_head.weight"]
        self.calls = 0

    def __call__(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        past: list[tuple[torch.Tensor, torch.Tensor]] | None = None,
        return_kv: bool = False,
    ):
        """Hidden states [B, S, hidden] (after the last norm) of `tokens` [B, S] at `positions` [B, S] (0, 1, ...).

        Row b sees its first lengths[b] tokens, and all of `past`: per layer, rotated keys and values
        [B, P, kv_heads, head_dim] as `return_kv=True` hands them back with the hidden states.
        """
        self.calls += 1
        s, batch, length = self.sizes, *tokens.shape
        device = tokens.device
        if positions is None:
            positions = torch.arange(length, device=device).expand(batch, length)
        dim = s["hidden_size"] // s["num_heads"]
        frequency = 1.0 / s["rope_theta"] ** (torch.arange(0, dim, 2, device=device).float() / dim)
        angle = (positions.float()[..., None] * frequency).repeat(1, 1, 2).unsqueeze(2)
        visible = None
        if lengths is not None:
            visible = (torch.arange(length, device=device) < lengths[:, None])[:, None, None]
            if past is not None:
                visible = F.pad(visible, (past[0][0].shape[1], 0), value=True)
        x, kv = F.embedding(tokens, self.weights["model.embed_tokens.weight"]), []
        for i in range(s["num_layers"]):
            layer = f"model.layers.{i}."
            y = self._norm(x, layer + "input_layernorm.weight")
            q, k, v = (
                self._linear(y, f"{layer}self_attn.{n}_proj").view(batch, length, heads, dim)
                for n, heads in (("q", s["num_heads"]), ("k", s["num_kv_heads"]), ("v", s["num_kv_heads"]))
            )
            q, k = (
                t * angle.cos() + torch.cat((-t[..., dim // 2 :], t[..., : dim // 2]), -1) * angle.sin() for t in (q, k)
            )
            kv.append((k, v))
            if past is not None:
                k, v = (torch.cat(pair, 1) for pair in zip(past[i], (k, v), strict=True))
            y = F.scaled_dot_product_attention(
                *(t.transpose(1, 2) for t in (q, k, v)), attn_mask=visible, enable_gqa=True
            ).transpose(1, 2)
            x = x + self._linear(y.reshape(batch, length, -1), layer + "self_attn.o_proj")
            y = self._norm(x, layer + "post_attention_layernorm.weight")
            y = F.silu(self._linear(y, layer + "mlp.gate_proj")) * self._linear(y, layer + "mlp.up_proj")
            x = x + self._linear(y, layer + "mlp.down_proj")
        hidden = self._norm(x, "model.norm.weight")
        return (hidden, kv) if return_kv else hidden

    def logits(self, *args, **kwargs) -> torch.Tensor:
        """What a call returns, times the head: [B, S, vocab]."""
        return F.linear(self(*args, **kwargs), self.head)

    def _norm(self, x, name):
        return F.rms_norm(x, (x.shape[-1],), self.weights[name], self.sizes["rms_norm_eps"])

    def _linear(self, x, name):
        return F.linear(x, self.weights[name + ".weight"], self.weights.get(name + ".bias"))
