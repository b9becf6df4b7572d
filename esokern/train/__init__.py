"""Training: the recipe (config), the losses, the optimizers, the trainer, and the export of what it trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from esokern import distributed
from esokern.train.config import TrainConfig, parse_config
from esokern.train.export import export
from esokern.train.optim import learning_rate
from esokern.train.trainer import CHECKPOINT, METRICS, SAMPLES, STREAMS, Trainer, train

__all__ = [
    "CHECKPOINT", "METRICS", "SAMPLES", "STREAMS", "TrainConfig", "Trainer", "export", "learning_rate", "main",
    "parse_config", "train",
]  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """`esokern train`: train, then export. Exit status 0, or 130 if a signal ended the run (a checkpoint is kept)."""
    config, target = parse_config(argv)
    with distributed.process_group(config.device):
        trainer = train(config)
        is_first = distributed.rank() == 0
    run = Path(config.out)
    if trainer.interrupted:
        if is_first:
            print(f"stopped at step {trainer.step}; the same command continues from {run / CHECKPOINT}")
        return 130
    if is_first:
        folder = Path(target) if target else run / "model"
        bits = export(run, folder)
        print(f"{folder}: {bits:.4f} held-out bits per byte after {trainer.step} steps")
    return 0
