"""The network: names and shapes of the published checkpoints, and the folded form against the trainable one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from esokern import masks
from esokern.kv_cache import KVCache
from esokern.models import network as network_module
from esokern.models.network import FoldedNetwork, Network, NetworkConfig
from esokern.testing import assert_close

GOLDENS = Path(__file__).parent / "goldens"
SIZES = json.loads((GOLDENS / "tiny.json").read_text())
CASES = load_file(GOLDENS / "tiny-cases.safetensors")
BD3LM = load_file(GOLDENS / "tiny-bd3lm-cases.safetensors")
MASK_ID = SIZES["mask_index"]
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def tiny(name: str = "tiny-weights") -> Network:
    tensors = load_file(GOLDENS / f"{name}.safetensors")
    names = ("vocab_size", "hidden_size", "n_blocks", "n_heads", "length", "cond_dim")
    network = Network(NetworkConfig(**{n: SIZES[n] for n in names}, adaln="sigma_map.mlp.0.bias" in tensors))
    network.load_state_dict(tensors)  # strict: the names and shapes are the published ones
    return network.requires_grad_(False).eval()


def cache_for(network: FoldedNetwork, batch: int, length: int) -> KVCache:
    config = network.config
    return KVCache(config.n_blocks, batch, length, config.n_heads, config.head_dim, network.dtype)


def by_rank(values: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Values in text order [B, L, ...] taken in rank order."""
    return values.gather(1, order[..., None].expand_as(values) if values.dim() == 3 else order)


def test_full_size_network_has_the_published_parameters():
    config = NetworkConfig(50258, 768, 12, 12, 1024)
    with torch.device("meta"):
        network = Network(config)
    shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
    assert shapes["sigma_map.mlp.0.weight"] == (128, 256)
    assert shapes["blocks.11.adaLN_modulation.weight"] == (6 * 768, 128)
    assert shapes["output_layer.linear.weight"] == (50258, 768)
    assert network.n_parameters() == pytest.approx(169.6e6, rel=1e-3)
    assert config.mask_id == 50257
    assert NetworkConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("name", ["tiny-weights", "tiny-ar-weights"])
def test_folded_network_equals_the_network(name, backend):
    network = tiny(name)
    folded = network.fold()
    tokens, order = CASES["zt"], CASES["order"]
    positions = torch.arange(24)
    for mask in (masks.causal(24), masks.bidirectional(24), masks.sliding_window(24, window_size=(3, 2))):
        expected = network(tokens, positions, mask)
        logits = folded.logits(folded(tokens, positions, mask=mask, backend=backend), backend=backend)
        torch.testing.assert_close(logits, expected, **TOLERANCE)
    mask = masks.esolm_diffusion(torch.arange(24).expand(3, 24), (tokens != MASK_ID).sum(1), variant="A")
    logits = folded.logits(folded(by_rank(tokens, order), order, mask=mask, backend=backend), backend=backend)
    expected = by_rank(CASES["diffusion_mixed2_logits_natural"], order)
    if name == "tiny-weights":
        torch.testing.assert_close(logits, expected, **TOLERANCE)


@pytest.mark.parametrize(("name", "case"), [("tiny-mdlm-weights", "mdlm_logits"), ("tiny-ar-weights", "ar_logits")])
def test_folded_mdlm_and_ar_match_goldens(name, case, backend):
    folded = tiny(name).fold()
    mdlm = case == "mdlm_logits"
    tokens, mask = (CASES["zt"], masks.bidirectional(24)) if mdlm else (CASES["x0"], masks.causal(24))
    logits = folded.logits(folded(tokens, torch.arange(24), mask=mask, backend=backend), backend=backend)
    torch.testing.assert_close(logits, CASES[case], **TOLERANCE)


def test_cached_sampling_matches_goldens(backend):
    """Every step: the clean tokens of the last step, to be committed, then this step's masks, which are scratch."""
    folded = tiny().fold()
    order, x = CASES["sampling_order"], by_rank(CASES["x0"], CASES["sampling_order"])
    cache = cache_for(folded, 3, 24)
    logits, done, last = [], 0, 0
    for k in CASES["sampling_ks"].tolist():
        rows = slice(done - last, done + k)
        tokens = x[:, rows].clone()
        tokens[:, last:] = MASK_ID
        n_clean = torch.full((3,), last, dtype=torch.int32)
        hidden = folded(tokens, order[:, rows], cache=cache, cache_mask="causal", num_clean=n_clean, backend=backend)
        cache.commit(n_clean)
        logits.append(folded.logits(hidden[:, last:], backend=backend))
        done, last = done + k, k
    assert done == 24
    torch.testing.assert_close(torch.cat(logits, 1), CASES["sampling_logits_generation_order"], **TOLERANCE)


def test_cached_block_diffusion_matches_goldens(backend):
    """Block by block: the noisy block as scratch, then the clean one committed."""
    folded = tiny("tiny-bd3lm-weights").fold()
    cache = cache_for(folded, 3, 24)
    logits = []
    for start in range(0, 24, 4):
        rows, positions = slice(start, start + 4), torch.arange(start, start + 4)
        noisy = folded(BD3LM["xt"][:, rows], positions, cache=cache, cache_mask="bidirectional", backend=backend)
        logits.append(folded.logits(noisy, backend=backend))
        folded(BD3LM["x0"][:, rows], positions, cache=cache, cache_mask="bidirectional", backend=backend)
        cache.commit(torch.full((3,), 4, dtype=torch.int32))
    torch.testing.assert_close(torch.cat(logits, 1), BD3LM["cached_sampling_logits"], **TOLERANCE)


def test_packed_rows_equal_padded_ones(backend):
    folded = tiny().fold()
    tokens = CASES["x0"]
    lengths = [5, 9, 1]
    packed = torch.cat([tokens[b, :n] for b, n in enumerate(lengths)])
    positions = torch.cat([torch.arange(n) for n in lengths])
    cu_seqlens = torch.tensor([0, 5, 14, 15], dtype=torch.int32)
    cache = cache_for(folded, 3, 16)
    hidden = folded(packed, positions, cache=cache, cu_seqlens_q=cu_seqlens, backend=backend)
    whole = folded(tokens, torch.arange(24), mask=masks.causal(24), backend=backend)
    expected = torch.cat([whole[b, :n] for b, n in enumerate(lengths)])
    torch.testing.assert_close(hidden, expected, **TOLERANCE)


def test_half_precision_stays_near_float32(backend):
    """No more than twice the error of rounding the weights alone."""
    network = tiny()
    tokens, positions, mask = CASES["zt"], torch.arange(24), masks.bidirectional(24)
    exact = network.fold(torch.float64)
    assert exact.dtype == torch.float64
    gold = network(tokens, positions, mask)
    for dtype in (torch.bfloat16, torch.float16):
        folded = network.fold(dtype)
        logits = folded.logits(folded(tokens, positions, mask=mask, backend=backend), backend=backend).float()
        reference = network.fold(dtype)
        plain = reference.logits(reference(tokens, positions, mask=mask, backend="reference"), backend="reference")
        assert (logits - gold).abs().max() <= 2 * (plain.float() - gold).abs().max() + 1e-4
        assert folded.to(torch.float32).dtype == torch.float32
        assert tiny().to(dtype).rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize("linear", ["fused", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
def test_linear_layers_fused_and_by_torch(dtype, linear, backend):
    """Both are within twice the error of torch's layers; with and without a cache, packed too."""
    network = tiny()
    tokens, positions = CASES["x0"], torch.arange(24)
    cu_seqlens = torch.tensor([0, 24, 48, 72], dtype=torch.int32)

    def hidden(dtype, linear, backend):
        folded = network.fold(dtype)
        folded.linear = linear
        yield folded(tokens, positions, mask=masks.causal(24), backend=backend)
        yield folded(tokens, positions, cache=cache_for(folded, 3, 24), backend=backend)
        cache = cache_for(folded, 3, 24)
        yield folded(tokens.flatten(), positions.repeat(3), cache=cache, cu_seqlens_q=cu_seqlens, backend=backend)

    gold, plain = hidden(torch.float64, "fused", "reference"), hidden(dtype, "torch", "reference")
    for ours, exact, by_torch in zip(hidden(dtype, linear, backend), gold, plain, strict=True):
        assert_close(ours, exact, by_torch)


def test_which_linear_layers_run(monkeypatch):
    folded = tiny().fold()
    assert folded.linear == "auto"
    folded.linear = "torch"
    assert folded.to(torch.bfloat16).linear == "torch"
    with pytest.raises(ValueError, match="linear is 'fast'; it may be 'auto', 'fused', 'torch'"):
        folded.linear = "fast"
    many = network_module.FUSED_ROWS + 1
    assert folded._layers_by_torch(1, None)
    folded.linear = "auto"
    assert not folded._layers_by_torch(many, None)
    monkeypatch.setattr(FoldedNetwork, "device", torch.device("cuda"))
    assert folded._layers_by_torch(many, None)
    assert not folded._layers_by_torch(many - 1, None)
    assert not folded._layers_by_torch(many, "reference")
    folded.linear = "fused"
    assert not folded._layers_by_torch(many, None)


def test_rotary_tables_grow(backend):
    folded = tiny().fold()
    tokens = CASES["x0"][:, :4]
    near = folded(tokens, torch.arange(4), mask=masks.causal(4), backend=backend)
    far = folded(tokens, torch.arange(4) + 1000, mask=masks.causal(4), backend=backend)
    assert len(folded.rotary_cos) >= 1004
    torch.testing.assert_close(near, far, atol=1e-3, rtol=1e-3)  # attention depends on relative positions only


def test_training_mask_forms_agree():
    network = tiny()
    tokens, positions = CASES["x0"], torch.arange(24)
    for word, mask in (("causal", masks.causal(24)), ("bidirectional", masks.bidirectional(24))):
        expected = network(tokens, positions, word)
        torch.testing.assert_close(network(tokens, positions, mask), expected, **TOLERANCE)
        torch.testing.assert_close(network(tokens, positions, mask.dense()[0]), expected, **TOLERANCE)
        torch.testing.assert_close(network(tokens, positions.expand(3, 24), mask), expected, **TOLERANCE)


@pytest.mark.parametrize(("head_dim", "dtype"), [(16, torch.float32), (12, torch.float32), (16, torch.float64)])
def test_gradients_by_rank_are_those_by_dense_mask(head_dim, dtype):
    """The compiled attention, and what stands in for it where it does not serve, against torch's on a bool mask."""
    torch.manual_seed(0)
    network = Network(NetworkConfig(40, 2 * head_dim, n_blocks=2, n_heads=2, length=24, cond_dim=4)).to(dtype)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    rank = torch.stack([torch.randperm(12) for _ in range(3)])
    mask = masks.esolm_sequential(rank)
    tokens, positions = torch.randint(40, (3, 24)), torch.arange(12).repeat(2)
    gradients = []
    for form in (mask, mask.dense()):
        network.zero_grad()
        network(tokens, positions, form).square().sum().backward()
        gradients.append([p.grad for p in network.parameters()])
    for ours, by_torch in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, by_torch, rtol=1e-4, atol=1e-4 * float(by_torch.abs().max()))


def test_bad_input_names_the_argument():
    with pytest.raises(ValueError, match="hidden_size 48 is not a multiple of n_heads 5"):
        NetworkConfig(53, 48, 2, 5, 24)
    with pytest.raises(ValueError, match="dropout is 1"):
        NetworkConfig(53, 48, 2, 3, 24, dropout=1.0)
    with pytest.raises(ValueError, match="unknown network settings: depth"):
        NetworkConfig.from_dict({"depth": 3})
    network = tiny()
    folded = network.fold()
    tokens, positions = CASES["x0"], torch.arange(24)
    with pytest.raises(ValueError, match="mask is 'left'"):
        network(tokens, positions, "left")
    with pytest.raises(ValueError, match="mask must be bool"):
        network(tokens, positions, torch.ones(24, 24))
    with pytest.raises(ValueError, match="mask is None"):
        folded(tokens, positions)
    with pytest.raises(ValueError, match="positions"):
        folded(tokens, positions[:5], mask=masks.causal(24))
    with pytest.raises(TypeError, match="tokens and positions"):
        folded(tokens.float(), positions, mask=masks.causal(24))
    with pytest.raises(ValueError, match="must be on the network's device cpu; got cpu and meta"):
        folded(tokens, positions.to("meta"), mask=masks.causal(24))
    with pytest.raises(ValueError, match="packed calls need one"):
        folded(tokens[0], positions, mask=masks.causal(24), cu_seqlens_q=torch.tensor([0, 24], dtype=torch.int32))
