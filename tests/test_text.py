"""Corpus and tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from esokern import text

SAMPLE = 'def f(x):\n    """Doc."""\n    if x:\n        return x\n\n\nclass A:\n    pass  # ünïcode ✓\n'


@pytest.fixture(scope="module")
def tokenizer() -> text.Tokenizer:
    return text.train_tokenizer([SAMPLE * 50, Path(text.__file__).read_text()], 300)


def test_standard_library_is_deterministic_and_split_by_path():
    documents = text.standard_library()
    paths = [d.path for d in documents]
    assert paths == sorted(paths)
    assert len(set(paths)) == len(paths) > 300
    assert not any("test" in part for path in paths for part in path.split("/")[:-1] if part != "unittest")
    held_out = [d for d in documents if d.held_out]
    assert 0.02 < len(held_out) / len(documents) < 0.1
    assert text.Document("functools.py", "").held_out == text.Document("functools.py", "other").held_out


def test_standard_library_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="no usable Python source"):
        text.standard_library(tmp_path)
    with pytest.raises(ValueError, match="no files ending in"):
        text.text_files(tmp_path)
    with pytest.raises(ValueError, match="no file or folder"):
        text.text_files(tmp_path / "missing")


def test_encode_decode(tokenizer):
    assert tokenizer.vocab_size == 300
    assert tokenizer.mask_id == 299
    assert tokenizer.eos_id == 0
    for sample in (SAMPLE, "", "\n\n\n        x", "tabs\tand  runs   of spaces ", "日本語 🙂"):
        assert tokenizer.decode(tokenizer.encode(sample)) == sample
    assert len(tokenizer.encode("\n    ")) == 1  # a new line with its indent


def test_prompts_leave_white_space_to_the_model(tokenizer):
    assert tokenizer.encode_prompt("if x:\n    ") == tokenizer.encode("if x:")
    assert tokenizer.decode(tokenizer.encode_prompt("\n")) == "\n"


def test_user_text_cannot_make_special_tokens(tokenizer):
    sample = f"a {text.MASK} b {text.EOS}{text.MASK}"
    ids = tokenizer.encode(sample)
    assert tokenizer.mask_id not in ids
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == sample


def test_masks_show_as_symbols(tokenizer):
    mask = tokenizer.mask_id
    ids = [mask, *tokenizer.encode("if"), mask, mask, *tokenizer.encode(" x:"), 0]
    assert tokenizer.decode(ids) == "░if░░ x:"
    assert tokenizer.decode(np.array(ids), mask_symbol="_") == "_if__ x:"


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        again = text.Tokenizer.from_file(path)
        assert again.encode(SAMPLE) == tokenizer.encode(SAMPLE)
        assert again.mask_id == tokenizer.mask_id
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer"):
        text.Tokenizer.from_file(tmp_path)
    with pytest.raises(ValueError, match="no tokenizer at"):
        text.Tokenizer.from_file(tmp_path / "missing.json")


def test_a_vocabulary_without_a_mask_gets_one():
    raw = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    foreign = text.Tokenizer(raw)
    assert (foreign.mask_id, foreign.vocab_size, foreign.eos_id) == (3, 4, None)
    assert foreign.decode([0, 3, 1]).replace(" ", "") == "a░b"


def test_bytes_are_counted(tokenizer):
    sample = SAMPLE + "\n✓ x"
    assert tokenizer.n_bytes()[[tokenizer.eos_id, *tokenizer.encode(sample), tokenizer.mask_id]].sum() == len(
        sample.encode()
    )


def test_bytes_of_sentencepiece_vocabularies():
    vocabulary = {"<unk>": 0, "▁": 1, "x": 2, "é": 3, "▁x": 4, "<0xC3>": 5, "<0xA9>": 6}
    raw = tokenizers.Tokenizer(models.BPE(vocabulary, [("▁", "x")], unk_token="<unk>"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    assert text.Tokenizer(raw).n_bytes().tolist() == [5, 1, 1, 2, 2, 1, 1, 0]


def test_a_vocabulary_of_bytes():
    """One token per byte, so of ASCII one per character."""
    tokenizer = text.byte_tokenizer()
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.mask_id) == (258, 0, 257)
    every = "".join(map(chr, range(128))) + "é✓🙂"
    ids = tokenizer.encode(every)
    assert len(ids) == len(every.encode())
    assert len(set(ids[:128])) == 128
    assert tokenizer.decode(ids) == every
    assert ids == tokenizer._raw.encode(every).ids  # the table agrees with the file that is saved
    assert tokenizer.decode(tokenizer.encode(text.MASK + text.EOS)) == text.MASK + text.EOS  # text, not special ids
    assert (tokenizer.n_bytes()[1:257] == 1).all()
    assert tokenizer.fingerprint() == text.byte_tokenizer().fingerprint()


def test_encoding_a_batch(tokenizer):
    samples = [SAMPLE, "", f"a {text.MASK}", "tabs\t and  spaces"]
    assert tokenizer.encode_batch(samples) == [tokenizer.encode(sample) for sample in samples]
    assert tokenizer.encode_batch(samples[:2]) == [tokenizer.encode(sample) for sample in samples[:2]]
    assert tokenizer.fingerprint() != text.byte_tokenizer().fingerprint()


def test_held_out_documents_are_chosen_by_name():
    names = [f"{i}.txt" for i in range(2000)]
    assert 0.03 < sum(map(text.is_held_out, names)) / 2000 < 0.07
    for fraction in (0.1, 0.5):
        share = sum(text.is_held_out(name, fraction) for name in names) / 2000
        assert abs(share - fraction) < 0.04


def test_vocabulary_sizes_are_checked():
    with pytest.raises(ValueError, match="at least 258"):
        text.train_tokenizer([SAMPLE], 257)
    with pytest.raises(ValueError, match="yields only"):
        text.train_tokenizer(["ab"], 2000)
