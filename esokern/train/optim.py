"""Optimizers, the learning rate of a step, and the moving average of the weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from esokern import distributed
from esokern.models.network import Network
from esokern.train.config import TrainConfig


def learning_rate(config: TrainConfig, step: int, seconds: float) -> float:
    """The share of the full learning rates at step `step` (0-based), after `seconds` of training."""
    warm = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    if config.schedule == "constant":
        return warm
    done = step / config.steps if config.schedule_by == "steps" else seconds / config.max_seconds
    cosine = 0.5 * (1 + math.cos(math.pi * min(max(done, 0.0), 1.0)))
    return warm * (config.final_lr + (1 - config.final_lr) * cosine)


class Ema:
    """Exponential moving average of a module's parameters, in parameter order."""

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float):
        self.decay = decay
        self.n_updates = 0
        self.shadow = [p.detach().clone() for p in parameters]  # each split over processes as its parameter is

    @torch.no_grad()
    def update(self, parameters: Sequence[nn.Parameter]) -> None:
        self.n_updates += 1
        # Early on the average follows the weights closely, or it would remember the initial ones for long.
        decay = min(self.decay, (1 + self.n_updates) / (10 + self.n_updates))
        shadow, current = ([distributed.local(p.detach()) for p in tensors] for tensors in (self.shadow, parameters))
        torch._foreach_lerp_(shadow, current, 1 - decay)

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
        """Of whole tensors, on any device."""
        self.decay, self.n_updates = state["decay"], state["num_updates"]
        with torch.no_grad():
            for shadow, value in zip(self.shadow, state["shadow_params"], strict=True):
                shadow.copy_(distributed.shard_like(value, shadow))


def optimizers(network: Network, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the blocks' large matrices and AdamW for the rest.

    Each group remembers its full learning rate as "full_lr".
    """
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
    made: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=True)]
    if large:
        # "match_rms_adamw": an update is as large as AdamW's, so the two learning rates are of one kind.
        muon = torch.optim.Muon(
            large, lr=config.muon_lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        made.append(muon)
    for optimizer in made:
        for group in optimizer.param_groups:
            group["full_lr"] = group["lr"]
    return made
