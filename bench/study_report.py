"""The study's tables and plots, from its records (bench/study.py)."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from harness import markdown

COLOURS = {
    "AR": "#3a9a5b",
    "Eso-LM (B)": "#1b6ca8",
    "Eso-LM (A)": "#8b5fbf",
    "MDLM": "#b03a48",
    "BD3-LM 4": "#edc27c",
    "BD3-LM 16": "#d98c1f",
}


def tables(records: list[dict]) -> dict[str, str]:
    """Markdown by name."""
    return {"study": markdown(*likelihood_rows(records)), "study_samples": markdown(*sample_rows(records))}


def plots(records: list[dict], folder: Path) -> None:
    """study_likelihood.png and study_samples.png."""
    plot_likelihood(records, folder / "study_likelihood.png")
    plot_samples(records, folder / "study_samples.png")


def likelihood_rows(records: list[dict]) -> tuple[list[str], list[list[str]]]:
    """A line per model, the corpora side by side."""
    found = {(row["model"], row["corpus"]): row["estimates"] for row in records if row["stage"] == "likelihood"}
    corpora = list(dict.fromkeys(corpus for _, corpus in found))
    lines = []
    for model in dict.fromkeys(model for model, _ in found):
        line = [model]
        for corpus in corpora:
            estimates = found.get((model, corpus))
            line += ["-"] * 3 if estimates is None else _cells(estimates)
        lines.append(line)
    header = ["model"]
    for corpus in corpora:
        header += [f"{corpus}, bits per byte", "perplexity", "importance-weighted"]
    return header, lines


def _cells(estimates: list[dict]) -> list[str]:
    first, last = estimates[0], estimates[-1]
    exact = " (exact)" if first["kind"] == "exact" else ""
    cells = [f"{first['bits_per_byte']:.3f}{exact}", f"{first['perplexity']:.2f} ± {_noise(first):.2f}"]
    if last["kind"] != "importance_weighted":
        return [*cells, "-"]
    return [*cells, f"{last['perplexity']:.2f} ± {_noise(last):.2f} (K {last['samples']})"]


def _noise(estimate: dict) -> float:
    return estimate["perplexity_se_noise"] or 0.0


def plot_likelihood(records: list[dict], path: Path) -> None:
    """Perplexity against alpha_0, a panel per corpus; models without alpha_0 are horizontal lines."""
    found = [row for row in records if row["stage"] == "likelihood"]
    corpora = list(dict.fromkeys(row["corpus"] for row in found))
    figure, panels = plt.subplots(1, len(corpora), figsize=(5.2 * len(corpora), 4.2), squeeze=False)
    for axes, corpus in zip(panels[0], corpora, strict=True):
        rows = {row["model"]: row["estimates"] for row in found if row["corpus"] == corpus}
        for family in ("Eso-LM (B)", "Eso-LM (A)"):
            by_alpha = sorted((float(name.rsplit(" ", 1)[1]), row) for name, row in rows.items() if family in name)
            _line(axes, [(alpha_0, row[0]) for alpha_0, row in by_alpha], COLOURS[family], f"{family}, NELBO", "o-")
            best = [(alpha_0, row[-1]) for alpha_0, row in by_alpha if row[-1]["kind"] != "nelbo"]
            if best:
                _line(axes, best, COLOURS[family], f"{family}, K = {best[-1][1]['samples']} orders", "s--")
        for name in ("AR", "MDLM", "BD3-LM 4", "BD3-LM 16"):
            if name in rows:
                axes.axhline(rows[name][0]["perplexity"], color=COLOURS[name], lw=1.2, label=name)
        axes.set(xlabel="alpha_0, share of tokens that diffusion decodes", ylabel="perplexity per token", title=corpus)
        axes.grid(alpha=0.3)
    figure.legend(*panels[0][0].get_legend_handles_labels(), frameon=False, fontsize=8, ncols=4, loc="lower center")
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _line(axes, points: list[tuple[float, dict]], colour: str, label: str, style: str) -> None:
    x, estimates = zip(*points, strict=True)
    values, errors = [e["perplexity"] for e in estimates], [_noise(e) for e in estimates]
    axes.errorbar(x, values, yerr=errors, fmt=style, color=colour, label=label, capsize=2, ms=4)


def sample_rows(records: list[dict]) -> tuple[list[str], list[list[str]]]:
    """A line per point of the plot, cheapest first within a model."""
    header = [
        "model", "decoding", "NFE", "ms per sample", "scorer's perplexity", "entropy", "distinct-1", "distinct-2",
    ]  # fmt: skip
    lines = []
    for row in (row for row in records if row["stage"] == "samples"):
        how = [f"{word} {row[key]:g}" for key, word in (("alpha_0", "alpha_0"), ("num_steps", "T")) if key in row]
        cost = ["-", "-"] if "nfe" not in row else [f"{row['nfe']:.0f}", f"{1e3 * row['seconds']:.1f}"]
        quality = [f"{row['perplexity']:.2f} ± {row['perplexity_error']:.2f}", f"{row['entropy']:.2f}"]
        lines.append(
            [row["model"], ", ".join(how), *cost, *quality, f"{row['distinct_1']:.2f}", f"{row['distinct_2']:.2f}"]
        )
    return header, lines


def plot_samples(records: list[dict], path: Path) -> None:
    """Perplexity of samples against network evaluations and against seconds."""
    rows = [row for row in records if row["stage"] == "samples"]
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True)
    styles = {"0.125": "v", "0.25": "^", "0.5": "s", "1": "o"}
    for axes, key, scale, label in (
        (panels[0], "nfe", 1, "network evaluations"),
        (panels[1], "seconds", 1e3, "milliseconds per sample"),
    ):
        for model in dict.fromkeys(row["model"] for row in rows if "nfe" in row):
            points = sorted((row[key] * scale, row["perplexity"]) for row in rows if row["model"] == model)
            family, _, trained = model.rpartition(" ")
            if family == "Eso-LM (B)":
                axes.scatter(
                    *zip(*points, strict=True), color=COLOURS[family], marker=styles[trained], s=24, alpha=0.8,
                    label=f"{family} trained at alpha_0 {trained}",
                )  # fmt: skip
            elif model == "AR":
                axes.scatter(*points[0], color=COLOURS["AR"], marker="*", s=180, label="AR", zorder=3)
            else:
                axes.plot(*zip(*points, strict=True), color=COLOURS[model], marker="D", ms=4, label=model)
        real = next((row for row in rows if row["model"] == "held-out text"), None)
        if real is not None:
            axes.axhline(real["perplexity"], color="#777777", lw=1, ls=":", label="held-out text")
        axes.set(xscale="log", yscale="log", xlabel=label)
        axes.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("perplexity under a stronger AR model")
    panels[1].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
