"""The training loss of every objective, and the held-out bits per byte."""

from __future__ import annotations

import contextlib
import math

import numpy as np
import torch
from torch import Tensor, nn

from esokern import distributed, nelbo, objectives
from esokern.models.network import Network
from esokern.train.config import TrainConfig

CHUNK = 16  # rows evaluated at a time


def loss(
    network: Network, x: Tensor, config: TrainConfig, generator: torch.Generator, rows: slice = slice(None)
) -> tuple[Tensor, dict[str, Tensor]]:
    """Training loss of the batch x [B, L] in nats per token, and its parts.

    rows: only these go through the network; the losses of disjoint slices add up to that of the batch, whose noise is
        the same for all of them.
    """
    if config.objective == "esolm":
        return objectives.esolm_loss(network, x, config.esolm(), generator, rows=rows)
    if config.objective == "ar":
        value = objectives.ar_nll(network, x[rows]).sum() / x[:, 1:].numel()
    else:
        value = _diffusion_nll(network, x, config, generator, rows).sum() / x.numel()
    return value, {config.objective: value}


def _diffusion_nll(network: Network, x: Tensor, config: TrainConfig, generator: torch.Generator, rows: slice) -> Tensor:
    """Nats [n, L] of those rows of x, noise drawn for all of it: MDLM or BD3-LM."""
    batch, length = x.shape
    mask_id = network.config.mask_id
    if config.objective == "mdlm":
        t = objectives.antithetic_t(batch, generator)
        zt = objectives.mask_tokens(x, objectives.log_linear(t, 1.0)[0], mask_id, generator)
        return objectives.mdlm_nll(network, x[rows], zt[rows], t[rows], low_var=config.low_var)
    n_blocks = -(-length // config.block_size)
    t = objectives.antithetic_t(batch * n_blocks, generator)
    t = t[torch.randperm(len(t), generator=generator)].view(-1, n_blocks)
    keep = objectives.log_linear(t, 1.0)[0].repeat_interleave(config.block_size, dim=1)[:, :length]
    zt = objectives.mask_tokens(x, keep, mask_id, generator)
    return objectives.bd3lm_nll(network, x[rows], zt[rows], t[rows], config.block_size, low_var=config.low_var)


def _bound(network: Network, x: Tensor, config: TrainConfig, generator: torch.Generator) -> float:
    """Nats of x under the objective's bound, one draw of its noise."""
    if config.objective == "esolm":
        nll = nelbo.esolm_nelbo(network, x, config.alpha_0, generator, variant=config.variant)
    elif config.objective == "mdlm":
        nll = nelbo.mdlm_nelbo(network, x, generator)
    elif config.objective == "bd3lm":
        nll = nelbo.bd3lm_nelbo(network, x, config.block_size, generator)
    else:
        nll = objectives.ar_nll(network, x)
    return nll.double().sum().item()


@torch.no_grad()
def evaluate(
    call: nn.Module, rows: Tensor, n_bytes: np.ndarray, config: TrainConfig, *, seed: int = 0, draws: int = 1
) -> float:
    """Bits per byte of `rows` under the objective's bound, averaged over `draws` of its noise.

    call: what esokern.distributed.wrap returns; every process must call this, each takes its share of the rows. The
    noise is fixed by `seed` and the place among the rows, so two calls on the same rows compare.
    """
    was_training = call.training
    call.eval()
    device = distributed.local_device(config.device)
    chunks = [(draw, chunk) for draw in range(draws) for chunk in rows.split(CHUNK)]
    nats = 0.0
    # Every process runs the network equally often, as FSDP needs; what it runs beyond the last chunk does not count.
    for first in range(0, len(chunks), distributed.size()):
        index = first + distributed.rank()
        draw, chunk = chunks[min(index, len(chunks) - 1)]
        generator = objectives.seeded(seed, draw, index)
        with autocast(config):
            value = call(_bound, chunk.to(device), config, generator)
        if index < len(chunks):
            nats += value
    distributed.release(call)
    call.train(was_training)
    (nats,) = distributed.total([nats])
    return nats / draws / math.log(2) / max(int(n_bytes[rows.numpy()].sum()), 1)


def autocast(config: TrainConfig) -> contextlib.AbstractContextManager:
    """The precision that the network runs in."""
    if config.precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(config.device).type, torch.bfloat16)
