"""The paper's claims in small: eleven models on two corpora, one recipe and one budget, in one resumable command.

    python bench/study.py --shakespeare tinyshakespeare.txt

Stages, each skipped where its results are already in --out:
    train        AR, Eso-LM (B) at five alpha_0, Eso-LM (A) at two, MDLM, BD3-LM at two block sizes; and a stronger AR
    likelihood   held-out NELBO and importance-weighted bound of every model
    samples      quality against network evaluations and seconds; the stronger AR model scores the text
and at last tables and plots; with --record in bench/results, from where bench/report.py puts them into README.

Training of different models runs side by side, one thread each (--workers). Samples are timed, so they run alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import multiprocessing
import re
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import study_report
from esokern import data, objectives, perplexity, samplers, text, train
from esokern.models import FoldedNetwork, load_checkpoint
from harness import RESULTS, commit, machine_name

RECIPE = {
    "hidden_size": 96,
    "n_blocks": 3,
    "n_heads": 3,
    "length": 128,
    "cond_dim": 8,
    "batch_size": 16,
    "infill_fraction": 0.0,
    "ema": 0.99,
}
# Where the true weight 1/t has no bound (alpha_0 = 1, MDLM, BD3-LM) training uses weight 1, as the paper does.
MODELS: dict[str, dict] = {
    "AR": {"objective": "ar"},
    **{
        f"Eso-LM (B) {alpha_0:g}": {"objective": "esolm", "alpha_0": alpha_0, "low_var": alpha_0 == 1.0}
        for alpha_0 in (0.0, 0.125, 0.25, 0.5, 1.0)
    },
    **{
        f"Eso-LM (A) {alpha_0:g}": {
            "objective": "esolm", "alpha_0": alpha_0, "variant": "A", "low_var": alpha_0 == 1.0,
        }
        for alpha_0 in (0.25, 1.0)
    },
    "MDLM": {"objective": "mdlm", "low_var": True},
    **{f"BD3-LM {size}": {"objective": "bd3lm", "block_size": size, "low_var": True} for size in (4, 16)},
}  # fmt: skip
SCORER = {"objective": "ar", "hidden_size": 128, "n_blocks": 4, "n_heads": 4, "steps": 2000}
HELD_OUT_ROWS, DRAWS = 64, 16
# Of the importance-weighted bound: an order takes one pass of Eso-LM, block_size of BD3-LM, one a token of MDLM.
ORDERS = {"esolm": 32, "bd3lm": 4, "mdlm": 2}
NUM_SAMPLES, SAMPLE_BATCH, TOP_P = 128, 32, 0.9


@dataclasses.dataclass(frozen=True)
class Job:
    """A model on a corpus, and where its run lives."""

    corpus: str
    model: str
    out: Path
    config: train.TrainConfig

    @property
    def done(self) -> bool:
        path = self.out / train.CHECKPOINT
        return path.exists() and torch.load(path, mmap=True, weights_only=True)["step"] >= self.config.steps

    @property
    def steps(self) -> int:
        """Steps that the run has reported."""
        path = self.out / train.METRICS
        lines = path.read_text().splitlines() if path.exists() else []
        return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)

    def network(self) -> FoldedNetwork:
        """What was trained: the average over the last steps."""
        return load_checkpoint(self.out / train.CHECKPOINT).fold()


def jobs(options: argparse.Namespace) -> list[Job]:
    """What has to be trained, in the order in which it is wanted."""
    corpora = {
        "tinyshakespeare": {
            "corpus": str(options.shakespeare),
            "tokenizer": "bytes",
            "held_out_fraction": 0.1,
            "steps": 1200,
        },
        "standard library": {"corpus": "stdlib", "vocab_size": 1024, "steps": 800},
    }
    wanted = []
    for corpus, settings in corpora.items():
        models = MODELS | ({"scorer": SCORER} if corpus == "tinyshakespeare" else {})
        for model, objective in models.items():
            out = options.out / _slug(corpus) / _slug(model)
            recipe = RECIPE | settings | objective | {"out": str(out), "progress": False, "threads": 1}
            recipe["steps"] = max(1, round(recipe["steps"] * options.scale))
            wanted.append(Job(corpus, model, out, train.TrainConfig(**recipe, eval_every=recipe["steps"])))
    return wanted


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


# --- train


def _train(job: Job) -> None:
    torch.set_num_threads(1)
    train.train(job.config)


def train_all(wanted: list[Job], workers: int) -> None:
    """Train what is not trained yet. Ctrl-C is safe: every run continues from its last checkpoint."""
    waiting = [job for job in wanted if not job.done]
    if not waiting:
        return
    bar = tqdm(total=sum(job.config.steps - job.steps for job in waiting), unit="step", desc="train")
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(_train, job): job for job in waiting}
        start = {job.out: job.steps for job in waiting}
        left = set(running)
        while left:
            done, left = wait(left, timeout=2, return_when=FIRST_EXCEPTION)
            bar.update(sum(job.steps - start[job.out] for job in waiting) - bar.n)
            for future in done:
                if future.exception() is not None:
                    pool.shutdown(wait=False, cancel_futures=True)
                    job = running[future]
                    raise RuntimeError(f"training of {job.model} on {job.corpus} failed") from future.exception()
    bar.close()


# --- likelihood


@functools.cache
def text_of(job: Job) -> tuple[torch.Tensor, text.Tokenizer, torch.Tensor]:
    """Held-out rows [n, length], the tokenizer, and the share of every id in the training text."""
    tokenizer = text.Tokenizer.from_file(job.out / "tokenizer.json")
    training, held_out = data.streams(job.out / train.STREAMS, job.config.source(), tokenizer)
    counts = 1 + np.bincount(training.tokens, minlength=tokenizer.vocab_size)
    rows = data.held_out_rows(held_out.tokens, job.config.length, HELD_OUT_ROWS)
    return rows, tokenizer, torch.from_numpy(counts / counts.sum())


def bounds(job: Job) -> dict:
    """What the model says of the held-out rows: its NELBO, and the bound over many orders where it has orders."""
    rows, tokenizer, frequency = text_of(job)
    kind = job.config.objective
    settings = {"esolm": ("alpha_0", "variant"), "bd3lm": ("block_size",)}.get(kind, ())
    model = perplexity.Model(kind, **{name: getattr(job.config, name) for name in settings})
    orders = ORDERS[kind] if model.has_orders else 0
    found = perplexity.estimates(job.network(), [rows], model, draws=DRAWS, num_orders=orders)
    if kind == "ar":  # it does not predict the first token of a row, whose frequency stands in
        first = -frequency[rows[:, 0]].log()
        found = [dataclasses.replace(estimate, nll=estimate.nll + first) for estimate in found]
    num_tokens = torch.full((len(rows),), rows.shape[1])
    num_bytes = torch.from_numpy(tokenizer.n_bytes())[rows].sum(1)
    parameters = load_checkpoint(job.out / train.CHECKPOINT).n_parameters()
    return {"parameters": parameters, "estimates": [perplexity.figures(e, num_tokens, num_bytes) for e in found]}


# --- samples


def settings() -> Iterator[tuple[str, str, dict]]:
    """(model, sampler, its options) of every point of the plot."""
    yield "AR", "autoregressive", {}
    for trained in (0.125, 0.25, 0.5, 1.0):
        for alpha_0 in (0.0625, 0.25, 0.5, 1.0):
            for steps in (8, 16, 32, 64, 128) if alpha_0 == 1.0 else (8, 32, 128):
                yield f"Eso-LM (B) {trained:g}", "esolm", {"alpha_0": alpha_0, "num_steps": steps}
    for steps in (8, 16, 32, 64, 128, 512):
        yield "MDLM", "mdlm", {"num_steps": steps}
    for size in (4, 16):
        for steps in (1, 2, 4, 8, 16):
            if steps <= size:
                yield f"BD3-LM {size}", "bd3lm", {"block_size": size, "num_steps": steps}


def quality(tokens: torch.Tensor, scorer: FoldedNetwork, tokenizer: text.Tokenizer) -> dict[str, float]:
    """What the scorer and simple counts say of samples [n, length]; entropy in nats, distinct-n of words."""
    nats = objectives.ar_nll(scorer, tokens).sum(1) / (tokens.shape[1] - 1)
    perplexity = nats.mean().exp().item()
    frequency = torch.stack([torch.bincount(row, minlength=tokenizer.vocab_size) for row in tokens]) / tokens.shape[1]
    words = [tokenizer.decode(row.tolist()).split() for row in tokens]
    distinct = {}
    for n in (1, 2):
        grams = [tuple(row[i : i + n]) for row in words for i in range(len(row) - n + 1)]
        distinct[f"distinct_{n}"] = len(set(grams)) / max(len(grams), 1)
    return {
        "perplexity": perplexity,
        "perplexity_error": perplexity * nats.std().item() / math.sqrt(len(nats)),
        "entropy": torch.special.entr(frequency).sum(1).mean().item(),
        **distinct,
    }


def sample(job: Job, sampler: str, options: dict, scorer: FoldedNetwork, first: torch.Tensor) -> dict[str, float]:
    """Generate, time and score one point. `first`: [n, 1] tokens that AR samples begin with, since it predicts none."""
    network = job.network()
    generate = getattr(samplers, sampler).generate
    tokens, seconds, nfe = [], [], []
    for begin in range(0, NUM_SAMPLES, SAMPLE_BATCH):
        start = first[begin : begin + SAMPLE_BATCH] if sampler == "autoregressive" else None
        result = generate(
            network, start, length=job.config.length, batch=SAMPLE_BATCH, seed=1000 + begin, top_p=TOP_P, **options
        )
        tokens.append(result.tokens)
        seconds.append(result.seconds)
        nfe.append(result.nfe)
    point = {"nfe": sum(nfe) / len(nfe), "seconds": min(seconds) / SAMPLE_BATCH}
    return point | quality(torch.cat(tokens), scorer, text_of(job)[1])


# --- results, one line each


class Results:
    """Finished pieces of work, kept in a file so that the study can go on after a stop."""

    def __init__(self, path: Path):
        self.path = path
        self.rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        self.stamp = {"machine": machine_name(), "commit": commit(), "torch": torch.__version__}

    def find(self, **key) -> dict | None:
        return next((row for row in self.rows if key.items() <= row.items()), None)

    def once(self, compute: Callable[[], dict], **key) -> None:
        """Compute and keep the row of `key`, unless it is here."""
        if self.find(**key) is None:
            row = key | compute() | self.stamp
            self.rows.append(row)
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shakespeare", type=Path, required=True, help="tinyshakespeare as one text file")
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="default %(default)s")
    parser.add_argument("--workers", type=int, default=2, help="models trained at once (default %(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the steps, to try things out")
    parser.add_argument("--record", action="store_true", help="put the results into bench/results, for bench/report.py")
    options = parser.parse_args()
    if not options.shakespeare.is_file():
        parser.error(f"--shakespeare {options.shakespeare}: there is no such file")
    options.out.mkdir(parents=True, exist_ok=True)

    wanted = jobs(options)
    train_all(wanted, options.workers)
    results = Results(options.out / "study.jsonl")
    for job in tqdm([job for job in wanted if job.model != "scorer"], desc="likelihood", unit="model"):
        results.once(functools.partial(bounds, job), stage="likelihood", corpus=job.corpus, model=job.model)

    by_model = {job.model: job for job in wanted if job.corpus == "tinyshakespeare"}
    scorer = by_model["scorer"].network()
    real, tokenizer, _ = text_of(by_model["scorer"])
    results.once(lambda: quality(real, scorer, tokenizer), stage="samples", model="held-out text")
    first = real[:, :1].repeat(NUM_SAMPLES // len(real), 1)
    for model, sampler, chosen in tqdm(list(settings()), desc="samples", unit="setting"):
        compute = functools.partial(sample, by_model[model], sampler, chosen, scorer, first)
        results.once(compute, stage="samples", model=model, **chosen)

    if options.record:
        (RESULTS / "study.jsonl").write_text((options.out / "study.jsonl").read_text())
    study_report.plots(results.rows, RESULTS if options.record else options.out)
    for table in study_report.tables(results.rows).values():
        print(table, end="\n\n")


if __name__ == "__main__":
    main()
