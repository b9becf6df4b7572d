"""Training: one process, resumable bit for bit, from a YAML file or flags.

    esokern train --out runs/mine --steps 2000
    esokern train --config recipe.yaml --max-seconds 3600

All randomness of step n (the rows, the noise, dropout) is a function of (seed, n), so a run that stops and resumes
takes exactly the steps it would have taken. Rows are windows of the encoded corpus at random offsets, each epoch in a
new order.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import platform
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from esokern import objectives, text
from esokern.models.checkpoint import load_checkpoint, save_checkpoint, write_atomically
from esokern.models.network import Network, NetworkConfig
from esokern.objectives import EsoLMObjective

CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class TrainConfig:
    """A recipe. Field names are the flags of `esokern train` and the keys of its YAML file.

    The defaults are close to the recipe of the model that comes with the package (its model card has the exact one).
    """

    out: str = "runs/esolm"
    corpus: str = "stdlib"  # "stdlib", or a file or folder of text
    tokenizer: str = ""  # a tokenizer.json; empty: train one of vocab_size ids
    vocab_size: int = 1024
    # network
    hidden_size: int = 128
    n_blocks: int = 4
    n_heads: int = 4
    length: int = 256
    cond_dim: int = 8
    adaln: bool = True
    dropout: float = 0.0
    # objective
    objective: str = "esolm"  # esolm, mdlm, bd3lm, ar
    alpha_0: float = 0.25
    kappa: float = 0.5
    variant: str = "B"
    low_var: bool = False
    infill_fraction: float = 0.4
    block_size: int = 16  # bd3lm
    # optimisation
    batch_size: int = 8
    steps: int = 10_000
    max_seconds: float = 0.0  # 0: no limit
    schedule: str = "cosine"  # cosine, constant; after the warm-up
    schedule_by: str = "steps"  # steps, or seconds: the share of max_seconds used up
    optimizer: str = "muon"  # muon (the blocks' matrices by Muon, the rest by AdamW), adamw
    lr: float = 3e-3
    muon_lr: float = 7e-3
    final_lr: float = 0.0  # where the cosine ends, as a share
    warmup_steps: int = 50
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.05
    grad_clip: float = 1.0
    ema: float = 0.998
    precision: str = "fp32"  # fp32, bf16 (autocast)
    device: str = "cpu"
    threads: int = 0  # 0: leave torch's choice
    compile: bool = False
    seed: int = 0
    # reports
    eval_every: int = 500
    eval_rows: int = 64
    log_every: int = 20
    checkpoint_every_seconds: float = 300.0
    progress: bool = True

    def __post_init__(self):
        choices = {
            "objective": ("esolm", "mdlm", "bd3lm", "ar"),
            "optimizer": ("muon", "adamw"),
            "schedule": ("cosine", "constant"),
            "schedule_by": ("steps", "seconds"),
            "precision": ("fp32", "bf16"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; supported: {', '.join(allowed)}")
        for name in ("batch_size", "steps", "eval_every", "eval_rows", "log_every", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; at least 1 is needed")
        if self.schedule_by == "seconds" and self.max_seconds <= 0:
            raise ValueError("schedule_by seconds needs max_seconds > 0")
        if not 0.0 <= self.ema < 1.0:
            raise ValueError(f"ema is {self.ema}; it must lie in [0, 1)")
        self.esolm()  # checks the objective's own settings

    def network(self, vocab_size: int) -> NetworkConfig:
        names = ("hidden_size", "n_blocks", "n_heads", "length", "cond_dim", "adaln", "dropout")
        return NetworkConfig(vocab_size, **{name: getattr(self, name) for name in names})

    def esolm(self) -> EsoLMObjective:
        return EsoLMObjective(self.alpha_0, self.kappa, self.variant, self.low_var, self.infill_fraction)


class Ema:
    """Exponential moving average of a module's parameters, in parameter order."""

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float):
        self.decay = decay
        self.n_updates = 0
        self.shadow = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self, parameters: Sequence[nn.Parameter]) -> None:
        self.n_updates += 1
        # Early on the average follows the weights closely, or it would remember the initial ones for long.
        decay = min(self.decay, (1 + self.n_updates) / (10 + self.n_updates))
        torch._foreach_lerp_(self.shadow, [p.detach() for p in parameters], 1 - decay)

    @contextlib.contextmanager
    def applied(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """The parameters hold the average inside this context."""
        kept = [p.detach().clone() for p in parameters]
        try:
            self.copy_to(parameters)
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(parameters, kept, strict=True):
                    parameter.copy_(value)

    @torch.no_grad()
    def copy_to(self, parameters: Sequence[nn.Parameter]) -> None:
        for parameter, value in zip(parameters, self.shadow, strict=True):
            parameter.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """The layout of the published Lightning checkpoints."""
        return {"decay": self.decay, "num_updates": self.n_updates, "shadow_params": self.shadow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.decay, self.n_updates = state["decay"], state["num_updates"]
        self.shadow = [value.clone() for value in state["shadow_params"]]


class Rows:
    """Windows of `length` tokens of a stream; row i of the run is a function of (seed, i) alone."""

    def __init__(self, stream: np.ndarray, length: int, seed: int):
        if len(stream) < 2 * length:
            raise ValueError(f"the corpus has {len(stream)} tokens; rows of {length} need at least twice as many")
        self.stream, self.length, self.seed = stream, length, seed
        self.per_epoch = len(stream) // length - 1
        self._epoch, self._starts = -1, np.empty(0, dtype=np.int64)

    def _row(self, index: int) -> np.ndarray:
        epoch, place = divmod(index, self.per_epoch)
        if epoch != self._epoch:
            # Each epoch tiles the stream anew, from another offset and in another order.
            rng = np.random.default_rng((self.seed, 1, epoch))
            self._starts = rng.integers(self.length) + self.length * rng.permutation(self.per_epoch)
            self._epoch = epoch
        start = self._starts[place]
        return self.stream[start : start + self.length]

    def batch(self, step: int, batch_size: int) -> Tensor:
        """int64 [batch_size, length]: the rows of step `step`."""
        rows = [self._row(step * batch_size + i) for i in range(batch_size)]
        return torch.from_numpy(np.stack(rows).astype(np.int64))


def held_out_rows(stream: np.ndarray, length: int, n_rows: int) -> Tensor:
    """int64 [n, length]: non-overlapping rows spread evenly over the stream; n = n_rows or all there are."""
    available = len(stream) // length
    if available < 1:
        raise ValueError(f"the held-out text has {len(stream)} tokens, fewer than one row of {length}")
    picked = np.unique(np.linspace(0, available - 1, min(n_rows, available)).round().astype(np.int64))
    return torch.from_numpy(np.stack([stream[i * length : (i + 1) * length] for i in picked]).astype(np.int64))


def loss(
    network: Network, rows: Tensor, config: TrainConfig, generator: torch.Generator
) -> tuple[Tensor, dict[str, Tensor]]:
    """Training loss in nats per token, and its parts."""
    if config.objective == "esolm":
        return objectives.esolm_loss(network, rows, config.esolm(), generator)
    if config.objective == "ar":
        value = objectives.ar_nll(network, rows).sum() / rows[:, 1:].numel()
    else:
        value = _diffusion_nll(network, rows, config, generator, low_var=config.low_var).mean()
    return value, {config.objective: value}


def _diffusion_nll(
    network: Network, rows: Tensor, config: TrainConfig, generator: torch.Generator, low_var: bool
) -> Tensor:
    mask_id = network.config.mask_id
    if config.objective == "mdlm":
        t = objectives.antithetic_t(rows.shape[0], generator)
        zt = objectives.mask_tokens(rows, objectives.log_linear(t, 1.0)[0], mask_id, generator)
        return objectives.mdlm_nll(network, rows, zt, t, low_var=low_var)
    n_blocks = -(-rows.shape[1] // config.block_size)
    t = objectives.antithetic_t(rows.shape[0] * n_blocks, generator)
    t = t[torch.randperm(len(t), generator=generator)].view(-1, n_blocks)
    keep = objectives.log_linear(t, 1.0)[0].repeat_interleave(config.block_size, dim=1)[:, : rows.shape[1]]
    zt = objectives.mask_tokens(rows, keep, mask_id, generator)
    return objectives.bd3lm_nll(network, rows, zt, t, config.block_size, low_var=low_var)


@torch.no_grad()
def evaluate(
    network: Network, rows: Tensor, n_bytes: np.ndarray, config: TrainConfig, *, seed: int = 0, draws: int = 1
) -> float:
    """Bits per byte of `rows` under the objective's bound with true weights, averaged over `draws` of its noise.

    The noise is fixed by `seed`, so two calls on the same rows compare.
    """
    was_training = network.training
    network.eval()
    generator = torch.Generator().manual_seed(seed)
    nats = 0.0
    with _autocast(config):
        for _ in range(draws):
            for chunk in rows.split(16):
                if config.objective == "esolm":
                    nll = objectives.esolm_nelbo(
                        network, chunk.to(config.device), config.alpha_0, generator, variant=config.variant
                    )
                elif config.objective == "ar":
                    nll = objectives.ar_nll(network, chunk.to(config.device))
                else:
                    nll = _diffusion_nll(network, chunk.to(config.device), config, generator, low_var=False)
                nats += nll.double().sum().item()
    network.train(was_training)
    return nats / draws / math.log(2) / max(int(n_bytes[rows.numpy()].sum()), 1)


def _autocast(config: TrainConfig):
    if config.precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(config.device).type, torch.bfloat16)


def learning_rate(config: TrainConfig, step: int, seconds: float) -> float:
    """The share of the full learning rates at step `step` (0-based), after `seconds` of training."""
    warm = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    if config.schedule == "constant":
        return warm
    done = step / config.steps if config.schedule_by == "steps" else seconds / config.max_seconds
    cosine = 0.5 * (1 + math.cos(math.pi * min(max(done, 0.0), 1.0)))
    return warm * (config.final_lr + (1 - config.final_lr) * cosine)


def _optimizers(network: Network, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the blocks' large matrices and AdamW for the rest."""
    names = ("attn_qkv.weight", "attn_out.weight", "mlp.0.weight", "mlp.2.weight")
    large = [
        p for n, p in network.named_parameters() if config.optimizer == "muon" and n.endswith(names) and "blocks" in n
    ]
    chosen = {id(p) for p in large}
    rest = [p for p in network.parameters() if id(p) not in chosen]
    groups = [
        {"params": [p for p in rest if p.dim() == 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.dim() != 2], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=True)]
    if large:
        # "match_rms_adamw": an update is as large as AdamW's, so the two learning rates are of one kind.
        muon = torch.optim.Muon(
            large, lr=config.muon_lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        optimizers.append(muon)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["full_lr"] = group["lr"]
    return optimizers


def load_corpus(config: TrainConfig) -> tuple[list[text.Document], list[text.Document]]:
    """Training and held-out documents; a corpus without a held-out file gives its last documents' tail."""
    documents = text.standard_library() if config.corpus == "stdlib" else text.folder_of_text(config.corpus)
    train = [d for d in documents if not d.held_out]
    held_out = [d for d in documents if d.held_out]
    if not train or not held_out:  # too few files to split by file: split the text
        whole = "\n".join(d.text for d in documents)
        cut = int(len(whole) * (1 - 1 / text.HELD_OUT_PARTS))
        train, held_out = [text.Document("train", whole[:cut])], [text.Document("held-out", whole[cut:])]
    return train, held_out


class Interrupted:
    """Remembers SIGINT and SIGTERM inside the context, so a step is never cut in two."""

    def __init__(self):
        self.signal: int | None = None

    def __enter__(self) -> Interrupted:
        self._previous = {}
        with contextlib.suppress(ValueError):  # not the main thread: signals go elsewhere
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number, _frame):
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C does not wait
        self.signal = number


class Trainer:
    """State of a run: network, optimizer, average, step and seconds. `train` drives it."""

    def __init__(self, config: TrainConfig):
        self.config = config
        if config.threads:
            torch.set_num_threads(config.threads)
        out = Path(config.out)
        out.mkdir(parents=True, exist_ok=True)
        train, held_out = load_corpus(config)
        saved_tokenizer = out / "tokenizer.json"
        if saved_tokenizer.exists():
            self.tokenizer = text.Tokenizer.from_file(saved_tokenizer)
        else:
            if config.tokenizer:
                self.tokenizer = text.Tokenizer.from_file(config.tokenizer)
            else:
                self.tokenizer = text.train_tokenizer((d.text for d in train), config.vocab_size)
            write_atomically(saved_tokenizer, self.tokenizer.save)
        self.rows = Rows(text.encode_corpus(train, self.tokenizer), config.length, config.seed)
        self.held_out = text.encode_corpus(held_out, self.tokenizer)
        self.n_bytes = self.tokenizer.n_bytes()

        torch.manual_seed(config.seed)
        self.network = Network(config.network(self.tokenizer.vocab_size)).to(config.device).train()
        self.parameters = list(self.network.parameters())
        self.optimizers = _optimizers(self.network, config)
        self.ema = Ema(self.parameters, config.ema)
        self.step, self.seconds = 0, 0.0
        self.interrupted = False
        if (out / CHECKPOINT).exists():
            self._resume(out / CHECKPOINT)
        self._hidden = torch.compile(self.network.hidden, dynamic=False) if config.compile else None

    def _resume(self, path: Path) -> None:
        state = torch.load(path, map_location=self.config.device, weights_only=True)
        changed = _differences(state["config"], dataclasses.asdict(self.config))
        if changed:
            raise ValueError(f"{path} was made with other settings: {changed}. Resume with those, or another --out")
        self.network.load_state_dict(state["state_dict"])
        for optimizer, values in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        self.ema.load_state_dict(state["ema"])
        self.step, self.seconds = state["step"], state["seconds"]

    def save(self) -> None:
        state = {
            "state_dict": self.network.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
            "config": dataclasses.asdict(self.config),
            "network_config": self.network.config.to_dict(),
        }
        write_atomically(Path(self.config.out) / CHECKPOINT, lambda path: torch.save(state, path))

    def one_step(self) -> dict[str, float]:
        """Take one optimizer step; returns what to log."""
        config = self.config
        scale = learning_rate(config, self.step, self.seconds)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = scale * group["full_lr"]
        generator = torch.Generator().manual_seed(_mixed_seed(config.seed, self.step))
        torch.manual_seed(_mixed_seed(config.seed, self.step) ^ 1)  # dropout
        rows = self.rows.batch(self.step, config.batch_size).to(config.device)
        with _autocast(config), self._compiled():
            value, terms = loss(self.network, rows, config, generator)
        value.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, config.grad_clip if config.grad_clip > 0 else math.inf)
        if not torch.isfinite(norm):
            raise RuntimeError(f"step {self.step}: gradient norm is {norm.item()}; lower the learning rate")
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.parameters)
        self.step += 1
        logged = {"loss": value.item(), "grad_norm": norm.item(), "lr_scale": scale}
        return logged | {name: term.item() for name, term in terms.items()}

    @contextlib.contextmanager
    def _compiled(self) -> Iterator[None]:
        """Inside, `network.hidden` is the compiled one. Evaluation runs eagerly: its shapes would compile anew."""
        if self._hidden is None:
            yield
            return
        self.network.hidden = self._hidden
        try:
            yield
        finally:
            del self.network.hidden

    def evaluate(self, n_rows: int, draws: int = 1) -> float:
        """Held-out bits per byte of the averaged weights."""
        rows = held_out_rows(self.held_out, self.config.length, n_rows)
        with self.ema.applied(self.parameters):
            return evaluate(self.network, rows, self.n_bytes, self.config, draws=draws)


def _mixed_seed(seed: int, step: int) -> int:
    return int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0] >> 2)


# Settings that may differ between a run and its continuation.
_FREE_SETTINGS = frozenset(
    {
        "out", "steps", "max_seconds", "threads", "compile", "eval_every", "eval_rows", "log_every",
        "checkpoint_every_seconds", "progress", "device", "tokenizer", "corpus",
    }
)  # fmt: skip


def _differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    names = [name for name in new if name not in _FREE_SETTINGS and old.get(name) != new[name]]
    return ", ".join(f"{name} {old.get(name)!r} -> {new[name]!r}" for name in names)


def train(config: TrainConfig) -> Trainer:
    """Run `config` to its end (steps, max_seconds, or a signal), writing a checkpoint and metrics to `config.out`.

    Continues from the checkpoint in `config.out` if there is one. Returns the trainer, its network holding the
    current weights and its `ema` their average.
    """
    from tqdm import tqdm

    trainer = Trainer(config)
    out = Path(config.out)
    with Interrupted() as interrupted, open(out / METRICS, "a", encoding="utf-8", buffering=1) as metrics:
        bar = tqdm(total=config.steps, initial=trainer.step, disable=not config.progress, unit="step", mininterval=1.0)
        last_save = last_time = time.monotonic()
        since_log: list[dict[str, float]] = []
        while trainer.step < config.steps and interrupted.signal is None:
            if config.max_seconds and trainer.seconds >= config.max_seconds:
                break
            since_log.append(trainer.one_step())
            now = time.monotonic()
            trainer.seconds, last_time = trainer.seconds + now - last_time, now
            bar.update()
            if trainer.step % config.log_every == 0:
                record = {name: sum(r[name] for r in since_log) / len(since_log) for name in since_log[0]}
                record |= {"step": trainer.step, "seconds": round(trainer.seconds, 1)}
                metrics.write(json.dumps(record) + "\n")
                bar.set_postfix(loss=f"{record['loss']:.3f}")
                since_log.clear()
            if trainer.step % config.eval_every == 0:
                bits = trainer.evaluate(config.eval_rows)
                metrics.write(json.dumps({"step": trainer.step, "held_out_bits_per_byte": bits}) + "\n")
                bar.write(f"step {trainer.step}: {bits:.4f} held-out bits per byte")
            if now - last_save > config.checkpoint_every_seconds:
                trainer.save()
                last_save = now
        bar.close()
        trainer.save()
        trainer.interrupted = interrupted.signal is not None
    return trainer


def export(run: str | Path, target: str | Path, *, draws: int = 2) -> float:
    """Write the averaged weights of a run as a model folder; returns its held-out bits per byte.

    The folder gets ``model.safetensors`` (fp16, published parameter names), ``config.json``, ``tokenizer.json`` and
    ``MODEL_CARD.md``. The figure is measured on the fp16 weights over all of the held-out text, `draws` draws of the
    bound's noise per row.
    """
    run, target = Path(run), Path(target)
    path = run / CHECKPOINT
    if not path.is_file():
        raise ValueError(f"no {CHECKPOINT} in {run}; train first")
    state = torch.load(path, map_location="cpu", weights_only=True)
    config = dataclasses.replace(TrainConfig(**state["config"]), precision="fp32", device="cpu")
    tokenizer = text.Tokenizer.from_file(run / "tokenizer.json")
    recipe = {name: value for name, value in state["config"].items() if name not in _LOCAL_SETTINGS}
    facts = {"steps": state["step"], "training_seconds": round(state["seconds"])}
    save_checkpoint(load_checkpoint(path), target, dtype=torch.float16, extra={"recipe": recipe, **facts})
    write_atomically(target / "tokenizer.json", tokenizer.save)

    network = load_checkpoint(target)
    train_documents, held_out = load_corpus(config)
    rows = held_out_rows(text.encode_corpus(held_out, tokenizer), config.length, 1 << 30)
    bits = evaluate(network, rows, tokenizer.n_bytes(), config, seed=1, draws=draws)
    facts["held_out_bits_per_byte"] = round(bits, 4)
    save_checkpoint(network, target, dtype=torch.float16, extra={"recipe": recipe, **facts})
    card = _model_card(network, config, recipe, facts, train_documents, held_out)
    write_atomically(target / "MODEL_CARD.md", lambda file: file.write_text(card, encoding="utf-8"))
    return bits


# Settings that say where and how a run ran, not what was trained.
_LOCAL_SETTINGS = frozenset(
    {"out", "device", "threads", "compile", "progress", "eval_every", "eval_rows", "log_every",
     "checkpoint_every_seconds"}
)  # fmt: skip


def _model_card(
    network: Network,
    config: TrainConfig,
    recipe: dict[str, Any],
    facts: dict[str, Any],
    train_documents: list[text.Document],
    held_out: list[text.Document],
) -> str:
    model = {
        "esolm": f"Eso-LM ({config.variant}), alpha_0 = {config.alpha_0:g}",
        "mdlm": "masked diffusion (MDLM)",
        "bd3lm": f"block diffusion (BD3-LM), blocks of {config.block_size}",
        "ar": "autoregressive",
    }[config.objective]
    library = f"the sources of Python {platform.python_version()}'s standard library (PSF licence)"
    corpus = library if config.corpus == "stdlib" else config.corpus
    size = network.config
    n_train, n_held_out = (sum(len(d.text.encode()) for d in part) for part in (train_documents, held_out))
    rows_seen = facts["steps"] * config.batch_size
    lines = [
        f"# {model}, {network.n_parameters() / 1e6:.2f} M parameters",
        "",
        f"Trained by `esokern train` on {corpus}.",
        "It writes text that looks like its corpus, no more: what it says is not to be relied on, and code it",
        "writes is not meant to be run.",
        "",
        "| | |",
        "|---|---|",
        f"| network | {size.n_blocks} blocks, hidden {size.hidden_size}, {size.n_heads} heads of {size.head_dim}, "
        f"length {size.length} tokens |",
        f"| vocabulary | {size.vocab_size} ids (byte-level BPE, the last one is the mask) |",
        "| weights | fp16, average over training steps (EMA) |",
        f"| training text | {len(train_documents)} documents, {n_train / 1e6:.2f} MB |",
        f"| held-out text | {len(held_out)} documents, {n_held_out / 1e6:.2f} MB, chosen by a hash of their paths |",
        f"| training | {facts['steps']} steps of {config.batch_size} rows "
        f"({rows_seen * config.length / 1e6:.1f} M tokens), {facts['training_seconds'] / 60:.0f} minutes |",
        f"| held-out bits per byte | {facts['held_out_bits_per_byte']:.3f} "
        f"({'exact' if config.objective == 'ar' else 'variational bound'}) |",
        "",
        "Recipe (`esokern train` flags):",
        "",
        "```yaml",
        *(f"{name}: {json.dumps(value)}" for name, value in recipe.items()),
        "```",
        "",
    ]
    return "\n".join(lines)


def parse_config(argv: Sequence[str]) -> tuple[TrainConfig, str]:
    """The recipe and the export folder from flags; flags override the YAML file of ``--config``."""
    parser = argparse.ArgumentParser(
        prog="esokern train", description="Train a model; continues the run in --out if there is one."
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with the settings below")
    parser.add_argument("--export", metavar="FOLDER", default="", help="where the model goes (default: OUT/model)")
    for field in dataclasses.fields(TrainConfig):
        flag = "--" + field.name.replace("_", "-")
        kind = type(field.default)
        if kind is bool:
            parser.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=None, help=f"default {field.default}"
            )
        else:
            parser.add_argument(flag, type=kind, default=None, help=f"default {field.default!r}", metavar=kind.__name__)
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


def main(argv: Sequence[str]) -> int:
    """`esokern train`: train, then export. Exit status 0, or 130 if a signal ended the run (a checkpoint is kept)."""
    config, target = parse_config(argv)
    trainer = train(config)
    run = Path(config.out)
    if trainer.interrupted:
        print(f"stopped at step {trainer.step}; the same command continues from {run / CHECKPOINT}")
        return 130
    folder = Path(target) if target else run / "model"
    bits = export(run, folder)
    print(f"{folder}: {bits:.4f} held-out bits per byte after {trainer.step} steps")
    return 0
