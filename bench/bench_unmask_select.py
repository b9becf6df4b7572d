"""Choosing which proposals to keep, against the loops of published decoders and the same for all rows at once."""

from __future__ import annotations

import math

import pytest
import torch

import esokern
from harness import Cost

MASK = 126_336


def by_row(tokens: torch.Tensor, proposed: torch.Tensor, confidence: torch.Tensor, num_select: torch.Tensor) -> None:
    """As LLaDA does it: a top-k per row, whose size Python learns."""
    masked = tokens == MASK
    confidence = confidence.masked_fill(~masked, -math.inf)
    chosen = torch.zeros_like(masked)
    for row in range(len(tokens)):
        chosen[row, confidence[row].topk(num_select[row]).indices] = True
    tokens[chosen] = proposed[chosen]


def by_token(tokens: torch.Tensor, proposed: torch.Tensor, confidence: torch.Tensor, threshold: float) -> None:
    """As Fast-dLLM does it: all masks of a row in order, and a look at each of them but the first."""
    masked = tokens == MASK
    confidence = confidence.masked_fill(~masked, -math.inf)
    chosen = torch.zeros_like(masked)
    for row, count in enumerate(masked.sum(1).tolist()):
        order = confidence[row].topk(count).indices
        chosen[row, order] = True
        for column in order[1:]:
            if confidence[row, column] < threshold:
                chosen[row, column] = False
    tokens[chosen] = proposed[chosen]


def all_rows(
    tokens: torch.Tensor,
    proposed: torch.Tensor,
    confidence: torch.Tensor,
    num_select: torch.Tensor,
    threshold: float = math.inf,
) -> None:
    """Ranks of all rows at once, without a look at a value."""
    masked = tokens == MASK
    confidence = confidence.masked_fill(~masked, -math.inf)
    rank = confidence.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    chosen = masked & ((rank < num_select[:, None]) | (confidence >= threshold))
    tokens.copy_(torch.where(chosen, proposed, tokens))


@pytest.mark.parametrize("rule", ["num_select", "threshold"])
@pytest.mark.parametrize("width", [32, 256, 1024])
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_unmask_select(compare, batch, width, rule):
    generator = torch.Generator().manual_seed(0)
    before = torch.where(torch.rand(batch, width, generator=generator) < 0.5, MASK, 1)
    before[:, 0] = MASK
    tokens, proposed = before.clone(), torch.randint(MASK, (batch, width), generator=generator)
    confidence = torch.rand(batch, width, generator=generator)
    some, one = (torch.full((batch,), count, dtype=torch.int32) for count in (max(1, width // 32), 1))

    def on_text(choose, *options):
        def run() -> torch.Tensor:  # the copy is everybody's: one writes in place
            choose(tokens.copy_(before), proposed, confidence, *options)
            return tokens

        return run

    def ours(*inputs):
        if rule == "num_select":
            esokern.unmask_select(*inputs, mask_id=MASK, num_select=some)
        else:
            esokern.unmask_select(*inputs, mask_id=MASK, num_select=1, threshold=0.9)

    candidates = {"esokern": on_text(ours)}
    if rule == "num_select":
        candidates["top-k per row"] = on_text(by_row, some)
        candidates["ranks of all rows"] = on_text(all_rows, some)
    else:
        candidates["loop per token"] = on_text(by_token, 0.9)
        candidates["ranks of all rows"] = on_text(all_rows, one, 0.9)
    expected = candidates["esokern"]().clone()
    assert all(torch.equal(run(), expected) for run in candidates.values())
    cost = Cost(bytes=batch * width * (8 + 8 + 4))
    compare("unmask_select", f"{rule} batch {batch} width {width}", torch.float32, candidates, cost, seconds=0.5)
