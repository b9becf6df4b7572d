"""LLaDA and Dream as classes of transformers: LLaDA's network is Llama's, Dream's is Qwen2's, in both directions.

Their published code needs an old transformers and computes every step anew. The same weights under Llama's and Qwen2's
names run on `esokern.generate` with its kernels and caches:

    model = llada_dream.from_pretrained("path/to/LLaDA-8B-Instruct", dtype=torch.bfloat16)
    result = esokern.generate(model, prompt, decoder=decoders.FastDLLM(), cache="dual", max_new_tokens=256)
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

# Names in LLaDA -> names in Llama.
_BLOCK = {
    "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}
_OUTSIDE = {
    "wte.weight": "model.embed_tokens.weight",
    "ln_f.weight": "model.norm.weight",
    "ff_out.weight": "lm_head.weight",
}
# What the network must be for Llama to be the same one: option -> value.
_LLADA_IS = {
    "block_type": "llama",
    "activation_type": "silu",
    "layer_norm_type": "rms",
    "rope": True,
    "alibi": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "attention_layer_norm": False,
    "input_emb_norm": False,
    "scale_logits": False,
}


def is_llada_or_dream(model: object) -> bool:
    """Is it a model of the published code?"""
    return type(model).__name__ in ("LLaDAModelLM", "DreamModel") and hasattr(model, "config")


def as_transformers(model: nn.Module) -> PreTrainedModel:
    """A LlamaForCausalLM or Qwen2ForCausalLM that shares the weights of a loaded `LLaDAModelLM` or `DreamModel`.

    Its config has the mask_token_id, and for Dream `shift_logits`: row i predicts token i + 1.
    Raises TypeError for another class, ValueError for options that Llama or Qwen2 do not have.
    """
    if not is_llada_or_dream(model):
        raise TypeError(f"model: must be a LLaDAModelLM or DreamModel, got {type(model).__name__}")
    config = model.config if isinstance(model.config, dict) else model.config.to_dict()
    config = config | {"model_type": "llada" if type(model).__name__ == "LLaDAModelLM" else "Dream"}
    return _build(config, dict(model.state_dict()))


def from_pretrained(
    path: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """The same from the folder of a published checkpoint: config.json and *.safetensors. None of its code is run.

    dtype: of the weights; default: as stored. Raises ValueError for a folder without them or another architecture.
    """
    folder = Path(path)
    files = sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").is_file() or not files:
        raise ValueError(
            f"path: {folder} must be a folder with config.json and *.safetensors; download the checkpoint, e.g. with "
            "`hf download GSAI-ML/LLaDA-8B-Instruct --local-dir LLaDA-8B-Instruct`"
        )
    config = json.loads((folder / "config.json").read_text())
    state: dict[str, Tensor] = {}
    for file in files:
        state |= {name: value.to(dtype=dtype) for name, value in load_file(file, device=str(device)).items()}
    return _build(config, state)


def _build(config: dict[str, Any], state: dict[str, Tensor]) -> PreTrainedModel:
    """The model over the tensors of `state`, without a copy."""
    kind = config.get("model_type")
    if kind == "llada":
        made, cls = _llada_config(config, state), LlamaForCausalLM
        state = {_llada_name(name): value for name, value in state.items()}
    elif kind == "Dream":
        made, cls = _dream_config(config), Qwen2ForCausalLM
        state = {name: value for name, value in state.items() if not name.endswith("inv_freq")}
    else:
        raise ValueError(f"config: model_type must be 'llada' or 'Dream', got {kind!r}")
    if made.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    with torch.device("meta"):
        model = cls(made)
    model.load_state_dict(state, assign=True)
    # Its table of frequencies is no weight, so it is still without memory.
    model.model.rotary_emb = type(model.model.rotary_emb)(made).to(model.model.embed_tokens.weight.device)
    return model.eval()


def _llada_config(config: dict[str, Any], state: dict[str, Tensor]) -> LlamaConfig:
    for name, wanted in _LLADA_IS.items():
        if (config.get(name) or False) != (wanted or False):
            raise ValueError(f"config: {name}: must be {wanted!r} for LLaDA to be Llama, got {config.get(name)!r}")
    heads = config["n_heads"]
    kv_heads = config.get("n_kv_heads") or (1 if config.get("multi_query_attention") else heads)
    vocab_size = state["model.transformer.wte.weight"].shape[0]  # with what pads it
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=config["d_model"],
        intermediate_size=config.get("mlp_hidden_size") or config["mlp_ratio"] * config["d_model"],
        num_hidden_layers=config["n_layers"],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=config["max_sequence_length"],
        rms_norm_eps=config["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": config["rope_theta"]},
        tie_word_embeddings=bool(config.get("weight_tying", False)),
        mask_token_id=config.get("mask_token_id"),
        eos_token_id=config["eos_token_id"] if config.get("eos_token_id", vocab_size) < vocab_size else None,
        bos_token_id=None,
        pad_token_id=None,
        is_causal=False,
    )


def _llada_name(name: str) -> str:
    short = name.removeprefix("model.transformer.")
    block = re.fullmatch(r"blocks\.(\d+)\.(\w+)\.weight", short)
    if block and block[2] in _BLOCK:
        return f"model.layers.{block[1]}.{_BLOCK[block[2]]}.weight"
    if short not in _OUTSIDE:
        raise ValueError(f"checkpoint: {name} has no place in Llama")
    return _OUTSIDE[short]


def _dream_config(config: dict[str, Any]) -> Qwen2Config:
    if config.get("rope_scaling") or config.get("use_sliding_window"):
        raise ValueError(
            "config: rope_scaling and use_sliding_window: Dream has neither, got "
            f"{config.get('rope_scaling')!r} and {config.get('use_sliding_window')!r}"
        )
    same = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
        "max_position_embeddings rms_norm_eps tie_word_embeddings mask_token_id eos_token_id bos_token_id"
    )
    return Qwen2Config(
        **{name: config[name] for name in same.split() if name in config},
        rope_parameters={"rope_type": "default", "rope_theta": config["rope_theta"]},
        is_causal=False,
        shift_logits=True,
    )
