"""LLaDA, Dream, Eso-LM, BD3-LM and Set Diffusion by their own code, as published and with their attention swapped.

    python bench/published.py --checkouts DIR [--only esolm llada] [--rounds 3] [--small] [--record]

DIR holds checkouts of their repositories; bench/checkouts.py says which, and what must be installed. Models are of
their own classes with random weights (512 wide, 12 layers, about 50 M parameters, vocabulary 8192). A case is a call of
their own sampler, or the attention method of one block alone; it runs as published and inside `swap_attention`, in
turn, in one process, and nothing else differs. On one thread, in process time, which other work on the machine changes
little. --record appends to bench/results/published.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch

import checkouts
from esokern.integrations.published import swap_attention
from harness import RESULTS, Timing, recorder

VOCAB = 8192
HEADS = 8


class Case(NamedTuple):
    name: str
    model: torch.nn.Module
    call: Callable[[], object]
    repeats: int = 1  # calls in one timing


def size(small: bool, length: int = 1024) -> dict[str, int]:
    return {
        "hidden": 64 if small else 512,
        "layers": 2 if small else 12,
        "heads": HEADS,
        "length": length,
        "vocab": VOCAB,
    }


def prompt(length: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(0, VOCAB - 2, (batch, length), generator=torch.Generator().manual_seed(0))


def packed(model: torch.nn.Module, batch: int, tokens: int) -> torch.Tensor:
    """qkv [batch, tokens, 3, heads, head_dim]."""
    width = next(p.shape[-1] for p in model.parameters() if p.dim() == 2)
    return torch.randn(batch, tokens, 3, HEADS, width // HEADS)


def llada(root: Path, small: bool) -> Iterator[Case]:
    model, samplers = checkouts.llada(root, **size(small))
    options = {"steps": 2, "gen_length": 32, "block_length": 32, "mask_id": VOCAB - 1}
    for name in ("generate", "generate_with_prefix_cache", "generate_with_dual_cache"):
        sample = getattr(samplers, name)
        yield Case(f"LLaDA {name} L1024, 2 steps", model, partial(sample, model, prompt(992), **options))
    block = model.model.transformer.blocks[0]
    q, k, v = packed(model, 1, 1024).transpose(1, 3).unbind(2)
    for n in (1024, 32):
        name = f"LLaDA attention {n} x 1024"
        yield Case(name, block, lambda n=n: block._scaled_dot_product_attention(q[:, :, -n:], k, v), 10)


def dream(root: Path, small: bool) -> Iterator[Case]:
    model = checkouts.dream(root, **size(small), kv_heads=2)
    options = {"max_new_tokens": 32, "steps": 2, "alg": "entropy"}
    yield Case(
        "Dream diffusion_generate L1024, 2 steps", model, partial(model.diffusion_generate, prompt(992), **options)
    )


def esolm(root: Path, small: bool) -> Iterator[Case]:
    for steps, batch, length in ((16, 8, 256), (128, 1, 1024)):
        model = checkouts.esolm(root, **size(small, length), steps=steps)
        yield Case(
            f"Eso-LM generate_samples L{length} B{batch} T{steps}", model, partial(model.generate_samples, batch)
        )
    block = model.backbone.blocks[0]
    cos, sin = model.backbone.rotary_emb(torch.zeros(1, 1024))
    for batch in (1, 8):
        block.reset_kv_cache()
        qkv, tables = packed(block, batch, 1024), (cos.expand(batch, -1, -1, -1, -1), sin.expand(batch, -1, -1, -1, -1))

        def step(start: int, end: int, clean: int, qkv=qkv, tables=tables) -> object:
            block.num_clean_cached = start
            part = (table[:, start:end] for table in tables)
            return block._attention_with_kv_cache(qkv[:, start:end], tuple(part), clean, end - start)

        step(0, 512, 512)
        for new in (2, 32):
            yield Case(f"Eso-LM step {new} x 512 B{batch}", block, partial(step, 512, 512 + new, new // 2), 50 // batch)


def bd3lm(root: Path, small: bool) -> Iterator[Case]:
    model = checkouts.bd3lm(root, **size(small), block_size=16)
    settings = {"n_samples": 1, "num_steps": 1000, "num_strides": 8, "seqlen": 128}
    yield Case("BD3-LM block 16 L128, cached", model, partial(model._semi_ar_sampler, **settings))
    model.backbone.reset_kv_cache()
    for block in model.backbone.blocks:
        block.cache_idx = 1008
    step = partial(model, prompt(16), torch.zeros(1, 1), sample_mode=True)
    yield Case("BD3-LM step of the sampler, 1008 cached", model, step, 2)
    block, qkv = model.backbone.blocks[0], packed(model.backbone, 1, 1024)
    block.kv_cache = torch.zeros(1)
    yield Case("BD3-LM attention of a block, 1024 cached", block, lambda: block.cross_attn(qkv), 10)
    model = checkouts.bd3lm(root, **size(small, 512), block_size=16)
    pair, mask = prompt(1024), model.backbone.block_diff_mask
    yield Case("BD3-LM forward of training, 2 x 512", model, partial(model.backbone, pair, torch.zeros(1)))
    other = model.backbone.blocks[0]
    yield Case("BD3-LM attention of training, 2 x 512", other, lambda: other.cross_attn(qkv, mask), 10)


def set_diffusion(root: Path, small: bool) -> Iterator[Case]:
    model, settings = checkouts.set_diffusion(root, **size(small))
    options = {"generation_config": settings, "max_new_tokens": 64}
    yield Case("Set Diffusion generate, 512 + 64", model, partial(model.generate, prompt(512), **options))


FAMILIES = {f.__name__: f for f in (llada, dream, esolm, bd3lm, set_diffusion)}


def measure(case: Case, rounds: int) -> None:
    seconds: dict[str, list[float]] = {"published": [], "esokern": []}
    for i in range(rounds + 1):
        for name, taken in seconds.items():
            torch.manual_seed(i)
            np.random.seed(i)
            with swap_attention(case.model) if name == "esokern" else contextlib.nullcontext():
                start = time.process_time()
                for _ in range(case.repeats):
                    case.call()
                taken.append((time.process_time() - start) / case.repeats)
    timings = {name: Timing.of(taken[1:]) for name, taken in seconds.items()}  # the first warms up and compiles
    note = {"parameters": sum(p.numel() for p in case.model.parameters()), "clock": "process time"}
    recorder.add("published", case.name, torch.float32, timings, notes=dict.fromkeys(timings, note))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkouts", type=Path, required=True, metavar="DIR")
    parser.add_argument("--only", nargs="*", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="tiny networks: does it run?")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # theirs, of a GPU that is not there and of names that are old
    for family in options.only:
        for case in FAMILIES[family](options.checkouts, options.small):
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), torch.no_grad():
                measure(case, options.rounds if case.repeats == 1 else 3 * options.rounds)
            print(*recorder.table().splitlines()[-2:], sep="\n", flush=True)
    if options.record:
        print(f"recorded in {recorder.save(RESULTS / 'published.jsonl')}")


if __name__ == "__main__":
    main()
