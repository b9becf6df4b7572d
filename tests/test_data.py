"""Corpora and their split, the token streams on disk, and the rows taken from them."""

from __future__ import annotations

import itertools
import json
import sys
import types

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import models

from esokern import corpus, data, text
from esokern.data import Source

BYTES = text.byte_tokenizer()


def sides(name: str, **options) -> tuple[list[str], list[str]]:
    """The training and the held-out documents of a corpus."""
    found = ([], [])
    for part in corpus.parts(name, **options):
        found[part.held_out].append("".join(part.pieces))
    return found


@pytest.fixture
def many(tmp_path):
    folder = tmp_path / "many"
    (folder / "sub").mkdir(parents=True)
    for i in range(60):
        (folder / ("sub" if i % 2 else ".") / f"{i:02}.txt").write_text(f"document {i}\n")
    (folder / "picture.png").write_bytes(b"\xff\x00")
    return folder


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the package `datasets`: two data sets and a record of how they were asked for."""

    class Dataset(list):
        column_names = ("text", "title")

    asked = []

    def load_dataset(path, config, split):
        asked.append((path, config, split))
        if path == "missing":
            raise FileNotFoundError("no such data set")
        rows = {"one": 1, "none": 0}.get(path, 200)
        return Dataset({"text": f"row {i} of {path}\n" * 5, "title": f"title {i}"} for i in range(rows))

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


def test_whole_documents_are_held_out(many):
    train, held_out = sides(str(many))
    assert sorted(train + held_out) == sorted(f"document {i}\n" for i in range(60))
    paths = [p.relative_to(many).as_posix() for p in text.text_files(many)]
    expected = [(many / path).read_text() for path in paths if text.is_held_out(path)]
    assert held_out == expected != []
    _, half = sides(str(many), held_out_fraction=0.5)
    assert 20 < len(half) < 40


@pytest.mark.parametrize("fraction", [0.0, 0.25])
def test_one_file_is_split_by_characters(tmp_path, fraction):
    file = tmp_path / "one.txt"
    whole = "".join(f"line {i}, ascii\n" for i in range(1000))
    file.write_text(whole)
    train, held_out = sides(str(file), held_out_fraction=fraction)
    cut = int(len(whole) * (1 - (fraction or 0.1)))
    assert (train, held_out) == ([whole[:cut]], [whole[cut:]])


@pytest.mark.parametrize("piece", [1, 3, 7, 64])
def test_files_are_read_in_pieces(tmp_path, monkeypatch, piece):
    """Whatever the size of a read, no character is cut in two, and pieces end before a new line where they can."""
    monkeypatch.setattr(corpus, "_PIECE", piece)
    whole = "ünïcode ✓\n\n  🙂🙂 \nlast line without an end ✓" * 3
    file = tmp_path / "one.txt"
    file.write_text(whole, encoding="utf-8")
    parts = list(corpus.parts(str(file), held_out_fraction=0.3))
    pieces = [list(part.pieces) for part in parts]
    assert "".join(pieces[0] + pieces[1]) == whole
    assert 0.6 < len("".join(pieces[0]).encode()) / len(whole.encode()) < 0.75
    if piece == 64:
        assert len(pieces[0]) > 1
        for before, after in itertools.pairwise(pieces[0]):
            assert after.startswith("\n")
            assert not before.endswith("\n")
    monkeypatch.setattr(corpus, "_LONGEST_LINE", 100)
    file.write_text("x" * 1000)  # no line to end a piece at
    (part, _) = corpus.parts(str(file))
    pieces = list(part.pieces)
    assert "".join(pieces) == "x" * 900
    assert max(map(len, pieces)) <= 100 + piece
    file.write_bytes(b"not \xff UTF-8")
    assert "".join("".join(part.pieces) for part in corpus.parts(str(file))) == "not \ufffd UTF-8"


def test_hugging_face_datasets(hub):
    train, held_out = sides("hf:org/name")
    assert len(train + held_out) == 200
    assert len(held_out) > 2
    assert sides("hf:org/name:small:validation", text_field="title")[0][0].startswith("title")
    assert len(sides("hf:one")[1]) == 1  # a single row, split by characters
    assert hub == [("org/name", None, "train"), ("org/name", "small", "validation"), ("one", None, "train")]
    for name, message in {
        "hf:": "must be hf:NAME",
        "hf:a:b:c:d": "must be hf:NAME",
        "hf:missing": "FileNotFoundError: no such data set",
        "hf:none": "no rows",
    }.items():
        with pytest.raises(ValueError, match=message):
            sides(name)
    with pytest.raises(ValueError, match=r"--text-field body: .* columns text, title"):
        sides("hf:org/name", text_field="body")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # importing it now fails
    with pytest.raises(ValueError, match="pip install datasets"):
        sides("hf:name")


def decoded(stream: data.Stream, tokenizer: text.Tokenizer = BYTES) -> list[str]:
    starts = np.flatnonzero(stream.tokens == tokenizer.eos_id)
    return [tokenizer.decode(part.tolist()) for part in np.split(stream.tokens, starts)[1:]]


def test_streams_hold_the_corpus(many, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_BATCH", 30)
    train, held_out = data.streams(tmp_path / "streams", Source(str(many)), BYTES)
    expected = sides(str(many))
    assert (decoded(train), decoded(held_out)) == expected
    for stream, documents in zip((train, held_out), expected, strict=True):
        assert isinstance(stream.tokens, np.memmap)
        assert stream.tokens.dtype == np.uint16
        assert (stream.n_documents, stream.n_bytes) == (len(documents), sum(len(d) for d in documents))


def test_streams_are_made_once(many, tmp_path, monkeypatch):
    folder = tmp_path / "streams"
    first, _ = data.streams(folder, Source(str(many)), BYTES)
    with monkeypatch.context() as patch:
        patch.setattr(text.Tokenizer, "encode_batch", None)  # calling it would fail
        again, _ = data.streams(folder, Source(str(many)), BYTES)
        assert np.array_equal(first.tokens, again.tokens)
    # Another source, another tokenizer, a missing or short file: made anew.
    other, _ = data.streams(folder, Source(str(many), held_out_fraction=0.5), BYTES)
    assert len(other.tokens) < len(first.tokens)
    trained = text.train_tokenizer(["document 1\n"] * 9, 262)
    assert decoded(data.streams(folder, Source(str(many)), trained)[0], trained) == decoded(first)
    with open(folder / "train.bin", "rb+") as file:
        file.truncate(10)
    assert decoded(data.streams(folder, Source(str(many)), trained)[0], trained) == decoded(first)
    (folder / "streams.json").write_text('{"made_fr')
    assert decoded(data.streams(folder, Source(str(many)), BYTES)[0]) == decoded(first)


def test_an_interrupted_writer_changes_nothing(many, tmp_path, monkeypatch):
    folder = tmp_path / "streams"
    before = decoded(data.streams(folder, Source(str(many)), BYTES)[0])

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(text.Tokenizer, "encode_batch", fail)
    with pytest.raises(KeyboardInterrupt):
        data.streams(folder, Source(str(many), held_out_fraction=0.5), BYTES)
    assert decoded(data.streams(folder, Source(str(many)), BYTES)[0]) == before
    (folder / "streams.json").unlink()  # as between the two renames: what is there counts for nothing
    with pytest.raises(KeyboardInterrupt):
        data.streams(folder, Source(str(many)), BYTES)


def test_an_explicit_held_out_corpus(many, tmp_path):
    valid = tmp_path / "valid.md"
    valid.write_text("held out")
    train, held_out = data.streams(tmp_path / "streams", Source(str(many), str(valid)), BYTES)
    assert len(decoded(train)) == 60
    assert decoded(held_out) == ["held out"]


def test_large_vocabularies_take_four_bytes(tmp_path):
    vocabulary = {text.EOS: 0, "[UNK]": 1} | {f"w{i}": i for i in range(2, 70_000)}
    raw = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    file = tmp_path / "one.txt"
    file.write_text("w69999 w5 w6 w7 w8 w9 w10 w11 w12 w13")
    train, _ = data.streams(tmp_path / "streams", Source(str(file)), text.Tokenizer(raw))
    assert train.tokens.dtype == np.uint32
    assert train.tokens[1] == 69_999
    assert json.loads((tmp_path / "streams" / "streams.json").read_text())["dtype"] == "uint32"


def test_what_cannot_be_encoded_is_said(tmp_path):
    raw = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="no separator token"):
        data.streams(tmp_path / "streams", Source(str(tmp_path)), text.Tokenizer(raw))
    with pytest.raises(ValueError, match="no train text"):
        data.streams(tmp_path / "streams", Source(str(tmp_path)), BYTES)
    with pytest.raises(ValueError, match="no file or folder"):
        data.streams(tmp_path / "streams", Source(str(tmp_path / "missing")), BYTES)


def test_rows_cover_each_epoch_once():
    stream = np.arange(1000, dtype=np.uint16)
    rows = data.Rows(stream, 32, seed=5)
    epoch = torch.cat([rows.batch(step, 5) for step in range(rows.per_epoch // 5)])
    assert epoch.shape == (rows.per_epoch, 32)
    assert len(epoch.unique()) == epoch.numel()
    assert (epoch[:, 1:] - epoch[:, :-1] == 1).all()
    again = data.Rows(stream, 32, seed=5)
    assert torch.equal(again.batch(7, 5), rows.batch(7, 5))
    with pytest.raises(ValueError, match="40 tokens"):
        data.Rows(stream[:40], 32, seed=0)


def test_held_out_rows_do_not_overlap():
    rows = data.held_out_rows(np.arange(1000, dtype=np.uint16), 32, 5)
    assert rows.shape == (5, 32)
    assert rows[0, 0] == 0
    assert rows[-1, 0] == 30 * 32
    assert len(data.held_out_rows(np.arange(1000), 32, 10**6)) == 31
    with pytest.raises(ValueError, match="20 tokens, fewer than one row of 32"):
        data.held_out_rows(np.arange(20), 32, 1)
