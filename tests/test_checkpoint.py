"""Checkpoints: every published form loads, nothing pickled runs, and what does not fit is named."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from esokern.models import checkpoint
from esokern.models.checkpoint import load_checkpoint, read_config, save_checkpoint
from esokern.models.network import Network, NetworkConfig
from esokern.text import Tokenizer

GOLDENS = Path(__file__).parent / "goldens"
TINY = GOLDENS / "tiny-weights.safetensors"
PUBLISHED_CONFIG = {  # field names of the published config.json files
    "model_type": "esolm", "vocab_size": 53, "hidden_dim": 48, "n_blocks": 2, "n_heads": 3, "model_length": 24,
    "cond_dim": 16, "dropout": 0.1, "time_conditioning": False,
}  # fmt: skip


def weights() -> dict[str, torch.Tensor]:
    return load_file(TINY)


def same(network: Network, tensors: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(t, tensors[name]) for name, t in network.state_dict().items())


def test_safetensors_without_a_config():
    network = load_checkpoint(TINY)
    config = network.config
    assert (config.vocab_size, config.hidden_size, config.n_blocks, config.n_heads) == (53, 48, 2, 3)
    assert (config.length, config.cond_dim, config.adaln) == (1024, 16, True)
    assert same(network, weights())
    assert not network.training
    assert not load_checkpoint(GOLDENS / "tiny-ar-weights.safetensors", length=24).config.adaln


def test_published_folder_with_prefix(tmp_path):
    tensors = {f"backbone.{name}": t.contiguous() for name, t in weights().items() if "inv_freq" not in name}
    save_file(tensors | {"backbone.block_diff_mask": torch.ones(4)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED_CONFIG))
    network = load_checkpoint(tmp_path)
    assert network.config == NetworkConfig(53, 48, 2, 3, 24, cond_dim=16, dropout=0.1)
    assert same(network, weights())  # the rotary table is computed


def test_sharded_folder(tmp_path):
    names = sorted(weights())
    for i in range(2):
        save_file({n: weights()[n] for n in names[i::2]}, tmp_path / f"model-0000{i + 1}-of-00002.safetensors")
    assert same(load_checkpoint(tmp_path), weights())


def test_round_trip(tmp_path):
    network = load_checkpoint(TINY, length=24)
    save_checkpoint(network, tmp_path, extra={"note": "x"})
    again = load_checkpoint(tmp_path)
    assert again.config == network.config
    assert same(again, weights())
    assert read_config(tmp_path)["note"] == "x"
    save_checkpoint(network, tmp_path, dtype=torch.float16)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["blocks.0.attn_qkv.weight"].dtype == torch.float16
    assert stored["rotary_emb.inv_freq"].dtype == torch.float32
    assert load_checkpoint(tmp_path, dtype=torch.float16).vocab_embed.embedding.dtype == torch.float16
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


class RunConfiguration:
    """Stands for the configuration objects of foreign packages inside published files."""

    loaded = 0

    def __init__(self):
        self.values = {"lr": 3e-4}

    def __setstate__(self, state):
        type(self).loaded += 1
        self.__dict__.update(state)


def lightning(tmp_path: Path, extra: dict) -> Path:
    path = tmp_path / "last.ckpt"
    state = {f"backbone.{name}": t for name, t in weights().items()}
    shadow = [t + 1 for name, t in state.items() if "inv_freq" not in name]
    torch.save({"state_dict": state, "ema": {"decay": 0.99, "shadow_params": shadow}, **extra}, path)
    return path


def test_lightning_file_gives_the_average(tmp_path):
    path = lightning(tmp_path, {"epoch": 3})
    network = load_checkpoint(path, length=24)
    expected = {name: t if "inv_freq" in name else t + 1 for name, t in weights().items()}
    assert same(network, expected)
    assert same(load_checkpoint(path, ema=False), weights())


def test_foreign_objects_are_never_built(tmp_path):
    path = lightning(tmp_path, {"hyper_parameters": {"config": RunConfiguration()}, "loops": [RunConfiguration()]})
    network = load_checkpoint(path)
    assert RunConfiguration.loaded == 0
    expected = {name: t if "inv_freq" in name else t + 1 for name, t in weights().items()}
    assert same(network, expected)


class Attack:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


def test_pickled_code_does_not_run(tmp_path):
    target = tmp_path / "touched"
    pickle.loads(pickle.dumps(Attack(target)))
    assert target.exists()  # the attack works where pickle is trusted
    target.unlink()
    load_checkpoint(lightning(tmp_path, {"callbacks": Attack(target)}))
    assert not target.exists()
    torch.save({"state_dict": Attack(target)}, tmp_path / "only.ckpt")
    with pytest.raises(ValueError, match="no plain state_dict"):
        load_checkpoint(tmp_path / "only.ckpt")
    assert not target.exists()


def test_mismatches_are_named(tmp_path):
    tensors = weights()
    tensors["blocks.1.mlp.0.bias"] = torch.zeros(7)
    del tensors["output_layer.linear.bias"]
    tensors["blocks.0.attn_bias"] = torch.zeros(3)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"blocks.1.mlp.0.bias is \(7,\), not \(192,\)") as caught:
        load_checkpoint(tmp_path)
    assert "missing: output_layer.linear.bias" in str(caught.value)
    assert "unexpected: blocks.0.attn_bias" in str(caught.value)

    tensors = weights()
    tensors["vocab_embed.embedding"][3, 4] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"no finite numbers in vocab_embed.embedding"):
        load_checkpoint(tmp_path)

    save_file({"weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"vocab_embed.embedding is missing.*holds weight"):
        load_checkpoint(tmp_path)


def test_wrong_average_is_named(tmp_path):
    state = weights()
    names = [name for name in state if "inv_freq" not in name]
    path = tmp_path / "run.ckpt"
    torch.save({"state_dict": state, "ema": {"shadow_params": [state[n] for n in names[:-1]]}}, path)
    with pytest.raises(ValueError, match=rf"`ema` holds {len(names) - 1} tensors for {len(names)} parameters"):
        load_checkpoint(path)
    torch.save({"state_dict": state, "ema": {"shadow_params": [state[n] for n in reversed(names)]}}, path)
    with pytest.raises(ValueError, match="does not follow the parameters' order"):
        load_checkpoint(path)
    torch.save({"state_dict": state, "ema": {"shadow_params": None}}, path)
    with pytest.raises(ValueError, match="shadow_params"):
        load_checkpoint(path)


@pytest.mark.parametrize("name", ["model.safetensors", "last.ckpt"])
def test_damaged_files(tmp_path, name):
    if name == "last.ckpt":
        path = lightning(tmp_path, {})
    else:
        path = tmp_path / name
        path.write_bytes(TINY.read_bytes())
    whole = path.read_bytes()
    for damaged in (b"", whole[:9], whole[: len(whole) // 2], b"\x80" * 100):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="truncated"):
            load_checkpoint(path)
    with pytest.raises(ValueError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no \.safetensors file"):
        load_checkpoint(tmp_path / "empty")
    (tmp_path / "model.safetensors").write_bytes(TINY.read_bytes())
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_checkpoint(tmp_path)


def test_the_shipped_model_loads():
    folder = Path(checkpoint.__file__).parents[1] / "default_model"
    assert (folder / "model.safetensors").stat().st_size <= 4_000_000
    network, tokenizer = load_checkpoint(folder), Tokenizer.from_file(folder)
    assert tokenizer.vocab_size == network.config.vocab_size
    assert tokenizer.mask_id == network.config.mask_id
    assert read_config(folder)["held_out_bits_per_byte"] < 2
