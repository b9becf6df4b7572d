"""Models of transformers on "esokern": against sdpa in float64, and what is refused."""

from __future__ import annotations

import copy
import re
import weakref
from pathlib import Path

import pytest
import torch
import torch._dynamo

from esokern.masks import RankMask
from esokern.models.denoiser import Step
from esokern.testing import assert_close, same_bits

transformers = pytest.importorskip("transformers", reason="pip install '.[transformers]' runs these tests")

from transformers import masking_utils as hf  # noqa: E402

from esokern.integrations import transformers as integration  # noqa: E402
from esokern.integrations.transformers_attention import attention_forward  # noqa: E402
from esokern.integrations.transformers_masks import attention_mask  # noqa: E402

integration.register()
VOCAB = 89
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
SLIDING_THEN_FULL = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
MODELS = {
    "Llama": SIZES,
    "Qwen2": SIZES | SLIDING_THEN_FULL | {"use_sliding_window": True},
    "Qwen3": SIZES,
    "Mistral": SIZES | {"sliding_window": 6},
    "Gemma3": SIZES | SLIDING_THEN_FULL | {"final_logit_softcapping": 2.0},
    "Llama4": SIZES
    | {"attention_chunk_size": 4, "layer_types": ["chunked_attention", "full_attention"], "intermediate_size_mlp": 96}
    | {"num_local_experts": 2, "num_experts_per_tok": 1},
    "ModernBert": SIZES
    | {"local_attention": 8, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2}
    | {"classifier_bias": True, "norm_bias": True},
    "Bert": SIZES,
}
CAUSAL = ["Llama", "Qwen2", "Qwen3", "Mistral", "Gemma3", "Llama4"]
BATCH, SEQLEN = 3, 13


def model_of(name: str, dtype: torch.dtype = torch.float32, **changes):
    """A small random model; its weights are large enough for attention to matter, and exact in dtype."""
    config_name = f"{name}TextConfig" if name in ("Gemma3", "Llama4") else f"{name}Config"
    config = getattr(transformers, config_name)(**MODELS[name] | {"initializer_range": 0.2} | changes)
    kind = "ForMaskedLM" if name in ("ModernBert", "Bert") else "ForCausalLM"
    model = getattr(transformers, name + kind)(config)
    return model.to(dtype).eval()


def tokens_and_padding(kind: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Tokens [3, 13], and which of them are no padding: all, or 13, 9 and 4 of a row."""
    tokens = torch.randint(3, VOCAB, (BATCH, SEQLEN))
    padding = torch.ones(BATCH, SEQLEN, dtype=torch.long)
    padding[1, :4], padding[2, :9] = 0, 0
    if kind == "right":
        padding = padding.flip(1)
    return tokens, None if kind == "none" else padding


def check(model, call, shown: torch.Tensor | None = None) -> None:
    """call(model) on "esokern" is as near to float64 as on "sdpa", for the entries of `shown` and for those of none."""
    wide = copy.deepcopy(model).double()
    wide.set_attn_implementation("sdpa")
    results = {}
    for implementation in ("sdpa", "esokern"):
        model.set_attn_implementation(implementation)
        results[implementation] = call(model)
    assert_close(results["esokern"], call(wide), results["sdpa"])


@torch.no_grad()
def logits(model, tokens, **options):
    return model(tokens, **options).logits


dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
paddings = pytest.mark.parametrize("padding", ["none", "left", "right"])


@dtypes
@paddings
@pytest.mark.parametrize("name", MODELS)
def test_forward(name, padding, dtype):
    tokens, mask = tokens_and_padding(padding)
    check(model_of(name, dtype), lambda model: logits(model, tokens, attention_mask=mask))


@pytest.mark.parametrize("name", ["Llama", "Mistral"])
@paddings
def test_bidirectional(name, padding):
    """A causal model made bidirectional by its config, with and without a window."""
    tokens, mask = tokens_and_padding(padding)
    check(model_of(name, is_causal=False), lambda model: logits(model, tokens, attention_mask=mask, use_cache=False))


@pytest.mark.parametrize("name", CAUSAL)
def test_packed(name):
    """Several sequences in a row, told by positions that begin anew."""
    tokens, _ = tokens_and_padding("none")
    positions = torch.stack(
        [torch.cat([torch.arange(n) for n in lengths]) for lengths in ([4, 9], [1, 2, 10], [13])]
    ).contiguous()
    model = model_of(name)
    check(model, lambda model: logits(model, tokens, position_ids=positions, use_cache=False))
    model.set_attn_implementation("esokern")
    alone = logits(model, tokens[:1, 4:], position_ids=positions[:1, 4:], use_cache=False)
    packed = logits(model, tokens, position_ids=positions, use_cache=False)
    torch.testing.assert_close(packed[:1, 4:], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", CAUSAL)
def test_generate(name, cache):
    """Prompts padded on the left, then twice the window of new tokens."""
    tokens, mask = tokens_and_padding("left")
    model = model_of(name)
    texts = []
    for implementation in ("sdpa", "esokern"):
        model.set_attn_implementation(implementation)
        texts.append(
            model.generate(tokens, attention_mask=mask, max_new_tokens=12, do_sample=False, cache_implementation=cache)
        )
    assert torch.equal(*texts)


def test_generate_compiled():
    """generate's compiled decoding, one graph per step: masks are made outside it."""
    tokens, mask = tokens_and_padding("left")
    model = model_of("Mistral", num_hidden_layers=1)
    settings = transformers.CompileConfig(fullgraph=True, backend="eager", mode=None)
    settings._compile_all_devices = True  # not on GPUs alone
    texts = []
    for implementation, options in [("sdpa", {}), ("esokern", {"compile_config": settings})]:
        model.set_attn_implementation(implementation)
        options |= {"max_new_tokens": 9, "do_sample": False, "cache_implementation": "static"}
        texts.append(model.generate(tokens, attention_mask=mask, **options))
    assert torch.equal(*texts)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_prefill_in_chunks(name):
    """Several queries behind keys of earlier calls."""
    tokens, mask = tokens_and_padding("left")

    def call(model):
        cache = transformers.DynamicCache(config=model.config)
        spans = [slice(0, 6), slice(6, 10), slice(10, 13)]
        return torch.cat([logits(model, tokens[:, s], attention_mask=mask[:, : s.stop], cache=cache) for s in spans], 1)

    check(model_of(name), call)


def test_encoder_and_decoder():
    sizes = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in [("layers", 1), ("ffn_dim", 96)]}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "init_std": 0.2}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    config = transformers.BartConfig(vocab_size=VOCAB, d_model=64, max_position_embeddings=64, **sizes, **heads, **ids)
    tokens, mask = tokens_and_padding("right")
    model = transformers.BartForConditionalGeneration(config).eval()
    check(model, lambda model: logits(model, tokens, attention_mask=mask, decoder_input_ids=tokens[:, :7]))


@dtypes
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["Llama", "Qwen2", "ModernBert"])
def test_training(name, checkpointing, dtype):
    tokens, mask = tokens_and_padding("right")
    model = model_of(name, dtype).train()
    if checkpointing:
        model.activation_checkpointing_enable()

    def gradients(model):
        model.zero_grad()
        model(tokens, attention_mask=mask, labels=tokens).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    check(model, gradients)


def test_autocast():
    """Under autocast attention computes in its dtype, as sdpa does."""
    tokens, mask = tokens_and_padding("right")
    model = model_of("Llama")
    results = {}
    for implementation in ("sdpa", "esokern"):
        model.set_attn_implementation(implementation)
        with torch.autocast("cpu", torch.bfloat16):
            results[implementation] = logits(model, tokens, attention_mask=mask)
    model.set_attn_implementation("sdpa")
    gold = logits(copy.deepcopy(model).double(), tokens, attention_mask=mask)
    assert_close(results["esokern"], gold, results["sdpa"])


@pytest.mark.parametrize(("name", "fullgraph"), [("Llama", True), ("Mistral", False)])
def test_compiled(name, fullgraph):
    tokens, mask = tokens_and_padding("left")
    model = model_of(name, num_hidden_layers=1)
    model.set_attn_implementation("esokern")
    compiled = torch.compile(model, backend="eager", fullgraph=fullgraph)
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask, use_cache=False).logits
        assert same_bits(compiled(tokens, attention_mask=mask, use_cache=False).logits, expected)
    torch._dynamo.reset()


# --- masks


def windows_of(lengths: list[int]) -> torch.Tensor:
    return torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])


def packed(function):
    """What transformers makes of a mask function for rows that hold several sequences."""
    lengths = [[4, 3, 5], [12], [1, 10, 1]]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    numbers = hf.packed_sequence_mask_function(torch.stack([windows_of(row) for row in lengths]))
    return hf.and_masks(hf.remap_positions_for_packed_sequence(function, positions), numbers)


LEFT = torch.tensor([0, 3, 5])
FUNCTIONS = {
    "causal": hf.causal_mask_function,
    "bidirectional": hf.bidirectional_mask_function,
    "sliding": hf.sliding_window_causal_mask_function(4),
    "sliding, bidirectional": hf.sliding_window_bidirectional_mask_function(2),
    "chunked": hf.chunked_causal_mask_function(4, LEFT),
    "sliding twice": hf.and_masks(hf.causal_mask_function, hf.sliding_window_overlay(3), hf.sliding_window_overlay(7)),
}
PACKED = {name: packed(function) for name, function in FUNCTIONS.items() if name != "bidirectional"}


def assert_same_mask(function, padding, q_length=12, kv_length=12, q_offset=0, kv_offset=0):
    sizes = {"batch_size": 3, "q_length": q_length, "kv_length": kv_length, "q_offset": q_offset}
    sizes |= {"kv_offset": kv_offset, "mask_function": function, "attention_mask": padding}
    expected = hf.sdpa_mask(**sizes, allow_is_causal_skip=False)[:, 0]
    ours = attention_mask(**sizes)
    dense = torch.ones(1, 1, 1, dtype=torch.bool) if ours.mask is None else ours.mask.dense()
    assert torch.equal(dense.expand_as(expected), expected)
    return ours


@pytest.mark.parametrize("padded", [None, "all tokens", "left", "right", "holes"])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"q_length": 1, "q_offset": 11},  # decoding
        {"q_length": 1, "q_offset": torch.tensor(7)},  # decoding with a static cache
        {"q_length": 5, "q_offset": 7},  # a chunk behind a cache
        {"q_length": 5, "kv_length": 30},  # prefill of a static cache
        {"q_length": 2, "kv_length": 7, "q_offset": 10, "kv_offset": 5},  # a cache of a window
        {"q_length": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_mask(name, sizes, padded):
    padding = None
    if padded is not None:
        padding = torch.ones(3, 12, dtype=torch.bool)
        if padded == "left":
            padding[1, :4], padding[2, :11] = False, False
        elif padded == "right":
            padding[1, 8:], padding[2, 1:] = False, False
        elif padded == "holes":
            padding = torch.rand(3, 12) < 0.5
    assert_same_mask(FUNCTIONS[name], padding, **sizes)


@pytest.mark.parametrize("name", PACKED)
def test_packed_mask(name):
    assert_same_mask(PACKED[name], None)


def test_no_mask_where_all_is_seen():
    for function in (hf.bidirectional_mask_function, hf.causal_mask_function):
        padding = torch.ones(3, 12, dtype=torch.bool)
        assert assert_same_mask(function, padding, q_length=1, q_offset=11).mask is None


@pytest.mark.parametrize(
    "function",
    [
        lambda batch, head, q, k: k <= q,
        hf.or_masks(hf.causal_mask_function, hf.bidirectional_mask_function),
        hf.and_masks(hf.causal_mask_function, lambda batch, head, q, k: k != 3),
        hf.or_masks(hf.causal_mask_function, hf.blockwise_overlay(torch.zeros(3, 12, dtype=torch.long))),
    ],
)
def test_unknown_mask_functions_are_refused(function):
    with pytest.raises(NotImplementedError, match=r'mask_function: .*"sdpa"'):
        attention_mask(3, 12, 12, mask_function=function)


def test_a_mask_is_made_once_per_forward(monkeypatch):
    """Once, not per layer, and nothing of it stays behind."""
    made = []

    def counted(*args, **kwargs):
        mask = attention_mask(*args, **kwargs)
        made.append(weakref.ref(mask))
        return mask

    monkeypatch.setitem(transformers.AttentionMaskInterface._global_mapping, "esokern", counted)
    tokens, mask = tokens_and_padding("left")
    model = model_of("Llama", num_hidden_layers=3)
    model.set_attn_implementation("esokern")
    logits(model, tokens, attention_mask=mask)
    assert [ref() for ref in made] == [None]


# --- refusals


def refuse(error, match, name="Llama", *, train=False, call=None, dtype=torch.float32, **changes):
    tokens, _ = tokens_and_padding("none")
    model = model_of(name, dtype, **changes).train(train)
    model.set_attn_implementation("esokern")
    with pytest.raises(error, match=match):
        model(tokens, **(call or {}))


def test_refusals():
    refuse(ValueError, 'dropout: must be 0, got 0.1; .*"sdpa"', attention_dropout=0.1, train=True)
    refuse(TypeError, 'query: .* got float64; .*"sdpa"', dtype=torch.float64)
    refuse(ValueError, "head_dim must be a multiple of 8 up to 256, got 12", head_dim=12)
    refuse(ValueError, "head_dim must be a multiple of 8 up to 256, got 264", head_dim=264)
    refuse(NotImplementedError, 'output_attentions: .*"eager"', call={"output_attentions": True})
    dense = torch.ones(BATCH, 1, SEQLEN, SEQLEN).tril()
    refuse(NotImplementedError, r"attention_mask: a dense mask, here \[3, 1, 13, 13\]", call={"attention_mask": dense})


def test_softcap_and_sinks_are_refused(monkeypatch):
    monkeypatch.setitem(MODELS, "Gemma2", SIZES)
    monkeypatch.setitem(MODELS, "GptOss", SIZES | {"num_local_experts": 2, "num_experts_per_tok": 1})
    refuse(NotImplementedError, 'softcap: .*"eager"', "Gemma2")
    refuse(NotImplementedError, 's_aux: .* sinks .*"eager"', "GptOss")


class Layer(torch.nn.Module):
    is_causal = True


def direct(q_length=4, kv_length=4, mask=None, value_dim=16, **options):
    """The attention function itself."""
    q, k, v = torch.randn(1, 2, q_length, 16), torch.randn(1, 2, kv_length, 16), torch.randn(1, 2, kv_length, value_dim)
    return attention_forward(Layer(), q, k, v, mask, **options)[0], (q, k, v)


@pytest.mark.parametrize("is_causal", [None, True, False])
def test_without_a_mask_is_causal_decides(is_causal):
    out, floats = direct(is_causal=is_causal, scaling=0.3)
    options = {"is_causal": is_causal is not False, "scale": 0.3}
    expected = torch.nn.functional.scaled_dot_product_attention(*floats, **options).transpose(1, 2)
    torch.testing.assert_close(out, expected)
    out, floats = direct(q_length=1, is_causal=is_causal)
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(*floats).transpose(1, 2))


def test_refusals_of_the_function():
    with pytest.raises(ValueError, match="attention_mask: must be given for 2 causal queries and 4 keys"):
        direct(q_length=2)
    with pytest.raises(ValueError, match="value: must have the head_dim of query 16, got 8"):
        direct(value_dim=8)
    for name in ("position_bias", "sinks", "indices", "block_indices"):
        with pytest.raises(NotImplementedError, match=name):
            direct(**{name: torch.zeros(1)})
    with pytest.raises(NotImplementedError, match="cu_seq_lens_q"):
        direct(is_causal=False, cu_seq_lens_q=torch.tensor([0, 2, 4]))


# --- denoising steps


def step_of(*lengths: int, **options) -> Step:
    return Step(torch.tensor(lengths, dtype=torch.int32), **options)


POSITIONS = torch.arange(SEQLEN).expand(BATCH, -1)
DENOISERS = ["Llama", "Qwen2", "Qwen3", "Mistral", "Gemma3", "ModernBert", "Bert"]


def head(denoiser, hidden):
    """Logits as the attributes of a denoiser say they are."""
    out = torch.nn.functional.linear(hidden, denoiser.head_weight, denoiser.head_bias)
    cap = denoiser.logit_softcap
    return out if cap is None else cap * torch.tanh(out / cap)


@dtypes
@pytest.mark.parametrize("name", DENOISERS)
def test_denoiser(name, dtype):
    """Its logits are those of the model with a bidirectional mask and padding on the right."""
    tokens, mask = tokens_and_padding("right")
    changes = {} if name in ("ModernBert", "Bert") else {"is_causal": False, "use_cache": False}
    model = model_of(name, dtype, **changes)
    lengths = mask.sum(1).tolist()
    denoiser = integration.TransformersDenoiser(model)
    assert (denoiser.vocab_size, denoiser.dtype, denoiser.device.type) == (VOCAB, dtype, "cpu")
    assert not model.base_model._forward_hooks
    with torch.no_grad():
        out = head(denoiser, denoiser.hidden(tokens, POSITIONS, step_of(*lengths)))
    assert model.config._attn_implementation == "sdpa", "put back"
    assert out.isfinite().all(), "tokens of padding too"
    options = {"attention_mask": mask, "position_ids": POSITIONS}
    gold, plain = (logits(m, tokens, **options) for m in (copy.deepcopy(model).double(), model))
    for row, length in enumerate(lengths):
        assert_close(out[row, :length], gold[row, :length], plain[row, :length], f"row {row}")


def test_denoiser_ignores_what_the_model_says():
    """A causal model is bidirectional in a step, and causal again after it."""
    tokens, _ = tokens_and_padding("none")
    model = model_of("Llama")
    model.set_attn_implementation("esokern")
    before = logits(model, tokens)
    denoiser = integration.TransformersDenoiser(model)
    changed = tokens.clone()
    changed[:, -1] = 3
    step = step_of(SEQLEN, SEQLEN, SEQLEN)
    with torch.no_grad():
        a, b = (denoiser.hidden(x, POSITIONS, step) for x in (tokens, changed))
    assert (a[:, 0] - b[:, 0]).abs().min(1).values.max() > 0
    assert same_bits(logits(model, tokens), before)
    with integration.denoising_step(step), torch.no_grad():
        assert torch.equal(model.model(tokens, use_cache=False).last_hidden_state, a)


def test_denoiser_with_a_mask_of_its_own():
    """step.mask: here a random order, against the dense mask of it on sdpa."""
    tokens, _ = tokens_and_padding("none")
    order = torch.stack([torch.randperm(SEQLEN) for _ in range(BATCH)]).int()
    mask = RankMask(order, order)
    model = model_of("Llama")
    denoiser = integration.TransformersDenoiser(model)
    with torch.no_grad():
        out = head(denoiser, denoiser.hidden(tokens, POSITIONS, step_of(SEQLEN, SEQLEN, SEQLEN, mask=mask)))
    dense = mask.dense()[:, None]
    gold, plain = (logits(m, tokens, attention_mask=dense) for m in (copy.deepcopy(model).double(), model))
    assert_close(out, gold, plain)


@pytest.mark.parametrize("name", DENOISERS)
def test_denoiser_with_a_cache(name):
    """All tokens in any order of memory, into any rows of a cache, give what they give without one."""
    tokens, mask = tokens_and_padding("right")
    lengths = mask.sum(1).tolist()
    denoiser = integration.TransformersDenoiser(model_of(name))
    with torch.no_grad():
        expected = denoiser.hidden(tokens, POSITIONS, step_of(*lengths))
        cache = denoiser.new_cache(5, 16)
        assert (cache.num_layers, cache.dtype) == (2, torch.float32)
        cache.k_cache.fill_(torch.nan)
        cache.v_cache.fill_(torch.nan)
        order = torch.stack([torch.randperm(SEQLEN) for _ in range(BATCH)])
        slots = torch.where(order < mask.sum(1, keepdim=True), order, -1).int()
        rows = torch.tensor([4, 0, 2], dtype=torch.int32)
        step = step_of(*lengths, cache=cache, slots=slots, cache_batch_idx=rows)
        out = denoiser.hidden(tokens.gather(1, order), order, step)
    out = out.gather(1, order.argsort(1)[:, :, None].expand_as(out))
    for row, length in enumerate(lengths):
        torch.testing.assert_close(out[row, :length], expected[row, :length], atol=1e-5, rtol=1e-4)
    written = ~cache.k_cache.isnan().all(-1).all(-1)
    for row, length in zip(rows.tolist(), lengths, strict=True):
        assert written[:, row].tolist() == [[p < length for p in range(16)]] * 2
    assert not written[:, [1, 3]].any()


def test_denoiser_with_a_part_of_the_tokens():
    """In a model of one layer cached keys are exact: a changed token alone gives what all tokens would."""
    tokens, _ = tokens_and_padding("none")
    denoiser = integration.TransformersDenoiser(model_of("Llama", num_hidden_layers=1))
    cache = denoiser.new_cache(BATCH, SEQLEN)
    everything = {"cache": cache, "slots": POSITIONS.int()}
    with torch.no_grad():
        denoiser.hidden(tokens, POSITIONS, step_of(*[SEQLEN] * BATCH, **everything))
        places = torch.tensor([[3, 7], [12, 0], [5, 6]])
        tokens.scatter_(1, places, torch.randint(3, VOCAB, (BATCH, 2)))
        step = step_of(*[SEQLEN] * BATCH, cache=cache, slots=places.int())
        out = denoiser.hidden(tokens.gather(1, places), places, step)
        expected = denoiser.hidden(tokens, POSITIONS, step_of(*[SEQLEN] * BATCH))
    expected = expected.gather(1, places[:, :, None].expand_as(out))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


def test_denoiser_is_differentiable():
    tokens, _ = tokens_and_padding("none")
    model = model_of("Llama")
    denoiser = integration.TransformersDenoiser(model)
    denoiser.hidden(tokens, POSITIONS, step_of(SEQLEN, 9, 4)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.model.parameters())


def test_denoiser_of_a_model_that_was_autoregressive():
    model = model_of("Llama")
    assert integration.TransformersDenoiser(model, shift=True).shift is True
    assert integration.TransformersDenoiser(model).shift is False


def test_denoising_step_refusals():
    denoiser = integration.TransformersDenoiser(model_of("Mistral"))
    model, tokens = denoiser.model, tokens_and_padding("none")[0]
    cache, slots = denoiser.new_cache(BATCH, SEQLEN), POSITIONS.int()
    mask = RankMask(slots, slots)
    for options, match in [
        ({"cache": cache}, "slots is missing"),
        ({"slots": slots}, "cache is missing"),
        ({"cache": cache, "slots": slots, "mask": mask}, "step.mask: must be None with a cache"),
    ]:
        with pytest.raises(ValueError, match=match):
            denoiser.hidden(tokens, POSITIONS, step_of(13, 13, 13, **options))
    with pytest.raises(NotImplementedError, match="sliding-window"):
        denoiser.hidden(tokens, POSITIONS, step_of(13, 13, 13, mask=mask))
    assert model.config._attn_implementation == "sdpa", "put back after an error"
    model.set_attn_implementation("esokern")
    past = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens[:, :4], cache=past)
        with pytest.raises(ValueError, match="use_cache=False"), integration.denoising_step(step_of(1, 1, 1)):
            model(tokens[:, 4:5], cache=past)
        model(tokens[:, :4])  # no step is left behind


def test_denoising_step_of_a_compiled_model():
    """What the compiler cannot read breaks the graph, or is refused where it may not break."""
    tokens, _ = tokens_and_padding("none")
    model = model_of("Llama", num_hidden_layers=1)
    model.set_attn_implementation("esokern")
    step, options = step_of(13, 9, 4), {"attention_mask": torch.ones_like(tokens), "use_cache": False}
    with torch.no_grad():
        causal = model(tokens, **options).logits
        with integration.denoising_step(step):
            bidirectional = model(tokens, **options).logits
            with pytest.raises(torch._dynamo.exc.Unsupported):
                torch.compile(model, backend="eager", fullgraph=True)(tokens, **options)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager")
        with integration.denoising_step(step):
            assert same_bits(compiled(tokens, **options).logits, bidirectional)
        assert same_bits(compiled(tokens, **options).logits, causal)
    torch._dynamo.reset()


def test_denoiser_refusals():
    with pytest.raises(TypeError, match="PreTrainedModel, got Linear"):
        integration.TransformersDenoiser(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="linear LM head"):
        integration.TransformersDenoiser(model_of("Llama").model)
    model = model_of("Llama")
    model.config.layer_types = ["chunked_attention", "full_attention"]
    with pytest.raises(ValueError, match=r"full attention or say their sliding window, got \['chunked_attention'"):
        integration.TransformersDenoiser(model)
    granite = transformers.GraniteForCausalLM(
        transformers.GraniteConfig(**SIZES | {"logits_scaling": 4.0, "initializer_range": 0.2})
    )
    with pytest.raises(ValueError, match="more than a linear layer"):
        integration.TransformersDenoiser(granite.eval())
    roberta = transformers.RobertaForMaskedLM(transformers.RobertaConfig(**SIZES | {"pad_token_id": 1}))
    with pytest.raises(ValueError, match="begin at 0"):
        integration.TransformersDenoiser(roberta.eval())
    mpt = transformers.MptForCausalLM(transformers.MptConfig(d_model=32, n_heads=2, n_layers=2, vocab_size=VOCAB))
    with pytest.raises(ValueError, match="position_ids"):
        integration.TransformersDenoiser(mpt.eval())


# --- the page


def test_page_example():
    page = (Path(__file__).parent.parent / "docs" / "transformers.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(examples) >= 2
    for number, example in enumerate(examples):
        assert len(example.splitlines()) <= 20
        exec(compile(example, f"docs/transformers.md example {number + 1}", "exec"), {})
