"""The recipe of a training run: every setting, from flags or a YAML file."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esokern.data import Source
from esokern.models.network import NetworkConfig
from esokern.objectives import EsoLMObjective

DEFAULT_LENGTH = 256
# What recipe and network share.
SIZES = ("vocab_size", "hidden_size", "n_blocks", "n_heads", "length", "cond_dim", "adaln")


@dataclass(frozen=True)
class TrainConfig:
    """A recipe. Field names are the flags of `esokern train` and the keys of its YAML file.

    The defaults are close to the recipe of the model that comes with the package (its model card has the exact one).
    """

    out: str = "runs/esolm"  # the folder of the run; where it holds a checkpoint, the run continues
    init_from: str = ""  # a checkpoint to start from; sizes (but a length given here) and vocabulary are then its own
    # text
    corpus: str = "stdlib"  # "stdlib", a file or folder of text, or hf:NAME[:CONFIG][:SPLIT]
    text_field: str = "text"  # the column of a Hugging Face dataset
    valid_corpus: str = ""  # the held-out text; empty: a part of corpus
    held_out_fraction: float = 0.0  # 0: one document in 20, or the last tenth of a single one
    tokenizer: str = ""  # a tokenizer.json, or "bytes"; empty: train one of vocab_size ids
    vocab_size: int = 1024
    # network
    hidden_size: int = 128
    n_blocks: int = 4
    n_heads: int = 4
    length: int = 0  # tokens of a row; 0: that of init_from, else 256
    cond_dim: int = 8  # width of the condition that adaLN reads
    adaln: bool = True  # the published networks' adaptive layer norm
    dropout: float = 0.0
    # objective
    objective: str = "esolm"  # esolm, mdlm, bd3lm, ar
    alpha_0: float = 0.25  # esolm: expected share of tokens that diffusion produces; 1 = all, 0 = none
    kappa: float = 0.5  # esolm: share of the rows that take the diffusion term
    variant: str = "B"  # esolm: attention of clean tokens, A (bidirectional) or B (causal)
    low_var: bool = False  # unit weights in the diffusion term: less noise, no bound
    infill_fraction: float = 0.4  # esolm: share of rows trained to fill a gap or continue a text
    block_size: int = 16  # bd3lm: tokens of a block
    # optimisation
    batch_size: int = 8  # rows of a step, over all processes
    accumulate: int = 1  # parts of the batch that a process takes one after the other
    steps: int = 10_000
    max_seconds: float = 0.0  # 0: no limit
    schedule: str = "cosine"  # cosine, constant; after the warm-up
    schedule_by: str = "steps"  # steps, or seconds: the share of max_seconds used up
    optimizer: str = "muon"  # muon (the blocks' matrices by Muon, the rest by AdamW), adamw
    lr: float = 3e-3  # of AdamW
    muon_lr: float = 7e-3  # of Muon
    final_lr: float = 0.0  # where the cosine ends, as a share of the full rate
    warmup_steps: int = 50
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.05
    grad_clip: float = 1.0  # largest norm of the gradient; 0: no limit
    ema: float = 0.998  # decay of the weights' moving average, which is what is evaluated and exported
    precision: str = "fp32"  # fp32, bf16 (autocast)
    device: str = "cpu"  # cpu, cuda or cuda:N; of several processes each takes its own GPU
    shard: str = "ddp"  # several processes: ddp (the network on each), fsdp (its weights split over them)
    threads: int = 0  # 0: leave torch's choice
    compile: bool = False  # torch.compile the network
    seed: int = 0
    # reports
    eval_every: int = 500  # steps between evaluations
    eval_rows: int = 64  # held-out rows of an evaluation
    sample_length: int = 64  # tokens of the text that each evaluation writes; 0: none
    log_every: int = 20  # steps between lines of metrics.jsonl
    checkpoint_every_seconds: float = 300.0  # a killed run loses no more than this
    progress: bool = True  # show progress bars

    def __post_init__(self):
        choices = {
            "objective": ("esolm", "mdlm", "bd3lm", "ar"),
            "optimizer": ("muon", "adamw"),
            "schedule": ("cosine", "constant"),
            "schedule_by": ("steps", "seconds"),
            "precision": ("fp32", "bf16"),
            "shard": ("ddp", "fsdp"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; supported: {', '.join(allowed)}")
        for name in ("batch_size", "accumulate", "steps", "eval_every", "eval_rows", "log_every", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; at least 1 is needed")
        if self.schedule_by == "seconds" and self.max_seconds <= 0:
            raise ValueError("schedule_by seconds needs max_seconds > 0")
        for name in ("length", "sample_length"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        for name in ("ema", "held_out_fraction"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie in [0, 1)")
        if self.valid_corpus and self.held_out_fraction:
            raise ValueError("valid_corpus and held_out_fraction: give one of them")
        self.esolm()  # checks the objective's own settings

    def network(self) -> NetworkConfig:
        return NetworkConfig(dropout=self.dropout, **{name: getattr(self, name) for name in SIZES})

    def with_sizes_of(self, network: NetworkConfig) -> TrainConfig:
        """The same recipe for a network of these sizes; its own length stays if it has one."""
        sizes = {name: getattr(network, name) for name in SIZES}
        return dataclasses.replace(self, **sizes | {"length": self.length or network.length})

    def source(self) -> Source:
        return Source(self.corpus, self.valid_corpus, self.text_field, self.held_out_fraction)

    def max_parts(self) -> int:
        """Into how many parts a batch can be split so that each has rows of every term of the loss."""
        diffusion = round(self.kappa * self.batch_size)
        if self.objective != "esolm" or self.alpha_0 in (0.0, 1.0):
            return self.batch_size
        return min(diffusion, self.batch_size - diffusion)

    def esolm(self) -> EsoLMObjective:
        return EsoLMObjective(self.alpha_0, self.kappa, self.variant, self.low_var, self.infill_fraction)


# Settings that may differ between a run and its continuation.
_FREE_SETTINGS = frozenset(
    {
        "out", "init_from", "corpus", "text_field", "valid_corpus", "held_out_fraction", "tokenizer", "vocab_size",
        "accumulate", "steps", "max_seconds", "device", "shard", "threads", "compile", "eval_every", "eval_rows",
        "sample_length", "log_every", "checkpoint_every_seconds", "progress",
    }
)  # fmt: skip
# Settings that say where and how a run ran, not what was trained.
_LOCAL_SETTINGS = frozenset(
    {"out", "device", "shard", "threads", "compile", "progress", "eval_every", "eval_rows", "sample_length",
     "log_every", "checkpoint_every_seconds"}
)  # fmt: skip


def differences(old: dict[str, Any], new: TrainConfig) -> str:
    """What a run may not change on its way, named with both values; "" if there is nothing."""
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    pairs = {name: (old.get(name, defaults[name]), getattr(new, name)) for name in defaults}
    changed = {name: pair for name, pair in pairs.items() if name not in _FREE_SETTINGS and pair[0] != pair[1]}
    return ", ".join(f"{name} {before!r} -> {after!r}" for name, (before, after) in changed.items())


def recipe(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide what is trained."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in _LOCAL_SETTINGS}


def parse_config(argv: Sequence[str]) -> tuple[TrainConfig, str]:
    """The recipe and the export folder from flags; flags override the YAML file of ``--config``."""
    parser = argparse.ArgumentParser(
        prog="esokern train", description="Train a model; continues the run in --out if there is one."
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with the settings below")
    parser.add_argument("--export", metavar="FOLDER", default="", help="where the model goes (default: OUT/model)")
    # The comments on the settings are their help.
    notes = dict(re.findall(r"^    (\w+): \w+ = .*?  # (.*)$", inspect.getsource(TrainConfig), re.MULTILINE))
    for field in dataclasses.fields(TrainConfig):
        flag = "--" + field.name.replace("_", "-")
        kind = type(field.default)
        about = (
            f"{notes[field.name]} (default {field.default!r})" if field.name in notes else f"default {field.default!r}"
        )
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=about)
        else:
            parser.add_argument(flag, type=kind, default=None, help=about, metavar=kind.__name__)
    given = vars(parser.parse_args(list(argv)))
    file, target = given.pop("config"), given.pop("export")
    settings = _read_yaml(file) if file else {}
    settings |= {name: value for name, value in given.items() if value is not None}
    return TrainConfig(**settings), target


def _read_yaml(file: str) -> dict[str, Any]:
    try:
        import yaml
    except ImportError as error:
        raise ValueError("--config needs PyYAML (pip install pyyaml); flags work without it") from error
    try:
        values = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"--config {file}: {error}") from error
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    if not isinstance(values, dict) or not values.keys() <= defaults.keys():
        unknown = sorted(map(str, values.keys() - defaults.keys())) if isinstance(values, dict) else [str(values)]
        raise ValueError(f"--config {file}: unknown settings {', '.join(unknown)}; known: {', '.join(defaults)}")
    for name, value in values.items():
        kind = type(defaults[name])
        if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
            with contextlib.suppress(ValueError):  # YAML 1.1 reads 3e-4 as a string
                values[name] = float(value)
        if type(values[name]) is not kind:
            raise ValueError(f"--config {file}: {name} is {value!r}; a {kind.__name__} is needed")
    return values
