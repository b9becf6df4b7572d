"""bench/decoders.py in miniature: the peer that needs no checkouts decides the same tokens as ours."""

import time

import pytest
import torch

pytest.importorskip("transformers", reason="bench/decoders.py runs models of transformers")

import decoders

SIZE = decoders.Size(hidden=32, layers=2, heads=2, vocab=99)


@pytest.fixture(scope="module")
def models():
    return decoders.make_models(None, SIZE)


@pytest.mark.parametrize("batch", [1, 3])
def test_eager_decoder_is_llada(models, batch):
    case = decoders.Case(cache=None, temperature=0.0, steps=16)
    with torch.inference_mode():
        rows = decoders.measure(models, case, batch, rounds=1, clock="wall").rows
    assert [row["candidate"] for row in rows] == ["eager LLaDA", "esokern"]
    for row in rows:
        assert row["passes"] == 16
        assert row["same_tokens"] == 1.0
        parts = row["network_us"] + (row["head_us"] or 0) + row["overhead_us"]
        assert 0 < row["network_us"] < row["median_us"] == pytest.approx(parts)
    assert rows[0]["head_us"] > 0
    assert rows[1]["head_us"] is None  # a part of sampling
    assert rows[1]["ratio_to_best_alternative"] == pytest.approx(rows[0]["median_us"] / rows[1]["median_us"])


def test_cached_cases_have_no_peer_without_checkouts(models):
    prompt = torch.zeros(1, decoders.PROMPT, dtype=torch.int64)
    assert not list(decoders.peers(models, prompt, "dual", 16, 0.0, None, time.perf_counter))
