"""Several processes compute what one computes: training, generation, evaluation, draws from a head split over ids.

This file is also what those processes run (at its end): started as `torchrun` starts them, they write their results
into a folder, and the tests compare these with what one process does.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from esokern import cli, distributed, text, train
from esokern.models.checkpoint import save_checkpoint
from esokern.models.network import FoldedNetwork, Network, NetworkConfig
from esokern.samplers import autoregressive, bd3lm, esolm, mdlm
from esokern.train import TrainConfig

GENERATE = {
    "esolm": (esolm.generate, {"alpha_0": 0.5, "num_steps": 6}),
    "esolm_schedule_seed": (esolm.generate, {"num_steps": 6, "schedule_seed": 9, "return_logprob": True}),
    "mdlm": (mdlm.generate, {"num_steps": 6, "temperature": [1.0, 0.5, 0.0, 2.0, 1.0], "top_p": 0.9}),
    "bd3lm": (bd3lm.generate, {"block_size": 8, "num_steps": 4, "seed": [5, 4, 3, 2, 1]}),
    "ar": (autoregressive.generate, {}),
}
HEAD = {
    "sampled": {"alpha_0": 0.5, "num_steps": 6, "return_logprob": True},
    "greedy": {"alpha_0": 0.5, "num_steps": 6, "temperature": 0.0},
}
COMMAND = ["generate", "--prompt", "ab", "--batch", "5", "--length", "20"]
EVALUATE = [
    "evaluate", "--text", __file__, "--model", "esolm", "--alpha0", "0.5", "--orders", "2", "--draws", "1",
    "--rows", "57", "--json",
]  # fmt: skip
# name -> what differs from the plain recipe of one process
RUNS = {
    "ddp": {},
    "fsdp": {"shard": "fsdp"},
    "ddp-accumulate": {"accumulate": 2},
    "fsdp-accumulate": {"shard": "fsdp", "accumulate": 2},
    "muon": {"optimizer": "muon"},
    "bd3lm": {"objective": "bd3lm", "block_size": 8},
    "ar": {"objective": "ar", "shard": "fsdp"},
}


def recipe(folder: Path, name: str, **changes: object) -> TrainConfig:
    options = {
        "corpus": str(folder / "corpus"), "tokenizer": "bytes", "hidden_size": 32, "n_blocks": 2, "n_heads": 2,
        "length": 32, "cond_dim": 4, "batch_size": 8, "steps": 5, "warmup_steps": 2, "lr": 5e-3, "ema": 0.9,
        "eval_every": 3, "eval_rows": 20, "log_every": 1, "progress": False, "infill_fraction": 0.3,
        "optimizer": "adamw", "schedule": "constant", "sample_length": 16,
    }  # fmt: skip
    return TrainConfig(out=str(folder / name), **options | changes)


def folded() -> FoldedNetwork:
    torch.manual_seed(1)
    network = Network(NetworkConfig(vocab_size=75, hidden_size=32, n_blocks=2, n_heads=2, length=24, cond_dim=4))
    for parameter in network.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return network.fold()


def prompts() -> torch.Tensor:
    """Five rows, of differently long prompts."""
    tokens = torch.full((5, 24), 74)
    for row in range(5):
        tokens[row, :row] = torch.arange(row)
    return tokens


def launch(processes: int, function: str, folder: Path) -> None:
    """Run `function(folder)` of this file in that many processes, with the variables that torchrun sets."""
    command = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", __file__, function, str(folder)]
    variables = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(processes)], env=os.environ | variables, capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with all RUNS by two processes, and "one", the plain recipe, by this one."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "corpus").mkdir()
    for i in range(40):
        lines = [f"def function_{i % 7}(value):\n    return value + {j % 5}\n\n\n" for j in range(20)]
        (folder / "corpus" / f"{i:02}.py").write_text("".join(lines))
    torch.set_num_threads(1)
    train.train(recipe(folder, "one"))
    train.train(recipe(folder, "continued", steps=2))
    launch(2, "run_training", folder)
    return folder


def metrics(run: Path) -> list[dict[str, float]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "tokens_per_second")
    return [{name: value for name, value in record.items() if name not in timed} for record in records]


def assert_same_run(run: Path, one: Path, rel: float = 1e-5) -> None:
    ours, theirs = metrics(run), metrics(one)
    assert len(ours) == len(theirs) == 6
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=rel)


@pytest.mark.parametrize("name", ["ddp", "fsdp", "ddp-accumulate", "fsdp-accumulate", "continued"])
def test_two_processes_train_as_one(trained, name):
    """Losses, gradient norms, held-out bits and samples; "continued" took its first two steps in one process."""
    assert_same_run(trained / name, trained / "one")
    assert (trained / name / "samples.jsonl").read_text() == (trained / "one" / "samples.jsonl").read_text()


@pytest.mark.parametrize("name", ["muon", "bd3lm", "ar"])
def test_other_optimizers_and_objectives(trained, name):
    changes = {field: value for field, value in RUNS[name].items() if field != "shard"}
    train.train(recipe(trained, f"{name}-one", **changes))
    rel = 5e-3 if name == "muon" else 1e-5  # Muon orthogonalises in bfloat16
    assert_same_run(trained / name, trained / f"{name}-one", rel)


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_a_checkpoint_of_two_processes_continues_in_one(trained, name):
    whole, state = (torch.load(trained / run / "checkpoint.pt", weights_only=True) for run in ("one", name))
    for a, b in zip(state["ema"]["shadow_params"], whole["ema"]["shadow_params"], strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    for run in ("one", name):
        shutil.copytree(trained / run, trained / f"{run}-before-{name}")
        train.train(recipe(trained, f"{run}-before-{name}", steps=7))
    ours, theirs = (metrics(trained / f"{run}-before-{name}") for run in (name, "one"))
    assert [r["step"] for r in ours] == [1, 2, 3, 3, 4, 5, 6, 6, 7]
    assert ours[-1] == pytest.approx(theirs[-1], rel=1e-5)


def test_a_signal_to_one_process_stops_all(trained):
    """Process 1 got SIGTERM in the middle of a long run; both left at the same step, with a checkpoint."""
    stopped = [json.loads((trained / f"stopped-{rank}.json").read_text()) for rank in range(2)]
    assert stopped[0] == stopped[1]
    assert stopped[0]["interrupted"]
    state = torch.load(trained / "signal" / "checkpoint.pt", weights_only=True)
    assert state["step"] == stopped[0]["step"] < 100_000


def test_what_cannot_be_split_is_refused(trained):
    refused = json.loads((trained / "refused.json").read_text())
    assert "splits into 2 parts" in refused["batch"]
    assert "2 processes with accumulate 2 need 4" in refused["batch"]
    assert "Muon needs whole matrices" in refused["muon"]


@pytest.fixture(scope="module")
def generated(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("generated")
    launch(4, "run_generation", folder)
    return folder


@pytest.mark.parametrize("name", GENERATE)
def test_rows_split_over_processes_come_out_the_same(generated, name):
    sampler, options = GENERATE[name]
    expected = sampler(folded(), prompts(), **{"seed": 3} | options)
    for rank in range(4):
        result = torch.load(generated / f"{name}-{rank}.pt", weights_only=True)
        assert torch.equal(result["tokens"], expected.tokens)
        assert torch.equal(result["decode_step"] >= 0, expected.decode_step >= 0)
        assert result["nfe"] == expected.nfe
        assert (result["logprob"] is None) == (expected.logprob is None)
        if expected.logprob is not None:
            assert torch.equal(result["logprob"], expected.logprob)
    seen = torch.zeros(5, 24, dtype=torch.int64)
    for rank in range(4):
        seen += torch.load(generated / f"{name}-{rank}.pt", weights_only=True)["seen"]
    assert torch.equal(seen > 0, expected.decode_step >= 0)  # each callback saw its own rows, once
    assert seen.max() == 1


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("name", HEAD)
def test_a_head_split_over_the_vocabulary_draws_the_same_tokens(generated, name, processes):
    expected = esolm.generate(folded(), prompts(), seed=3, **HEAD[name])
    for rank in range(4):
        result = torch.load(generated / f"head-{name}-{processes}-{rank}.pt", weights_only=True)
        assert result["rows_of_head"] in (75 // processes, 75 // processes + 1)
        assert torch.equal(result["tokens"], expected.tokens)
        assert torch.equal(result["decode_step"], expected.decode_step)
        if expected.logprob is not None:
            torch.testing.assert_close(result["logprob"], expected.logprob, atol=1e-5, rtol=1e-5)


def test_a_split_head_refuses_what_needs_all_of_it(generated):
    for rank in range(4):
        refused = json.loads((generated / f"refused-{rank}.json").read_text())
        assert "filters need the whole vocabulary" in refused["top_p"]
        assert "split over processes" in refused["logits"]
        assert "split already" in refused["twice"]
        assert "schedule" in refused["schedule"]


@pytest.mark.parametrize("split", ["rows", "head"])
def test_the_command_line_under_torchrun(generated, capsys, split):
    """The first process prints what one process would, the others nothing."""
    assert cli.main([*COMMAND, "--checkpoint", str(generated / "model")]) == 0
    printed = [(generated / f"printed-{split}-{rank}.txt").read_text() for rank in range(4)]
    assert printed == [capsys.readouterr().out, "", "", ""]


def test_evaluation_under_torchrun(generated, capsys):
    """Rows are dealt out to the processes; the first one prints what one process would."""
    assert cli.main([*EVALUATE, "--checkpoint", str(generated / "model")]) == 0
    alone = json.loads(capsys.readouterr().out)
    first, *others = [(generated / f"evaluated-{rank}.txt").read_text() for rank in range(4)]
    assert others == ["", "", ""]
    together = json.loads(first)
    assert alone["rows"] == 57
    for found in (alone, together):
        del found["seconds"], found["checkpoint"]
    assert together == alone


# --- what the processes run -----------------------------------------------------------------------------------------


def run_training(folder: Path) -> None:
    with distributed.process_group():
        for name, changes in RUNS.items():
            train.train(recipe(folder, name, **changes))
        train.train(recipe(folder, "continued", shard="fsdp"))
        refused = {}
        for name, changes in {
            "batch": {"batch_size": 4, "accumulate": 2},
            "muon": {"shard": "fsdp", "optimizer": "muon"},
        }.items():
            with pytest.raises(ValueError) as error:
                train.Trainer(recipe(folder, f"refused-{name}", **changes))
            refused[name] = str(error.value)
        run_until_signal(folder)
        if distributed.rank() == 0:
            (folder / "refused.json").write_text(json.dumps(refused))


def run_until_signal(folder: Path) -> None:
    metrics = folder / "signal" / "metrics.jsonl"

    def send() -> None:
        while not metrics.exists() or metrics.stat().st_size == 0:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    if distributed.rank() == 1:
        threading.Thread(target=send).start()
    trainer = train.train(recipe(folder, "signal", steps=100_000, eval_every=1000))
    found = {"step": trainer.step, "interrupted": trainer.interrupted, "seconds": trainer.seconds}
    (folder / f"stopped-{distributed.rank()}.json").write_text(json.dumps(found))


def run_generation(folder: Path) -> None:
    with distributed.process_group():
        rank = distributed.rank()
        network = folded()
        for name, (sampler, options) in GENERATE.items():
            seen = torch.zeros(5, 24, dtype=torch.int64)

            def count(step, seen=seen):
                seen[step.rows, step.positions] += 1

            result = distributed.generate(sampler, network, prompts(), **{"seed": 3} | options, callback=count)
            torch.save({**vars(result), "seen": seen}, folder / f"{name}-{rank}.pt")
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        for processes, group in ((2, pairs[rank // 2]), (4, None)):
            sharded = distributed.shard_head(network, group)
            for name, options in HEAD.items():
                result = esolm.generate(sharded, prompts(), seed=3, **options)
                found = {**vars(result), "rows_of_head": len(sharded.head_weight)}
                torch.save(found, folder / f"head-{name}-{processes}-{rank}.pt")
        refused = {}
        for name, call in {
            "top_p": lambda: esolm.generate(sharded, prompts(), top_p=0.9),
            "logits": lambda: sharded.logits(torch.zeros(1, 32)),
            "twice": lambda: distributed.shard_head(sharded),
            "schedule": lambda: distributed.generate(esolm.generate, network, prompts(), schedule=object()),
        }.items():
            with pytest.raises(ValueError) as error:
                call()
            refused[name] = str(error.value)
        (folder / f"refused-{rank}.json").write_text(json.dumps(refused))
        if rank == 0:
            tokenizer = text.byte_tokenizer()
            made = Network(NetworkConfig(vocab_size=258, hidden_size=32, n_blocks=1, n_heads=2, length=24, cond_dim=4))
            save_checkpoint(made, folder / "model")
            tokenizer.save(folder / "model" / "tokenizer.json")
        distributed.barrier()
        for split in ("rows", "head"):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                assert cli.main([*COMMAND, "--checkpoint", str(folder / "model"), "--split", split]) == 0
            (folder / f"printed-{split}-{rank}.txt").write_text(printed.getvalue())
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            assert cli.main([*EVALUATE, "--checkpoint", str(folder / "model")]) == 0
        (folder / f"evaluated-{rank}.txt").write_text(printed.getvalue())


def main(function: str, folder: str, processes: str) -> int:
    """Fork the processes: what is imported by now, they need not import again. 1 if one of them failed."""
    import torch.distributed.fsdp
    import torch.distributed.tensor  # noqa: F401

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    children = []
    for rank in range(int(processes)):
        children.append(os.fork())
        if children[-1] == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            try:
                globals()[function](Path(folder))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
    for _ in range(int(processes)):
        pid, status = os.wait()
        children.remove(pid)
        if status:
            for child in children:  # they would wait for it
                os.kill(child, signal.SIGKILL)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
