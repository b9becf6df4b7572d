"""The `compare` fixture, and the table and records at the end of a bench run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from harness import Cost, Timing, recorder, timed

NO_COST = Cost()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", action="store_true", help="append the results to bench/results/<machine>.jsonl")


@pytest.fixture
def compare(benchmark):
    """compare(op, case, dtype, {"esokern": f, "other": g, ...}, cost, ours="esokern", seconds=1.0)

    Times all candidates interleaved: pytest-benchmark drives `ours`, and its set-up before each round runs and
    times the others once.
    """

    def run(
        op: str,
        case: str,
        dtype: torch.dtype,
        candidates: dict[str, Callable[[], object]],
        cost: Cost = NO_COST,
        *,
        ours: str = "esokern",
        seconds: float = 1.0,
        max_rounds: int = 100,
    ) -> dict[str, Timing]:
        others = [name for name in candidates if name != ours]
        once = 0.0
        for function in candidates.values():  # warm up, and learn how many rounds fit
            function()
            once += timed(function)
        rounds = int(min(max(seconds / once, 3), max_rounds))
        samples: dict[str, list[float]] = {name: [] for name in candidates}

        def run_others() -> None:
            for name in others:
                samples[name].append(timed(candidates[name]))

        def run_ours() -> None:
            samples[ours].append(timed(candidates[ours]))

        benchmark.extra_info.update(op=op, case=case, dtype=str(dtype))
        benchmark.pedantic(run_ours, setup=run_others, rounds=rounds)
        timings = {name: Timing.of(values) for name, values in samples.items() if values}
        recorder.add(op, case, dtype, timings, cost, ours)
        return timings

    with torch.inference_mode():
        yield run


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if not recorder.rows:
        return
    terminalreporter.write_line("")
    terminalreporter.write_line(recorder.table())
    if config.getoption("--record"):
        terminalreporter.write_line(f"recorded in {recorder.save()}")
