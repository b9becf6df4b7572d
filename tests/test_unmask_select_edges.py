"""unmask_select in rows wider than what a GPU's block holds at once, and where a single bit decides."""

import math

import pytest
import torch

from esokern import philox
from select_cases import MASK, assert_as_oracle, scattered_masks


@pytest.mark.parametrize("width", [2049, 12_289])
@pytest.mark.parametrize("options", [{"num_select": 700, "temperature": 0.2}, {"factor": 900.0, "entropy_bound": 9.0}])
def test_wide_windows(backend, width, options):
    """Wider than what a pass, or the shared memory of a GPU, holds at once."""
    tokens = scattered_masks(2, width)
    arguments = {"proposed": torch.randint(MASK + 1, (2, width)), "confidence": torch.rand(2, width)}
    if "entropy_bound" in options:
        arguments["entropy"] = 0.05 * torch.rand(2, width)
    result = assert_as_oracle(backend, tokens, mask_id=MASK, **arguments, **options)
    assert (result.num_transferred > 100).all()


def test_entropies_are_added_in_double(backend):
    width = 100
    entropy = torch.full((width, width), 1e-9)
    entropy[:, 0] = 1.0  # in float32 the sum would stay there
    result = assert_as_oracle(
        backend, torch.full((width, width), MASK), torch.zeros(width, width, dtype=torch.int64),
        torch.linspace(0.9, 0.1, width).expand(width, -1), mask_id=MASK, entropy=entropy,
        entropy_bound=1e-9 * torch.arange(width) + 5e-10,
    )  # fmt: skip
    assert torch.equal(result.num_transferred, torch.arange(1, width + 1).int())


def test_one_bit_below_the_factor(backend):
    """In row r every confidence, in the order of the noise, is just enough, but that of rank r is not, by one bit."""
    width = 100
    rank, factor = torch.arange(width), torch.linspace(0.3, 1.9, width)
    enough = 1 - factor[:, None] / (rank + 2)
    enough[rank, rank] = torch.nextafter(enough[rank, rank], torch.tensor(-math.inf))
    noise = philox.selection_gumbel(torch.tensor(0), rank, torch.tensor(0))
    confidence = torch.empty(width, width)
    confidence[:, noise.argsort(descending=True)] = enough
    result = assert_as_oracle(
        backend, torch.full((width, width), MASK), torch.zeros(width, width, dtype=torch.int64), confidence,
        mask_id=MASK, factor=factor, temperature=math.inf,
    )  # fmt: skip
    expected = rank.clone()
    expected[[0, width - 1]] = width  # the first is chosen in any case, the last if only it is missing
    assert torch.equal(result.num_transferred, expected.int())
