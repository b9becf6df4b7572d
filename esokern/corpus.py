"""Where training text comes from: the standard library, files, folders, Hugging Face datasets; and what is held out.

A corpus is read document by document and never held in memory as a whole. Of several documents, whole ones are held
out, chosen by a hash of their names, so the split does not depend on what else there is; a corpus of one document (or
of so few that none or all would be held out) gives the end of each.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from esokern import text

DEFAULT_TAIL = 0.1  # of a text that is split by characters
HUGGING_FACE = "hf:"
_PIECE = 1 << 16  # bytes read at a time
_LONGEST_LINE = 1 << 20  # a longer one is cut anywhere


@dataclass(frozen=True)
class Part:
    """A document, or the part of one that is on the same side of the split: its text in pieces, in order."""

    held_out: bool
    pieces: Iterator[str]


def parts(name: str, *, text_field: str = "text", held_out_fraction: float = 0.0) -> Iterator[Part]:
    """The documents of a corpus, split.

    Args:
        name: "stdlib", a file, a folder (its .txt, .md and .py files), or "hf:NAME[:CONFIG][:SPLIT]", a dataset of the
            Hugging Face hub or of a local folder, by default its split "train".
        text_field: the column of a Hugging Face dataset.
        held_out_fraction: share of the documents, or of a single document's characters, in [0, 1); 0 = one document in
            20, or the last tenth of a single one.

    Raises ValueError if there is no such corpus, or no text in it.
    """
    documents = _open(name, text_field)
    held_out = [text.is_held_out(documents.name(index), held_out_fraction) for index in range(len(documents))]
    if any(held_out) and not all(held_out):
        for index, chosen in enumerate(held_out):
            yield Part(chosen, documents.pieces(index))
        return
    cut = 1 - (held_out_fraction or DEFAULT_TAIL)
    for index in range(len(documents)):
        yield Part(False, documents.pieces(index, 0.0, cut))
        yield Part(True, documents.pieces(index, cut, 1.0))


def whole(name: str, *, held_out: bool, text_field: str = "text") -> Iterator[Part]:
    """The documents of a corpus, all on one side."""
    documents = _open(name, text_field)
    for index in range(len(documents)):
        yield Part(held_out, documents.pieces(index))


def n_bytes(name: str) -> int | None:
    """Bytes of the text, where that is known without reading it."""
    if name == "stdlib" or name.startswith(HUGGING_FACE):
        return None
    return sum(path.stat().st_size for path in _Files(name).paths)


def _open(name: str, text_field: str) -> _Files | _Texts | _HuggingFace:
    if name == "stdlib":
        return _Texts(text.standard_library())
    if name.startswith(HUGGING_FACE):
        return _HuggingFace(name, text_field)
    return _Files(name)


def _slice(whole: str, begin: float, end: float) -> str:
    return whole[int(begin * len(whole)) : int(end * len(whole))]


class _Texts:
    """Documents in memory."""

    def __init__(self, documents: Sequence[text.Document]):
        self.documents = documents

    def __len__(self) -> int:
        return len(self.documents)

    def name(self, index: int) -> str:
        return self.documents[index].path

    def pieces(self, index: int, begin: float = 0.0, end: float = 1.0) -> Iterator[str]:
        yield _slice(self.documents[index].text, begin, end)


class _Files:
    """One file, or the files of a folder in sorted order of their paths, read piece by piece."""

    def __init__(self, name: str):
        self.base = Path(name)
        self.paths = text.text_files(self.base)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        path = self.paths[index]
        return path.name if path == self.base else path.relative_to(self.base).as_posix()

    def pieces(self, index: int, begin: float = 0.0, end: float = 1.0) -> Iterator[str]:
        """The share [begin, end) of the bytes, cut between characters. A piece ends before new lines, where there are
        any, so that a token seldom spans two."""
        path = self.paths[index]
        size = path.stat().st_size
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        with open(path, "rb") as file:
            start, stop = (_character_start(file, int(share * size)) for share in (begin, end))
            file.seek(start)
            kept = ""
            while start < stop:
                block = file.read(min(_PIECE, stop - start))
                if not block:
                    raise ValueError(f"{path} became shorter while it was read")
                start += len(block)
                kept += decoder.decode(block, final=start == stop)
                cut = len(kept) if start == stop or len(kept) > _LONGEST_LINE else _before_last_line(kept)
                if cut:
                    yield kept[:cut]
                    kept = kept[cut:]


def _before_last_line(text: str) -> int:
    """Where the line breaks before the last line with something in it begin; 0 if there are none."""
    return len(text[: text.rstrip("\n").rfind("\n") + 1].rstrip("\n"))


def _character_start(file, offset: int) -> int:
    """The first offset >= this one at which a UTF-8 character starts."""
    file.seek(offset)
    following = file.read(3)
    return offset + next((i for i, byte in enumerate(following) if byte & 0xC0 != 0x80), len(following))


class _HuggingFace:
    """A column of a dataset, row by row."""

    def __init__(self, name: str, field: str):
        try:
            import datasets
        except ImportError as error:
            raise ValueError(f"--corpus {name} needs the package datasets: pip install datasets") from error
        path, *rest = name.removeprefix(HUGGING_FACE).split(":")
        if not path or len(rest) > 2:
            raise ValueError(f"--corpus {name}: must be {HUGGING_FACE}NAME[:CONFIG][:SPLIT]")
        config = rest[0] if rest and rest[0] else None
        split = rest[1] if len(rest) == 2 else "train"
        try:
            self.rows = datasets.load_dataset(path, config, split=split)
        except Exception as error:  # the library's own kinds, of which there are many
            raise ValueError(f"--corpus {name}: {type(error).__name__}: {error}") from error
        if field not in self.rows.column_names:
            raise ValueError(f"--text-field {field}: {name} has the columns {', '.join(self.rows.column_names)}")
        if len(self.rows) == 0:
            raise ValueError(f"--corpus {name}: there are no rows in it")
        self.field = field

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return str(index)

    def pieces(self, index: int, begin: float = 0.0, end: float = 1.0) -> Iterator[str]:
        yield _slice(self.rows[index][self.field], begin, end)
