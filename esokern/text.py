"""Text: a corpus every machine has, and tokenizers whose last id is the mask: bytes, byte-level BPE, or any other.

The corpus is the source of Python's own standard library, in sorted path order, without tests, generated tables and
non-text data. A file belongs to the held-out part if a hash of its relative path says so, so the split does not depend
on what else is installed.
"""

from __future__ import annotations

import hashlib
import re
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
        return is_held_out(self.path)


def is_held_out(path: str, fraction: float = 0.0) -> bool:
    """Whether the document of this name belongs to the held-out part; fraction 0 = one in 20."""
    digest = int(hashlib.sha256(path.encode()).hexdigest(), 16)
    return digest % HELD_OUT_PARTS == 0 if fraction == 0 else digest < fraction * 2**256


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


def text_files(root: str | Path, suffixes: Sequence[str] = (".txt", ".md", ".py")) -> list[Path]:
    """The text files of a folder in the order of their paths, or the one file. ValueError if there are none."""
    base = Path(root)
    if base.is_file():
        return [base]
    if not base.is_dir():
        raise ValueError(f"there is no file or folder {base}")
    files = [p for p in base.rglob("*") if p.is_file() and p.suffix in suffixes]
    if not files:
        raise ValueError(f"no files ending in {', '.join(suffixes)} under {base}")
    return sorted(files, key=lambda p: p.relative_to(base).as_posix())


# A byte that no other piece of a SentencePiece vocabulary covers.
_BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")

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


def byte_tokenizer() -> Tokenizer:
    """258 ids: the separator, the 256 bytes, the mask. For ASCII text that is one token per character."""
    return train_tokenizer((), 258)


def _byte_ids(raw: tokenizers.Tokenizer) -> np.ndarray | None:
    """int64 [256]: the id of every byte, if the vocabulary is bytes and nothing else; a table is faster than BPE."""
    special = {token.content for token in raw.get_added_tokens_decoder().values() if token.special}
    pieces = {piece: index for piece, index in raw.get_vocab().items() if piece not in special}
    if len(pieces) != 256 or pieces.keys() != set(pre_tokenizers.ByteLevel.alphabet()):
        return None
    # Printable bytes stand for themselves, the others are the characters from 256 on (the convention of GPT-2).
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return np.array([pieces[chr(b if b in printable else 256 + others.index(b))] for b in range(256)])


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
        self._byte_ids = _byte_ids(raw)
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

    def fingerprint(self) -> str:
        """A hash of everything that decides how text is encoded."""
        return hashlib.sha256(self._raw.to_str().encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of `text`. Special tokens' names inside the text count as text, never as special tokens."""
        if not text:
            return []
        if self._byte_ids is not None:
            return self._byte_ids[np.frombuffer(text.encode(), dtype=np.uint8)].tolist()
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

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all processors."""
        if self._byte_ids is not None or any(name in text for text in texts for name in (MASK, EOS)):
            return [self.encode(text) for text in texts]
        return [encoding.ids for encoding in self._raw.encode_batch_fast(texts, add_special_tokens=False)]

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
        """int64 [vocab_size]: UTF-8 bytes each id stands for, 0 for special ids.

        Exact for byte-level vocabularies (GPT-2's, and those trained here) and for SentencePiece's; of others, such as
        WordPiece's, which drop white space, it counts what they keep.
        """
        byte_level = "ByteLevel" in str(self._raw.decoder)
        sizes = np.zeros(self.vocab_size, dtype=np.int64)
        special = {i for i, token in self._raw.get_added_tokens_decoder().items() if token.special}
        for piece, index in self._raw.get_vocab(with_added_tokens=True).items():
            if index in special:
                continue
            if byte_level:
                sizes[index] = len(piece)  # one character of the piece is one byte
            elif _BYTE_PIECE.fullmatch(piece):
                sizes[index] = 1
            else:
                sizes[index] = len(piece.replace("\u2581", " ").removeprefix("##").encode())
        return sizes
