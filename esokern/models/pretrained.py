"""A checkpoint with its tokenizer, ready for inference; by default the model that comes with the package."""

from __future__ import annotations

from pathlib import Path

import torch

from esokern.models.checkpoint import load_checkpoint
from esokern.models.network import FoldedNetwork
from esokern.text import Tokenizer

DEFAULT_MODEL = Path(__file__).parent.parent / "default_model"


def load_model(
    path: str | Path | None = None, *, tokenizer: str | Path | None = None, dtype: torch.dtype | None = None
) -> tuple[FoldedNetwork, Tokenizer]:
    """A checkpoint for inference, and its tokenizer; None = the model that comes with the package.

    path: what load_checkpoint takes. tokenizer: a tokenizer.json or its folder; default: the one beside the checkpoint.
    Raises ValueError for files that are missing or do not fit each other.
    """
    source = DEFAULT_MODEL if path is None else Path(path)
    if path is None and not source.is_dir():
        raise ValueError(f"the default model is missing from this installation ({source}); pass --checkpoint")
    network = load_checkpoint(source).fold(dtype)
    beside = source if source.is_dir() else source.parent
    text = Tokenizer.from_file(beside if tokenizer is None else tokenizer)
    if text.vocab_size != network.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {text.vocab_size} ids with the mask, the network {network.config.vocab_size}: "
            "they do not belong together"
        )
    return network, text
