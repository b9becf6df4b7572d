"""Cross-entropy of an LM head, forward and with gradients, against linear + cross_entropy in torch; time and memory.

"torch" takes the softmax of logits in the dtype, "torch float" of logits cast to float32, as training code does. With
gradients, ours computes the logits twice: four products of this size instead of three, for which no logits are kept.
"""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional

import esokern
from harness import Cost, recorder

SHAPES = [(2048, 256, 8193), (512, 768, 50258), (2048, 128, 66)]


def candidates(rows: int, hidden_size: int, vocab: int, dtype: torch.dtype) -> tuple[dict[str, Callable], tuple]:
    """name -> the mean loss of leaves (hidden, weight); the leaves."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, hidden_size, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab, hidden_size, generator=generator).div_(hidden_size**0.5).to(dtype).requires_grad_()
    targets = torch.randint(vocab - 1, (rows,), generator=generator)

    def ours():
        return esokern.masked_cross_entropy(hidden, weight, targets, mask_id=vocab - 1).mean()

    def theirs(cast):
        return functional.cross_entropy(cast(functional.linear(hidden, weight)), targets)

    losses = {"esokern": ours, "torch": functools.partial(theirs, lambda logits: logits)}
    if hasattr(functional, "linear_cross_entropy"):  # since torch 2.13
        options = torch.nn.LinearCrossEntropyOptions()
        losses["torch chunked"] = lambda: functional.linear_cross_entropy(hidden, weight, targets, options=options)
    if dtype != torch.float32:
        losses["torch float"] = functools.partial(theirs, torch.Tensor.float)
    return losses, (hidden, weight)


def run(loss: Callable, leaves: tuple, train: bool) -> None:
    """The loss, or the loss and its gradients."""
    with torch.inference_mode(False), torch.set_grad_enabled(train):
        value = loss()
        if train:
            torch.autograd.grad(value, leaves)


def peak_memory(name: str, shape: tuple[int, int, int], dtype: torch.dtype, train: bool) -> int:
    """Bytes by which one call raises the resident memory of a process that has made the inputs and a small call."""
    run(*_pick(name, (8, *shape[1:2], 300), dtype), train)
    case = _pick(name, shape, dtype)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = _resident("VmHWM")
    run(*case, train)
    return _resident("VmHWM") - before


def _pick(name: str, shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Callable, tuple]:
    losses, leaves = candidates(*shape, dtype)
    return losses[name], leaves


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("train", [False, True], ids=["forward", "train"])
@pytest.mark.parametrize("shape", SHAPES, ids=["V8193", "V50258", "V66"])
def test_masked_cross_entropy(compare, shape, train, dtype):
    rows, hidden_size, vocab = shape
    with torch.inference_mode(False):
        losses, leaves = candidates(*shape, dtype)
    calls = {name: functools.partial(run, loss, leaves, train) for name, loss in losses.items()}
    moved = (rows + vocab) * hidden_size * leaves[0].element_size()
    cost = Cost(bytes=(2 if train else 1) * moved, flops=(3 if train else 1) * 2 * rows * hidden_size * vocab)
    case = f"{'forward + backward' if train else 'forward'} rows {rows} D{hidden_size} V{vocab}"
    compare("masked_cross_entropy", case, dtype, calls, cost, seconds=4.0, max_rounds=40)
    context = multiprocessing.get_context("spawn")
    for row in recorder.rows[-len(calls) :]:
        with context.Pool(1) as pool:
            row["peak_bytes"] = pool.apply(peak_memory, (row["candidate"], shape, dtype, train))
        print(f"{case} {row['dtype']} {row['candidate']}: {row['peak_bytes'] / 2**20:.1f} MiB")
