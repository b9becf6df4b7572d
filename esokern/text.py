"""Text: a corpus every machine has, and a byte-level BPE tokenizer whose last id is the mask.

The corpus is the source of Python's own standard library, in sorted path order, without tests, generated tables and
non-text data. A file belongs to the held-out part if a hash of its relative path says so, so the split does not depend
on what else is installed.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

EOS = "<|endoftext|>"
MASK = "<|mask|>"
MASK_SYMBOL = "░"

# Folders that hold no prose or code of use: tests, generated tables, bundled wheels, and copies of other folders.
SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test", "_test", "encodings",
        "pydoc_data", "lib2to3", "ensurepip", "lib-dynload",
    }
)  # fmt: skip
SKIPPED_FILES = frozenset({"keyword.py", "token.py", "_opcode_metadata.py", "stringprep.py"})
HELD_OUT_PARTS = 20  # one file in this many is held out


@dataclass(frozen=True)
class Document:
    """One file of the corpus: its path relative to the root, and its text."""

    path: str
    text: str

    @property
    def held_out(self) -> bool:
        return int(hashlib.sha256(self.path.encode()).hexdigest(), 16) % HELD_OUT_PARTS == 0


def standard_library(root: str | Path | None = None, max_bytes: int = 400_000) -> list[Document]:
    """The corpus: every usable ``.py`` file under `root` (default: this interpreter's standard library).

    Files that are not UTF-8 or ASCII-poor (generated tables) and files over `max_bytes` are left out.
    Raises ValueError if nothing is left.
    """
    base = Path(root if root is not None else sysconfig.get_paths()["stdlib"])
    documents = []
    for path in sorted(base.rglob("*.py"), key=lambda p: p.relative_to(base).as_posix()):
        relative = path.relative_to(base)
        folders = relative.parts[:-1]
        if any(part in SKIPPED_FOLDERS or part.startswith("config-") for part in folders):
            continue
        if path.name in SKIPPED_FILES or path.name.startswith(("_sysconfigdata", "test_")):
            continue
        if path.stat().st_size > max_bytes:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if len(text) < 200 or _is_table(text):
            continue
        documents.append(Document(relative.as_posix(), text.expandtabs(8)))
    if not documents:
        raise ValueError(f"no usable Python source under {base}; pass the folder of a standard library as `root`")
    return documents


def _is_table(text: str) -> bool:
    """Generated data: few letters, or hardly any plain ASCII."""
    sample = text[:200_000]
    letters = sum(c.isalpha() for c in sample)
    ascii_share = sum(c < "\x7f" for c in sample)
    return letters < 0.4 * len(sample) or ascii_share < 0.97 * len(sample)


def folder_of_text(root: str | Path, suffixes: Sequence[str] = (".txt", ".md", ".py")) -> list[Document]:
    """Any folder of text files (or one file) as a corpus, in sorted path order."""
    base = Path(root)
    if base.is_file():
        return [Document(base.name, base.read_text(encoding="utf-8", errors="replace"))]
    documents = [
        Document(p.relative_to(base).as_posix(), p.read_text(encoding="utf-8", errors="replace"))
        for p in sorted(base.rglob("*"))
        if p.is_file() and p.suffix in suffixes
    ]
    if not documents:
        raise ValueError(f"no files ending in {', '.join(suffixes)} under {base}")
    return documents


# A run of blank lines with the indent that follows is one piece, so that "new line, eight spaces" can be one token.
_PIECES = r"\n+ *| ?[A-Za-z]+| ?[0-9]| ?[^\sA-Za-z0-9]+|\s+"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with `vocab_size` ids in all: id 0 separates documents, the last id is the mask.

    `vocab_size` is at least 258 (256 bytes, separator, mask).
    """
    if vocab_size < 258:
        raise ValueError(f"vocab_size is {vocab_size}; a byte-level tokenizer needs at least 258")
    raw = tokenizers.Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=24,
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    raw.add_special_tokens([AddedToken(MASK, special=True, normalized=False)])
    if raw.token_to_id(MASK) != vocab_size - 1:
        raise ValueError(
            f"vocab_size is {vocab_size}, but the text yields only {raw.get_vocab_size()} ids; ask for fewer"
        )
    return Tokenizer(raw)


class Tokenizer:
    """A `tokenizers` tokenizer plus what a masked-diffusion model needs: `mask_id` (the last id) and `eos_id`.

    A vocabulary without a mask token (GPT-2's, say) gets one appended: ``mask_id == len(vocabulary)``.
    """

    def __init__(self, raw: tokenizers.Tokenizer):
        self._raw = raw
        ids = raw.get_vocab_size(with_added_tokens=True)
        known = raw.token_to_id(MASK)
        if known is not None and known != ids - 1:
            raise ValueError(f"the tokenizer's {MASK} has id {known}; the mask must be the last id, {ids - 1}")
        self.mask_id: int = ids if known is None else known
        self.vocab_size: int = self.mask_id + 1  # the mask included
        found = (raw.token_to_id(name) for name in (EOS, "</s>", "[SEP]"))
        self.eos_id: int | None = next((i for i in found if i is not None), None)

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Read a ``tokenizer.json``, or the one in a folder. ValueError if it is missing or not one."""
        file = Path(path)
        if file.is_dir():
            file = file / "tokenizer.json"
        if not file.is_file():
            raise ValueError(f"no tokenizer at {file}")
        try:
            return cls(tokenizers.Tokenizer.from_file(str(file)))
        except ValueError:
            raise
        except Exception as error:  # the library raises bare Exception for bad JSON
            raise ValueError(f"{file} is not a tokenizers JSON file: {error}") from error

    def save(self, path: str | Path) -> None:
        self._raw.save(str(path), pretty=False)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`. Special tokens' names inside the text count as text, never as special tokens."""
        if not text:
            return []
        # Pieces between special names are encoded separately, the names themselves byte by byte, so user text cannot
        # smuggle in a mask or a separator.
        for name in (MASK, EOS):
            if name in text:
                pieces = text.split(name)
                ids = self.encode(pieces[0])
                for piece in pieces[1:]:
                    ids += self.encode(name[:1]) + self.encode(name[1:]) + self.encode(piece)
                return ids
        return self._raw.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text that a model continues, without its trailing white space.

        A new line and the indent after it are one token, as a space and the word after it are. A prompt that ends in
        half of such a token is one that the model has not seen; left to the model, the white space comes out right.
        """
        return self.encode(text.rstrip() or text)

    def decode(self, ids: Sequence[int], mask_symbol: str = MASK_SYMBOL) -> str:
        """Text of `ids`; each mask shows as `mask_symbol`, other special tokens as nothing."""
        text: list[str] = []
        run: list[int] = []
        for token in [int(i) for i in ids] + [self.mask_id]:
            if token != self.mask_id:
                run.append(token)
                continue
            if run:
                text.append(self._raw.decode(run, skip_special_tokens=True))
                run = []
            text.append(mask_symbol)
        text.pop()  # the mask added as an end mark
        return "".join(text)

    def n_bytes(self) -> np.ndarray:
        """int64 [vocab_size]: UTF-8 bytes each id stands for (0 for special ids); byte-level vocabularies only."""
        sizes = np.zeros(self.vocab_size, dtype=np.int64)
        special = {i for i, token in self._raw.get_added_tokens_decoder().items() if token.special}
        for piece, index in self._raw.get_vocab(with_added_tokens=True).items():
            if index not in special:
                sizes[index] = len(piece)  # byte-level: one character of the piece is one byte
        return sizes


def encode_corpus(documents: Iterable[Document], tokenizer: Tokenizer) -> np.ndarray:
    """int32 [T]: all documents joined, each preceded by the separator."""
    if tokenizer.eos_id is None:
        raise ValueError("the tokenizer has no separator token (<|endoftext|>, </s> or [SEP])")
    parts: list[int] = []
    for document in documents:
        parts.append(tokenizer.eos_id)
        parts.extend(tokenizer.encode(document.text))
    return np.asarray(parts, dtype=np.int32)
