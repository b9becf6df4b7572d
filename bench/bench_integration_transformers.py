"""Models of transformers on "esokern" and on "sdpa": four layers of the width of a 60 M model, without an LM head."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import transformers

from esokern.integrations import transformers as integration

integration.register()
OP = "transformers"
SIZES = {"vocab_size": 4096, "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8}
SIZES |= {"max_position_embeddings": 2048, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


def models(kind: str, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    """The same random model without its LM head on both implementations."""
    if kind == "Llama":
        config = transformers.LlamaConfig(num_key_value_heads=4, intermediate_size=1536, **SIZES)
    else:
        config = transformers.ModernBertConfig(intermediate_size=768, cls_token_id=1, sep_token_id=2, **SIZES)
    made = {}
    for name in ("esokern", "sdpa"):
        torch.manual_seed(0)
        own = copy.deepcopy(config)  # a model's choice of attention lies in its config
        made[name] = transformers.AutoModel.from_config(own, dtype=dtype, attn_implementation=name).eval()
    assert [model.config._attn_implementation for model in made.values()] == list(made)
    return made


def inputs(batch: int, seqlen: int, padded: str) -> dict[str, torch.Tensor]:
    """Tokens and their mask; padded: a row of a batch is a fifth shorter than the one before it."""
    mask = torch.ones(batch, seqlen, dtype=torch.long)
    for row in range(batch if padded else 0):
        pad = row * seqlen // 5
        mask[row, :pad] = 0
    if padded == "right":
        mask = mask.flip(1)
    return {"input_ids": torch.randint(3, 4096, (batch, seqlen)), "attention_mask": mask}


def check(candidates: dict[str, Callable[[], torch.Tensor]], dtype: torch.dtype, where: torch.Tensor | None) -> None:
    """Both give the same, where there are tokens."""
    ours, theirs = (candidates[name]().float() for name in ("esokern", "sdpa"))
    if where is not None:
        ours, theirs = ours[where.bool()], theirs[where.bool()]
    atol = 0.1 if dtype == torch.bfloat16 else 2e-4
    assert (ours - theirs).abs().max() < atol * theirs.abs().max()


@dtypes
@pytest.mark.parametrize(
    ("kind", "batch", "seqlen", "padded"),
    [
        ("Llama", 1, 512, ""),
        ("Llama", 1, 1024, ""),
        ("Llama", 4, 512, ""),
        ("Llama", 4, 1024, "left"),
        ("ModernBERT", 1, 1024, ""),
        ("ModernBERT", 4, 1024, "right"),
    ],
)
def test_forward(compare, kind, batch, seqlen, padded, dtype):
    given = inputs(batch, seqlen, padded)
    options = given | ({"use_cache": False} if kind == "Llama" else {})
    candidates = {
        name: lambda model=model: model(**options).last_hidden_state for name, model in models(kind, dtype).items()
    }
    check(candidates, dtype, given["attention_mask"])
    suffix = f" padded {padded}" if padded else ""
    compare(OP, f"{kind} forward B{batch} S{seqlen}{suffix}", dtype, candidates, seconds=20)


@dtypes
@pytest.mark.parametrize(("kind", "batch", "seqlen"), [("Llama", 1, 1024), ("Llama", 4, 512), ("ModernBERT", 4, 512)])
def test_training(compare, kind, batch, seqlen, dtype):
    with torch.inference_mode(False), torch.enable_grad():
        given = inputs(batch, seqlen, "right")
        # Gradients that arrive at tokens, none at padding; a loss of their squares would be constant under the norm.
        dout = torch.randn(batch, seqlen, 512).to(dtype) * given["attention_mask"][..., None]
        options = given | ({"use_cache": False} if kind == "Llama" else {})

        def gradient(model: torch.nn.Module) -> torch.Tensor:
            model.zero_grad()
            with torch.enable_grad():
                model(**options).last_hidden_state.backward(dout)
            return model.get_input_embeddings().weight.grad

        candidates = {name: lambda model=model: gradient(model.train()) for name, model in models(kind, dtype).items()}
        check(candidates, dtype, None)
        compare(OP, f"{kind} forward + backward B{batch} S{seqlen} padded right", dtype, candidates, seconds=20)


@dtypes
@pytest.mark.parametrize("batch", [1, 4])
def test_decode(compare, batch, dtype):
    """One token behind 1024 in a DynamicCache."""
    given = inputs(batch, 1025, "left")
    mask = given["attention_mask"]

    def decoder(model: torch.nn.Module) -> Callable[[], torch.Tensor]:
        cache = transformers.DynamicCache(config=model.config)
        model(given["input_ids"][:, :-1], attention_mask=mask[:, :-1], cache=cache)

        def call() -> torch.Tensor:
            out = model(given["input_ids"][:, -1:], attention_mask=mask, cache=cache).last_hidden_state
            cache.crop(-1)
            return out

        return call

    with torch.inference_mode():
        candidates = {name: decoder(model) for name, model in models("Llama", dtype).items()}
        check(candidates, dtype, None)
        compare(OP, f"Llama decode B{batch} KV1024 padded left", dtype, candidates, seconds=4)
