"""LLaDA and Dream under the names of classes of transformers: names, sharing, refusals. The goldens of the published
decoders, which have these names, show that the network is the same one."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from decoder_goldens import SIZES, dream_model, load, weights
from esokern import decoders, generate

transformers = pytest.importorskip("transformers", reason="pip install '.[transformers]' runs these tests")

from esokern.integrations import llada_dream  # noqa: E402

LLADA = {
    "model_type": "llada",
    "block_type": "llama",
    "activation_type": "silu",
    "layer_norm_type": "rms",
    "rope": True,
    "d_model": 32,
    "n_heads": 4,
    "n_kv_heads": 2,
    "n_layers": 2,
    "mlp_ratio": 4,
    "mlp_hidden_size": 48,
    "max_sequence_length": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "mask_token_id": 66,
}
DREAM = {
    "model_type": "Dream",
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_theta": 1e6,
    "mask_token_id": 66,
}


def llada_state():
    torch.manual_seed(0)
    shapes = {"wte": (67, 32), "ln_f": (32,), "ff_out": (67, 32)}
    for layer in range(2):
        own = {"attn_norm": (32,), "ff_norm": (32,), "q_proj": (32, 32), "k_proj": (16, 32), "v_proj": (16, 32)}
        own |= {"attn_out": (32, 32), "ff_proj": (48, 32), "up_proj": (48, 32), "ff_out": (32, 48)}
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in own.items()}
    return {f"model.transformer.{name}.weight": torch.randn(shape) for name, shape in shapes.items()}


class LLaDAModelLM(transformers.PreTrainedModel):
    """What of the published class matters here: its name, its config, its weights."""

    def __init__(self, config=LLADA, state=None):
        super().__init__(transformers.PretrainedConfig(**config))
        self.weights = llada_state() if state is None else state

    def state_dict(self):
        return self.weights


def test_llada_is_llama_and_shares_its_weights():
    published = LLaDAModelLM()
    model = llada_dream.as_transformers(published)
    weights = published.state_dict()
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config.mask_token_id == 66
    assert not model.training
    assert model.lm_head.weight.data_ptr() == weights["model.transformer.ff_out.weight"].data_ptr()
    layer = model.model.layers[1]
    assert layer.mlp.gate_proj.weight.data_ptr() == weights["model.transformer.blocks.1.ff_proj.weight"].data_ptr()
    assert layer.mlp.down_proj.weight.data_ptr() == weights["model.transformer.blocks.1.ff_out.weight"].data_ptr()
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert model(torch.arange(10)[None]).logits.isfinite().all()
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, 5e5 ** (-torch.arange(4) / 4))


def golden_llada():
    """The goldens' toy LLaDA under the published names."""
    names = {there: here for here, there in llada_dream._BLOCK.items()}
    state = {}
    for name, value in weights("llada").items():
        if name.startswith("model.layers."):
            _, _, layer, part = name.removesuffix(".weight").split(".", 3)
            state[f"model.transformer.blocks.{layer}.{names[part]}.weight"] = value
    outside = {there: here for here, there in llada_dream._OUTSIDE.items()}
    state |= {f"model.transformer.{outside[n]}": v for n, v in weights("llada").items() if n in outside}
    sizes = SIZES["llada"]
    config = LLADA | {
        "n_kv_heads": sizes["num_kv_heads"],
        "mlp_hidden_size": sizes["intermediate_size"],
        "rms_norm_eps": sizes["rms_norm_eps"],
        "rope_theta": sizes["rope_theta"],
        "max_sequence_length": 256,
    }
    return LLaDAModelLM(config, state)


FAST_DLLM = [case for case in load("fast-dllm") if not case["params"]["early_stop"]][::9]
DREAM_CASES = [case for case in load("dream") if case["params"]["threshold"] is None][::9]


@pytest.mark.parametrize("case", FAST_DLLM, ids=lambda case: case["name"])
def test_published_tokens_from_a_published_model(case):
    """Handed to `generate` as it is, with the published caches."""
    params, rows = case["params"], case["rows"]
    length = params["block_length"]
    if params["factor"] is None and params["threshold"] is None:
        decoder = decoders.LLaDA(block_length=length, steps=params["steps"])
    else:
        chosen = {name: params[name] for name in ("factor", "threshold") if params[name] is not None}
        decoder = decoders.FastDLLM(block_length=length, **chosen)
    prompts = [row["prompt"] for row in rows]
    result = generate(golden_llada(), prompts, decoder=decoder, cache=params["cache"], max_new_tokens=32)
    for number, row in enumerate(rows):
        assert result.row(number)[len(row["prompt"]) :].tolist() == row["tokens"]


@pytest.mark.parametrize(
    "case", [c for c in load("dream") if c["params"]["threshold"] is None][::9], ids=lambda c: c["name"]
)
def test_dream_by_transformers(case):
    params, rows = case["params"], case["rows"]
    names = ("steps", "alg", "top_p", "top_k", "eps", "block_length")
    decoder = decoders.Dream(**{name: params[name] for name in names if params.get(name) is not None})
    model = dream_model()
    model.config.shift_logits, model.config.mask_token_id = True, 66
    prompts = [row["prompt"] for row in rows]
    result = generate(model, prompts, decoder=decoder, cache=params["cache"], max_new_tokens=32)
    for number, row in enumerate(rows):
        assert result.row(number)[len(row["prompt"]) :].tolist() == row["tokens"]


@pytest.mark.parametrize("config", [LLADA, DREAM], ids=lambda config: config["model_type"])
def test_from_a_folder(config, tmp_path):
    if config is LLADA:
        state = llada_state()
    else:
        from transformers import Qwen2Config, Qwen2ForCausalLM

        sizes = {name: value for name, value in DREAM.items() if name not in ("model_type", "rope_theta")}
        state = Qwen2ForCausalLM(Qwen2Config(**sizes)).state_dict()
    half = len(state) // 2
    for number, part in enumerate((list(state)[:half], list(state)[half:])):
        save_file({name: state[name].clone() for name in part}, tmp_path / f"model-{number}.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = llada_dream.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert getattr(model.config, "shift_logits", False) == (config is DREAM)
    assert model(torch.arange(10)[None]).logits.isfinite().all()


def test_refusals(tmp_path):
    with pytest.raises(TypeError, match="model: must be a LLaDAModelLM or DreamModel, got Linear"):
        llada_dream.as_transformers(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="alibi: must be False for LLaDA to be Llama, got True"):
        llada_dream.as_transformers(LLaDAModelLM(LLADA | {"alibi": True}))
    with pytest.raises(ValueError, match=r"path: .* must be a folder with config.json and \*.safetensors; download"):
        llada_dream.from_pretrained(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="model_type must be 'llada' or 'Dream', got 'gpt2'"):
        llada_dream.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(DREAM | {"use_sliding_window": True}))
    with pytest.raises(ValueError, match="Dream has neither, got None and True"):
        llada_dream.from_pretrained(tmp_path)
    extra = llada_state() | {"model.transformer.wpe.weight": torch.zeros(1)}
    save_file(extra, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(LLADA))
    with pytest.raises(ValueError, match=r"model\.transformer\.wpe\.weight has no place in Llama"):
        llada_dream.from_pretrained(tmp_path)
