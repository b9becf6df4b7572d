"""Timing, floors and records. A comparison interleaves its candidates in one process and reports medians and ratios.

A bench is a pytest-benchmark test that calls the `compare` fixture (conftest.py). Records are JSON lines, one per
candidate, in `bench/results/<machine>.jsonl`; README's tables and plots are made from them by `python bench/report.py`.
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
from collections.abc import Callable
from pathlib import Path

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


def machine_name() -> str:
    """Short name of this machine for the record file: processor model, cores, best instruction set."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())
        model = found.group(1) if found else model
    name = f"{model}-{os.cpu_count()}cores-{backend.supported_isas()[-1]}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def commit() -> str:
    """Short commit of the checkout, with + if the tree has changes; 'unknown' outside a checkout."""
    here = Path(__file__).parent

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "csrc", "esokern") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@functools.lru_cache
def floors() -> dict[str, float]:
    """Measured rates of this machine: bytes/s of a streaming read beyond the caches and flop/s of a large matmul."""
    buffer = torch.ones(64 * 2**20)  # 256 MiB
    read = min(timed(buffer.sum) for _ in range(7))
    rates = {"bytes": buffer.numel() * 4 / read}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(1536, 1536).to(dtype)
        a @ a
        rates[str(dtype)] = 2 * 1536**3 / min(timed(lambda a=a: a @ a) for _ in range(7))
    return rates


def floor_seconds(cost: Cost, dtype: torch.dtype) -> float:
    """The least time `cost` takes at the measured rates."""
    rates = floors()
    return max(cost.bytes / rates["bytes"], cost.flops / rates.get(str(dtype), rates["torch.float32"]))


class Recorder:
    """Collects rows, prints them as a table, and appends them to the machine's record file."""

    def __init__(self) -> None:
        self.rows: list[dict] = []

    def add(
        self,
        op: str,
        case: str,
        dtype: torch.dtype,
        timings: dict[str, Timing],
        cost: Cost = Cost(),
        ours: str = "esokern",
    ) -> None:
        """One comparison: all candidates of a case."""
        others = [timing.median for name, timing in timings.items() if not name.startswith(ours)]
        best_other = min(others, default=None)
        floor = floor_seconds(cost, dtype) if cost.bytes or cost.flops else None
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
            self.rows.append(row)

    def table(self) -> str:
        """All rows as fixed-width text."""
        lines = [
            f"{'op':24} {'case':34} {'dtype':9} {'candidate':22} {'median us':>10} {'p25-p75':>19} {'GB/s':>6} "
            f"{'GF/s':>6} {'%floor':>6} {'x best':>6}"
        ]
        for row in self.rows:
            spread = f"{row['p25_us']:.0f}-{row['p75_us']:.0f}"
            numbers = " ".join(
                "     -" if row.get(key) is None else f"{row[key]:6.{digits}f}"
                for key, digits in (
                    ("gb_per_s", 1),
                    ("gflop_per_s", 1),
                    ("percent_of_floor", 0),
                    ("ratio_to_best_alternative", 2),
                )
            )
            lines.append(
                f"{row['op']:24} {row['case']:34} {row['dtype']:9} {row['candidate']:22} {row['median_us']:10.1f} "
                f"{spread:>19} {numbers}"
            )
        return "\n".join(lines)

    def save(self) -> Path:
        """Append the rows to the machine's record file, with what is needed to read them later."""
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{machine_name()}.jsonl"
        context = {
            "machine": machine_name(),
            "threads": torch.get_num_threads(),
            "isa": backend.get_isa(),
            "torch": torch.__version__,
            "esokern": esokern.__version__,
            "commit": commit(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "floor_gb_per_s": floors()["bytes"] / 1e9,
            "floor_gflop_per_s": {
                key.removeprefix("torch."): value / 1e9 for key, value in floors().items() if key != "bytes"
            },
        }
        with path.open("a") as file:
            for row in self.rows:
                file.write(json.dumps(row | context) + "\n")
        return path


recorder = Recorder()
