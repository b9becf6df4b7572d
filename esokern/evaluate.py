"""`esokern evaluate`: the flags, the text, and how the figures are shown."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esokern import distributed, text
from esokern.models import FoldedNetwork, pretrained
from esokern.models.checkpoint import read_config
from esokern.perplexity import MODELS, Model, estimates, figures, split_rows
from esokern.text import Document, Tokenizer

# Flag, name in a recipe and in Model, the model that has it.
_SETTINGS = (
    ("--alpha0", "alpha_0", "esolm"),
    ("--variant", "variant", "esolm"),
    ("--block-size", "block_size", "bd3lm"),
)


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The flags of `esokern evaluate`, those that say which network aside."""
    source = command.add_mutually_exclusive_group()
    source.add_argument("--text", metavar="FILE", help="a text file; - reads standard input")
    source.add_argument(
        "--corpus", default="stdlib", metavar="PATH",
        help="a folder of text files, or stdlib: the held-out files of Python's standard library (the default)",
    )  # fmt: skip
    command.add_argument("--model", choices=MODELS, help="what the network is (default: what its config.json says)")
    command.add_argument("--alpha0", type=float, metavar="X", help="of esolm (default: as trained, else 1)")
    command.add_argument("--variant", choices=("A", "B"), help="of esolm (default: as trained, else B)")
    command.add_argument("--block-size", type=int, metavar="N", help="of bd3lm (default: as trained)")
    command.add_argument(
        "--draws", type=int, default=4, metavar="N", help="of the NELBO; 0 = leave it out (default %(default)s)"
    )
    command.add_argument(
        "--orders", type=int, metavar="K",
        help="of the importance-weighted bound; 0 = leave it out (default: 16 for esolm, else 0: an order takes a "
        "pass per token of a row for mdlm, of a block for bd3lm)",
    )  # fmt: skip
    command.add_argument("--length", type=int, metavar="N", help="tokens of a row (default: the network's length)")
    command.add_argument(
        "--rows", type=int, default=64, metavar="N", help="evenly spread over the text; 0 = all (default %(default)s)"
    )
    command.add_argument("--seed", type=int, default=0, help="of draws and orders (default %(default)s)")
    command.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace, network: FoldedNetwork, tokenizer: Tokenizer) -> int:
    """`esokern evaluate`."""
    model = _model(options)
    length = network.config.length if options.length is None else options.length
    if not 1 <= length <= network.config.length:
        raise ValueError(f"--length: must lie in 1 .. {network.config.length}, the network's length; got {length}")
    if options.rows < 0:
        raise ValueError(f"--rows: must be at least 0, got {options.rows}")
    orders = options.orders
    if orders is None:
        orders = 16 if model.name == "esolm" and model.has_orders else 0
    if options.draws == orders == 0 and not model.exact:
        raise ValueError("--draws and --orders: both are 0, which leaves nothing to do")
    name, documents = _documents(options)
    stream, sizes = _encode(documents, tokenizer)
    rows = split_rows(stream, length, options.rows or None)
    rows = [group for group in rows if model.num_predicted(group)]
    if not rows:
        raise ValueError(f"{name}: has one token, which says nothing about an autoregressive model")

    begin = time.perf_counter()
    on_device = [group.to(network.device) for group in rows]
    found = estimates(
        network, on_device, model, draws=options.draws, num_orders=orders, seed=options.seed,
        progress=sys.stderr.isatty(),
    )  # fmt: skip
    seconds = time.perf_counter() - begin
    if distributed.rank() > 0:  # the first process prints
        return 0

    num_tokens = torch.tensor([model.num_predicted(group) for group in rows for _ in group])
    num_bytes = None
    if sizes is not None:
        num_bytes = torch.cat([sizes[group[:, -model.num_predicted(group) :]].sum(1) for group in rows])
        num_bytes = num_bytes if num_bytes.any() else None  # separators alone
    results = [figures(estimate, num_tokens, num_bytes) for estimate in found]
    facts = {
        "rows": len(num_tokens),
        "length": length,
        "tokens": int(num_tokens.sum()),
        "bytes": None if num_bytes is None else int(num_bytes.sum()),
        "seconds": round(seconds, 2),
    }
    if options.json:
        settings = {"checkpoint": options.checkpoint, "text": name, "seed": options.seed, "model": model.name}
        settings |= {key: getattr(model, key) for _, key, owner in _SETTINGS if owner == model.name}
        print(json.dumps({**settings, **facts, "estimates": results}, indent=1))
        return 0
    print(f"{model}; {name}")
    print(
        f"{facts['rows']} rows of {length} tokens"
        + (", the last one shorter" if rows[-1].shape[1] < length else "")
        + f"; {facts['tokens']} tokens"
        + (" predicted, the first of a row being given" if model.name == "ar" else "")
        + ("" if num_bytes is None else f", {facts['bytes']} bytes")
        + f"; {seconds:.1f} s\n"
    )
    for line in table(results, [estimate.label for estimate in found]):
        print(line)
    print("\n± rows: standard error for the choice of rows; ± noise: for that of draws and orders, of these rows")
    return 0


def _model(options: argparse.Namespace) -> Model:
    """From the flags, and for what they leave open from the recipe in the checkpoint's config.json."""
    source = pretrained.DEFAULT_MODEL if options.checkpoint is None else Path(options.checkpoint)
    recipe = read_config(source if source.is_dir() else source.parent).get("recipe", {})
    name = options.model or recipe.get("objective")
    if name is None:
        raise ValueError(f"--model: {source} does not say what it is; one of {', '.join(MODELS)} is needed")
    settings = {}
    for flag, key, owner in _SETTINGS:
        given = vars(options)[flag[2:].replace("-", "_")]
        if given is not None and name != owner:
            raise ValueError(f"{flag}: belongs to {owner}, the model is {name}")
        if given is None and name == owner == recipe.get("objective"):
            given = recipe.get(key)
        if given is not None:
            settings[key] = given
    return Model(name, **settings)


def _documents(options: argparse.Namespace) -> tuple[str, list[Document]]:
    """What to call the text, and its documents."""
    if options.text == "-":
        return "standard input", [Document("-", sys.stdin.read())]
    if options.text is None and options.corpus == "stdlib":
        return "held-out files of Python's standard library", [d for d in text.standard_library() if d.held_out]
    flag, name = ("--corpus", options.corpus) if options.text is None else ("--text", options.text)
    base = Path(name)
    if not base.exists():
        raise ValueError(f"{flag}: there is no {name}")
    files = sorted(p for p in base.rglob("*") if p.suffix in (".txt", ".md", ".py")) if base.is_dir() else [base]
    if not files:
        raise ValueError(f"{flag}: no .txt, .md or .py file in {name}")
    return name, [Document(str(file), file.read_text(encoding="utf-8", errors="replace")) for file in files]


def _encode(documents: Sequence[Document], tokenizer: Tokenizer) -> tuple[list[int], Tensor | None]:
    """The tokens, each document after a separator if there is one; and int64 [vocab], the bytes of every id.

    None for those where they do not account for every byte of the text, as in a vocabulary that drops white space.
    """
    separator = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    stream: list[int] = []
    for document in documents:
        stream += separator + tokenizer.encode(document.text)
    sizes = torch.from_numpy(tokenizer.n_bytes())
    complete = int(sizes[torch.tensor(stream, dtype=torch.int64)].sum()) == sum(
        len(document.text.encode()) for document in documents
    )
    return stream, sizes if complete else None


def table(results: Sequence[dict[str, Any]], labels: Sequence[str]) -> list[str]:
    """Lines of text for the `figures` of several estimates."""

    def shown(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}"

    columns = [
        ("nats/token", "nats_per_token"),
        ("± rows", "nats_per_token_se_rows"),
        ("± noise", "nats_per_token_se_noise"),
        ("bits/byte", "bits_per_byte"),
        ("± rows", "bits_per_byte_se_rows"),
        ("± noise", "bits_per_byte_se_noise"),
        ("perplexity", "perplexity"),
        ("± rows", "perplexity_se_rows"),
        ("± noise", "perplexity_se_noise"),
    ]
    width = max(map(len, labels))
    lines = [" " * width + "".join(f"{title:>11}" for title, _ in columns)]
    for label, result in zip(labels, results, strict=True):
        lines.append(f"{label:{width}}" + "".join(f"{shown(result[key]):>11}" for _, key in columns))
    return lines
