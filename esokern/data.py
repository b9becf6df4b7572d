"""The tokens of a corpus, in files that are mapped into memory, and the rows that training takes from them.

A folder of streams holds `train.bin` and `held_out.bin`, all documents behind each other as uint16 (or uint32 where the
vocabulary needs it), and `streams.json`, which says what they were made from. It is written last, so that what an
interrupted run leaves behind counts for nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from esokern import corpus
from esokern.models.checkpoint import write_atomically
from esokern.text import Tokenizer

FACTS = "streams.json"
_BATCH = 1 << 19  # characters encoded in one call; what the tokenizer returns is some hundred times as large


@dataclass(frozen=True)
class Source:
    """What streams are made from; see esokern.corpus.parts. `valid_corpus` ("" = none) is all held out, and then all of
    `corpus` is for training."""

    corpus: str
    valid_corpus: str = ""
    text_field: str = "text"
    held_out_fraction: float = 0.0

    def parts(self) -> Iterator[corpus.Part]:
        if not self.valid_corpus:
            yield from corpus.parts(self.corpus, text_field=self.text_field, held_out_fraction=self.held_out_fraction)
            return
        yield from corpus.whole(self.corpus, text_field=self.text_field, held_out=False)
        yield from corpus.whole(self.valid_corpus, text_field=self.text_field, held_out=True)

    def training_text(self) -> Iterator[str]:
        return chain.from_iterable(part.pieces for part in self.parts() if not part.held_out)

    def n_bytes(self) -> int | None:
        sizes = [corpus.n_bytes(name) for name in (self.corpus, self.valid_corpus) if name]
        return None if None in sizes else sum(sizes)


class Stream(NamedTuple):
    """tokens: uint16 or uint32 [n], mapped; each of the documents is preceded by the separator."""

    tokens: np.ndarray
    n_documents: int
    n_bytes: int


def streams(folder: Path, source: Source, tokenizer: Tokenizer, *, progress: bool = False) -> tuple[Stream, Stream]:
    """The training and the held-out stream of `source`: those in `folder`, or made there if they are not yet.

    Raises ValueError if the tokenizer has no separator, or if there is no text on one side of the split.
    """
    made_from = {
        "corpus": source.corpus,
        "valid_corpus": source.valid_corpus,
        "text_field": source.text_field,
        "held_out_fraction": source.held_out_fraction,
        "tokenizer": tokenizer.fingerprint(),
    }
    found = _read(folder, made_from)
    if found is None:
        _write(folder, source, tokenizer, made_from, progress)
        found = _read(folder, made_from)
    if found is None:
        raise ValueError(f"{folder}: the files just written cannot be read back")
    return found


def _read(folder: Path, made_from: dict[str, Any]) -> tuple[Stream, Stream] | None:
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        if facts["made_from"] != made_from:
            return None
        dtype, found = np.dtype(facts["dtype"]), []
        for name in ("train", "held_out"):
            n_tokens, n_documents, n_bytes = (facts[name][key] for key in ("tokens", "documents", "bytes"))
            file = folder / f"{name}.bin"
            if file.stat().st_size != n_tokens * dtype.itemsize:
                return None
            found.append(Stream(np.memmap(file, dtype, mode="r"), n_documents, n_bytes))
    except (OSError, ValueError, KeyError):
        return None
    return found[0], found[1]


def _write(folder: Path, source: Source, tokenizer: Tokenizer, made_from: dict[str, Any], progress: bool) -> None:
    if tokenizer.eos_id is None:
        raise ValueError("the tokenizer has no separator token (<|endoftext|>, </s> or [SEP])")
    folder.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    counts = {name: {"tokens": 0, "documents": 0, "bytes": 0} for name in ("train", "held_out")}
    with ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / f"{name}.bin.tmp", "wb")) for name in counts}
        bar = stack.enter_context(
            tqdm(total=source.n_bytes(), disable=not progress, unit="B", unit_scale=True, desc="encoding")
        )
        for batch in _batches(source.parts()):
            ids = tokenizer.encode_batch([piece for _, _, piece in batch])
            for (name, is_first, piece), tokens in zip(batch, ids, strict=True):
                row = np.asarray([tokenizer.eos_id, *tokens] if is_first else tokens, dtype=dtype)
                row.tofile(files[name])
                n_bytes = len(piece.encode())
                counts[name]["tokens"] += len(row)
                counts[name]["documents"] += is_first
                counts[name]["bytes"] += n_bytes
                bar.update(n_bytes)
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    for name, count in counts.items():
        if count["bytes"] == 0:
            raise ValueError(f"{source.valid_corpus or source.corpus}: there is no {name.replace('_', '-')} text in it")
    (folder / FACTS).unlink(missing_ok=True)  # what it describes is about to change
    for name in counts:  # a run that has the old files mapped keeps them
        os.replace(folder / f"{name}.bin.tmp", folder / f"{name}.bin")
    facts = json.dumps({"made_from": made_from, "dtype": dtype.name, **counts}, indent=1)
    write_atomically(folder / FACTS, lambda path: path.write_text(facts + "\n", encoding="utf-8"))


def _batches(parts: Iterable[corpus.Part]) -> Iterator[list[tuple[str, bool, str]]]:
    """(stream, whether a document begins, text), enough of them at a time for all processors to have work."""
    batch, size = [], 0
    for part in parts:
        name = "held_out" if part.held_out else "train"
        for index, piece in enumerate(part.pieces):
            batch.append((name, index == 0, piece))
            size += len(piece)
            if size >= _BATCH:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


class Rows:
    """Windows of `length` tokens of a stream; row i of the run is a function of (seed, i) alone."""

    def __init__(self, stream: np.ndarray, length: int, seed: int):
        if len(stream) < 2 * length:
            raise ValueError(f"the corpus has {len(stream)} tokens; rows of {length} need at least twice as many")
        self.stream, self.length, self.seed = stream, length, seed
        self.per_epoch = len(stream) // length - 1
        self._epoch, self._starts = -1, np.empty(0, dtype=np.int64)

    def _row(self, index: int) -> np.ndarray:
        epoch, place = divmod(index, self.per_epoch)
        if epoch != self._epoch:
            # Each epoch tiles the stream anew, from another offset and in another order.
            rng = np.random.default_rng((self.seed, 1, epoch))
            self._starts = rng.integers(self.length) + self.length * rng.permutation(self.per_epoch)
            self._epoch = epoch
        start = self._starts[place]
        return self.stream[start : start + self.length]

    def batch(self, step: int, batch_size: int) -> Tensor:
        """int64 [batch_size, length]: the rows of step `step`."""
        rows = [self._row(step * batch_size + i) for i in range(batch_size)]
        return torch.from_numpy(np.stack(rows).astype(np.int64))


def held_out_rows(stream: np.ndarray, length: int, n_rows: int) -> Tensor:
    """int64 [n, length]: non-overlapping rows spread evenly over the stream; n = n_rows or all there are."""
    available = len(stream) // length
    if available < 1:
        raise ValueError(f"the held-out text has {len(stream)} tokens, fewer than one row of {length}")
    picked = np.unique(np.linspace(0, available - 1, min(n_rows, available)).round().astype(np.int64))
    return torch.from_numpy(np.stack([stream[i * length : (i + 1) * length] for i in picked]).astype(np.int64))
