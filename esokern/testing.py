"""What the tests of every op share: one tolerance rule, poison, and memory with guards around it."""

from __future__ import annotations

import math

import torch

POISON_INT = 2147480000  # near INT32_MAX: an index that must not be followed


def assert_close(out: torch.Tensor, gold: torch.Tensor, plain: torch.Tensor, name: str = "out") -> None:
    """|out - gold| <= 2 * max |plain - gold| + tiny: at most twice the error of the plain computation.

    out: what a kernel gave. gold: the reference on float64 inputs. plain: the reference on out's own inputs. tiny is
    four float32 roundings of the largest value, for cases so small that `plain` is exact. Infinities must be those of
    gold; NaN is never right.
    """
    __tracebackhide__ = True
    if out.shape != gold.shape or plain.shape != gold.shape:
        raise AssertionError(
            f"{name}: shapes differ: out {list(out.shape)}, gold {list(gold.shape)}, plain {list(plain.shape)}"
        )
    if out.dtype != plain.dtype:
        raise AssertionError(f"{name}: dtype is {out.dtype}, the reference gives {plain.dtype}")
    out, gold, plain = (tensor.detach().double() for tensor in (out, gold, plain))
    finite = gold.isfinite()
    if not torch.equal(out[~finite], gold[~finite]):
        raise AssertionError(f"{name}: infinities differ: got {out[~finite]}, gold {gold[~finite]}")
    if not finite.any():
        return
    error = torch.where(finite, (out - gold).abs(), 0.0)
    plain_error = (plain - gold)[finite].abs().max().item()
    tiny = 4 * torch.finfo(torch.float32).eps * max(1.0, gold[finite].abs().max().item())
    bound = 2 * plain_error + tiny
    worst = error.max().item()
    if math.isnan(worst) or worst > bound:
        bad = ~(error <= bound)
        where = bad.nonzero()[0].tolist()
        raise AssertionError(
            f"{name}: {int(bad.sum())} of {bad.numel()} elements are off, worst error {worst:.3g}, allowed {bound:.3g} "
            f"(plain: {plain_error:.3g}); first at {where}: got {out[tuple(where)]:.9g}, gold {gold[tuple(where)]:.9g}"
        )


def poison_(tensor: torch.Tensor) -> torch.Tensor:
    """Fill with what must never be read: NaN, or POISON_INT. In place; returns the tensor."""
    return tensor.fill_(math.nan if tensor.is_floating_point() else POISON_INT)


class Guarded:
    """A copy of `tensor` in the middle of guard memory, with guards between its rows too.

    `.tensor` is a strided view, its last dimension contiguous. `check()` raises AssertionError if a byte outside it
    changed.
    """

    def __init__(self, tensor: torch.Tensor, guard: int = 8) -> None:
        sizes = [size + 2 for size in tensor.shape[:-1]] + [tensor.shape[-1] + 2 * guard]
        self._memory = poison_(torch.empty(sizes, dtype=tensor.dtype))
        inner = (*(slice(1, 1 + size) for size in tensor.shape[:-1]), slice(guard, guard + tensor.shape[-1]))
        self.tensor = self._memory[inner]
        self.tensor.copy_(tensor)
        self._outside = torch.ones(sizes, dtype=torch.bool)
        self._outside[inner] = False
        self._before = self._outside_bytes()

    def _outside_bytes(self) -> torch.Tensor:
        return self._memory[self._outside].view(torch.uint8)

    def check(self) -> None:
        """AssertionError if memory outside the tensor changed."""
        __tracebackhide__ = True
        changed = (self._outside_bytes() != self._before).sum().item()
        if changed:
            raise AssertionError(f"{changed} bytes outside the tensor were overwritten")


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bitwise equality; NaN equals itself."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(_bits(a), _bits(b))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
