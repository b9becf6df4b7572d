"""bench/gpu.py in miniature on the CPU: every case and peer runs, agrees, is recorded, and the summary says so."""

import argparse
import contextlib
import json
import time
import types

import pytest
import torch

import gpu
import gpu_bench
import harness
from gpu_cases import Case, Setting


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    rates = {"bytes": 1e10, "torch.float32": 1e11, "torch.bfloat16": 1e11}
    monkeypatch.setattr(harness, "floors", lambda device="cpu": rates)
    monkeypatch.setattr(gpu_bench, "CASE_SECONDS", 0.0)
    torch.set_num_threads(1)


def session(tmp_path, **changes):
    options = {"out": tmp_path, "minutes": 1.0, "device": "cpu", "small": True}
    return gpu.Session(argparse.Namespace(**(options | changes)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("op", [*gpu_bench.OPS, *gpu_bench.WHOLE])
def test_cases_run_and_are_recorded(op, tmp_path, capsys):
    run = session(tmp_path)
    bench = gpu_bench.Bench(Setting("cpu", small=True), run.rows_file, time.monotonic() + 60)
    with torch.no_grad():
        if op in gpu_bench.WHOLE:
            gpu_bench.WHOLE[op](bench)
        else:
            bench.op(op, 0, once=False)
    assert not bench.failed, capsys.readouterr().out
    rows = run.rows()
    measured = [row for row in rows if "left_out" not in row]
    ours = "Eso-LM cached" if op == "generate" else "esokern"
    assert {row["candidate"] for row in measured} > {ours}
    for row in measured:
        assert row["op"] == op
        assert 0 < row["p25_us"] <= row["median_us"] <= row["p75_us"]
        assert row["how"]
        assert {"machine", "torch", "commit", "time", "floor_gb_per_s"} <= set(row)
    assert all(row["candidate"] not in (ours, "all") for row in rows if "left_out" in row)
    if "attention" in op:
        absent = {row["candidate"] for row in rows if "left_out" in row}
        assert {"flex", "fa3", "flash-attn"} <= absent | {row["candidate"] for row in measured}
    if op == "decoders":
        assert {row["candidate"] for row in measured} == {"esokern", "esokern prefix", "esokern dual", "eager LLaDA"}
    if op == "masked_cross_entropy":
        assert {"linear + cross_entropy", "torch chunked"} <= {row["candidate"] for row in measured}
        assert {"compiled", "liger", "cut cross-entropy"} <= {row["candidate"] for row in rows}
    text = gpu.summary(run)
    assert all(row["case"] in text for row in measured)
    assert text.endswith("failed: nothing")


def test_wrong_results_and_failures_are_told(tmp_path):
    def broken(inputs):
        raise RuntimeError("no such kernel")

    run = session(tmp_path)
    bench = gpu_bench.Bench(Setting("cpu", small=True), run.rows_file, time.monotonic() + 60)
    candidates = {"esokern": lambda x: x, "peer": lambda x: x + 1, "other": broken, "good": lambda x: x.clone()}
    cost = harness.Cost(bytes=8)
    recorder = harness.Recorder()
    bench.measure(Case("op", "case", torch.float32, cost, lambda: torch.ones(2), candidates), recorder)
    reasons = {row["candidate"]: row["left_out"] for row in recorder.rows if "left_out" in row}
    assert {row["candidate"] for row in recorder.rows} - set(reasons) == {"esokern", "good"}
    assert reasons == {
        "peer": "ValueError: differs from esokern's result by 1",
        "other": "RuntimeError: no such kernel",
    }
    assert not bench.failed  # peers may fail
    bench.measure(Case("op", "case 2", torch.float32, cost, lambda: torch.ones(2), {"esokern": broken}), recorder)
    assert bench.failed


def test_no_time(tmp_path):
    run = session(tmp_path)
    bench = gpu_bench.Bench(Setting("cpu", small=True), run.rows_file, time.monotonic() - 1)
    bench.op("add_norm", 1, once=False)
    assert [row["left_out"] for row in run.rows()] == [gpu_bench.NO_TIME]
    assert "left out: add_norm, all: the time was up (1 cases)" in gpu.summary(run)


class FakeEvent:
    """A CUDA event that reads the host's clock."""

    def __init__(self, enable_timing):
        self.time = None

    def record(self):
        self.time = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1e3 * (end.time - self.time)


class FakeGraph:
    """Notes that it is being captured; a replay does nothing."""

    capturing = False

    def replay(self):
        time.sleep(1e-5)


@contextlib.contextmanager
def fake_capture(graph, stream, capture_error_mode):
    FakeGraph.capturing = True
    try:
        yield
    finally:
        FakeGraph.capturing = False


def test_graphs_and_events_with_stand_ins(tmp_path, monkeypatch):
    """What a GPU alone reaches, with torch.cuda's parts replaced: graphs where they can be captured, else a loop."""
    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    stand_ins = {
        "Event": FakeEvent,
        "CUDAGraph": FakeGraph,
        "graph": fake_capture,
        "Stream": lambda: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda: stream,
        "synchronize": lambda: None,
        "get_device_properties": lambda index: types.SimpleNamespace(L2_cache_size=50),
        "_sleep": lambda cycles: None,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    bench = gpu_bench.Bench(Setting("cpu"), tmp_path / "rows.jsonl", 0.0)
    bench.cuda, bench.clock = True, harness.gpu_timed

    def waits_for_the_host(inputs):
        if FakeGraph.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")
        return inputs

    recorder = harness.Recorder()
    candidates = {"esokern": lambda x: x, "peer": waits_for_the_host}
    cost = harness.Cost(bytes=8)
    bench.measure(Case("op", "case", torch.float32, cost, lambda: torch.ones(2), candidates), recorder)
    ours, peer = recorder.rows
    assert (ours["how"], ours["sets"]) == ("graph", 25)  # 4 x 50 bytes of cache, 8 bytes a set
    assert peer["how"] == "eager, no graph: operation not permitted when stream is capturing"
    assert ours["median_us"] > 0
    assert ours["ratio_to_best_alternative"] == pytest.approx(peer["median_us"] / ours["median_us"])


def test_sections_are_processes_and_failures_go_on(tmp_path, monkeypatch, capsys):
    run = session(tmp_path)
    status, output = run.run("echo", ["sh", "-c", "echo $OMP_WAIT_POLICY; exit 7"], 10)
    assert (status, output.strip()) == (7, "passive")
    assert run.run("sleep", ["sleep", "20"], 0.1)[0] == 124
    monkeypatch.setattr(gpu, "OPS", {"add_norm": 0.9})
    gpu.bench(run)
    assert run.failed == []
    assert {row["candidate"] for row in run.rows()} == {"esokern", "torch"}
    monkeypatch.setattr(gpu.sys, "executable", "false")
    gpu.bench(run)
    assert run.failed == ["bench"]
    assert gpu.summary(run).endswith("failed: bench")
    gpu.record(run)  # of a CPU in miniature: nothing
    assert all(json.loads(line)["op"] == "add_norm" for line in run.rows_file.read_text().splitlines())
    capsys.readouterr()
