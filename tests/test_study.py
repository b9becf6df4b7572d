"""The study: its parts on two models in miniature, and its records against README."""

from __future__ import annotations

import json
import random

import pytest
import torch

import study
import study_report
from esokern import train
from harness import RESULTS
from report import README

ROWS = [json.loads(line) for line in (RESULTS / "study.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """AR and Eso-LM, a few steps each, by the study's own workers."""
    folder = tmp_path_factory.mktemp("study")
    letters = random.Random(0).choices("abcde \n", k=4000)
    (folder / "text.txt").write_text("".join(letters))
    found = []
    for model in ("AR", "Eso-LM (B) 0.5"):
        recipe = (
            study.RECIPE
            | study.MODELS[model]
            | {"hidden_size": 48, "n_blocks": 1, "length": 16, "steps": 3, "log_every": 1}
        )
        config = train.TrainConfig(
            corpus=str(folder / "text.txt"), tokenizer="bytes", out=str(folder / model), progress=False, **recipe
        )
        found.append(study.Job("text", model, folder / model, config))
    study.train_all(found, workers=1)
    return found


def test_training_is_done_once(trained, monkeypatch):
    assert all(job.done and job.steps == 3 for job in trained)
    monkeypatch.setattr(study, "ProcessPoolExecutor", None)  # what would train again
    study.train_all(trained, workers=1)


def test_bounds(trained):
    ar, esolm = (study.bounds(job)["estimates"] for job in trained)
    assert [estimate["kind"] for estimate in ar] == ["exact"]
    assert [estimate["samples"] for estimate in esolm] == [study.DRAWS, 1, 2, 4, 8, 16, 32]
    for estimate in (*ar, *esolm):  # hardly trained: near the uniform distribution
        assert 5 < estimate["perplexity"] < 300


@pytest.mark.parametrize("index", [0, 1])
def test_samples(trained, index):
    job = trained[index]
    sampler, options = [("autoregressive", {}), ("esolm", {"alpha_0": 0.5, "num_steps": 4})][index]
    first = torch.zeros(study.NUM_SAMPLES, 1, dtype=torch.int64)
    point = study.sample(job, sampler, options, trained[0].network(), first)
    assert 1 <= point["nfe"] <= 16
    assert point["seconds"] > 0
    assert 1 < point["perplexity"] < 1000
    assert 0 < point["distinct_1"] <= 1


def test_results_are_computed_once(tmp_path):
    path = tmp_path / "results.jsonl"
    results = study.Results(path)
    results.once(lambda: {"value": 1}, stage="a", model="x")
    study.Results(path).once(lambda: pytest.fail("computed twice"), stage="a", model="x")
    assert study.Results(path).find(model="x")["value"] == 1


def test_records_hold_the_whole_study():
    for corpus in ("tinyshakespeare", "standard library"):
        models = {row["model"] for row in ROWS if row["stage"] == "likelihood" and row["corpus"] == corpus}
        assert models == set(study.MODELS)
    for model, _, options in study.settings():
        assert any({"stage": "samples", "model": model, **options}.items() <= row.items() for row in ROWS)


def test_readme_shows_the_records():
    text = README.read_text()
    for table in study_report.tables(ROWS).values():
        assert table in text
