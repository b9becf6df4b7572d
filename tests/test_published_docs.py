"""The examples of docs/ on published models run, with stand-ins for what they load."""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import published_standins as standins
from published_standins import BD3LM, EsoLM, Network, SetDiffusion

DOCS = Path(__file__).parent.parent / "docs"


class Loaded(Network):
    """A model whose sampler, by any of its names, notes which attributes its blocks have while it runs."""

    config = SimpleNamespace(length=64)

    def generate(self, *args, **kwargs):
        self.during = [set(vars(block)) for block in self.blocks]
        return torch.zeros(1, 8, dtype=torch.long)

    diffusion_generate = generate

    def generate_samples(self, num_samples, num_steps):
        return self.generate(), float(num_steps), 0.1

    def _semi_ar_sampler(self, n_samples, num_steps, num_strides, seqlen):
        return self.generate(), num_steps


class Tokenizer:
    def __call__(self, text, **options):
        ids = torch.zeros(1 if isinstance(text, str) else len(text), 4, dtype=torch.long)
        return SimpleNamespace(input_ids=ids, attention_mask=ids + 1)

    def decode(self, tokens):
        return "text"

    def batch_decode(self, tokens):
        return ["text"] * len(tokens)


def loads(result):
    return SimpleNamespace(from_pretrained=lambda *args, **kwargs: result)


def modules_of(model):
    """Every module that the examples import, by name."""
    hydra = SimpleNamespace(
        compose=lambda name, overrides: SimpleNamespace(),
        initialize_config_dir=lambda *args, **kwargs: contextlib.nullcontext(),
    )
    return {
        "generate": SimpleNamespace(generate_with_prefix_cache=lambda model, *args, **kwargs: (model.generate(), 8)),
        "model.modeling_llada": SimpleNamespace(LLaDAModelLM=loads(model)),
        "transformers": SimpleNamespace(AutoModel=loads(model), AutoTokenizer=loads(Tokenizer())),
        "algo": SimpleNamespace(EsoLM=None),
        "dataloader": SimpleNamespace(get_tokenizer=lambda config: Tokenizer()),
        "main": SimpleNamespace(_load_from_checkpoint=lambda *args: model),
        "hydra": hydra,
        "scripts.eval.model_loading": SimpleNamespace(load_eval_model=lambda *args: model),
        "src.denoiser.diffusion": SimpleNamespace(SetDiffusionGenerationConfig=SimpleNamespace),
    }


@pytest.mark.parametrize(
    ("page", "block"),
    [
        ("llada", standins.LLaDALlamaBlock),
        ("dream", standins.DreamSdpaAttention),
        ("esolm", EsoLM.DDiTBlock),
        ("bd3lm", BD3LM.DDiTBlock),
        ("set_diffusion", SetDiffusion.DDiTBlock),
    ],
)
def test_the_example_of_a_page(page, block, monkeypatch, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(), re.DOTALL)
    assert example.count("\n") <= 20
    model = Loaded(block(), block())
    before = [set(vars(block)) for block in model.blocks]
    for name, module in modules_of(model).items():
        monkeypatch.setitem(sys.modules, name, module)
    exec(compile(example, f"{page}.md", "exec"), {})
    assert all(found > was for found, was in zip(model.during, before, strict=True))
    assert [set(vars(block)) for block in model.blocks] == before
    assert "text" in capsys.readouterr().out
