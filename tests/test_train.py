"""The trainer: it learns, resumes bit for bit, stops cleanly and exports what it trained."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading

import numpy as np
import pytest
import torch

from esokern import text, train
from esokern.models.checkpoint import load_checkpoint, read_config
from esokern.train import TrainConfig


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A text of 40 short files that repeat themselves, so that a tiny network learns something at once."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(40):
        lines = [f"def function_{i % 7}(value):\n    return value + {j % 5}\n\n\n" for j in range(20)]
        (folder / f"{i:02}.py").write_text("".join(lines))
    return folder


@pytest.fixture(autouse=True)
def _one_thread():
    """Networks this small are slower on two threads than on one."""
    torch.set_num_threads(1)


@pytest.fixture
def config(corpus, tmp_path) -> TrainConfig:
    return TrainConfig(
        out=str(tmp_path / "run"), corpus=str(corpus), vocab_size=280, hidden_size=32, n_blocks=2, n_heads=2,
        length=32, cond_dim=4, batch_size=8, steps=6, warmup_steps=2, lr=5e-3, ema=0.9, eval_every=3, eval_rows=4,
        log_every=2, dropout=0.1, progress=False, infill_fraction=0.3,
    )  # fmt: skip


def states(trainer: train.Trainer) -> list[torch.Tensor]:
    moments = [v for o in trainer.optimizers for s in o.state.values() for v in s.values()]
    return [*trainer.network.state_dict().values(), *trainer.ema.shadow, *moments]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_resuming_is_bit_exact(config, optimizer):
    """Six steps at once, and three, a checkpoint, three more: the same weights, average and optimizer state."""
    # The rate depends on the planned steps, so it is held constant here.
    config = dataclasses.replace(config, schedule="constant", optimizer=optimizer)
    halves = dataclasses.replace(config, out=config.out + "-halves", steps=3)
    whole = train.train(config)
    train.train(halves)
    resumed = train.train(dataclasses.replace(halves, steps=6))
    assert resumed.step == whole.step == 6
    for a, b in zip(states(whole), states(resumed), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="hidden_size 32 -> 64"):
        train.Trainer(dataclasses.replace(halves, hidden_size=64))


@pytest.mark.parametrize("objective", ["esolm", "mdlm", "bd3lm", "ar"])
def test_it_learns_and_reports(config, objective):
    config = dataclasses.replace(config, objective=objective, steps=24, eval_every=12, dropout=0.0)
    before = train.Trainer(config).evaluate(4)
    trainer = train.train(config)
    after = trainer.evaluate(4)
    assert after < before - 0.2
    with open(f"{config.out}/metrics.jsonl") as file:
        records = [json.loads(line) for line in file]
    assert [r["step"] for r in records if "loss" in r] == list(range(2, 25, 2))
    assert [r["step"] for r in records if "held_out_bits_per_byte" in r] == [12, 24]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_a_checkpoint(config, number):
    config = dataclasses.replace(config, steps=100_000)
    timer = threading.Timer(1.0, os.kill, (os.getpid(), number))
    timer.start()
    stopped = train.train(config)
    timer.join()
    assert stopped.interrupted
    assert 0 < stopped.step < 100_000
    assert train.Trainer(config).step == stopped.step


def test_max_seconds(config):
    config = dataclasses.replace(config, steps=100_000, max_seconds=0.5, schedule_by="seconds")
    trainer = train.train(config)
    assert not trainer.interrupted
    assert trainer.seconds >= 0.5
    assert train.learning_rate(config, trainer.step, trainer.seconds) == 0


def test_export(config, tmp_path):
    status = train.main(
        [f"--{n.replace('_', '-')}={v}" for n, v in dataclasses.asdict(config).items() if not isinstance(v, bool)]
        + ["--no-progress", f"--export={tmp_path / 'model'}"]
    )
    assert status == 0
    folder = tmp_path / "model"
    assert {p.name for p in folder.iterdir()} == {
        "model.safetensors", "config.json", "tokenizer.json", "MODEL_CARD.md"
    }  # fmt: skip
    network = load_checkpoint(folder)
    averaged = load_checkpoint(f"{config.out}/checkpoint.pt")
    for a, b in zip(network.parameters(), averaged.parameters(), strict=True):
        assert torch.equal(a, b.half().float())
    facts = read_config(folder)
    assert facts["steps"] == 6
    assert facts["held_out_bits_per_byte"] > 0
    assert text.Tokenizer.from_file(folder).vocab_size == network.config.vocab_size
    card = (folder / "MODEL_CARD.md").read_text()
    assert "Eso-LM (B)" in card
    assert "held-out" in card
    with pytest.raises(ValueError, match="train first"):
        train.export(tmp_path, folder)


def test_rows_cover_each_epoch_once():
    stream = np.arange(1000, dtype=np.int32)
    rows = train.Rows(stream, 32, seed=5)
    epoch = torch.cat([rows.batch(step, 5) for step in range(rows.per_epoch // 5)])
    assert epoch.shape == (rows.per_epoch, 32)
    assert len(epoch.unique()) == epoch.numel()
    assert (epoch[:, 1:] - epoch[:, :-1] == 1).all()
    again = train.Rows(stream, 32, seed=5)
    assert torch.equal(again.batch(7, 5), rows.batch(7, 5))
    with pytest.raises(ValueError, match="40 tokens"):
        train.Rows(stream[:40], 32, seed=0)


def test_learning_rate():
    config = TrainConfig(steps=100, warmup_steps=10, final_lr=0.1)
    assert train.learning_rate(config, 0, 0) == pytest.approx(0.1)
    assert train.learning_rate(config, 100, 0) == pytest.approx(0.1)
    assert train.learning_rate(dataclasses.replace(config, schedule="constant"), 99, 0) == 1.0
    timed = dataclasses.replace(config, schedule_by="seconds", max_seconds=10.0)
    assert train.learning_rate(timed, 50, 5.0) == pytest.approx(0.55)


def test_settings_come_from_yaml_and_flags(tmp_path):
    pytest.importorskip("yaml")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("lr: 3e-4\nsteps: 7\nadaln: false\n")
    config, target = train.parse_config(["--config", str(recipe), "--steps", "9", "--export", "x"])
    assert (config.lr, config.steps, config.adaln, target) == (3e-4, 9, False, "x")
    recipe.write_text("learning_rate: 1\n")
    with pytest.raises(ValueError, match="unknown settings learning_rate"):
        train.parse_config(["--config", str(recipe)])
    recipe.write_text("steps: many\n")
    with pytest.raises(ValueError, match="steps is 'many'; a int is needed"):
        train.parse_config(["--config", str(recipe)])
    with pytest.raises(ValueError, match="objective is 'gan'"):
        train.parse_config(["--objective", "gan"])
