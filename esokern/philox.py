"""The noise of a draw, in torch: the same bits as `csrc/common/philox.h` and `csrc/common/gumbel.h`.

The Gumbel number of a token is a function of (seed, position, step, global vocabulary id) alone, so it does not depend
on the batch, the order of rows, threads, tiles, vocabulary shards or the back end. Its generator is Philox4x32-10
(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), its logarithm a polynomial in separately
rounded float32 operations. These functions are the reference for tests and for reproducing a draw elsewhere; they are
slow.
"""

from __future__ import annotations

import torch

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
# (log(1 + f) - f + f^2 / 2) / f^3 on [sqrt(1/2) - 1, sqrt(2) - 1], highest power first.
_LOG = tuple(
    float.fromhex(c)
    for c in (
        "0x1.64a52ep-4",
        "-0x1.261742p-3",
        "0x1.3210cap-3",
        "-0x1.533fc0p-3",
        "0x1.98c456p-3",
        "-0x1.0004a2p-2",
        "0x1.55572ap-2",
    )
)


def philox4x32(counter: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Philox4x32-10. counter [..., 4] and key [..., 2] int64 tensors of 32-bit words (shapes broadcast) ->
    [..., 4] int64, each in [0, 2^32)."""
    c0, c1, c2, c3 = counter.unbind(-1)
    key0, key1 = key.unbind(-1)
    for _ in range(10):
        # The 64-bit product may wrap into the sign bit; the mask after the shift removes the sign extension.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = ((product1 >> 32) & _WORD) ^ c1 ^ key0, ((product0 >> 32) & _WORD) ^ c3 ^ key1
        c1, c3 = product1 & _WORD, product0 & _WORD
        key0, key1 = (key0 + _KEY_STEPS[0]) & _WORD, (key1 + _KEY_STEPS[1]) & _WORD
    return torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), -1)


def gumbel(
    seed: torch.Tensor, position: torch.Tensor, step: torch.Tensor, vocab_start: int, vocab: int
) -> torch.Tensor:
    """The standard Gumbel noise of ids vocab_start .. vocab_start + vocab - 1. seed, position, step: int64 [rows] ->
    float32 [rows, vocab].

    Philox with key (low word of seed, high word) and counter (id >> 2, position, step, stream); word id & 3 of stream 0
    is x, of stream 1 y. U = (x + 1/2) / 2^32, or (x + (y + 1/2) / 2^32) / 2^32 for x < 2^16: the largest draws come
    from there. The result is -log(-log(1 - U)).
    """
    block = torch.arange(vocab_start >> 2, ((vocab_start + vocab - 1) >> 2) + 1, device=seed.device)
    words = (block, (position & _WORD)[:, None], (step & _WORD)[:, None], torch.zeros_like(block))
    counter = torch.stack(torch.broadcast_tensors(*words), -1)
    key = torch.stack([seed & _WORD, (seed >> 32) & _WORD], -1)[:, None].expand(-1, len(block), -1)
    x = philox4x32(counter, key)
    tail = (x < 1 << 16).any(-1)
    counter, key = counter[tail], key[tail]
    counter[:, 3] = 1
    y = torch.zeros_like(x)
    y[tail] = philox4x32(counter, key)
    first = vocab_start & 3
    return _gumbel_from_words(x, y).flatten(1)[:, first : first + vocab]


def selection_gumbel(seed: torch.Tensor, position: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """The standard Gumbel noise of a position that `unmask_select` may choose. int64 tensors of shapes that
    broadcast -> float32. Words 0 and 1 of the Philox block (0, position, step, 2) are what x and y are to `gumbel`."""
    zero = torch.zeros_like(position)
    counter = torch.stack(torch.broadcast_tensors(zero, position & _WORD, step & _WORD, zero + 2), -1)
    words = philox4x32(counter, torch.stack(torch.broadcast_tensors(seed & _WORD, (seed >> 32) & _WORD), -1))
    return _gumbel_from_words(words[..., 0], words[..., 1])


def _gumbel_from_words(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    small = x < 1 << 30  # U < 1/4: log(1 - U) from f = -U; above, from 1 - U, exact in the complement of x
    t = (_to_float(torch.where(small, x, ~x & _WORD)) + 0.5) * 2.0**-32
    t = torch.where(x < 1 << 16, _to_float(x) * 2.0**-32 + (_to_float(y) + 0.5) * 2.0**-64, t)
    exponent, fraction = _split(t)
    exponent = torch.where(small, 0.0, exponent)
    fraction = torch.where(small, -t, fraction)
    return -_log(*_split(-_log(exponent, fraction)))


def _to_float(word: torch.Tensor) -> torch.Tensor:
    """A 32-bit word as the nearest float32: both halves are exact, so only the sum rounds."""
    return (word >> 16).float() * 65536.0 + (word & 0xFFFF).float()


def _split(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)), for positive normal x."""
    bits = x.view(torch.int32)
    exponent = (bits - 0x3F3504F3) >> 23
    return exponent.float(), (bits - (exponent << 23)).view(torch.float32) - 1.0


def _log(exponent: torch.Tensor, fraction: torch.Tensor) -> torch.Tensor:
    """log(2^e (1 + f)), relative error below 1.4e-7. Every product and every sum rounds to float32."""
    polynomial = torch.full_like(fraction, _LOG[0])
    for coefficient in _LOG[1:]:
        polynomial = polynomial * fraction + coefficient
    square = fraction * fraction
    y = (square * fraction) * polynomial
    y = y + exponent * -2.12194440e-4
    y = y + square * -0.5
    return (fraction + y) + exponent * 0.693359375
