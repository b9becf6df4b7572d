"""Cross-entropy of an LM head at the positions that are predicted, without [tokens, vocab] logits in memory.

    nll[i] = weights[i] (lse[i] - logit[i, targets[i]]),   lse[i] = log sum_v exp(logit[i, v])
    logit = softcap(hidden weight^T + bias),   softcap(x) = logit_softcap tanh(x / logit_softcap),

the sum over v without the mask token, which a masked-diffusion model never predicts (Sahoo et al., arXiv 2406.07524,
section 3.2.3, "zero masking probabilities"). Differentiable in hidden, weight and bias: with g the gradient that
arrives in nll,

    dlogit[i, v] = g[i] weights[i] (exp(logit[i, v] - lse[i]) - [v = targets[i]]) softcap'(..)
    dhidden = dlogit weight,   dweight = dlogit^T hidden,   dbias[v] = sum_i dlogit[i, v].

The backward computes the logits again (Wijmans et al., arXiv 2411.09009), for as many ids at a time as
`GRADIENT_BYTES` allow, and leaves the two products to torch.
"""

from __future__ import annotations

import operator

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from esokern import backend as _backend
from esokern.arrays import accept_arrays

# What dlogit may take at a time, by type of device.
GRADIENT_BYTES = {"cpu": 16 * 2**20, "cuda": 128 * 2**20}

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MIN_IDS = 128  # at a time, however many rows there are


@accept_arrays()
def masked_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    mask_id: int = -1,
    ignore_index: int = -100,
    logit_softcap: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood of `targets` under an LM head, per token in nats, where a target is given.

    Args:
        hidden: [..., hidden_size] float32, bfloat16 or float16, after the final norm.
        weight: [vocab, hidden_size], dtype of hidden, as in `torch.nn.Linear`.
        targets: int64 or int32 [...], the leading dimensions of hidden. A token whose target is `ignore_index` is
            skipped: its hidden may be anything, its nll and lse are 0, it has no gradient. It costs nothing, except on
            a GPU in the two products of the backward; where they matter, call with `hidden[predicted]` there.
        bias: [vocab], dtype of hidden.
        weights: float32 [...] like targets: factors of nll, such as the 1/t of a NELBO. They get no gradient.
        mask_id: id of the mask token, which has probability 0; -1 = none.
        ignore_index: the target that stands for none.
        logit_softcap: c > 0, logits become c * tanh(logit / c); 0 = off.
        return_lse: also return lse, without a gradient.
        backend: None = the compiled one of hidden's device, "reference" = PyTorch (any device, float64 too).

    Under torch.autocast hidden, weight and bias are cast as in `torch.nn.functional.linear`.

    Returns:
        nll float32 [...] (float64 for float64), not reduced, or (nll, lse): lse is float32 [...], natural log, without
        `weights`, the same bits as `unmask_sample`'s. A row's result does not depend on its batch. A row with a NaN or
        +inf logit gives NaN.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is supported. A target that is neither
        ignore_index nor an id other than mask_id raises on the CPU; on a GPU nothing waits for the host, and nll is NaN
        there. RuntimeError from a second derivative through a compiled back end.

    >>> hidden, weight = torch.randn(2, 3, 8), torch.randn(100, 8)
    >>> targets = torch.tensor([[5, -100, 7], [-100, -100, 98]])
    >>> nll = masked_cross_entropy(hidden, weight, targets, mask_id=99)
    >>> nll.shape, nll[1, 0].item()
    (torch.Size([2, 3]), 0.0)
    """
    chosen = _backend.select(
        backend, "masked_cross_entropy", hidden, weight, targets, bias, weights, differentiable=True
    )
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden, weight, bias = (_cast(tensor, torch.get_autocast_dtype(device)) for tensor in (hidden, weight, bias))
    _check(hidden, weight, targets, bias, weights, chosen)
    mask_id, ignore_index = operator.index(mask_id), operator.index(ignore_index)
    if mask_id < -1:
        raise ValueError(f"masked_cross_entropy: mask_id: must be >= 0, or -1 for none, got {mask_id}")
    if not 0.0 <= logit_softcap < float("inf"):
        raise ValueError(f"masked_cross_entropy: logit_softcap: must be finite and >= 0, got {logit_softcap}")

    shape, vocab = targets.shape, weight.shape[0]
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).long()
    if weights is not None:
        weights = weights.detach().reshape(-1)
    skipped = targets == ignore_index
    wrong = ~skipped & ((targets < 0) | (targets >= vocab) | (targets == mask_id))
    if device == "cpu" and not torch.compiler.is_compiling() and wrong.any():
        index = int(wrong.nonzero()[0, 0])
        raise ValueError(
            f"masked_cross_entropy: targets: must be ids in [0, {vocab})"
            + (f" other than mask_id {mask_id}" if 0 <= mask_id < vocab else "")
            + f", or ignore_index {ignore_index}; the first that is not is {int(targets[index])}, at flat index {index}"
        )
    targets = targets.masked_fill(wrong, vocab).masked_fill(skipped, -1)  # as the kernels have it

    settings = (mask_id, float(logit_softcap), chosen)
    if chosen == "reference":
        nll, lse = _reference(hidden, weight, bias, targets, mask_id, logit_softcap)
        lse = lse.detach()
    elif _backend.needs_grad(hidden, weight, bias):
        nll, lse = _MaskedCrossEntropy.apply(hidden, weight, bias, targets, *settings)
    else:
        nll, lse = _forward(hidden, weight, bias, targets, *settings)
    if weights is not None:
        nll = (nll * weights).masked_fill(skipped, 0.0)  # a weight of a skipped token may be anything
    return (nll.view(shape), lse.view(shape)) if return_lse else nll.view(shape)


def _cast(tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return tensor.to(dtype) if tensor is not None and tensor.dtype in _DTYPES else tensor


def _check(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    weights: torch.Tensor | None,
    backend: str,
) -> None:
    dtype = hidden.dtype
    if dtype not in _DTYPES and not (dtype == torch.float64 and backend == "reference"):
        raise TypeError(
            f"masked_cross_entropy: hidden: got {dtype}, supported are float32, bfloat16 and float16"
            ' (and float64 with backend="reference")'
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != dtype:
            raise TypeError(
                f"masked_cross_entropy: {name}: must have the dtype of hidden, {dtype}, got {tensor.dtype}; "
                "torch.autocast casts both"
            )
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise ValueError(
            f"masked_cross_entropy: weight: must be [vocab, hidden_size] with a vocab > 0, got {list(weight.shape)}"
        )
    vocab, hidden_size = weight.shape
    if hidden.dim() == 0 or hidden.shape[-1] != hidden_size:
        raise ValueError(
            f"masked_cross_entropy: hidden: must be [..., {hidden_size}] for a weight {list(weight.shape)}, "
            f"got {list(hidden.shape)}"
        )
    if bias is not None and bias.shape != (vocab,):
        raise ValueError(f"masked_cross_entropy: bias: must be [{vocab}], got {list(bias.shape)}")
    if targets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"masked_cross_entropy: targets: must be int64 or int32, got {targets.dtype}")
    if weights is not None and weights.dtype not in (torch.float32, torch.promote_types(dtype, torch.float32)):
        raise TypeError(f"masked_cross_entropy: weights: must be float32, got {weights.dtype}")
    for name, tensor in (("targets", targets), ("weights", weights)):
        if tensor is not None and tensor.shape != hidden.shape[:-1]:
            raise ValueError(
                f"masked_cross_entropy: {name}: must be {list(hidden.shape[:-1])} for a hidden {list(hidden.shape)}, "
                f"got {list(tensor.shape)}"
            )


# --- compiled. targets int64 [rows]: < 0 = skipped, >= vocab = not an id


def _forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    mask_id: int,
    logit_softcap: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """nll and lse, float32 [rows]."""
    lse, target_logit = (torch.empty(targets.shape, dtype=torch.float32, device=hidden.device) for _ in range(2))
    arguments = (lse, target_logit, hidden, weight, bias, targets, mask_id, logit_softcap)
    _backend.run(backend, "masked_cross_entropy", *arguments)
    return lse - target_logit, lse


class _MaskedCrossEntropy(torch.autograd.Function):
    """A compiled call that needs gradients: keeps its inputs and lse."""

    @staticmethod
    def forward(hidden, weight, bias, targets, mask_id, logit_softcap, backend):
        return _forward(hidden, weight, bias, targets, mask_id, logit_softcap, backend)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        hidden, weight, bias, targets, *ctx.settings = inputs
        ctx.save_for_backward(hidden, weight, bias, targets, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor, _: torch.Tensor):
        hidden, weight, bias, targets, lse = ctx.saved_tensors
        gradients = [
            torch.empty_like(tensor) if needed else None
            for tensor, needed in zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
        ]
        arguments = (*gradients, hidden, weight, bias, targets, lse, grad.contiguous(), *ctx.settings)
        if torch.compiler.is_compiling():
            torch.ops.esokern.masked_cross_entropy_gradients(*arguments)
        else:
            _gradients(*arguments)
        return (*gradients, None, None, None, None)


def _gradients(
    dhidden: torch.Tensor | None,
    dweight: torch.Tensor | None,
    dbias: torch.Tensor | None,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    lse: torch.Tensor,
    grad: torch.Tensor,
    mask_id: int,
    logit_softcap: float,
    backend: str,
) -> None:
    """Writes the gradients that are given, for grad float32 [rows], the gradient in the unweighted nll.

    A part of the vocabulary at a time, whose dweight and dbias are then final; dhidden is summed in float32.
    """
    predicted = _predicted(targets)
    if predicted is None:
        hidden = hidden.masked_fill((targets < 0)[:, None], 0.0)  # their dlogits are 0, but 0 * NaN is not
    else:
        hidden, targets, lse, grad = (tensor[predicted] for tensor in (hidden, targets, lse, grad))
    rows, vocab = hidden.shape[0], weight.shape[0]
    most = GRADIENT_BYTES[hidden.device.type] // max(rows * hidden.element_size(), 1)
    step = min(max(most // _MIN_IDS, 1) * _MIN_IDS, vocab)
    memory = hidden.new_empty(rows, -(-step // 8) * 8)  # rows that begin at multiples of 16 bytes
    total = None if dhidden is None else torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    for start in range(0, vocab, step):
        stop = min(start + step, vocab)
        dlogits = memory[:, : stop - start]
        part = weight[start:stop]
        part_bias = None if bias is None else bias[start:stop]
        part_mask_id = mask_id - start if start <= mask_id < stop else -1
        # An id below the part is none of its columns, as one behind it; a row without a target stays negative.
        part_targets = (targets - start).masked_fill((targets >= 0) & (targets < start), vocab)
        arguments = (dlogits, hidden, part, part_bias, part_targets, lse, grad, part_mask_id, logit_softcap)
        _backend.run(backend, "masked_cross_entropy_backward", *arguments)
        if dweight is not None:
            torch.mm(dlogits.T, hidden, out=dweight[start:stop])
        if dbias is not None:
            torch.sum(dlogits, 0, out=dbias[start:stop])
        if dhidden is not None and hidden.dtype == torch.float32:
            total.addmm_(dlogits, part)
        elif dhidden is not None:
            total += dlogits @ part
    if dhidden is not None and predicted is None:
        dhidden.copy_(total)
    elif dhidden is not None:
        dhidden.zero_()[predicted] = total.to(dhidden.dtype)


def _predicted(targets: torch.Tensor) -> torch.Tensor | None:
    """Which rows have a target; None if all have, or where to count them would make the host wait for a GPU."""
    if targets.device.type != "cpu":
        return None
    index = (targets >= 0).nonzero()[:, 0]
    return None if len(index) == len(targets) else index


# --- reference


def _reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    mask_id: int,
    logit_softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """nll and lse [rows] in plain PyTorch with all logits at once, in float32 (float64 for float64); differentiable."""
    compute = torch.promote_types(hidden.dtype, torch.float32)
    index = (targets >= 0).nonzero()[:, 0]
    wanted = targets[index]
    with torch.autocast(hidden.device.type, enabled=False):
        logits = functional.linear(
            hidden[index].to(compute), weight.to(compute), None if bias is None else bias.to(compute)
        )
    if logit_softcap > 0:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    vocab = weight.shape[0]
    logits = logits.masked_fill(torch.arange(vocab, device=hidden.device) == mask_id, -torch.inf)
    lse = logits.logsumexp(1)
    lse = lse.masked_fill(lse == torch.inf, torch.nan)
    target_logit = logits.gather(1, wanted.clamp(max=vocab - 1)[:, None])[:, 0]
    nll = torch.where(wanted < vocab, lse - target_logit, torch.nan)
    zeros = nll.new_zeros(targets.shape)
    return zeros.index_put((index,), nll), zeros.index_put((index,), lse)


_backend.define(
    "masked_cross_entropy_gradients",
    "(Tensor(a!)? dhidden, Tensor(b!)? dweight, Tensor(c!)? dbias, Tensor hidden, Tensor weight, Tensor? bias, "
    "Tensor targets, Tensor lse, Tensor grad, int mask_id, float logit_softcap, str backend) -> ()",
    _gradients,
)
