"""Tests of unmask_select: an oracle written from the definitions, row by row with sorted(), and inputs of all kinds."""

import math

import numpy as np
import torch

from esokern import philox
from esokern.testing import same_bits
from esokern.unmask_select import UnmaskSelect, unmask_select

MASK = 7


def oracle(tokens, proposed, confidence, *, mask_id, entropy=None, editable=None, done=None, **options):
    """(tokens, done, num_masked, num_transferred, transfer_index) after the call; the inputs stay as they are."""
    batch, width = proposed.shape
    tokens, done = tokens.clone(), None if done is None else done.clone()
    before, drawn, floats = tokens.tolist(), proposed.tolist(), confidence.numpy()
    nats = None if entropy is None else entropy.tolist()
    num_masked, num_transferred = (torch.zeros(batch, dtype=torch.int32) for _ in range(2))
    transfer_index = torch.zeros(batch, width, dtype=torch.bool)
    for b in range(batch):

        def of_row(name, otherwise, b=b):
            value = options.get(name)
            if isinstance(value, torch.Tensor):
                value = value.item() if value.dim() == 0 else value[b].item()
            return otherwise if value is None or value != value else value

        start, columns = of_row("window_start", 0), range(of_row("window_length", width))
        if done is None or not done[b]:
            edited, taken_back, candidates = [], [], []
            edit_threshold, remask_threshold = (
                np.float32(of_row(name, math.nan)) for name in ("edit_threshold", "remask_threshold")
            )
            for c in columns:
                old, new, sure = before[b][start + c], drawn[b][c], floats[b, c]
                if old == mask_id:
                    candidates.append(c)
                elif editable is None or editable[b, start + c]:
                    if new not in (old, mask_id) and sure >= edit_threshold:
                        edited.append(c)
                    elif sure < remask_threshold:
                        taken_back.append(c)
                        candidates.append(c)
            sure = {c: np.float32(-np.inf) if np.isnan(floats[b, c]) else floats[b, c] for c in columns}
            key = dict(sure)
            temperature = np.float32(of_row("temperature", 0.0))
            if temperature > 0:
                seed, step = (
                    torch.tensor(np.uint64(of_row(name, 0) % 2**64).view(np.int64)) for name in ("seed", "step")
                )
                noise = philox.selection_gumbel(seed, start + torch.arange(len(columns)), step).numpy()
                with np.errstate(all="ignore"):
                    key = {c: noise[c] if np.isinf(temperature) else key[c] / temperature + noise[c] for c in columns}
            order = sorted((c for c in candidates if drawn[b][c] != mask_id), key=lambda c: (-key[c], c))

            counts = [of_row("num_select", 0), len(taken_back) + 1 if taken_back else 0]
            threshold = np.float32(of_row("threshold", math.nan))
            counts.append(sum(bool(key[c] >= threshold) for c in order))
            factor = np.float32(of_row("factor", math.nan))
            if not np.isnan(factor) and order:
                fails = [i for i, c in enumerate(order) if i and sure[c] < np.float32(1) - factor / np.float32(i + 2)]
                kept = fails[0] if fails else len(order)
                counts.append(len(order) if kept == len(order) - 1 else kept)
            total, largest, kept, bound = 0.0, -math.inf, 0, np.float32(of_row("entropy_bound", math.nan))
            for c in order if entropy is not None else []:
                total, largest = total + nats[b][c], max(largest, nats[b][c])
                if not total - largest <= bound:
                    break
                kept += 1
            chosen = order[: max(0, *counts, kept)]
            for c in taken_back:
                tokens[b, start + c] = mask_id
            for c in chosen + edited:
                tokens[b, start + c] = proposed[b, c]
                transfer_index[b, c] = True
            num_transferred[b] = len(chosen) + len(edited)
        num_masked[b] = (tokens[b, start : start + len(columns)] == mask_id).sum()
        if done is not None and not done[b]:
            done[b] = num_masked[b] == 0 and not edited
    return tokens, done, num_masked, num_transferred, transfer_index


def assert_as_oracle(backend, tokens, proposed, confidence, **arguments):
    """Runs both on copies; nothing but tokens and done may change."""
    given = {"tokens": tokens, "proposed": proposed, "confidence": confidence, **arguments}
    on_cpu = {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    with torch.device("cpu"):
        expected = oracle(**on_cpu)
    given |= {name: given[name].clone() for name in ("tokens", "done") if given.get(name) is not None}
    result = unmask_select(**given, return_transfer_index=True, backend=backend)
    got = (given["tokens"], given.get("done"), *result)
    for name, ours, theirs in zip(("tokens", "done", *UnmaskSelect._fields), got, expected, strict=True):
        if theirs is not None:
            assert ours.dtype == theirs.dtype, name
            assert torch.equal(ours.cpu(), theirs), name
    for name, before in on_cpu.items():
        if isinstance(before, torch.Tensor) and name not in ("tokens", "done"):
            assert same_bits(given[name].cpu(), before), name
    return result


def scattered_masks(batch, length, share=0.6):
    tokens = torch.randint(MASK, (batch, length))
    return torch.where(torch.rand(batch, length) < share, MASK, tokens)


HOSTILE = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, -1e-45, 0.5, 0.5, 0.5, 1.0, 0.9, 3e38, -3e38)


def hostile(*shape, random=0.5):
    """Half of the numbers from a list of nasty ones, half in [0, 1)."""
    nasty = torch.tensor(HOSTILE)[torch.randint(len(HOSTILE), shape)]
    return torch.where(torch.rand(shape) < random, torch.rand(shape), nasty)


def hostile_call(number):
    """Any size, options on or off, numbers or per row, hostile values everywhere."""
    batch, width = [1, 3, 2, 5][number % 4], [0, 1, 2, 3, 16, 17, 31, 64, 129][number % 9]
    length = width + number % 6
    vocabulary = torch.tensor([0, 1, 2, MASK, -1, -(2**63), 2**63 - 1, 2**32 + MASK])
    length_of_window = torch.randint(width + 1, (batch,)) if number % 3 == 0 else torch.full((batch,), width)
    arguments = {
        "tokens": torch.where(torch.rand(batch, length) < 0.5, MASK, vocabulary[torch.randint(8, (batch, length))]),
        "proposed": vocabulary[torch.randint(8, (batch, width))],
        "confidence": hostile(batch, width, random=[0.0, 0.5, 1.0][number % 3]),
        "mask_id": MASK,
        "window_start": (torch.rand(batch) * (length - length_of_window + 1)).long(),
        "num_select": torch.randint(-3, width + 3, (batch,), dtype=torch.int32),
    }
    random_options = {
        "window_length": length_of_window,
        "threshold": hostile(batch),
        "factor": hostile(batch) * 5,
        "entropy_bound": hostile(batch),
        "temperature": torch.tensor([0.0, 0.3, 1e-45, 1e30, math.inf])[torch.randint(5, (batch,))],
        "seed": torch.randint(-(2**63), 2**63 - 1, (batch,)),
        "step": torch.randint(2**40, (batch,)),
        "editable": torch.rand(batch, length) < 0.7,
        "edit_threshold": hostile(batch),
        "remask_threshold": hostile(batch),
        "done": torch.rand(batch) < 0.3,
    }
    for name, value in random_options.items():
        if torch.rand(()) < 0.4 or (name == "window_length" and number % 3 == 0):
            arguments[name] = value
    if "entropy_bound" in arguments:
        arguments["entropy"] = hostile(batch, width).abs()
    return arguments
