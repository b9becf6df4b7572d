"""Whole generations of one network by every sampler, sampling included, and where one step's time goes.

The network is the one of the README's figures: hidden 256, 4 heads, 6 layers, vocabulary 8193, random weights. MDLM
forwards the whole sequence in every step, so a few of its steps are measured and the rest is that many times more:
its rows say "NFE x mean step".
"""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
import time

import pytest
import torch

import esokern
from eager import EagerEsoLM
from esokern import samplers
from esokern.models import Network, NetworkConfig
from esokern.samplers.schedule import denoising_schedule
from harness import Cost, Timing, recorder, timed

MDLM_STEPS = 12  # how many are measured


def network(length: int) -> Network:
    torch.manual_seed(0)
    config = NetworkConfig(vocab_size=8193, hidden_size=256, n_blocks=6, n_heads=4, length=length, cond_dim=128)
    made = Network(config).eval()
    for parameter in made.parameters():  # nothing zero, as after training
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.03)
    return made


def schedule_of(length: int, batch: int, num_steps: float, alpha_0: float = 1.0):
    masked = torch.ones(batch, length, dtype=torch.bool)
    return denoising_schedule(masked, alpha_0=alpha_0, num_steps=num_steps, seeds=range(batch), schedule_seed=0)


def mdlm_seconds(folded, length: int, batch: int, nfe: int) -> Timing:
    """Seconds of `nfe` steps from MDLM_STEPS measured ones, each drawing length / nfe tokens per row."""
    moments: list[float] = []
    schedule = schedule_of(length, batch, math.inf if nfe == length else nfe)

    class Enough(Exception):
        pass

    def callback(step) -> None:
        moments.append(time.perf_counter())
        if len(moments) > MDLM_STEPS:
            raise Enough

    with contextlib.suppress(Enough):
        samplers.mdlm.generate(folded, length=length, batch=batch, schedule=schedule, callback=callback)
    steps = [end - start for start, end in itertools.pairwise(moments)]
    scaled = [nfe * step for step in steps]
    return Timing(
        nfe * statistics.fmean(steps),
        *(Timing.of(scaled).__dict__[k] for k in ("p25", "p75", "minimum")),
        len(steps),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(
    ("batch", "num_steps"),
    [(1, math.inf), (8, math.inf), (1, 16), (1, 64), (1, 256), (8, 64)],
    ids=["B1-NFE=L", "B8-NFE=L", "B1-T16", "B1-T64", "B1-T256", "B8-T64"],
)
def test_generation(compare, batch, num_steps, dtype):
    length = 1024
    if batch == 8 and math.isinf(num_steps) and dtype == torch.float32:
        pytest.skip("minutes; bf16 is measured")
    model = network(length)
    folded = model.fold(dtype)
    schedule = schedule_of(length, batch, num_steps)
    order, counts = torch.from_numpy(schedule.order), schedule.counts[0].tolist()
    eager = EagerEsoLM(model)
    common = {"length": length, "batch": batch, "seed": 0}
    candidates = {
        "Eso-LM cached": lambda: samplers.esolm.generate(folded, schedule=schedule, **common),
        "AR cached": lambda: samplers.autoregressive.generate(folded, **common),
        "BD3-LM 16": lambda: samplers.bd3lm.generate(
            folded,
            block_size=16,
            num_steps=math.inf if math.isinf(num_steps) else max(num_steps * 16 // length, 1),
            **common,
        ),
    }
    if dtype == torch.float32:
        candidates["Eso-LM eager"] = lambda: eager.generate(order, counts)
    name = "NFE = L" if math.isinf(num_steps) else f"T {num_steps} (NFE {schedule.nfe})"
    case = f"L1024 B{batch} {name}"
    compare("generate", case, dtype, candidates, ours="Eso-LM cached", seconds=1.0, max_rounds=5)
    recorder.add("generate", case, dtype, {"MDLM (NFE x mean step)": mdlm_seconds(folded, length, batch, schedule.nfe)})


@pytest.mark.parametrize("length", [256, 512, 1024, 2048, 4096])
def test_scaling(length):
    """How time grows with length at one network evaluation per token."""
    model = network(length)
    folded = model.fold()
    schedule = schedule_of(length, 1, math.inf)
    curves = {
        "Eso-LM cached": lambda: samplers.esolm.generate(folded, length=length, schedule=schedule),
        "AR cached": lambda: samplers.autoregressive.generate(folded, length=length),
        "BD3-LM 4": lambda: samplers.bd3lm.generate(folded, length=length, block_size=4, num_steps=math.inf),
        "BD3-LM 16": lambda: samplers.bd3lm.generate(folded, length=length, block_size=16, num_steps=math.inf),
    }
    if length <= 2048:
        eager = EagerEsoLM(model)
        order, counts = torch.from_numpy(schedule.order), schedule.counts[0].tolist()
        curves["Eso-LM eager"] = lambda: eager.generate(order, counts)
    with torch.inference_mode():
        timings = {name: Timing.of([timed(run)]) for name, run in curves.items()}
    timings["MDLM"] = mdlm_seconds(folded, length, 1, length)
    recorder.add("generate_scaling", f"L{length} B1 NFE = L", torch.float32, timings, ours="Eso-LM cached")


def test_step_profile():
    """One step of the NFE = L generation, 512 tokens cached, part by part (each part alone, in a loop)."""
    folded = network(1024).fold()
    config = folded.config
    cache = esokern.KVCache(config.n_blocks, 1, 1024, config.n_heads, config.head_dim)
    cache.commit(512)
    tokens, positions = torch.tensor([[5, config.mask_id]]), torch.tensor([[700, 30]], dtype=torch.int32)

    def median(part) -> Timing:
        for _ in range(20):
            part()
        return Timing.of([timed(part) for _ in range(300)])

    with torch.inference_mode():
        x = torch.randn(1, 2, config.hidden_size)
        qkv = torch.randn(1, 2, 3, config.n_heads, config.head_dim)
        inner = torch.randn(1, 2, 4 * config.hidden_size)
        layers = [(b, *cache.layer(i)) for i, b in enumerate(folded.blocks)]

        def attend():
            for _, k_cache, v_cache in layers:
                esokern.attention_with_kvcache(
                    qkv[:, :, 0],
                    k_cache,
                    v_cache,
                    qkv[:, :, 1],
                    qkv[:, :, 2],
                    cache_seqlens=cache.cache_seqlens,
                    positions=positions,
                    rotary_cos=folded.rotary_cos,
                    rotary_sin=folded.rotary_sin,
                )

        def linear(source, weight, bias=None, **options):
            return lambda: [
                esokern.fused_linear(source, getattr(b, weight), bias and getattr(b, bias), **options)
                for b in folded.blocks
            ]

        hidden = torch.randn(1, config.hidden_size)
        parts = {
            "norm + qkv": linear(x, "qkv_weight", "qkv_bias", normalize_eps=1e-5),
            "attention": attend,
            "attention out": linear(x, "out_weight", residual=x),
            "norm + mlp + gelu": linear(x, "mlp1_weight", "mlp1_bias", normalize_eps=1e-5, activation="gelu_tanh"),
            "mlp out": linear(inner, "mlp2_weight", "mlp2_bias", residual=x),
            "head + sampling": lambda: esokern.unmask_sample(
                hidden,
                folded.head_weight,
                folded.head_bias,
                mask_id=config.mask_id,
                seed=0,
                positions=torch.tensor([30]),
                return_logprob=False,
            ),
        }
        timings = {name: median(part) for name, part in parts.items()}
        whole = median(lambda: folded.forward(tokens, positions, cache=cache))
    parts_of_forward = sum(t.median for name, t in timings.items() if name != "head + sampling")
    rest = whole.median - parts_of_forward
    timings["rest of the forward"] = Timing(max(rest, 0.0), 0.0, 0.0, 0.0, whole.rounds)
    recorder.add("step_profile", "L1024 KV512 B1", torch.float32, timings, Cost(bytes=folded.n_bytes()))
