"""`esokern demo`: a small Eso-LM writes Python in the terminal, token by token, then the samplers are compared."""

from __future__ import annotations

import math
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TextIO

import torch
from tqdm import tqdm

from esokern import backend as backends
from esokern.models.network import FoldedNetwork
from esokern.samplers import autoregressive, bd3lm, esolm, mdlm
from esokern.samplers.run import GenerationResult, StepInfo
from esokern.samplers.schedule import Schedule, denoising_schedule
from esokern.text import Tokenizer

PROMPT = '''class RecordReader:
    """Read records from a file, one at a time."""

    def __init__(self, path, encoding="utf-8"):
'''
PREFIX = '''def count_words(path):
    """Return a dictionary of the words in a file."""
    counts = {}
    with open(path) as file:
'''
SUFFIX = """
    return counts
"""
MIDDLE = 48  # tokens generated between the two

GIVEN, DIFFUSION, SEQUENTIAL, MASKED = range(4)
_NAMES = ("given", "diffusion", "sequential", "still masked")
_COLOURS = ("", "\x1b[36m", "\x1b[33m", "\x1b[2m")
_NEWEST, _RESET = "\x1b[7m", "\x1b[0m"


class LiveText:
    """A callback for samplers that shows batch row 0 in the terminal while its tokens appear.

    tokens: int64 [length], the start, mask_id where tokens will come. schedule: if known, its steps are counted and
    can be slowed down to take `seconds` in all, so that they can be watched, the diffusion phase most. In a terminal
    the text is redrawn in place, in colour; elsewhere, or with NO_COLOR set, a few plain lines report the progress and
    the text follows at the end. Use it in a `with` block: leaving it draws the final text.
    """

    DIFFUSION_WEIGHT = 4  # a diffusion step is shown as long as this many sequential ones

    def __init__(
        self,
        tokenizer: Tokenizer,
        tokens: torch.Tensor,
        schedule: Schedule | None = None,
        *,
        seconds: float = 0.0,
        stream: TextIO | None = None,
    ) -> None:
        self.tokenizer, self.seconds = tokenizer, seconds
        self.num_steps = self.num_diffusion = 0
        if schedule is not None:
            self.num_steps, self.num_diffusion = schedule.nfe, int(schedule.num_diffusion[0])
        self.stream = sys.stdout if stream is None else stream
        self.tokens = tokens.tolist()
        self.states = [MASKED if token == tokenizer.mask_id else GIVEN for token in self.tokens]
        self.num_masked = self.states.count(MASKED)
        self.in_place = use_colour(self.stream)
        self.dot = "·" if (self.stream.encoding or "utf-8").lower().startswith("utf") else "."
        self.pieces: dict[int, str] = {}
        self.height = 0  # lines on the screen
        self.step, self.phase, self.newest = 0, "", frozenset()
        self.start = self.drawn_at = time.perf_counter()
        self.waited = 0.0

    def __enter__(self) -> LiveText:
        if self.in_place:
            self.stream.write("\x1b[?25l")  # no cursor
            self._draw()
        return self

    def __exit__(self, *error: object) -> None:
        self.newest = frozenset()
        if self.in_place:
            self._draw(final=True)
            self.stream.write("\x1b[?25h")
        elif error[0] is None:
            for line, _ in self._lines(shutil.get_terminal_size().columns - 4):
                self.stream.write(f"  | {line}\n")
        self.stream.flush()

    def __call__(self, step: StepInfo) -> None:
        mine = step.rows == 0
        positions = step.positions[mine].tolist()
        for position, token in zip(positions, step.tokens[mine].tolist(), strict=True):
            self.tokens[position] = token
            self.states[position] = SEQUENTIAL if step.phase == "sequential" else DIFFUSION
        self.newest = frozenset(positions)
        self.step, self.phase = step.index + 1, step.phase
        if self.in_place:
            if time.perf_counter() - self.drawn_at > 0.03:
                self._draw()
            if self.num_steps:
                share = self._weight(self.step) / self._weight(self.num_steps)
                pause = self.start + self.seconds * share - time.perf_counter()
                if pause > 0:
                    self.waited += pause
                    time.sleep(pause)
        else:
            done = self.num_masked - self.states.count(MASKED)
            before = done - len(positions)
            if positions and done * 6 // self.num_masked > before * 6 // self.num_masked:
                self.stream.write(f"  {self._status()}\n")

    def _weight(self, steps: int) -> int:
        return steps + (self.DIFFUSION_WEIGHT - 1) * min(steps, self.num_diffusion)

    def _status(self) -> str:
        done = self.num_masked - self.states.count(MASKED)
        steps = f" of {self.num_steps}" if self.num_steps else ""
        return f"step {self.step:4d}{steps}   {done:4d} of {self.num_masked} tokens   {self.phase}"

    def _piece(self, token: int) -> str:
        if token not in self.pieces:
            text = self.tokenizer.decode([token]).expandtabs(4)
            self.pieces[token] = "".join(c if c.isprintable() or c == "\n" else "?" for c in text)
        return self.pieces[token]

    def _lines(self, width: int) -> list[tuple[str, bool]]:
        """The text wrapped to width, and whether a line holds a newest token."""
        lines: list[tuple[str, bool]] = []
        line, column, style, hot = "", 0, "", False
        for position, (token, state) in enumerate(zip(self.tokens, self.states, strict=True)):
            wanted = _COLOURS[state] if self.in_place else ""
            if position in self.newest and self.in_place:
                wanted, hot = wanted + _NEWEST, True
            for character in self.dot if state == MASKED else self._piece(token):
                if character == "\n" or column == width:
                    lines.append((line + (_RESET if style else ""), hot))
                    line, column, style, hot = "", 0, "", position in self.newest
                    if character == "\n":
                        continue
                if style != wanted:
                    line += (_RESET if style else "") + wanted
                    style = wanted
                line += character
                column += 1
        return [*lines, (line + (_RESET if style else ""), hot)]

    def _draw(self, final: bool = False) -> None:
        size = shutil.get_terminal_size()
        lines = self._lines(max(size.columns - 3, 20))
        room = max(size.lines - 3, 3)
        if not final and len(lines) > room:  # only what fits can be redrawn: keep the newest token in sight
            hot = next((index for index, (_, is_hot) in enumerate(lines) if is_hot), 0)
            first = min(max(hot - room // 2, 0), len(lines) - room)
            lines = lines[first : first + room]
        text = f"\x1b[{self.height}A" if self.height else ""
        text += "\r\x1b[J" + "".join(f"  {line}\n" for line, _ in lines)
        if not final:
            text += f"\x1b[2m{self._status()}\x1b[0m\n"
        self.stream.write(text)
        self.stream.flush()
        self.height = 0 if final else len(lines) + 1
        self.drawn_at = time.perf_counter()


def use_colour(stream: TextIO) -> bool:
    """Whether the stream is a terminal that takes colours, and the user has not asked for none."""
    return stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def legend(stream: TextIO) -> str:
    """One line that says what the colours of LiveText mean."""
    if not use_colour(stream):
        return ""
    names = (f"{colour}{name}{_RESET}" for name, colour in zip(_NAMES, _COLOURS, strict=True))
    return "   ".join([*names, f"{_NEWEST}new in this step{_RESET}"])


def write_live(
    network: FoldedNetwork,
    tokenizer: Tokenizer,
    tokens: torch.Tensor,
    *,
    alpha_0: float,
    num_steps: float,
    seed: int,
    seconds: float,
    stream: TextIO,
    **options: object,
) -> tuple[GenerationResult, Schedule]:
    """Generate one row, int64 [length], with Eso-LM in view; options go to esolm.generate. Returns its schedule too."""
    masked = (tokens == tokenizer.mask_id)[None]
    schedule = denoising_schedule(masked, alpha_0=alpha_0, num_steps=num_steps, seeds=[seed], schedule_seed=seed)
    with LiveText(tokenizer, tokens, schedule, seconds=seconds, stream=stream) as live:
        result = esolm.generate(network, tokens, schedule=schedule, seed=seed, callback=live, **options)
    return result, schedule


@dataclass(frozen=True)
class Comparison:
    """One row of the table of samplers."""

    name: str
    nfe: int
    seconds: float
    tokens: int
    result: GenerationResult


def compare_samplers(
    network: FoldedNetwork,
    length: int,
    *,
    alpha_0: float = 0.25,
    parallel_steps: int = 16,
    block_size: int = 16,
    repeats: int = 3,
    seed: int = 0,
    backend: str | None = None,
    progress: bool = False,
) -> list[Comparison]:
    """Time every sampler on one network, `length` tokens from nothing, batch 1: all with one evaluation per token, and
    Eso-LM also with `parallel_steps` diffusion steps at alpha_0 = 1. Medians over `repeats` interleaved rounds; what
    takes over 2 s is run once."""
    common = {"length": length, "seed": seed, "backend": backend}
    one_by_one = {"alpha_0": alpha_0, "num_steps": math.inf, **common}
    candidates: dict[str, Callable[[], GenerationResult]] = {
        "Eso-LM, cached": lambda: esolm.generate(network, **one_by_one),
        "Eso-LM, recomputed": lambda: esolm.generate(network, cached=False, **one_by_one),
        "MDLM": lambda: mdlm.generate(network, num_steps=math.inf, **common),
        f"BD3-LM, blocks of {block_size}": lambda: bd3lm.generate(
            network, block_size=block_size, num_steps=math.inf, **common
        ),
        "AR": lambda: autoregressive.generate(network, **common),
        f"Eso-LM, cached, T = {parallel_steps}": lambda: esolm.generate(
            network, alpha_0=1.0, num_steps=parallel_steps, **common
        ),
    }
    warm = min(length, 32)
    esolm.generate(network, **{**one_by_one, "length": warm})  # pages, tables and threads are ready afterwards
    mdlm.generate(network, **{**common, "length": warm}, num_steps=2)
    results: dict[str, list[GenerationResult]] = {name: [] for name in candidates}
    runs = [(name, index) for index in range(repeats) for name in candidates]
    for name, index in tqdm(runs, desc="timing the samplers", disable=not progress, leave=False, unit="run"):
        if index == 0 or results[name][0].seconds <= 2.0:
            results[name].append(candidates[name]())
    return [
        Comparison(name, taken[0].nfe, statistics.median(r.seconds for r in taken), taken[0].num_generated, taken[0])
        for name, taken in results.items()
    ]


def comparison_table(rows: list[Comparison], baseline: str = "MDLM") -> Iterator[str]:
    """The rows as lines of text, with the speed-up over the baseline's tokens per second."""
    slow = next(row for row in rows if row.name == baseline)
    width = max(len(row.name) for row in rows)
    header = f"{'sampler':{width}}  {'NFE':>5}  {'seconds':>8}  {'tokens/s':>9}  {'speed-up':>9}"
    yield header
    yield "-" * len(header)
    for row in rows:
        speed_up = row.tokens / row.seconds / (slow.tokens / slow.seconds)
        yield (
            f"{row.name:{width}}  {row.nfe:5d}  {row.seconds:8.3f}  {row.tokens / row.seconds:9.0f}  {speed_up:8.1f}x"
        )


def agreement(pairs: list[tuple[GenerationResult, GenerationResult]]) -> str:
    """How many tokens two kinds of runs have in common, as a line of text."""
    equal = sum(int(((a.tokens == b.tokens) & (a.decode_step >= 0)).sum()) for a, b in pairs)
    return f"cached and recomputed runs chose the same tokens: {equal} of {sum(a.num_generated for a, _ in pairs)}"


def run(
    network: FoldedNetwork,
    tokenizer: Tokenizer,
    *,
    seconds: float = 5.0,
    seed: int = 1,
    stream: TextIO | None = None,
) -> None:
    """The demo: a prompt and an infilling task live, then the table. seconds: how long each task is shown at least."""
    stream = sys.stdout if stream is None else stream
    config = network.config

    def say(text: str = "") -> None:
        print(text, file=stream, flush=True)

    def task(title: str, tokens: list[int], alpha_0: float, num_steps: int) -> tuple[GenerationResult, ...]:
        say(f"\n{title}")
        if legend(stream):
            say(f"  {legend(stream)}\n")
        start = torch.tensor(tokens)
        sampling = {"seed": seed, "temperature": 0.7, "top_p": 0.9}
        result, schedule = write_live(
            network,
            tokenizer,
            start,
            alpha_0=alpha_0,
            num_steps=num_steps,
            seconds=seconds,
            stream=stream,
            **sampling,
        )
        unwatched = esolm.generate(network, start, schedule=schedule, **sampling)
        parallel = int(schedule.counts[0, : schedule.num_diffusion[0]].sum())
        say(
            f"\n  {result.num_generated} tokens: {parallel} by diffusion in {schedule.num_diffusion[0]} steps, "
            f"{result.num_generated - parallel} one by one from left to right.\n"
            f"  {result.nfe} network evaluations. The same run unwatched: {unwatched.seconds:.2f} s, "
            f"{unwatched.tokens_per_second:.0f} tokens/s."
        )
        return result, esolm.generate(network, start, schedule=schedule, cached=False, **sampling)

    megabytes = (network.n_bytes() + network.embedding.numel() * network.embedding.element_size()) / 1e6
    say(
        f"A small Eso-LM trained on Python's standard library: {config.n_blocks} layers of {config.hidden_size}, "
        f"{config.vocab_size} token ids.\n{megabytes:.1f} MB of {str(network.dtype).removeprefix('torch.')}; "
        f"kernels for {backends.get_isa()}, {torch.get_num_threads()} threads."
    )

    mask_id = tokenizer.mask_id
    prompt = tokenizer.encode_prompt(PROMPT)
    pairs = [
        task(
            "1. A prompt is continued: first an eighth of the tokens by diffusion, all over the text and\n"
            "   several in a step, then the rest from left to right.",
            prompt + [mask_id] * (min(config.length, len(prompt) + 160) - len(prompt)),
            alpha_0=0.125,
            num_steps=8,
        ),
        task(
            "2. A gap is filled: beginning and end are given, the middle is generated.",
            tokenizer.encode_prompt(PREFIX) + [mask_id] * MIDDLE + tokenizer.encode(SUFFIX),
            alpha_0=0.125,
            num_steps=6,
        ),
    ]

    say(f"\n3. The samplers on this network: {config.length} tokens from nothing, batch 1.")
    rows = compare_samplers(network, config.length, seed=seed, progress=sys.stderr.isatty())
    say()
    for line in comparison_table(rows):
        say(f"  {line}")
    say(
        "\n  NFE: network evaluations. Speed-up: tokens per second against MDLM, which recomputes everything.\n"
        "  The network was trained as an Eso-LM: what MDLM, BD3-LM and AR write with it means nothing, only\n"
        "  their time does."
    )
    by_name = {row.name: row.result for row in rows}
    pairs.append((by_name["Eso-LM, cached"], by_name["Eso-LM, recomputed"]))
    say(f"\n  {agreement(pairs)}")
