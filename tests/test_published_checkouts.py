"""`swap_attention` on the published code itself, where ESOKERN_PUBLISHED names a folder with the checkouts.

bench/checkouts.py says which ones, where to get them and what else must be installed.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path

import numpy
import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from esokern.integrations.published import swap_attention
from esokern.testing import assert_close

if "ESOKERN_PUBLISHED" not in os.environ:
    pytest.skip("ESOKERN_PUBLISHED names no folder with checkouts", allow_module_level=True)

import checkouts

# Their code warns of what this package does not turn into errors: a GPU that is not there, names that are old.
pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(os.environ["ESOKERN_PUBLISHED"]).resolve()
SIZE = {"hidden": 64, "layers": 2, "heads": 4, "length": 64}
MASK = checkouts.VOCAB - 1
IDS = torch.randint(0, 500, (2, 64), generator=torch.Generator().manual_seed(0))
HALF_MASKED = IDS.where(torch.arange(64) < torch.tensor([[40], [33]]), MASK)
ORDER = torch.rand(2, 64, generator=torch.Generator().manual_seed(1)).argsort(-1)
SIGMA = torch.zeros(2)
VALID = torch.ones(2, 64, dtype=torch.bool)
VALID[1, :7] = False


@pytest.fixture(autouse=True)
def _eager():
    """Nothing of theirs is compiled: it takes minutes."""
    with torch.compiler.set_stance("force_eager"):
        yield


def in_double(model: torch.nn.Module) -> torch.nn.Module:
    """A copy in float64. Embeddings of time are made in float32 by name, so they are cast behind."""
    double = copy.deepcopy(model).double()
    for module in double.modules():
        if type(module).__name__ == "TimestepEmbedder":
            module.mlp.register_forward_pre_hook(lambda module, arguments: (arguments[0].double(),))
    return double


def llada_prefix_cache(model):
    past = [(k[:, :, :20], v[:, :, :20]) for k, v in model(IDS, use_cache=True).past_key_values]
    return model(IDS[:, 20:], past_key_values=past, use_cache=True).logits


def replaced_rows():
    rows = torch.zeros(1, 64, dtype=torch.bool)
    rows[:, 20:28] = True
    return rows


def llada_dual_cache(model):
    past = model(IDS, use_cache=True).past_key_values
    return model(IDS[:, 20:28], past_key_values=past, use_cache=True, replace_position=replaced_rows()).logits


def dream_dual_cache(model):
    past = model(IDS, "full", use_cache=True).past_key_values
    options = {"use_cache": True, "dual_cache": True, "replace_position": replaced_rows()}
    return model(IDS[:, 20:28], "full", past_key_values=past, **options).logits


def dream_padded(model):
    return model(IDS, (VALID[:, None] & VALID[:, :, None])[:, None]).logits[VALID]


def esolm_sampling(model):
    bounds, out = [0, 5, 6, 20, 21, 22, 64], []
    model.reset_kv_cache()
    model.reset_sorted_rotary_cache()
    for i in range(6):
        out.append(model.forward_sample(IDS, ORDER, bounds[max(i - 1, 0)], bounds[i], bounds[i + 1]))
    return torch.cat(out, 1)


def mdlm():
    """The network that Eso-LM's extends."""
    backbone = checkouts.esolm(ROOT, **SIZE).backbone
    mdlm = type(backbone).__mro__[1](backbone.config, vocab_size=checkouts.VOCAB)
    return checkouts.with_random_weights(mdlm)


def ar_sampling(model):
    model.reset_kv_cache()
    return torch.cat([model(IDS[:, : i + 1], None, kv_cache=True) for i in range(20)], 1)


def bd3lm_sampling(model):
    dtype, out = model.vocab_embed.embedding.dtype, []
    for block in model.blocks:
        block.kv_cache, block.cache_idx = torch.zeros(2, 64, 192, dtype=dtype), 0
    for start in range(0, 24, 8):
        out.append(model(IDS[:, start : start + 8], SIGMA, sample_mode=True))
        model(IDS[:, start : start + 8], SIGMA, sample_mode=True, store_kv=True)
    for block in model.blocks:
        block.kv_cache = None
    return torch.cat(out, 1)


def set_inputs(padding: torch.Tensor | None = None):
    """Inputs of training, [x_0 | x_t] and its mask, in one order for all."""
    model, _ = checkouts.set_diffusion(ROOT, **SIZE)
    torch.manual_seed(2)
    return model.train()._prepare_inputs(IDS, attention_mask=padding)


def set_training(model):
    inputs = set_inputs()
    return model.backbone(inputs.xt, inputs.attention_mask, **inputs.backbone_kwargs).logits


def set_padded(model):
    inputs = set_inputs(VALID.flip(1).long())
    logits = model.backbone(inputs.xt, inputs.attention_mask, **inputs.backbone_kwargs).logits
    return logits[VALID.flip(1).repeat(1, 2)]


def set_decoding(model):
    """Nine clean tokens into the cache, then a step in which four become clean beside four masks."""

    def run(inputs):
        past = inputs.past_key_values
        return model.backbone(inputs.xt, inputs.attention_mask, past_key_values=past, **inputs.backbone_kwargs)

    place = torch.arange(17)[None]
    inputs, cache = model._prepare_inputs_inference(IDS[:1, :9], cache={}, position_ids=place[:, :9])
    first = run(inputs)
    cache["past_key_values"] = first.past_key_values
    options = {"position_ids": place[:, 9:], "return_updated_cache": True}
    inputs, cache = model._prepare_inputs_inference(HALF_MASKED[:1, 36:44], cache=cache, **options)
    return torch.cat([first.logits, run(inputs).logits], 1)


CASES = {
    "LLaDA": (lambda: checkouts.llada(ROOT, **SIZE)[0], lambda model: model(IDS).logits),
    "LLaDA, GQA": (lambda: checkouts.llada(ROOT, **SIZE, kv_heads=2)[0], lambda model: model(IDS).logits),
    "LLaDA, prefix cache": (lambda: checkouts.llada(ROOT, **SIZE)[0], llada_prefix_cache),
    "LLaDA, dual cache": (lambda: checkouts.llada(ROOT, **SIZE)[0], llada_dual_cache),
    "Dream": (lambda: checkouts.dream(ROOT, **SIZE, kv_heads=2), lambda model: model(IDS, "full").logits),
    "Dream, padded": (lambda: checkouts.dream(ROOT, **SIZE, kv_heads=2), dream_padded),
    "Dream, dual cache": (lambda: checkouts.dream(ROOT, **SIZE, kv_heads=2), dream_dual_cache),
    **{
        f"Eso-LM, {mode}": (
            lambda mode=mode: checkouts.esolm(ROOT, **SIZE, diffusion_attn_mode=mode).backbone,
            lambda model: model(HALF_MASKED, SIGMA, ORDER),
        )
        for mode in ("causal", "bidirectional", "mixed", "mixed2")
    },
    **{
        f"Eso-LM, sequential {mode}": (
            lambda mode=mode: checkouts.esolm(ROOT, **SIZE, sequential_attn_mode=mode).backbone,
            lambda model: model(HALF_MASKED, SIGMA, ORDER, x0=IDS),
        )
        for mode in ("causal", "mixed")
    },
    "Eso-LM, sampling": (lambda: checkouts.esolm(ROOT, **SIZE).backbone, esolm_sampling),
    "Eso-LM, MDLM": (mdlm, lambda model: model(IDS, SIGMA)),
    "Eso-LM, AR": (lambda: checkouts.esolm(ROOT, **SIZE, causal=True).backbone, lambda model: model(IDS, None)),
    "Eso-LM, AR sampling": (lambda: checkouts.esolm(ROOT, **SIZE, causal=True).backbone, ar_sampling),
    **{
        f"BD3-LM, {name}": (
            lambda name=name: checkouts.bd3lm(ROOT, **SIZE, block_size=8, attn_backend=name).backbone,
            lambda model: model(torch.cat([HALF_MASKED, IDS], 1), SIGMA),
        )
        for name in ("sdpa", "flex")
    },
    "BD3-LM, sampling": (lambda: checkouts.bd3lm(ROOT, **SIZE, block_size=8).backbone, bd3lm_sampling),
    "BD3-LM, sampling without cache": (
        lambda: checkouts.bd3lm(ROOT, **SIZE, block_size=8, kv_cache=False).backbone,
        lambda model: model(IDS[:, :24], SIGMA, sample_mode=True),
    ),
    "Set Diffusion": (lambda: checkouts.set_diffusion(ROOT, **SIZE)[0], set_training),
    "Set Diffusion, padded": (lambda: checkouts.set_diffusion(ROOT, **SIZE)[0], set_padded),
    "Set Diffusion, decoding": (lambda: checkouts.set_diffusion(ROOT, **SIZE)[0], set_decoding),
    "Set Diffusion, AR": (
        lambda: checkouts.set_diffusion(ROOT, **SIZE, causal=True)[0].backbone,
        lambda model: model(IDS).logits,
    ),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_same_logits(case, monkeypatch):
    make, logits = CASES[case]
    model = make()
    for module in model.modules():  # FlexAttention itself, which unlike its compiled form takes float64
        names = getattr(type(module).forward, "__globals__", {})
        if "fused_flex_attention" in names:
            monkeypatch.setitem(
                names, "fused_flex_attention", lambda q, k, v, mask, **_: flex_attention(q, k, v, block_mask=mask)
            )
    plain, gold = logits(model), logits(in_double(model))
    with swap_attention(model) as handle:
        assert len(handle.families) == 2
        ours = logits(model)
    assert_close(ours, gold, plain, name="logits")
    assert not torch.equal(ours, plain), "as if nothing had been swapped"
    assert torch.equal(logits(model), plain)


def llada_sampler(name):
    model, samplers = checkouts.llada(ROOT, **SIZE)
    options = {"steps": 16, "gen_length": 32, "block_length": 16, "temperature": 0.0, "mask_id": MASK}
    return model, lambda: getattr(samplers, name)(model, IDS[:1, :16], **options)[0]


def dream_sampler(**options):
    model = checkouts.dream(ROOT, **SIZE, kv_heads=2)
    return model, lambda: model.diffusion_generate(IDS[:, :16], max_new_tokens=32, steps=16, temperature=0.0, **options)


def esolm_sampler(**options):
    model = checkouts.esolm(ROOT, **SIZE, **options)
    return model, lambda: model.generate_samples(2)[0]


def bd3lm_sampler():
    model = checkouts.bd3lm(ROOT, **SIZE, block_size=8)
    return model, lambda: model._semi_ar_sampler(n_samples=1, num_steps=64, num_strides=8, seqlen=64)[0]


def set_sampler():
    model, settings = checkouts.set_diffusion(ROOT, **SIZE)
    return model, lambda: model.generate(IDS[:1, :8], generation_config=settings, max_new_tokens=40)


SAMPLERS = {
    "LLaDA": lambda: llada_sampler("generate"),
    "LLaDA, prefix cache": lambda: llada_sampler("generate_with_prefix_cache"),
    "LLaDA, dual cache": lambda: llada_sampler("generate_with_dual_cache"),
    "Dream": lambda: dream_sampler(alg="entropy"),
    "Dream, padded": lambda: dream_sampler(alg="maskgit_plus", attention_mask=VALID[:, :16].long()),
    "Eso-LM": lambda: esolm_sampler(alpha_0=0.5),
    "Eso-LM, AR": lambda: esolm_sampler(causal=True),
    "BD3-LM": bd3lm_sampler,
    "Set Diffusion": set_sampler,
}


@pytest.mark.parametrize("case", SAMPLERS)
def test_their_own_sampler_writes_the_same(case):
    model, sample = SAMPLERS[case]()

    def seeded():
        torch.manual_seed(3)
        numpy.random.seed(3)
        return sample()

    plain = seeded()
    with swap_attention(model):
        assert torch.equal(seeded(), plain)
