"""Whole generations of a bidirectional network by LLaDA's decoder: its eager form, and ours without and with caches.

The network is the 170M one of the other generations, its forward pass the same in all of them: what differs is what a
step does besides, and with a cache how much of the text it computes again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

import eager
import esokern
from esokern import decoders
from esokern.models import Network
from esokern.models.denoiser import NetworkDenoiser, Step
from gpu_cases import Setting
from harness import Recorder, Timing, timed

if TYPE_CHECKING:
    from gpu_bench import Bench

CACHES = {"esokern": None, "esokern prefix": "prefix", "esokern dual": "dual"}
TRIES = 3


def generations(
    setting: Setting, network: Network, batch: int, temperature: float
) -> tuple[str, dict[str, Callable[[], object]]]:
    """The case's name and its candidates: 64 tokens of prompt, 256 new ones, 4 a step, in blocks of 32."""
    folded, mask_id = network.fold(setting.dtype), network.config.mask_id
    given, new, block = (8, 16, 8) if setting.small else (64, 256, 32)
    steps = new // 4
    prompt = torch.randint(mask_id, (batch, given), device=setting.device)
    decoder = decoders.LLaDA(steps=steps, block_length=block, temperature=temperature)
    denoiser = NetworkDenoiser(folded)

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        lengths = torch.full(tokens.shape[:1], tokens.shape[1], dtype=torch.int32, device=tokens.device)
        hidden = denoiser.hidden(tokens, positions, Step(lengths))
        return functional.linear(hidden, denoiser.head_weight, denoiser.head_bias)

    @torch.inference_mode()
    def plain() -> torch.Tensor:
        text = functional.pad(prompt, (0, new), value=mask_id)
        return eager.llada(logits, text, mask_id, steps=steps, block_length=block, temperature=temperature)

    def ours(cache: str | None) -> Callable[[], torch.Tensor]:
        return lambda: esokern.generate(folded, prompt, decoder=decoder, cache=cache, max_new_tokens=new).tokens

    candidates = {name: ours(cache) for name, cache in CACHES.items()} | {"eager LLaDA": plain}
    return f"S{given + new} B{batch} NFE {steps} T {temperature:g}", candidates


def decoding(bench: Bench, network: Network) -> None:
    """Time every case's candidates in turn by the host's clock."""
    setting = bench.setting

    def run(candidate: Callable[[], object]) -> None:
        candidate()
        if bench.cuda:
            torch.cuda.synchronize()

    for batch in (1, 3) if setting.small else (1, 32):
        for temperature in (0.0, 1.0):
            case, candidates = generations(setting, network, batch, temperature)
            recorder = Recorder(setting.device)
            seconds: dict[str, list[float]] = {name: [] for name in candidates}
            reasons: dict[str, str] = {}
            for _ in range(1 + TRIES):  # the first warms up
                for name in seconds.keys() - reasons.keys():
                    if bench.out_of_time():
                        reasons[name] = "the time was up"
                        continue
                    try:
                        seconds[name].append(timed(functools.partial(run, candidates[name])))
                    except Exception as error:
                        reasons[name] = f"{type(error).__name__}: {error}"
                        bench.failed |= name.startswith("esokern")
                        if bench.context_is_broken():
                            raise
            timings = {name: Timing.of(values[1:]) for name, values in seconds.items() if values[1:]}
            reasons = {name: reason for name, reason in reasons.items() if name not in timings}
            notes = {name: {"how": "whole generations"} for name in timings}
            for name in notes.keys() & {"esokern prefix", "esokern dual"}:
                notes[name]["partial"] = True  # approximate: less work, other texts
            recorder.add("decoders", case, setting.dtype, timings, notes=notes)
            bench.left_out(recorder, "decoders", case, reasons)
            bench.save(recorder)
