"""The timing half of bench/gpu.py, a process per op: a kernel that breaks its CUDA context takes only that op along.

Candidates of a case run interleaved over several input sets that together exceed the L2 several times. On a GPU each
is captured in a CUDA graph over all sets, or runs as an eager loop where it cannot be captured; its rows say which
("how"). Rows are appended to a file case by case, so that nothing measured is lost.

    python bench/gpu_bench.py --op attention --seconds 60 --rows rows.jsonl
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

import gpu_attention_cases
import gpu_cases
import gpu_decoders
from eager import EagerEsoLM
from esokern import samplers
from esokern.models import Network, NetworkConfig
from esokern.samplers.schedule import denoising_schedule
from gpu_cases import Candidate, Case, Setting
from harness import Recorder, Timing, gpu_timed, timed

OPS = {
    f.__name__: f
    for f in (
        gpu_attention_cases.attention_with_kvcache,
        gpu_cases.unmask_sample,
        gpu_cases.unmask_select,
        gpu_attention_cases.attention,
        gpu_attention_cases.attention_backward,
        gpu_cases.masked_cross_entropy,
        gpu_cases.fused_linear,
        gpu_cases.add_norm,
    )
}
BROKEN_CONTEXT = 3  # exit status: go on with --first of the next case in a new process
CASE_SECONDS, ROUNDS = 0.6, (5, 60)
NO_TIME = "the time was up"


class Bench:
    """Times cases, records rows, remembers failures of ours."""

    def __init__(self, setting: Setting, rows: Path, deadline: float) -> None:
        self.setting, self.rows, self.deadline = setting, rows, deadline
        self.cuda = setting.device == "cuda"
        self.clock = gpu_timed if self.cuda else timed
        self.failed = False

    def out_of_time(self) -> bool:
        return time.monotonic() > self.deadline

    def save(self, recorder: Recorder) -> None:
        print(*recorder.table().splitlines()[1:], sep="\n", flush=True)
        recorder.save(self.rows)

    def left_out(self, recorder: Recorder, op: str, case: str, reasons: dict[str, str]) -> None:
        """Rows that say why a candidate has no time."""
        for name, reason in reasons.items():
            recorder.rows.append({"op": op, "case": case, "candidate": name, "left_out": reason[:300]})
            print(f"{op} {case}: no {name}: {reason[:160]}", flush=True)

    def context_is_broken(self) -> bool:
        """Whether nothing more can run in this process: an illegal access stays with it."""
        try:
            if self.cuda:
                torch.cuda.synchronize()
        except RuntimeError:
            return True
        return False

    def measure(self, case: Case, recorder: Recorder) -> None:
        """Check and time one case."""
        l2 = torch.cuda.get_device_properties(0).L2_cache_size if self.cuda else 0
        num_sets = min(max(math.ceil(4 * l2 / case.cost.bytes), 2), 128)
        sets = [case.make() for _ in range(num_sets)]
        reasons, expected = dict(case.absent), None
        runs: dict[str, Callable[[], object]] = {}
        notes: dict[str, dict] = {}
        for name, candidate in case.candidates.items():
            try:
                got = candidate(sets[0])
                if case.alike and name not in case.partial:
                    results = got if isinstance(got, tuple) else (got,)
                    expected = results if expected is None else expected
                    for result, wanted in zip(results, expected, strict=True):
                        difference = (result.float() - wanted.float()).abs().max().item()
                        if not difference < 0.05 * max(wanted.float().abs().max().item(), 1.0):
                            raise ValueError(f"differs from esokern's result by {difference:.3g}")
                    del results
                del got
                runs[name], how = self._prepare(candidate, sets)
                notes[name] = {"how": how, "sets": num_sets} | ({"partial": True} if name in case.partial else {})
            except Exception as error:
                if self.context_is_broken():
                    raise
                reasons[name] = f"{type(error).__name__}: {error}"
                self.failed |= name.startswith("esokern")
        once = sum(self.clock(run) for run in runs.values())
        rounds = int(min(max(CASE_SECONDS / max(once, 1e-9), ROUNDS[0]), ROUNDS[1]))
        samples = (self._event_rounds if self.cuda else self._host_rounds)(runs, rounds)
        timings = {name: Timing.of([t / num_sets for t in values]) for name, values in samples.items()}
        recorder.add(case.op, case.name, case.dtype, timings, case.cost, notes=notes)
        self.left_out(recorder, case.op, case.name, reasons)

    def _prepare(self, candidate: Candidate, sets: list) -> tuple[Callable[[], object], str]:
        """A function that runs the candidate on every set, warmed up, and how it does so."""

        def loop() -> None:
            for inputs in sets:
                candidate(inputs)

        if not self.cuda:
            loop()
            return loop, "eager"
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            loop()
            loop()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                loop()
            graph.replay()
            torch.cuda.synchronize()
        except RuntimeError as error:
            if self.context_is_broken():
                raise
            loop()
            return loop, f"eager, no graph: {error}".splitlines()[0][:160]
        return graph.replay, "graph"

    @staticmethod
    def _host_rounds(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
        rows = [[timed(run) for run in runs.values()] for _ in range(rounds)]
        return dict(zip(runs, map(list, zip(*rows, strict=True)), strict=True))

    @staticmethod
    def _event_rounds(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
        """Seconds per run, without the time that a launch takes on the host."""
        events = {
            name: [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)] for name in runs
        }
        for index in range(rounds):
            for name, run in runs.items():
                start, end = events[name][index]
                torch.cuda._sleep(100_000)  # the GPU waits, so that the launch of `run` is behind us when it begins
                start.record()
                run()
                end.record()
        torch.cuda.synchronize()
        return {name: [start.elapsed_time(end) / 1e3 for start, end in pairs] for name, pairs in events.items()}

    def op(self, name: str, first: int, once: bool) -> None:
        """All cases of an op from `first` on, as far as the time goes; `once`: our kernels alone, untimed."""
        for index, make_case in enumerate(OPS[name](self.setting)):
            if index < first:
                continue
            recorder, label = Recorder(self.setting.device), f"case {index}"
            try:
                case = make_case()
                label = case.name
                print(f"-- {name} {label}", flush=True)
                if once:
                    case.candidates["esokern"](case.make())
                    if self.cuda:
                        torch.cuda.synchronize()
                elif self.out_of_time():
                    self.left_out(recorder, name, label, {"all": NO_TIME})
                else:
                    self.measure(case, recorder)
            except Exception as error:
                self.failed = True
                self.left_out(recorder, name, label, {"esokern": f"{type(error).__name__}: {error}"})
                if self.context_is_broken():
                    with self.rows.open("a") as file:  # without its context, which would ask the GPU
                        file.writelines(json.dumps(row) + "\n" for row in recorder.rows)
                    sys.exit(BROKEN_CONTEXT)
            if not once:
                self.save(recorder)
            case = None
            gc.collect()
            if self.cuda:
                torch.cuda.empty_cache()


# --- whole generations of the 170M network


class _Enough(Exception):
    pass


def random_network(setting: Setting) -> Network:
    """The published small network's sizes, random weights."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 50258, "hidden_size": 768, "n_blocks": 12, "n_heads": 12, "length": 1024}
    if setting.small:
        sizes = {"vocab_size": 99, "hidden_size": 32, "n_blocks": 2, "n_heads": 2, "length": 64}
    with torch.device(setting.device):
        network = Network(NetworkConfig(cond_dim=128, **sizes)).eval()
    for parameter in network.parameters():  # nothing zero, as after training
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.03)
    return network


def generation(bench: Bench) -> None:
    """Seconds of NFE = L generations: batch 1 whole, the large batch from steps at four lengths of the cache."""
    setting = bench.setting
    network = random_network(setting)
    folded, eager = network.fold(setting.dtype), EagerEsoLM(network, setting.dtype)
    length, mask_id = network.config.length, network.config.mask_id

    def start(batch: int, given: int) -> torch.Tensor:
        tokens = torch.full((batch, length), mask_id, device=setting.device)
        tokens[:, :given] = torch.randint(mask_id, (batch, given), device=setting.device)
        return tokens

    def until(steps: int, marks: list[float]) -> Callable[[object], None]:
        """A callback that ends the generation after `steps` steps beyond two warm ones, noting begin and end."""

        def callback(step) -> None:
            if step.index in (1, steps + 1):
                if bench.cuda:
                    torch.cuda.synchronize()
                marks.append(time.perf_counter())
                if step.index == steps + 1:
                    raise _Enough

        return callback

    def ours(generate: Callable, batch: int, given: int, steps: int, **options: object) -> float:
        marks: list[float] = []
        with contextlib.suppress(_Enough):
            generate(folded, start(batch, given), seed=0, callback=until(steps, marks), **options)
        return marks[1] - marks[0]

    def esolm(batch: int, given: int, steps: int) -> float:
        masked = (start(1, given) == mask_id).cpu().expand(batch, -1)
        schedule = denoising_schedule(masked, num_steps=math.inf, seeds=range(batch), schedule_seed=0)
        return ours(samplers.esolm.generate, batch, given, steps, schedule=schedule)

    def autoregressive(batch: int, given: int, steps: int) -> float:
        return ours(samplers.autoregressive.generate, batch, given, steps)

    @torch.inference_mode()
    def eager_esolm(batch: int, given: int, steps: int) -> float:
        order = torch.rand(batch, length, device=setting.device).argsort(-1)
        eager.generate(order, [1] * 2, given)
        return bench.clock(lambda: eager.generate(order, [1] * steps, given))

    candidates = {"Eso-LM cached": esolm, "AR cached": autoregressive, "Eso-LM eager": eager_esolm}
    for batch in (1, 3) if setting.small else (1, 512):
        segments, steps = 4, 4 if setting.small else (64 if batch == 1 else 12)
        size = length // segments
        case = f"L{length} B{batch} NFE = L"
        recorder = Recorder(setting.device)
        timings, reasons = {}, {}
        for name, run in candidates.items():
            try:
                if bench.out_of_time():
                    reasons[name] = NO_TIME
                    continue
                run(batch, size // 2, steps)  # warm-up
                # A step's time grows with the cache as a straight line: the middle of a segment is its mean.
                totals = []
                for _ in range(3):
                    begins = [segment * size + size // 2 for segment in range(segments)]
                    totals.append(sum(run(batch, begin, steps) / steps * size for begin in begins))
                    if bench.out_of_time():
                        break
                timings[name] = Timing.of(totals)
            except Exception as error:
                reasons[name] = f"{type(error).__name__}: {error}"
                bench.failed |= name != "Eso-LM eager"
                if bench.context_is_broken():
                    raise
        how = f"{segments} x {steps} measured steps stand for {length}"
        recorder.add(
            "generate", case, setting.dtype, timings, ours="Eso-LM cached", notes={n: {"how": how} for n in timings}
        )
        bench.left_out(recorder, "generate", case, reasons)
        bench.save(recorder)


def decoding(bench: Bench) -> None:
    """Seconds of whole generations by LLaDA's decoder."""
    gpu_decoders.decoding(bench, random_network(bench.setting))


WHOLE = {"decoders": decoding, "generate": generation}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", nargs="+", choices=[*OPS, *WHOLE], default=[*OPS])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--rows", type=Path, default=Path("/dev/null"))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--first", type=int, default=0, help="skip the cases before this one")
    parser.add_argument("--once", action="store_true", help="run our kernels once, untimed: for compute-sanitizer")
    options = parser.parse_args()
    torch.manual_seed(0)
    warnings.filterwarnings("ignore")  # SDPA's, about inputs that a back end does not take
    bench = Bench(Setting(options.device, options.small), options.rows, time.monotonic() + options.seconds)
    with torch.no_grad():
        for op in options.op:
            if op in WHOLE:
                WHOLE[op](bench)
            else:
                bench.op(op, options.first, options.once)
    sys.exit(bench.failed)


if __name__ == "__main__":
    main()
