"""Everything that needs a GPU, in one call: build, tests, compute-sanitizer, timings against peers. For one NVIDIA GPU.

    python bench/gpu.py [--out DIR] [--minutes 9] [--only build,test,sanitizer,bench] [--device cuda|cpu] [--small]

Needs nvcc, a C++ compiler, cmake, ninja, torch (CUDA) and the Python packages pybind11, pytest, safetensors; nothing is
installed. Each section, and each op of the timings, is a process with a share of the time; one that fails stops no
other, and the exit status is 1 if any failed. Logs and rows go to DIR, rows also to bench/results/<GPU>.jsonl, and a
summary is printed last. `--device cpu --small` takes the same way on a CPU with tiny cases, recording nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
SECTIONS = ("build", "test", "sanitizer", "bench")
SHARES = {"build": 0.30, "test": 0.25, "sanitizer": 0.15}  # of the whole time, at most; the rest is for timings
OPS = {  # op -> its share of what is left when its turn comes, in the order of importance
    "attention_with_kvcache": 0.28,
    "unmask_sample": 0.25,
    "attention": 0.35,
    "attention_backward": 0.40,
    "masked_cross_entropy": 0.40,
    "fused_linear": 0.35,
    "add_norm": 0.15,
    "unmask_select": 0.15,
    "decoders": 0.40,
    "generate": 1.0,
}
TESTS = (
    "attention_with_kvcache",
    "unmask_sample",
    "attention",
    "attention_backward",
    "masked_cross_entropy",
    "fused_linear",
    "add_norm",
    "unmask_select",
    "unmask_select_edges",
    "cuda_samplers",
    "arrays",
)
BROKEN_CONTEXT = 3  # of gpu_bench.py: a kernel broke its process; go on with the next case in a new one


def built_in_place() -> bool:
    """Whether the checkout itself can be imported; if not, the installed package is what runs."""
    return any((ROOT / "esokern").glob("_cpu*.so"))


class Session:
    """The clock, the output folder, and what came out so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.begin = time.monotonic()
        self.total = 60 * options.minutes
        self.out: Path = options.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.rows_file = self.out / "rows.jsonl"
        self.rows_file.unlink(missing_ok=True)
        self.notes: list[str] = []  # one line each, for the summary
        self.failed: list[str] = []

    def left(self) -> float:
        return self.total - (time.monotonic() - self.begin)

    def fail(self, section: str, why: str) -> None:
        self.failed.append(section)
        self.note(section, f"FAILED: {why}")

    def note(self, section: str, text: str) -> None:
        self.notes.append(f"{section}: {text}")
        print(f"[{time.monotonic() - self.begin:5.0f} s] {section}: {text}", flush=True)

    def run(self, name: str, command: list[str], seconds: float, **environment: str) -> tuple[int, str]:
        """Exit status (124 = stopped at the limit) and output of a command; the output also goes to DIR/name.log."""
        log = self.out / f"{name}.log"

        def before(first: str, variable: str) -> str:
            return os.pathsep.join(filter(None, [first, os.environ.get(variable)]))

        environment = {
            "OMP_WAIT_POLICY": "passive",
            **os.environ,
            "PATH": before(str(Path(sys.executable).parent), "PATH"),
            **({"PYTHONPATH": before(str(ROOT), "PYTHONPATH")} if built_in_place() else {}),
            **environment,
        }
        with log.open("a") as file:
            file.write(f"$ {' '.join(command)}\n")
            file.flush()
            position = file.tell()
            process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment)
            try:
                status = process.wait(timeout=max(seconds, 1))
            except subprocess.TimeoutExpired:
                process.terminate()
                try:
                    process.wait(timeout=5)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                status = 124
        with log.open(errors="replace") as file:
            file.seek(position)
            return status, file.read()

    def rows(self) -> list[dict]:
        return [json.loads(line) for line in self.rows_file.read_text().splitlines()] if self.rows_file.exists() else []


def tail(text: str, lines: int = 12) -> str:
    return "\n".join(text.strip().splitlines()[-lines:])


def build(session: Session) -> None:
    """The modules, in place, for this machine's GPU alone."""
    missing = [tool for tool in ("nvcc", "c++", "cmake", "ninja") if not _which(tool)]
    missing += [f"Python package {name}" for name in ("pybind11", "torch") if importlib.util.find_spec(name) is None]
    if session.options.device == "cpu":
        session.note("build", f"skipped on a CPU; missing here: {', '.join(missing) or 'nothing'}")
        return
    if missing:
        session.fail("build", f"missing: {', '.join(missing)}")
        return
    import pybind11
    import torch

    architecture = "".join(map(str, torch.cuda.get_device_capability()))
    folder = ROOT / "build" / "gpu"
    limit = SHARES["build"] * session.total
    configure = [
        _which("cmake"), "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={_which('ninja')}",
        f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        "-DESOKERN_CUDA=ON", f"-DESOKERN_CUDA_ARCHITECTURES={architecture}-real",
    ]  # fmt: skip
    begin = time.monotonic()
    for command in (configure, [_which("cmake"), "--build", str(folder)]):
        status, output = session.run("build", command, limit - (time.monotonic() - begin))
        if status:
            session.fail("build", f"status {status}\n{tail(output, 25)}")
            return
    for module in folder.glob("_c*.so"):
        shutil.copy(module, ROOT / "esokern")
    session.note("build", f"sm_{architecture} in {time.monotonic() - begin:.0f} s")


def _which(tool: str) -> str | None:
    """Path of a program on PATH, beside this interpreter, or in the wheel of its name."""
    folders = [str(Path(sys.executable).parent)]
    spec = importlib.util.find_spec(tool) if tool in ("cmake", "ninja") else None
    if spec is not None and spec.submodule_search_locations:
        folders += [str(Path(folder, "data", "bin")) for folder in spec.submodule_search_locations]
    return shutil.which(tool) or shutil.which(tool, path=os.pathsep.join(folders))


def test(session: Session) -> None:
    """The op tests against this GPU, and the samplers on it."""
    if importlib.util.find_spec("pytest") is None:
        session.fail("test", "missing: Python package pytest")
        return
    cpu = session.options.device == "cpu"
    if not cpu:  # without the module, pytest would find nothing to run and be content
        status, output = session.run("test", [sys.executable, "-c", "import torch, esokern, esokern._cuda"], 60)
        if status:
            session.fail("test", f"esokern does not load:\n{tail(output, 3)}")
            return
    files = [str(path) for name in TESTS if (path := ROOT / "tests" / f"test_{name}.py").exists()]
    chosen = "reference and (test_options or test_empty)" if cpu else "cuda and not emulated or cupy"
    command = [sys.executable, "-m", "pytest", "-q", "--maxfail=30", "-k", chosen, "-W", "default", *files]
    if not cpu and importlib.util.find_spec("xdist") is not None:
        command += ["-n", "6"]
    limit = min(SHARES["test"] * session.total, session.left())
    status, output = session.run("test", command, limit)
    if status:
        failures = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
        session.fail("test", "\n".join([f"status {status}", *failures[:25], tail(output, 1 if failures else 12)]))
    else:
        session.note("test", tail(output, 1))


def sanitizer(session: Session) -> None:
    """Memory errors and races of every op's small cases, as compute-sanitizer sees them."""
    program = shutil.which("compute-sanitizer")
    if session.options.device == "cpu" or program is None:
        session.note("sanitizer", "skipped: needs a GPU and compute-sanitizer on PATH")
        return
    limit = min(SHARES["sanitizer"] * session.total, session.left())
    ops = [op for op in OPS if op not in ("decoders", "generate")]
    cases = [sys.executable, "bench/gpu_bench.py", "--small", "--once", "--op", *ops]
    for tool in ("memcheck", "racecheck"):
        command = [program, "--tool", tool, "--error-exitcode", "9", *cases]
        # Without torch's cache every tensor is an allocation of its own, whose ends memcheck guards.
        status, output = session.run(tool, command, limit / 2, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        if status:
            found = [line for line in output.splitlines() if "========= " in line][:8]
            session.fail("sanitizer", "\n".join([f"{tool}: status {status}", *(found or [tail(output)])]))
        else:
            session.note("sanitizer", f"{tool}: {tail(output, 1)}")


def bench(session: Session) -> None:
    """Timings, an op at a time."""
    options = session.options
    for op, share in OPS.items():
        available = session.left() - 10
        seconds = share * available
        if available < 10:
            session.note("bench", f"{op}: left out, the time was up")
            with session.rows_file.open("a") as file:
                file.write(
                    json.dumps({"op": op, "case": "all", "candidate": "all", "left_out": "the time was up"}) + "\n"
                )
            continue
        begin = time.monotonic()
        status = BROKEN_CONTEXT
        while status == BROKEN_CONTEXT and time.monotonic() - begin < seconds:
            first = len({row["case"] for row in session.rows() if row["op"] == op})
            command = [
                sys.executable, "bench/gpu_bench.py", "--op", op, "--rows", str(session.rows_file.resolve()),
                "--first", str(first), "--seconds", str(seconds - (time.monotonic() - begin)),
                "--device", options.device, *(["--small"] if options.small else []),
            ]  # fmt: skip
            # A process stops adding cases by itself; what hangs is stopped when the whole time is up.
            status, output = session.run(f"bench-{op}", command, session.left() - 5)
            print(output, flush=True)
        if status:
            session.fail("bench", f"{op}: status {status}, see bench-{op}.log\n{tail(output, 3)}")
        else:
            session.note("bench", f"{op}: {time.monotonic() - begin:.0f} s")


def record(session: Session) -> None:
    """Append the rows to the GPU's record file; only full cases on a GPU count."""
    rows = [row for row in session.rows() if "machine" in row]
    if session.options.device == "cuda" and not session.options.small and rows:
        path = ROOT / "bench" / "results" / f"{rows[0]['machine']}.jsonl"
        with path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        shutil.copy(path, session.out)
        session.note("bench", f"{len(rows)} rows appended to {path.relative_to(ROOT)}")


def summary(session: Session) -> str:
    """One line per case, ours against the best peer; then who was missing, and how the sections went."""
    measured = [row for row in session.rows() if "left_out" not in row]
    lines = []
    if measured:
        first = measured[0]
        rates = ", ".join(f"{k} {v / 1e3:.0f} TFLOP/s" for k, v in first["floor_gflop_per_s"].items())
        lines = [
            f"{first['machine']}, torch {first['torch']}, commit {first['commit']}; floors: "
            f"memory {first['floor_gb_per_s']:.0f} GB/s, {rates}",
            f"{'op':14.14} {'case':36} {'ours us':>10} {'p25-p75':17} {'GB/s':>6} {'TF/s':>6} {'%floor':>6} best peer",
        ]
    for op, case in dict.fromkeys((row["op"], row["case"]) for row in measured):
        rows = [row for row in measured if (row["op"], row["case"]) == (op, case)]
        ours = next((row for row in rows if row["candidate"] in ("esokern", "Eso-LM cached")), None)
        peers = [row for row in rows if not row["candidate"].startswith("esokern") and row is not ours]
        best = min((row for row in peers if not row.get("partial")), key=lambda row: row["median_us"], default=None)
        cells = f"{'-':>10} {'':17} {'':6} {'':6} {'':6}"
        if ours is not None:
            cells = (
                f"{ours['median_us']:10.1f} {ours['p25_us']:.0f}-{ours['p75_us']:.0f}".ljust(28)
                + f" {ours['gb_per_s'] or 0:6.0f} {(ours['gflop_per_s'] or 0) / 1e3:6.1f}"
                + f" {ours['percent_of_floor'] or 0:6.0f}"
            )
            if not ours.get("how", "graph").startswith(("graph", "4 x")):
                cells += " (eager)"
        line = f"{op:14.14} {case:36} {cells}"
        if best is not None:
            ratio = f" {best['median_us'] / ours['median_us']:.2f}x" if ours is not None else ""
            line += f" {best['candidate']} {best['median_us']:.1f}{ratio}"
        lines.append(line)
    left_out: dict[str, set[str]] = {}
    for row in session.rows():
        if "left_out" in row:
            left_out.setdefault(f"{row['op']}, {row['candidate']}: {row['left_out'][:90]}", set()).add(row["case"])
    lines += [f"left out: {what} ({len(cases)} cases)" for what, cases in left_out.items()]
    return "\n".join([*lines, *session.notes, f"failed: {', '.join(dict.fromkeys(session.failed)) or 'nothing'}"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-run", help="folder for logs and rows")
    parser.add_argument("--minutes", type=float, default=9.0, help="of everything together")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, separated by commas")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny cases, nothing recorded")
    options = parser.parse_args()
    sections = options.only.split(",")
    if unknown := set(sections) - set(SECTIONS):
        parser.error(f"--only: got {', '.join(sorted(unknown))}, supported are {', '.join(SECTIONS)}")
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("--device cuda: torch finds no GPU; --device cpu --small takes the same way in miniature")
    session = Session(options)
    for section in SECTIONS:
        if section in sections:
            try:
                {"build": build, "test": test, "sanitizer": sanitizer, "bench": bench}[section](session)
            except Exception as error:
                session.fail(section, f"{type(error).__name__}: {error}")
    record(session)
    text = summary(session)
    (session.out / "summary.txt").write_text(text + "\n")
    print("\n" + text)
    return bool(session.failed)


if __name__ == "__main__":
    sys.exit(main())
