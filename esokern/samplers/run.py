"""What every sampler shares: the tokens it starts from, the drawing of tokens, the result, the step callback."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from esokern.kv_cache import KVCache
from esokern.unmask_sample import unmask_sample

if TYPE_CHECKING:
    from esokern.models.network import FoldedNetwork

Option = float | Sequence[float] | torch.Tensor | None


@dataclass(frozen=True)
class StepInfo:
    """One step of a sampler, as its callback sees it. Entry i: row rows[i] got tokens[i] at positions[i].

    index: 0, 1, ...   phase: "diffusion", "sequential", or "mixed" where rows of a batch are in different phases.
    rows, positions, tokens: int64 [num_decoded].
    """

    index: int
    phase: str
    rows: torch.Tensor
    positions: torch.Tensor
    tokens: torch.Tensor


Callback = Callable[[StepInfo], None]


@dataclass
class Divergence:
    """How far an approximate cache was from computing every step anew, over the masks that it predicted.

    kl: mean KL(exact || cached) of the predicted distributions, nats. agreement: share of masks with the same most
    likely token. positions: how many were compared.
    """

    kl: float = 0.0
    agreement: float = 1.0
    positions: int = 0

    def add(self, exact: torch.Tensor, cached: torch.Tensor) -> None:
        """Count in the logits [n, vocab] of both."""
        if len(exact) == 0:
            return
        exact, cached = exact.double().log_softmax(-1), cached.double().log_softmax(-1)
        before, self.positions = self.positions, self.positions + len(exact)
        kl = float((exact.exp() * (exact - cached)).sum())
        same = int((exact.argmax(-1) == cached.argmax(-1)).sum())
        self.kl = (self.kl * before + kl) / self.positions
        self.agreement = (self.agreement * before + same) / self.positions


@dataclass(frozen=True)
class GenerationResult:
    """What a sampler returns.

    tokens:           int64 [batch, length]
    decode_step:      int64 [batch, length], the step in which each token was drawn; -1 = it was given
    nfe:              forward passes of the network over the batch
    seconds:          wall time of the whole call, forward_seconds and sampling_seconds of which went to the network and
                      to the LM head with sampling. On a GPU those two are read from events in its stream: the time from
                      the first to the last kernel of each pass, with the gaps in which it waited for the host
    logprob:          float32 [batch, length], log-probability of each drawn token under the model (temperature 1, no
                      filters); 0 where given. None unless asked for.
    lengths:          int64 [batch], tokens of each row; what lies behind them is padding. None = all of them
    divergence:       of an approximate cache from exact computation. None unless asked for
    """

    tokens: torch.Tensor
    decode_step: torch.Tensor
    nfe: int
    seconds: float
    forward_seconds: float
    sampling_seconds: float
    logprob: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    divergence: Divergence | None = None

    def row(self, index: int) -> torch.Tensor:
        """int64 [length of the row]: its tokens without padding."""
        return self.tokens[index] if self.lengths is None else self.tokens[index, : int(self.lengths[index])]

    @property
    def num_generated(self) -> int:
        """Tokens drawn, over the batch."""
        return int((self.decode_step >= 0).sum())

    @property
    def tokens_per_second(self) -> float:
        """Tokens drawn per second of the whole call."""
        return self.num_generated / max(self.seconds, 1e-9)


class Stopwatch:
    """Adds up the time of its `with` blocks: by the clock, or on a GPU by events in the current stream, so that the
    host waits for nothing before `seconds` is asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.begin: float | torch.cuda.Event = 0.0
        self.spans: list[tuple] = []

    def _now(self) -> float | torch.cuda.Event:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def __enter__(self) -> None:
        self.begin = self._now()

    def __exit__(self, *error: object) -> None:
        self.spans.append((self.begin, self._now()))

    def seconds(self) -> float:
        """Seconds of all blocks so far. Waits for the last one to be over."""
        if self.device.type != "cuda":
            return sum(end - begin for begin, end in self.spans)
        if self.spans:
            self.spans[-1][1].synchronize()
        return sum(begin.elapsed_time(end) for begin, end in self.spans) / 1e3


def starting_tokens(
    network: FoldedNetwork, tokens: torch.Tensor | Sequence | None, length: int | None, batch: int | None
) -> torch.Tensor:
    """int64 [batch, length]: given tokens, and mask_id where tokens are to be generated.

    tokens: [prompt_length] or [batch, prompt_length] with mask_id for "generate here", or None; what lies beyond
    prompt_length is masked. Raises ValueError for ids outside the vocabulary and for lengths beyond the network's.
    """
    config, device = network.config, network.device
    if tokens is None:
        if length is None:
            raise ValueError("length: needed when no tokens are given")
        tokens = torch.empty(1, 0, dtype=torch.int64)
    given = torch.as_tensor(tokens)
    if given.numel() == 0:
        given = given.to(torch.int64)
    if given.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"tokens: must be int64 or int32, got {given.dtype}")
    if given.dim() == 1:
        given = given[None]
    if given.dim() != 2:
        raise ValueError(f"tokens: must be [length] or [batch, length], got {tuple(given.shape)}")
    given = given.to(torch.int64)
    if batch is not None:
        check_count("batch", batch)
        if len(given) not in (1, batch):
            raise ValueError(f"batch: tokens have {len(given)} rows, batch is {batch}")
        given = given.expand(batch, -1)
    length = given.shape[1] if length is None else length
    check_count("length", length)
    if length > config.length:
        raise ValueError(f"length: {length} is beyond the network's length {config.length}")
    if given.shape[1] > length:
        raise ValueError(f"tokens: {given.shape[1]} of them do not fit into length {length}")
    if given.numel() and not 0 <= int(given.min()) <= int(given.max()) < config.vocab_size:
        raise ValueError(
            f"tokens: ids must lie in [0, {config.vocab_size}), {config.mask_id} meaning 'generate here'; "
            f"got ids from {int(given.min())} to {int(given.max())}"
        )
    full = torch.full((len(given), length), config.mask_id, dtype=torch.int64, device=device)
    full[:, : given.shape[1]] = given.to(device)
    return full


def row_seeds(seed: int | Sequence[int] | torch.Tensor, batch: int) -> list[int]:
    """One seed per row: those given, or seed, seed + 1, ... for an integer (modulo 2**63)."""
    if isinstance(seed, (bool, float)):
        raise TypeError(f"seed: must be an integer or one integer per row, got {seed!r}")
    if isinstance(seed, (int, np.integer)) or (isinstance(seed, torch.Tensor) and seed.dim() == 0):
        return [(operator.index(seed) + row) % 2**63 for row in range(batch)]
    seeds = [operator.index(value) for value in seed]
    if len(seeds) != batch:
        raise ValueError(f"seed: one per row is needed, got {len(seeds)} for a batch of {batch}")
    if any(not 0 <= value < 2**63 for value in seeds):
        raise ValueError(f"seed: must lie in [0, 2**63), got {seeds}")
    return seeds


def check_count(name: str, value: int | None, optional: bool = False) -> None:
    """ValueError unless value is an integer of at least 1 (or None, if optional)."""
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: must be an integer of at least 1{' or None' if optional else ''}, got {value!r}")


def per_row(name: str, value: Option, batch: int, device: torch.device | str = "cpu") -> float | torch.Tensor | None:
    """A number, or a tensor [batch] on the device; ValueError for other shapes."""
    if value is None or isinstance(value, (int, float)):
        return value
    tensor = torch.as_tensor(value)
    if tensor.shape != (batch,):
        raise ValueError(f"{name}: must be a number or [batch] = [{batch}], got shape {tuple(tensor.shape)}")
    return tensor.to(device)


def on_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """A small array's copy on the device, for which the host does not wait."""
    return torch.from_numpy(values).to(device, non_blocking=True)


def check_drawn(failed: torch.Tensor, what: str) -> None:
    """RuntimeError if a token is missing anywhere in failed, bool [batch, length]. what: had to say something of it."""
    missing = failed.nonzero()
    if len(missing):
        row, position = missing[0].tolist()
        raise RuntimeError(
            f"no token could be drawn at {len(missing)} positions, first at row {row}, position {position}: the {what} "
            "returned NaN, or infinities. Check the checkpoint and the dtype."
        )


class Run:
    """State of one generation: the clock, the counters, and the drawing of tokens through `unmask_sample`.

    Noise is a function of (seed of the row, position, vocabulary id): a position is drawn once, so the op's step stays
    0, and the noise does not depend on how the schedule groups the positions.
    """

    def __init__(
        self,
        network: FoldedNetwork,
        tokens: torch.Tensor,
        seeds: list[int],
        options: dict[str, Option],
        return_logprob: bool,
        callback: Callback | None,
        backend: str | None,
    ) -> None:
        self.start = time.perf_counter()
        self.network, self.backend, self.callback = network, backend, callback
        self.batch, self.length = tokens.shape
        self.device = tokens.device
        self.nfe = 0
        self.forward_time, self.sampling_time = Stopwatch(self.device), Stopwatch(self.device)
        self.decode_step = torch.full((self.batch, self.length), -1, dtype=torch.int64)
        self.logprob = torch.zeros(self.batch, self.length, device=self.device) if return_logprob else None
        self.seeds = torch.tensor(seeds, dtype=torch.int64, device=self.device)
        options = {name: per_row(name, value, self.batch, self.device) for name, value in options.items()}
        self.per_row = {name: value for name, value in options.items() if isinstance(value, torch.Tensor)}
        self.constants = {name: value for name, value in options.items() if name not in self.per_row}

    def on_device(self, values: np.ndarray) -> torch.Tensor:
        """The values on the run's device. Nothing waits for the copy."""
        return on_device(values, self.device)

    def new_cache(self) -> KVCache:
        """A cache for one generation with the network."""
        config = self.network.config
        return KVCache(
            num_layers=config.n_blocks,
            batch=self.batch,
            max_seqlen=self.length,
            kv_heads=config.n_heads,
            head_dim=config.head_dim,
            dtype=self.network.dtype,
            device=self.device,
        )

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, **options: object) -> torch.Tensor:
        """Hidden states [rows, hidden] of `network.forward`, the batch flattened; counts and times the pass."""
        with self.forward_time:
            hidden = self.network.forward(tokens, positions, backend=self.backend, **options)
        self.nfe += 1
        return hidden.view(-1, hidden.shape[-1])

    def draw(self, hidden: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """int64 [n]: a token for each of hidden [n, hidden], at positions int64 [n] of batch rows int64 [n]."""
        network, shard = self.network, self.network.head_shard
        with self.sampling_time:
            result = unmask_sample(
                hidden,
                network.head_weight,
                network.head_bias,
                mask_id=network.config.mask_id,
                seed=self.seeds.index_select(0, rows),
                positions=positions,
                vocab_start=0 if shard is None else shard.start,
                vocab_size=network.config.vocab_size,
                return_logprob=self.logprob is not None,
                return_lse=shard is not None and self.logprob is not None,
                return_score=shard is not None,
                backend=self.backend,
                **self.constants,
                **{name: values[rows] for name, values in self.per_row.items()},
            )
            if shard is not None:
                result = shard.merge(result)
            if self.logprob is not None:
                self.logprob[rows, positions] = result.logprob
        return result.tokens

    def report(self, index: int, phase: str, rows: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor) -> None:
        """Tell the callback about a step."""
        if self.callback is not None:
            self.callback(StepInfo(index, phase, rows, positions, tokens))

    def result(self, tokens: torch.Tensor) -> GenerationResult:
        """The result; call it outside inference mode, so that its tensors are ordinary ones."""
        check_drawn(tokens == self.network.config.mask_id, "network")
        return GenerationResult(
            tokens=tokens.clone(),
            decode_step=self.decode_step.to(tokens.device, copy=True),
            nfe=self.nfe,
            seconds=time.perf_counter() - self.start,
            forward_seconds=self.forward_time.seconds(),
            sampling_seconds=self.sampling_time.seconds(),
            logprob=None if self.logprob is None else self.logprob.clone(),
        )
