"""Timing, floors and records. A comparison interleaves its candidates in one process and reports medians and ratios.

On a CPU a bench is a pytest-benchmark test that calls the `compare` fixture (conftest.py); on a GPU `bench/gpu.py` does
all of it. Records are JSON lines, one per candidate, in `bench/results/<machine>.jsonl`; README's tables and plots are
made from them by `python bench/report.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch

import esokern
from esokern import backend

RESULTS = Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class Cost:
    """What an op must do at least: bytes moved (each input read once, each output written once) and operations."""

    bytes: float = 0.0
    flops: float = 0.0


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds over all rounds of one candidate."""

    median: float
    p25: float
    p75: float
    minimum: float
    rounds: int

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        """Summarise samples in seconds."""
        ordered = sorted(samples)
        quarter = len(ordered) // 4
        return cls(statistics.median(ordered), ordered[quarter], ordered[-1 - quarter], ordered[0], len(ordered))


def timed(function: Callable[[], object]) -> float:
    """Seconds one call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def gpu_timed(function: Callable[[], object]) -> float:
    """Seconds one call takes on the GPU, by events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def machine_name(device: str = "cpu") -> str:
    """Short name of this machine for the record file: the GPU, or processor model, cores, best instruction set."""
    if device == "cuda":
        return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())
        model = found.group(1) if found else model
    name = f"{model}-{os.cpu_count()}cores-{backend.supported_isas()[-1]}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def commit() -> str:
    """Short commit of the checkout, with + if the tree has changes; outside one $ESOKERN_COMMIT, or 'unknown'."""
    here = Path(__file__).parent

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "csrc", "esokern") else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("ESOKERN_COMMIT", "unknown")


@functools.lru_cache
def floors(device: str = "cpu") -> dict[str, float]:
    """Measured rates: bytes/s beyond the caches and flop/s of a large matmul.

    Memory is a streaming read on a CPU and a copy, read plus written, on a GPU, where float32 means float32: no tf32.
    """
    cuda = device == "cuda"
    clock, size, repeats = (gpu_timed, 8192, 20) if cuda else (timed, 1536, 7)
    buffer = torch.ones((512 if cuda else 64) * 2**20, device=device)  # 2 GiB, 256 MiB
    stream = functools.partial(torch.empty_like(buffer).copy_, buffer) if cuda else buffer.sum
    stream()
    rates = {"bytes": (2 if cuda else 1) * buffer.nbytes / min(clock(stream) for _ in range(repeats))}
    del buffer, stream
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(size, size, device=device).to(dtype)
        a @ a
        rates[str(dtype)] = 2 * size**3 / min(clock(lambda a=a: a @ a) for _ in range(repeats))
    return rates


def floor_seconds(cost: Cost, dtype: torch.dtype, device: str = "cpu") -> float:
    """The least time `cost` takes at the measured rates."""
    rates = floors(device)
    return max(cost.bytes / rates["bytes"], cost.flops / rates.get(str(dtype), rates["torch.float32"]))


class Recorder:
    """Collects rows, prints them as a table, and appends them to the machine's record file."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.rows: list[dict] = []

    def add(
        self,
        op: str,
        case: str,
        dtype: torch.dtype,
        timings: dict[str, Timing],
        cost: Cost = Cost(),
        ours: str = "esokern",
        notes: Mapping[str, dict] = MappingProxyType({}),
    ) -> None:
        """One comparison: all candidates of a case; `notes` are further entries of a candidate's row,
        "partial" if it does a part of the work and is no alternative."""
        others = [
            timing.median
            for name, timing in timings.items()
            if not name.startswith(ours) and not notes.get(name, {}).get("partial")
        ]
        best_other = min(others, default=None)
        floor = floor_seconds(cost, dtype, self.device) if cost.bytes or cost.flops else None
        for name, timing in timings.items():
            row = {
                "op": op,
                "case": case,
                "dtype": str(dtype).removeprefix("torch."),
                "candidate": name,
                "median_us": timing.median * 1e6,
                "p25_us": timing.p25 * 1e6,
                "p75_us": timing.p75 * 1e6,
                "min_us": timing.minimum * 1e6,
                "rounds": timing.rounds,
                "gb_per_s": cost.bytes / timing.median / 1e9 if cost.bytes else None,
                "gflop_per_s": cost.flops / timing.median / 1e9 if cost.flops else None,
                "percent_of_floor": 100 * floor / timing.median if floor else None,
            }
            if name == ours and best_other is not None:
                row["ratio_to_best_alternative"] = best_other / timing.median
            self.rows.append(row | notes.get(name, {}))

    def table(self) -> str:
        """All measured rows as fixed-width text."""
        unit, scale = ("TF/s", 1e-3) if self.device == "cuda" else ("GF/s", 1.0)
        lines = [
            f"{'op':24} {'case':34} {'dtype':9} {'candidate':22} {'median us':>10} {'p25-p75':>19} {'GB/s':>6} "
            f"{unit:>6} {'%floor':>6} {'x best':>6}"
        ]
        for row in self.rows:
            if "left_out" in row:
                continue
            spread = f"{row['p25_us']:.0f}-{row['p75_us']:.0f}"
            numbers = " ".join(
                "     -" if row.get(key) is None else f"{row[key] * factor:6.{digits}f}"
                for key, digits, factor in (
                    ("gb_per_s", 1, 1),
                    ("gflop_per_s", 1, scale),
                    ("percent_of_floor", 0, 1),
                    ("ratio_to_best_alternative", 2, 1),
                )
            )
            lines.append(
                f"{row['op']:24} {row['case']:34} {row['dtype']:9} {row['candidate']:22} {row['median_us']:10.1f} "
                f"{spread:>19} {numbers}"
            )
        return "\n".join(lines)

    def context(self) -> dict:
        """What is needed to read a row later."""
        rates = floors(self.device)
        where = {"threads": torch.get_num_threads(), "isa": backend.get_isa()}
        if self.device == "cuda":
            where = {"driver": _driver(), "cuda": torch.version.cuda, "architectures": backend.cuda_architectures()}
        return {
            "machine": machine_name(self.device),
            **where,
            "torch": torch.__version__,
            "esokern": esokern.__version__,
            "commit": commit(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "floor_gb_per_s": rates["bytes"] / 1e9,
            "floor_gflop_per_s": {k.removeprefix("torch."): v / 1e9 for k, v in rates.items() if k != "bytes"},
        }

    def save(self, path: Path | None = None) -> Path:
        """Append the rows to the machine's record file, or to another."""
        path = RESULTS / f"{machine_name(self.device)}.jsonl" if path is None else path
        path.parent.mkdir(exist_ok=True)
        context = self.context()
        with path.open("a") as file:
            for row in self.rows:
                file.write(json.dumps(row | context) + "\n")
        return path


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


recorder = Recorder()


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A markdown table, numbers right-aligned."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])
