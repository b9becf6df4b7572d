"""A finished run as a model folder with its card."""

from __future__ import annotations

import dataclasses
import json
import platform
from pathlib import Path
from typing import Any

import torch

from esokern import distributed
from esokern.data import Stream, held_out_rows, streams
from esokern.models.checkpoint import load_checkpoint, save_checkpoint, write_atomically
from esokern.models.network import Network
from esokern.text import Tokenizer
from esokern.train.config import TrainConfig, recipe
from esokern.train.loss import evaluate
from esokern.train.trainer import CHECKPOINT, STREAMS, TOKENIZER

MAX_ROWS = 4096  # of the held-out text, where there is more


def export(run: str | Path, target: str | Path, *, draws: int = 2) -> float:
    """Write the averaged weights of a run as a model folder; returns its held-out bits per byte. For one process.

    The folder gets ``model.safetensors`` (fp16, published parameter names), ``config.json``, ``tokenizer.json`` and
    ``MODEL_CARD.md``. The figure is measured on the fp16 weights over the held-out text (4096 rows of it, spread
    evenly, if there are more), `draws` draws of the bound's noise per row.
    """
    run, target = Path(run), Path(target)
    path = run / CHECKPOINT
    if not path.is_file():
        raise ValueError(f"no {CHECKPOINT} in {run}; train first")
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    config = dataclasses.replace(TrainConfig(**state["config"]), precision="fp32")
    tokenizer = Tokenizer.from_file(run / TOKENIZER)
    facts = {"recipe": recipe(config), "steps": state["step"], "training_seconds": round(state["seconds"])}
    facts["recipe"]["precision"] = state["config"]["precision"]
    save_checkpoint(load_checkpoint(path), target, dtype=torch.float16, extra=facts)
    write_atomically(target / TOKENIZER, tokenizer.save)

    network = load_checkpoint(target)
    train, held_out = streams(run / STREAMS, config.source(), tokenizer, progress=config.progress)
    rows = held_out_rows(held_out.tokens, config.length, MAX_ROWS)
    call = distributed.wrap(network, distributed.local_device(config.device), config.shard)
    bits = evaluate(call, rows, tokenizer.n_bytes(), config, seed=1, draws=draws)
    facts["held_out_bits_per_byte"] = round(bits, 4)
    save_checkpoint(network, target, dtype=torch.float16, extra=facts)
    card = _model_card(network, config, facts, train, held_out)
    write_atomically(target / "MODEL_CARD.md", lambda file: file.write_text(card, encoding="utf-8"))
    return bits


def _model_card(network: Network, config: TrainConfig, facts: dict[str, Any], train: Stream, held_out: Stream) -> str:
    model = {
        "esolm": f"Eso-LM ({config.variant}), alpha_0 = {config.alpha_0:g}",
        "mdlm": "masked diffusion (MDLM)",
        "bd3lm": f"block diffusion (BD3-LM), blocks of {config.block_size}",
        "ar": "autoregressive",
    }[config.objective]
    library = f"the sources of Python {platform.python_version()}'s standard library (PSF licence)"
    size = network.config
    rows_seen = facts["steps"] * config.batch_size
    lines = [
        f"# {model}, {network.n_parameters() / 1e6:.2f} M parameters",
        "",
        f"Trained by `esokern train` on {library if config.corpus == 'stdlib' else config.corpus}"
        + (f", from {config.init_from}." if config.init_from else "."),
        "It writes text that looks like its corpus, no more: what it says is not to be relied on, and code it",
        "writes is not meant to be run.",
        "",
        "| | |",
        "|---|---|",
        f"| network | {size.n_blocks} blocks, hidden {size.hidden_size}, {size.n_heads} heads of {size.head_dim}, "
        f"length {size.length} tokens |",
        f"| vocabulary | {size.vocab_size} ids, the last one is the mask |",
        "| weights | fp16, average over training steps (EMA) |",
        f"| training text | {train.n_documents} documents, {train.n_bytes / 1e6:.2f} MB |",
        f"| held-out text | {held_out.n_documents} documents, {held_out.n_bytes / 1e6:.2f} MB"
        + (f", {config.valid_corpus} |" if config.valid_corpus else " |"),
        f"| training | {facts['steps']} steps of {config.batch_size} rows "
        f"({rows_seen * config.length / 1e6:.1f} M tokens), {facts['training_seconds'] / 60:.0f} minutes |",
        f"| held-out bits per byte | {facts['held_out_bits_per_byte']:.3f} "
        f"({'exact' if config.objective == 'ar' else 'variational bound'}) |",
        "",
        "Recipe (`esokern train` flags):",
        "",
        "```yaml",
        *(f"{name}: {json.dumps(value)}" for name, value in facts["recipe"].items()),
        "```",
        "",
    ]
    return "\n".join(lines)
