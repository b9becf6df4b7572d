"""The trainer: one process or many, resumable bit for bit, from a YAML file or flags.

    esokern train --out runs/mine --steps 2000
    esokern train --config recipe.yaml --max-seconds 3600
    torchrun --nproc-per-node 8 -m esokern train --config recipe.yaml --device cuda

All randomness of step n (the rows, the noise, dropout) is a function of (seed, n), so a run that stops and resumes
takes exactly the steps it would have taken. A step's batch is split into parts of every k-th row, one for each process
and each accumulated pass. Each part draws the noise of the whole batch and takes that of its rows, so the split changes
nothing but the order of sums (and, where there is dropout, what it drops). Only rank 0 writes; what it writes does not
depend on the number of processes, and the next run may have another.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import nn
from tqdm import tqdm

from esokern import backend as backends
from esokern import distributed, objectives
from esokern.data import Rows, held_out_rows, streams
from esokern.models.checkpoint import load_checkpoint, write_atomically
from esokern.models.network import Network, NetworkConfig
from esokern.samplers import autoregressive, bd3lm, esolm, mdlm
from esokern.text import Tokenizer, byte_tokenizer, train_tokenizer
from esokern.train.config import DEFAULT_LENGTH, TrainConfig, differences
from esokern.train.loss import autocast, evaluate, loss
from esokern.train.optim import Ema, learning_rate, optimizers

CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
TOKENIZER = "tokenizer.json"
STREAMS = "streams"
SAMPLE_STEPS = 32  # denoising steps of a sample


class Trainer:
    """State of a run: network, optimizer, average, step and seconds. `train` drives it."""

    def __init__(self, config: TrainConfig):
        out = Path(config.out)
        if config.threads:
            torch.set_num_threads(config.threads)
        self.device = distributed.local_device(config.device)
        with distributed.first_rank_first():
            out.mkdir(parents=True, exist_ok=True)
            self.tokenizer = _tokenizer(config)
            train, held_out = streams(
                out / STREAMS, config.source(), self.tokenizer, progress=config.progress and distributed.rank() == 0
            )
        state = None
        if (out / CHECKPOINT).exists():
            state = torch.load(out / CHECKPOINT, map_location="cpu", weights_only=True, mmap=True)
        torch.manual_seed(config.seed)
        network, self.config = _network(config, self.tokenizer, state)
        self._check_parts()
        if state is not None:
            changed = differences(state["config"], self.config)
            if changed:
                raise ValueError(
                    f"{out / CHECKPOINT} was made with other settings: {changed}. Resume with those, or another --out"
                )
            network.load_state_dict(state["state_dict"])
        self.rows = Rows(train.tokens, self.config.length, config.seed)
        self.held_out = held_out.tokens
        self.n_bytes = self.tokenizer.n_bytes()

        self.network = network.train()
        self.call = distributed.wrap(network, self.device, config.shard)
        self.parameters = list(network.parameters())
        self.optimizers = optimizers(network, self.config)
        self.ema = Ema(self.parameters, config.ema)
        self.step, self.seconds = 0, 0.0
        self.interrupted = False
        if state is not None:
            for optimizer, values in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(distributed.shard_optimizer_state(values, optimizer))
            self.ema.load_state_dict(state["ema"])
            self.step, self.seconds = state["step"], state["seconds"]
        self._hidden = torch.compile(network.hidden, dynamic=False) if config.compile else None

    def _check_parts(self) -> None:
        config, processes = self.config, distributed.size()
        if processes * config.accumulate > config.max_parts():
            raise ValueError(
                f"batch_size {config.batch_size} splits into {config.max_parts()} parts with rows of every term of the "
                f"loss; {processes} processes with accumulate {config.accumulate} need {processes * config.accumulate}"
            )
        if processes > 1 and config.shard == "fsdp" and (config.optimizer == "muon" or config.compile):
            raise ValueError("shard fsdp: needs optimizer adamw (Muon needs whole matrices), and no compile")

    def save(self) -> None:
        """Write the checkpoint; a crash at any moment leaves the one before or this one. Every process must call it."""
        state = distributed.whole(
            {
                "state_dict": self.network.state_dict(),
                "ema": self.ema.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "step": self.step,
                "seconds": self.seconds,
                "config": dataclasses.asdict(self.config),
                "network_config": self.network.config.to_dict(),
            }
        )
        if distributed.rank() == 0:
            write_atomically(Path(self.config.out) / CHECKPOINT, lambda path: torch.save(state, path))

    def one_step(self) -> dict[str, float]:
        """Take one optimizer step; returns what to log, the same on every process."""
        config = self.config
        scale = learning_rate(config, self.step, self.seconds)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = scale * group["full_lr"]
        x = self.rows.batch(self.step, config.batch_size).to(self.device)
        processes, seed = distributed.size(), objectives.mixed_seed(config.seed, self.step)
        parts = processes * config.accumulate
        logged: dict[str, float] = {}
        for part in range(distributed.rank(), parts, processes):
            generator = torch.Generator().manual_seed(seed)
            torch.manual_seed(seed ^ (part + 1))  # dropout
            is_last = part + processes >= parts
            with contextlib.nullcontext() if is_last else distributed.no_gradient_sync(self.call):
                with autocast(config), self._compiled():
                    value, terms = self.call(loss, x, config, generator, slice(part, None, parts))
                (value * processes).backward()  # gradients are averaged over processes
            for name, term in {"loss": value, **terms}.items():
                logged[name] = logged.get(name, 0.0) + term.item()
        norm = nn.utils.clip_grad_norm_(self.parameters, config.grad_clip if config.grad_clip > 0 else math.inf)
        norm = distributed.full(norm).item()
        if not math.isfinite(norm):
            raise RuntimeError(f"step {self.step}: gradient norm is {norm}; lower the learning rate")
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.parameters)
        self.step += 1
        logged = dict(zip(logged, distributed.total(list(logged.values())), strict=True))
        return logged | {"grad_norm": norm, "lr": scale * config.lr}

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
        """Held-out bits per byte of the averaged weights. Every process must call it."""
        rows = held_out_rows(self.held_out, self.config.length, n_rows)
        with self.ema.applied(self.parameters):
            return evaluate(self.call, rows, self.n_bytes, self.config, draws=draws)

    def sample(self) -> str:
        """A text by the averaged weights and the objective's own sampler; "" except on rank 0. Every process must call
        it."""
        average = distributed.whole(self.ema.shadow)
        if distributed.rank() != 0:
            return ""
        with torch.device("meta"):
            network = Network(self.network.config)
        names = [name for name, _ in network.named_parameters()]
        buffers = {"rotary_emb.inv_freq": self.network.rotary_emb.inv_freq}
        network.load_state_dict(buffers | dict(zip(names, average, strict=True)), assign=True)
        on_gpu = self.device.type == "cuda" and backends.cuda_architectures() is not None
        folded = network.cpu().fold().to(self.device if on_gpu else "cpu")
        config = self.config
        options = {"length": min(config.sample_length, config.length), "seed": self.step}
        if config.objective == "esolm":
            result = esolm.generate(folded, alpha_0=config.alpha_0, num_steps=SAMPLE_STEPS, **options)
        elif config.objective == "mdlm":
            result = mdlm.generate(folded, num_steps=SAMPLE_STEPS, **options)
        elif config.objective == "bd3lm":
            result = bd3lm.generate(folded, block_size=config.block_size, num_steps=SAMPLE_STEPS, **options)
        else:
            result = autoregressive.generate(folded, start_token=self.tokenizer.eos_id, **options)
        return self.tokenizer.decode(result.tokens[0].tolist())


def _tokenizer(config: TrainConfig) -> Tokenizer:
    """The run's tokenizer: the one in its folder, which is put there the first time."""
    saved = Path(config.out) / TOKENIZER
    if not saved.exists():
        if config.tokenizer == "bytes":
            tokenizer = byte_tokenizer()
        elif config.tokenizer:
            tokenizer = Tokenizer.from_file(config.tokenizer)
        elif config.init_from:
            source = Path(config.init_from)
            if not source.exists():
                raise ValueError(f"--init-from {source}: there is no such file or folder")
            beside = (source if source.is_dir() else source.parent) / TOKENIZER
            if not beside.is_file():
                raise ValueError(f"--init-from {source}: there is no {TOKENIZER} beside it; name one with --tokenizer")
            tokenizer = Tokenizer.from_file(beside)
        else:
            tokenizer = train_tokenizer(config.source().training_text(), config.vocab_size)
        write_atomically(saved, tokenizer.save)
    tokenizer = Tokenizer.from_file(saved)
    if not config.tokenizer and not config.init_from and tokenizer.vocab_size != config.vocab_size:
        raise ValueError(f"vocab_size is {config.vocab_size}, but the tokenizer of this run has {tokenizer.vocab_size}")
    return tokenizer


def _network(config: TrainConfig, tokenizer: Tokenizer, state: dict[str, Any] | None) -> tuple[Network, TrainConfig]:
    """The network to train, and the recipe with its sizes: new, from `init_from`, or as the run's checkpoint has it."""
    config = dataclasses.replace(config, vocab_size=tokenizer.vocab_size)
    if not config.init_from:
        config = dataclasses.replace(config, length=config.length or DEFAULT_LENGTH)
        return Network(config.network()), config
    if state is not None:
        sizes = NetworkConfig.from_dict(state["network_config"])
        return Network(dataclasses.replace(sizes, dropout=config.dropout)), config.with_sizes_of(sizes)
    loaded = load_checkpoint(config.init_from)
    if loaded.config.vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"--init-from {config.init_from}: it has {loaded.config.vocab_size} ids, the tokenizer has "
            f"{tokenizer.vocab_size} with the mask; --tokenizer must name the one it was trained with"
        )
    config = config.with_sizes_of(loaded.config)
    network = Network(dataclasses.replace(loaded.config, length=config.length, dropout=config.dropout))
    network.load_state_dict(loaded.state_dict())
    return network, config


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


def _open_log(path: Path, step: int) -> TextIO:
    """A file of JSON lines to append to, without what was written after step `step`, nor half a line."""
    kept = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
    write_atomically(path, lambda file: file.write_text("".join(kept), encoding="utf-8"))
    return open(path, "a", encoding="utf-8", buffering=1)


def train(config: TrainConfig) -> Trainer:
    """Run `config` to its end (steps, max_seconds, or a signal), writing into `config.out`: `checkpoint.pt`,
    `metrics.jsonl` (loss in nats per token and its terms, gradient norm before clipping, learning rate, tokens per
    second; held-out bits per byte) and `samples.jsonl`.

    Continues from the checkpoint in `config.out` if there is one. Returns the trainer, its network holding the
    current weights and its `ema` their average.
    """
    trainer = Trainer(config)
    config = trainer.config
    with contextlib.ExitStack() as stack:
        interrupted = stack.enter_context(Interrupted())
        write = _writer(trainer, stack)
        first = distributed.rank() == 0
        shown = config.progress and first
        bar = stack.enter_context(
            tqdm(total=config.steps, initial=trainer.step, disable=not shown, unit="step", mininterval=1.0)
        )
        say = bar.write if shown else lambda line: None
        clock = time.monotonic()
        saved_at, in_steps = trainer.seconds, 0.0
        since_log: list[dict[str, float]] = []
        while trainer.step < config.steps and not (config.max_seconds and trainer.seconds >= config.max_seconds):
            begun = time.monotonic()
            since_log.append(trainer.one_step())
            now = time.monotonic()
            in_steps += now - begun
            # Rank 0's clock is everyone's, and a signal to one process stops them all.
            elapsed, stop = distributed.total([now - clock if first else 0.0, interrupted.signal is not None])
            clock, trainer.seconds = now, trainer.seconds + elapsed
            bar.update()
            if trainer.step % config.log_every == 0:
                record = {name: sum(r[name] for r in since_log) / len(since_log) for name in since_log[0]}
                record["tokens_per_second"] = round(len(since_log) * config.batch_size * config.length / in_steps, 1)
                write(METRICS, {"step": trainer.step, "seconds": round(trainer.seconds, 1)} | record)
                bar.set_postfix(loss=f"{record['loss']:.3f}")
                since_log.clear()
                in_steps = 0.0
            if stop:
                trainer.interrupted = True
                break
            if trainer.step % config.eval_every == 0:
                bits = trainer.evaluate(config.eval_rows)
                write(METRICS, {"step": trainer.step, "held_out_bits_per_byte": bits})
                say(f"step {trainer.step}: {bits:.4f} held-out bits per byte")
                if config.sample_length:
                    text = trainer.sample()
                    write(SAMPLES, {"step": trainer.step, "text": text})
                    say("  " + json.dumps(text, ensure_ascii=False)[:120])
            if trainer.seconds - saved_at > config.checkpoint_every_seconds:
                trainer.save()
                saved_at = trainer.seconds
        trainer.save()
    return trainer


def _writer(trainer: Trainer, stack: contextlib.ExitStack):
    """write(file name, record): appends a line to a log of the run, on rank 0."""
    if distributed.rank() != 0:
        return lambda name, record: None
    out = Path(trainer.config.out)
    files = {name: stack.enter_context(_open_log(out / name, trainer.step)) for name in (METRICS, SAMPLES)}
    return lambda name, record: files[name].write(json.dumps(record, ensure_ascii=False) + "\n")
