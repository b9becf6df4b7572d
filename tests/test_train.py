"""The trainer: it learns, resumes bit for bit, stops cleanly and exports what it trained."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch

from esokern import objectives, text, train
from esokern.models.checkpoint import load_checkpoint, read_config, save_checkpoint
from esokern.models.network import Network, NetworkConfig
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


def lines(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


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
    records = lines(f"{config.out}/metrics.jsonl")
    assert [r["step"] for r in records if "loss" in r] == list(range(2, 25, 2))
    assert [r["step"] for r in records if "held_out_bits_per_byte" in r] == [12, 24]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_a_checkpoint(config, number):
    config = dataclasses.replace(config, steps=100_000)
    metrics = Path(config.out) / "metrics.jsonl"

    def send() -> None:
        while not metrics.exists() or metrics.stat().st_size == 0:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    stopped = train.train(config)
    sender.join()
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
    status = train.main([*flags(config), f"--export={tmp_path / 'model'}"])
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


@pytest.mark.parametrize(
    ("objective", "changes"),
    [
        ("esolm", {}),
        ("esolm", {"alpha_0": 1.0}),
        ("esolm", {"alpha_0": 0.0, "variant": "A"}),
        ("mdlm", {}),
        ("bd3lm", {"block_size": 8}),
        ("ar", {}),
    ],
)
def test_parts_of_a_batch_add_up(config, objective, changes):
    """`accumulate`: the same loss and gradient norm as from the whole batch at once."""
    config = dataclasses.replace(config, objective=objective, dropout=0.0, **changes)
    whole = train.Trainer(config)
    parts = train.Trainer(dataclasses.replace(config, accumulate=4))
    for _ in range(3):
        assert parts.one_step() == pytest.approx(whole.one_step(), rel=1e-4)
    with pytest.raises(ValueError, match="1 processes with accumulate 9 need 9"):
        train.Trainer(dataclasses.replace(config, accumulate=9))


def test_a_part_needs_rows_of_every_term(config):
    trainer = train.Trainer(config)
    x = trainer.rows.batch(0, 8)
    for rows, term in ((slice(0, 4), "sequential"), (slice(4, 8), "diffusion")):
        with pytest.raises(ValueError, match=f"none of the batch's rows of the {term} term"):
            objectives.esolm_loss(trainer.network, x, config.esolm(), rows=rows)


def test_samples_and_metrics(config):
    config = dataclasses.replace(config, sample_length=20, log_every=3)
    trainer = train.train(config)
    samples = lines(f"{config.out}/samples.jsonl")
    assert [s["step"] for s in samples] == [3, 6]
    assert samples[1]["text"] == trainer.sample()
    assert 5 < len(trainer.tokenizer.encode(samples[1]["text"])) <= 40
    first = lines(f"{config.out}/metrics.jsonl")[0]
    assert set(first) == {
        "step", "seconds", "loss", "diffusion", "sequential", "grad_norm", "lr", "tokens_per_second"
    }  # fmt: skip
    assert first["lr"] == pytest.approx(config.lr * np.mean([train.learning_rate(config, i, 0) for i in range(3)]))
    assert first["loss"] == pytest.approx(first["diffusion"] + first["sequential"])
    assert first["grad_norm"] > 0
    assert first["tokens_per_second"] > 0


def test_what_a_killed_run_logged_after_its_checkpoint_is_dropped(config):
    """The step is taken again, so its line would be there twice; the last line is half a line."""
    train.train(dataclasses.replace(config, steps=3, log_every=1))
    for name, record in (("metrics", {"step": 4, "loss": 1.0}), ("samples", {"step": 6, "text": "x"})):
        with open(f"{config.out}/{name}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + '\n{"step": 3, "lo')
    train.train(dataclasses.replace(config, log_every=1))
    records = lines(f"{config.out}/metrics.jsonl")
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4, 5, 6]
    assert all(r["loss"] != 1.0 for r in records if "loss" in r)
    assert [r["step"] for r in lines(f"{config.out}/samples.jsonl")] == [3, 6]


KILL = """
import os, random, signal, sys, time
import torch
from esokern import train
torch.set_num_threads(1)
config, _ = train.parse_config(sys.argv[1:])
trainer = train.Trainer(config)
trainer.one_step()  # the optimizers have something to save
trainer.save()
random.seed(0)
at_least, killed_while_saving = 1, 0
for trial in range(25):
    read, write = os.pipe()
    saver = os.fork()
    if saver == 0:
        while True:
            trainer.step += 1
            trainer.save()
            os.write(write, trainer.step.to_bytes(4, "little"))
    os.close(write)
    time.sleep(random.uniform(0.01, 0.06))
    os.kill(saver, signal.SIGKILL)
    os.waitpid(saver, 0)
    known = b""
    while part := os.read(read, 65536):
        known += part
    os.close(read)
    if known:
        at_least = int.from_bytes(known[-4:], "little")
    killed_while_saving += os.path.exists(config.out + "/checkpoint.pt.tmp")
    state = torch.load(config.out + "/checkpoint.pt", weights_only=True)
    assert at_least <= state["step"] <= at_least + 1, (state["step"], at_least)
    for name, value in trainer.network.state_dict().items():
        assert torch.equal(state["state_dict"][name], value)
    trainer.step = at_least = state["step"]
assert train.Trainer(config).step == at_least
assert killed_while_saving > 3, killed_while_saving
print("killed while saving:", killed_while_saving)
"""


def test_sigkill_never_costs_a_checkpoint(config):
    """A process that does nothing but save is killed 25 times; its last finished checkpoint, or the next, is there."""
    command = [sys.executable, "-c", KILL, *flags(config)]
    # Away from the checkout, which would stand before the installed package.
    where = {
        "cwd": Path(config.out).parent,
        "env": os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    }
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, **where)
    assert done.returncode == 0, done.stderr


def flags(config: TrainConfig) -> list[str]:
    given = dataclasses.asdict(config).items()
    return [f"--{n.replace('_', '-')}={v}" for n, v in given if not isinstance(v, bool)] + ["--no-progress"]


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A checkpoint that this trainer did not make, with a tokenizer beside it."""
    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(3)
    network = Network(NetworkConfig(vocab_size=258, hidden_size=48, n_blocks=3, n_heads=3, length=24, cond_dim=16))
    save_checkpoint(network, folder)
    text.byte_tokenizer().save(folder / "tokenizer.json")
    return folder


def test_starting_from_a_checkpoint(config, published, tmp_path):
    """Sizes, vocabulary and weights are its own, but for a length that the recipe names; the run resumes without it."""
    start = shutil.copytree(published, tmp_path / "start")
    given = dataclasses.replace(config, init_from=str(start), tokenizer="", schedule="constant")
    trainer = train.Trainer(given)
    assert trainer.network.config.length == trainer.config.length == 32
    assert (trainer.config.hidden_size, trainer.config.n_blocks, trainer.network.config.cond_dim) == (48, 3, 16)
    assert trainer.network.blocks[0].dropout == config.dropout
    assert trainer.tokenizer.vocab_size == 258
    expected = load_checkpoint(start).state_dict()
    for name, value in trainer.network.state_dict().items():
        assert torch.equal(value, expected[name])
    assert train.Trainer(dataclasses.replace(given, length=0)).config.length == 24
    train.train(dataclasses.replace(given, steps=3))
    shutil.rmtree(start)
    resumed = train.train(given)
    assert resumed.step == 6
    whole = train.train(dataclasses.replace(given, init_from=str(published), out=config.out + "-whole"))
    for a, b in zip(states(resumed), states(whole), strict=True):
        assert torch.equal(a, b)
    train.export(config.out, tmp_path / "model")
    assert load_checkpoint(tmp_path / "model").config.hidden_size == 48
    assert read_config(tmp_path / "model")["recipe"]["hidden_size"] == 48


def test_a_checkpoint_needs_its_tokenizer(config, published, tmp_path):
    given = dataclasses.replace(config, init_from=str(published / "model.safetensors"))
    text.train_tokenizer(["abc"], 258).save(tmp_path / "same.json")
    assert train.Trainer(dataclasses.replace(given, tokenizer=str(tmp_path / "same.json"))).step == 0
    text.train_tokenizer(["abab"], 259).save(tmp_path / "other.json")
    with pytest.raises(ValueError, match="it has 258 ids, the tokenizer has 259 with the mask"):
        train.Trainer(dataclasses.replace(given, out=config.out + "2", tokenizer=str(tmp_path / "other.json")))
    alone = shutil.copy(published / "model.safetensors", tmp_path / "alone.safetensors")
    with pytest.raises(ValueError, match=r"no tokenizer\.json beside it; name one with --tokenizer"):
        train.Trainer(dataclasses.replace(given, out=config.out + "3", init_from=str(alone), length=0))
    with pytest.raises(ValueError, match="--init-from /nowhere: there is no such file or folder"):
        train.Trainer(dataclasses.replace(given, out=config.out + "4", init_from="/nowhere"))


def test_published_files_are_a_start_too(config, tmp_path):
    """Weights alone, sizes read off them: the golden network of the published code, over a vocabulary of 53 ids."""
    words = {text.EOS: 0} | {f"w{i}": i for i in range(1, 52)}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w51"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    raw.save(str(tmp_path / "words.json"))  # 52 ids and no mask, which becomes the 53rd
    weights = Path(__file__).parent / "goldens" / "tiny-weights.safetensors"
    config = dataclasses.replace(config, init_from=str(weights), tokenizer=str(tmp_path / "words.json"), steps=2)
    trainer = train.train(config)
    assert trainer.network.config.n_heads == 3
    assert trainer.network.config.vocab_size == trainer.tokenizer.vocab_size == 53


def test_a_compiled_network_takes_the_same_steps(config):
    config = dataclasses.replace(config, dropout=0.0, n_blocks=1)
    eager = train.Trainer(config)
    compiled = train.Trainer(dataclasses.replace(config, compile=True))
    compiled._hidden = torch.compile(compiled.network.hidden, dynamic=False, backend="eager")
    for _ in range(2):
        assert compiled.one_step() == pytest.approx(eager.one_step(), rel=1e-4)
    assert "hidden" not in vars(compiled.network)


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
    for given, message in {
        "objective=gan": "objective is 'gan'",
        "shard=zero": "shard is 'zero'",
        "held-out-fraction=1": "held_out_fraction is 1.0",
        "length=-1": "length is -1",
        "accumulate=0": "accumulate is 0",
    }.items():
        with pytest.raises(ValueError, match=message):
            train.parse_config([f"--{given}"])
    with pytest.raises(ValueError, match="give one of them"):
        train.parse_config(["--valid-corpus=x", "--held-out-fraction=0.1"])
