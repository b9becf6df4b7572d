"""README's tables and plots, made from the records: `python bench/report.py [MACHINE]`.

Text between `<!-- bench:NAME -->` and `<!-- end -->` in README.md is replaced; plots go to bench/results/.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import study_report
from harness import RESULTS, machine_name, markdown

README = Path(__file__).parent.parent / "README.md"
COLOURS = {
    "Eso-LM cached": "#1b6ca8",
    "Eso-LM eager": "#8fb8d8",
    "AR cached": "#3a9a5b",
    "BD3-LM 16": "#d98c1f",
    "BD3-LM 4": "#edc27c",
    "MDLM": "#b03a48",
}


def load(machine: str) -> dict[tuple, dict]:
    """The newest record of every (op, case, dtype, candidate)."""
    newest = {}
    for line in (RESULTS / f"{machine}.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "left_out" in row:  # why a peer could not run a case
            continue
        newest[row["op"], row["case"], row["dtype"], row["candidate"]] = row
    return newest


def _time(microseconds: float) -> str:
    if microseconds < 1000:
        return f"{microseconds:.0f} us"
    return f"{microseconds / 1000:.2f} ms" if microseconds < 1e6 else f"{microseconds / 1e6:.2f} s"


def op_table(records: dict, op: str, keep: Callable[[str], bool]) -> str:
    """Ours against the best alternative, a line per case."""
    rows = []
    for (row_op, case, dtype, candidate), row in records.items():
        if row_op != op or candidate != "esokern" or not keep(case):
            continue
        others = [
            other for key, other in records.items() if key[:3] == (op, case, dtype) and not key[3].startswith("esokern")
        ]
        best = min(others, key=lambda other: other["median_us"])
        rows.append(
            [
                case,
                dtype,
                _time(row["median_us"]),
                f"{best['candidate']}: {_time(best['median_us'])}",
                f"{row['ratio_to_best_alternative']:.2f}x",
                f"{row['percent_of_floor']:.0f} %",
            ]
        )
    return markdown(["case", "dtype", "esokern", "best alternative", "ratio", "share of the machine's floor"], rows)


def generation_table(records: dict, op: str) -> str:
    """A line per case, a column per sampler; in brackets the time relative to Eso-LM's."""
    samplers = ["Eso-LM cached", "AR cached", "BD3-LM 16", "Eso-LM eager", "MDLM (NFE x mean step)"]
    rows = []
    for case, dtype in dict.fromkeys(key[1:3] for key in records if key[0] == op):
        times = [records.get((op, case, dtype, name), {}).get("median_us") for name in samplers]
        cells = ["-" if t is None else f"{_time(t)} ({t / times[0]:.3g}x)" for t in times]
        rows.append([case, dtype, *cells])
    return markdown(["case", "dtype", *samplers], rows)


def decoder_table(records: dict) -> str:
    """A line per case of bench/decoders.py: whole generations, and what a pass takes beside the transformer."""
    rows = []
    for (op, case, _, name), theirs in records.items():
        if op != "decoder" or name not in ("LLaDA", "Fast-dLLM"):
            continue
        ours = records[op, case, theirs["dtype"], "esokern"]
        steps = ours["passes"]  # the published code may need more: a call for each row
        beside = (theirs["head_us"] + theirs["overhead_us"]) / steps
        rows.append(
            [
                case,
                str(steps) if steps == theirs["passes"] else f"{theirs['passes']}, {steps}",
                f"{name}: {_time(theirs['median_us'])}",
                _time(ours["median_us"]),
                f"{theirs['median_us'] / ours['median_us']:.2f}x",
                _time(beside),
                _time(theirs["overhead_us"] / steps),
                _time(ours["overhead_us"] / steps),
            ]
        )
    beside = ["LM head and decoding of a pass, published", "without the head", "esokern, with the head"]
    return markdown(["case", "passes", "published", "esokern", "ratio", *beside], rows)


def memory_table(records: dict) -> str:
    """A line per batch of bench/decoder_memory.py, a column per decoder."""
    names = ["LLaDA", "Fast-dLLM", "esokern"]
    rows = []
    for case in dict.fromkeys(key[1] for key in records if key[0] == "decoder_memory"):
        found = [records.get(("decoder_memory", case, "float32", name)) for name in names]
        rows.append([case, *("-" if row is None else f"{row['peak_mib']:.0f} MiB" for row in found)])
    return markdown(["case", *names], rows)


def plot_scaling(records: dict, path: Path) -> None:
    """Seconds of a whole generation against its length, one line per sampler."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for (op, case, _, candidate), row in records.items():
        if op == "generate_scaling":
            length = int(re.search(r"L(\d+)", case).group(1))
            curves.setdefault(candidate, []).append((length, row["median_us"] / 1e6))
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name, points in sorted(curves.items(), key=lambda item: -max(item[1])[1]):
        points.sort()
        axes.plot(*zip(*points, strict=True), marker="o", label=name, color=COLOURS.get(name))
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="tokens generated, one network evaluation per token",
        ylabel="seconds",
    )
    axes.set_title("Time of one generation, batch 1, sampling included")
    ticks = sorted({x for points in curves.values() for x, _ in points})
    axes.set_xticks(ticks, [str(x) for x in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def plot_profile(records: dict, path: Path) -> None:
    """Where the time of one decoding step goes."""
    parts = {key[3]: row["median_us"] for key, row in records.items() if key[0] == "step_profile"}
    figure, axes = plt.subplots(figsize=(7, 1.9))
    left = 0.0
    for index, (name, microseconds) in enumerate(parts.items()):
        axes.barh(
            0,
            microseconds,
            left=left,
            label=f"{name} {microseconds:.0f} us",
            color=plt.cm.tab20c(index * 2 % 20),
        )
        left += microseconds
    axes.set(yticks=[], xlabel="microseconds", title="One Eso-LM step (hidden 256, 6 layers, batch 1, KV 512)")
    axes.legend(frameon=False, ncols=3, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.35))
    figure.savefig(path, dpi=130, bbox_inches="tight")


def main(machine: str) -> None:
    """Rewrite README's tables and the plots from the machine's records."""
    records = load(machine)
    tables = {
        "attention_with_kvcache": op_table(
            records, "attention_with_kvcache", lambda case: "B4" in case and "KV2048" in case
        ),
        "attention": op_table(records, "attention", lambda case: "S1024" in case),
        "attention_backward": op_table(records, "attention_backward", lambda case: "S1024" in case),
        "masked_cross_entropy": op_table(records, "masked_cross_entropy", lambda case: "V66" not in case),
        "unmask_sample": op_table(
            records, "unmask_sample", lambda case: case.startswith(("rows 1 ", "rows 16 ", "rows 256 "))
        ),
        "unmask_select": op_table(records, "unmask_select", lambda case: "width 256" in case),
        "fused_linear": op_table(records, "fused_linear", lambda case: case.endswith(("rows 2", "rows 1024"))),
        "generate": generation_table(records, "generate"),
        "decoder": decoder_table(records),
        "decoder_memory": memory_table(records),
    }
    study = RESULTS / "study.jsonl"
    if study.exists():
        rows = [json.loads(line) for line in study.read_text().splitlines()]
        tables |= study_report.tables(rows)
        study_report.plots(rows, RESULTS)
    text = README.read_text()
    for name, table in tables.items():
        text = re.sub(
            rf"(<!-- bench:{name} -->\n).*?(<!-- end -->)",
            lambda m, t=table: m[1] + t + "\n" + m[2],
            text,
            flags=re.S,
        )
    README.write_text(text)
    plot_scaling(records, RESULTS / "generation_time.png")
    plot_profile(records, RESULTS / "step_profile.png")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else machine_name())
