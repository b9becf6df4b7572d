"""Decoders of masked-diffusion models against `esokern.generate`, with the same weights and forward passes.

    python bench/decoders.py [--checkouts DIR] [--batch 1 8] [--rounds 3] [--threads 1 --clock cpu] [--small] [--record]

A Llama of 66 M parameters with random weights, whose distributions are about as sharp as a trained one's, writes 256
tokens after a prompt of 64, in blocks of 32. DIR holds checkouts of the published code,

    git clone https://github.com/ML-GSAI/LLaDA
    git clone https://github.com/NVlabs/Fast-dLLM

whose `generate` functions run on their own model class; a transformers model with the same weights is what esokern
runs. It needs einops and transformers besides this package. Without DIR the peer is bench/eager.py's form of LLaDA's
decoder, on the transformers model with torch's own attention.

Times are those of whole generations; "network" is the part of them that went to the transformer without its LM head,
"head" to the head alone, where that is apart from sampling. Fast-dLLM takes one row at a time, so that a batch is as
many calls. --clock cpu counts the process's CPU time, which with one thread is what a machine of its own would need:
for machines that others use as well.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import checkouts
import eager
import esokern
from esokern import decoders
from esokern.integrations import llada_dream
from esokern.integrations.transformers import TransformersDenoiser
from esokern.models.denoiser import Step
from harness import Recorder, Timing

PROMPT, NEW, BLOCK = 64, 256, 32
SHARP = 16.0  # the head's weights are this much larger than the others
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Size:
    hidden: int = 512
    layers: int = 8
    heads: int = 8
    vocab: int = 32000

    @property
    def mask_id(self) -> int:
        return self.vocab - 1


class Watch:
    """Adds up the time and number of the calls of a module or function."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.reset()

    def reset(self) -> None:
        self.seconds, self.calls, self._begin = 0.0, 0, 0.0

    def _start(self, *_: object) -> None:
        self._begin = self.clock()

    def _stop(self, *_: object) -> None:
        self.seconds += self.clock() - self._begin
        self.calls += 1

    def module(self, module: torch.nn.Module) -> None:
        module.register_forward_pre_hook(self._start)
        module.register_forward_hook(self._stop)

    def function(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any) -> Any:
            self._start()
            result = function(*args)
            self._stop()
            return result

        return watched


@dataclass
class Candidate:
    """generate() -> tokens [batch, PROMPT + NEW]; `whole` follows the model's calls, `head` those of its LM head, which
    are a part of `whole` (None: the head is a part of sampling)."""

    name: str
    generate: Callable[[], torch.Tensor]
    whole: Watch
    head: Watch | None = None


@dataclass(frozen=True)
class Models:
    """One set of weights as a transformers model and, with checkouts, as the published class with its samplers."""

    size: Size
    ours: LlamaForCausalLM
    published: torch.nn.Module | None = None
    llada: Any = None
    fast_dllm: Any = None


def transformers_model(size: Size) -> LlamaForCausalLM:
    """Without causality: what every layer sees by itself is the whole row."""
    config = LlamaConfig(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=4 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=PROMPT + NEW,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.03)
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    return model


def llada_decoder(root: Path) -> Any:
    """LLaDA's module of the function `generate`, which calls any model."""
    spec = importlib.util.spec_from_file_location("llada_generate", root / "LLaDA" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def make_models(root: Path | None, size: Size) -> Models:
    """Models with the same weights, whose logits agree."""
    torch.manual_seed(0)
    if root is None:
        ours = transformers_model(size)
        ours.lm_head.weight *= SHARP
        return Models(size, ours)
    sizes = {"hidden": size.hidden, "layers": size.layers, "heads": size.heads, "vocab": size.vocab}
    published, fast_dllm = checkouts.llada(root, **sizes, length=PROMPT + NEW)
    published.model.transformer.ff_out.weight *= SHARP
    ours = llada_dream.as_transformers(published)
    tokens = torch.randint(size.vocab, (2, 40))
    denoiser, positions = TransformersDenoiser(ours), torch.arange(40).expand(2, -1)
    hidden = denoiser.hidden(tokens, positions, Step(torch.full((2,), 40, dtype=torch.int32)))
    torch.testing.assert_close(ours.lm_head(hidden), published(tokens).logits, rtol=1e-4, atol=1e-3)
    return Models(size, ours, published, llada_decoder(root), fast_dllm)


# --- candidates


def esokern_candidate(
    models: Models, prompt: torch.Tensor, decoder: decoders.Decoder, cache: str | None, clock: Callable[[], float]
) -> Candidate:
    denoiser, watch = TransformersDenoiser(models.ours), Watch(clock)
    denoiser.hidden = watch.function(denoiser.hidden)
    options = {"decoder": decoder, "cache": cache, "max_new_tokens": NEW, "mask_id": models.size.mask_id}
    return Candidate("esokern", lambda: esokern.generate(denoiser, prompt, **options).tokens, watch)


def watched(
    name: str, generate: Callable[[], torch.Tensor], model: torch.nn.Module, head: torch.nn.Module, clock: Callable
) -> Candidate:
    """A candidate that calls `model`, whose last layer is `head`."""
    candidate = Candidate(name, generate, Watch(clock), Watch(clock))
    candidate.whole.module(model)
    candidate.head.module(head)
    return candidate


def peers(
    models: Models, prompt: torch.Tensor, cache: str | None, steps: int, temperature: float, threshold: float | None,
    clock: Callable[[], float],
) -> Iterator[Candidate]:  # fmt: skip
    """Decoders that do what a case asks for."""
    mask_id = models.size.mask_id
    if models.published is None:
        if cache is None and threshold is None:
            text = torch.nn.functional.pad(prompt, (0, NEW), value=mask_id)
            options = {"steps": steps, "block_length": BLOCK, "temperature": temperature}
            yield watched(
                "eager LLaDA", lambda: eager.llada(lambda x: models.ours(x).logits, text, mask_id, **options),
                models.ours, models.ours.lm_head, clock,
            )  # fmt: skip
        return
    options = {
        "steps": steps, "gen_length": NEW, "block_length": BLOCK, "temperature": temperature, "mask_id": mask_id
    }  # fmt: skip
    model, head = models.published, models.published.model.transformer.ff_out
    if cache is None and threshold is None:
        yield watched("LLaDA", lambda: models.llada.generate(model, prompt, **options), model, head, clock)
        return
    generate = getattr(models.fast_dllm, f"generate_with_{cache}_cache" if cache else "generate")

    def rows() -> torch.Tensor:
        return torch.cat([generate(model, row[None], threshold=threshold, **options)[0] for row in prompt])

    yield watched("Fast-dLLM", rows, model, head, clock)


# --- cases


@dataclass(frozen=True)
class Case:
    """cache: of `generate`; steps: over all blocks; threshold: of Fast-dLLM's parallel decoding, in place of steps."""

    cache: str | None
    temperature: float
    steps: int
    threshold: float | None = None

    def name(self, batch: int) -> str:
        kept = f"T {self.temperature:g}" if self.threshold is None else f"threshold {self.threshold:g}"
        return f"B{batch} {self.cache or 'no'} cache, {kept}"


def cases(batch: int, small: bool) -> Iterator[Case]:
    steps = NEW // BLOCK * (4 if batch == 1 and not small else 2)
    for cache in (None, "prefix", "dual"):
        if batch > 1 and cache == "prefix":
            continue
        for temperature in (0.0, 1.0):
            if batch == 1 or cache is None or temperature > 0:
                yield Case(cache, temperature, steps)
    if batch == 1:
        yield Case("dual", 0.0, NEW, threshold=0.9)


def measure(models: Models, case: Case, batch: int, rounds: int, clock: str) -> Recorder:
    """Time all candidates of a case in turn; their records."""
    size, now = models.size, CLOCKS[clock]
    prompt = torch.randint(size.mask_id, (batch, PROMPT), generator=torch.Generator().manual_seed(1))
    if case.threshold is None:
        decoder = decoders.LLaDA(steps=case.steps, block_length=BLOCK, temperature=case.temperature)
    else:
        decoder = decoders.FastDLLM(block_length=BLOCK, threshold=case.threshold)
    candidates = [
        *peers(models, prompt, case.cache, case.steps, case.temperature, case.threshold, now),
        esokern_candidate(models, prompt, decoder, case.cache, now),
    ]
    seconds: dict[str, list[float]] = {}
    network: dict[str, list[float]] = {}
    heads: dict[str, list[float]] = {}
    tokens: dict[str, torch.Tensor] = {}
    for _ in range(rounds):
        for candidate in candidates:
            for watch in (candidate.whole, candidate.head):
                if watch is not None:
                    watch.reset()
            begin = now()
            tokens[candidate.name] = candidate.generate()
            seconds.setdefault(candidate.name, []).append(now() - begin)
            head = candidate.head.seconds if candidate.head else 0.0
            network.setdefault(candidate.name, []).append(candidate.whole.seconds - head)
            heads.setdefault(candidate.name, []).append(head)
    notes = {}
    for candidate in candidates:
        name, passes = candidate.name, candidate.whole.calls
        parts = zip(seconds[name], network[name], heads[name], strict=True)
        notes[name] = {
            "passes": passes,
            "network_us": 1e6 * statistics.median(network[name]),
            "head_us": 1e6 * statistics.median(heads[name]) if candidate.head else None,
            "overhead_us": 1e6 * statistics.median(whole - net - head for whole, net, head in parts),
            "clock": clock,
            "parameters": sum(p.numel() for p in models.ours.parameters()),
        }
        if case.temperature == 0:
            same = (tokens[name] == tokens["esokern"])[:, PROMPT:]
            notes[name]["same_tokens"] = same.float().mean().item()
    timings = {name: Timing.of(values) for name, values in seconds.items()}
    recorder = Recorder()
    op = "decoder" if models.published is not None else "decoder_eager"
    recorder.add(op, case.name(batch), torch.float32, timings, notes=notes)
    return recorder


def told(row: dict) -> str:
    """A record as a line."""
    parts = ", ".join(
        f"{part} {row[f'{part}_us'] / 1e6:.3f}"
        for part in ("network", "head", "overhead")
        if row[f"{part}_us"] is not None
    )
    seconds = f"{row['median_us'] / 1e6:8.2f} s in {row['passes']} passes"
    return f"{row['case']:32} {row['candidate']:12} {seconds} ({parts}), same tokens: {row.get('same_tokens', '-')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkouts", type=Path, metavar="DIR")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--small", action="store_true", help="a tiny network: does it run?")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    if options.clock == "cpu" and options.threads != 1:
        parser.error(f"--clock cpu: needs --threads 1, got {options.threads}")
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")  # of transformers, about names that are old
    size = Size(hidden=64, layers=2, heads=2, vocab=512) if options.small else Size()
    with torch.inference_mode():
        models = make_models(options.checkouts, size)
        for batch in options.batch:
            for case in cases(batch, options.small):
                done = measure(models, case, batch, options.rounds, options.clock)
                print(*map(told, done.rows), sep="\n", flush=True)
                if options.record:
                    done.save()


if __name__ == "__main__":
    main()
