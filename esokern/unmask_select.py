"""Which drawn tokens a denoising step keeps: the other half of unmask-sampling.

`unmask_sample` proposes a token for every masked position and says how sure the model is; `unmask_select` chooses among
the proposals and writes the chosen ones into the text.
"""

from __future__ import annotations

import operator
from typing import NamedTuple

import torch

from esokern import backend as backends
from esokern import philox
from esokern.arrays import accept_arrays
from esokern.per_row import option

_OP = "unmask_select"
Option = float | torch.Tensor | None


class UnmaskSelect(NamedTuple):
    """What a choice returns.

    num_masked:      int32 [batch], masks left in the window
    num_transferred: int32 [batch], positions chosen or edited
    transfer_index:  bool [batch, width], which; None unless asked for
    """

    num_masked: torch.Tensor
    num_transferred: torch.Tensor
    transfer_index: torch.Tensor | None


@accept_arrays(writes=("tokens", "done"))
def unmask_select(
    tokens: torch.Tensor,
    proposed: torch.Tensor,
    confidence: torch.Tensor,
    *,
    mask_id: int,
    window_start: int | torch.Tensor = 0,
    window_length: int | torch.Tensor | None = None,
    num_select: int | torch.Tensor | None = None,
    threshold: Option = None,
    factor: Option = None,
    entropy_bound: Option = None,
    entropy: torch.Tensor | None = None,
    temperature: Option = None,
    seed: int | torch.Tensor = 0,
    step: int | torch.Tensor = 0,
    editable: torch.Tensor | None = None,
    edit_threshold: Option = None,
    remask_threshold: Option = None,
    done: torch.Tensor | None = None,
    return_transfer_index: bool = False,
    backend: str | None = None,
) -> UnmaskSelect:
    """Choose, in every row, which proposals for masked positions to keep, and write them into `tokens`.

    Column c of a row's window is position window_start + c of its text. Candidates are the masked positions of the
    window; they are taken in order of falling confidence (equal ones: lower positions first). The largest of the
    numbers that the options below give is chosen; at least one of them must be given, or one of the two for editing:

        num_select: that many (LLaDA, Dream: top-m)
        threshold: all whose confidence is at least that (Fast-dLLM with num_select=1: at least one); for a published
            rule of "more than that", pass the next larger float
        factor: as long as confidence_i >= 1 - factor / (i + 2), i = 0, 1, ...; the first in any case, and the last if
            only it would be missing (Fast-dLLM's factor decoding)
        entropy_bound: as long as the entropies' sum minus the largest is at most that (Ben-Hamu et al.,
            arXiv 2505.24857)

    Args:
        tokens: int64 [batch, length], contiguous; written in place.
        proposed: int64 [batch, width], a token for each position of the window; mask_id = none, never chosen.
        confidence: float32 [batch, width], any monotone measure: a probability, a margin, a negative entropy.
        mask_id: id of the mask token.
        window_start: int or int64 [batch].
        window_length: int or int64 [batch], columns in use; default: width.
        num_select: int or int32 [batch].
        threshold, factor, entropy_bound: number or float32 [batch]; NaN in a row's place = not for this row.
        entropy: float32 [batch, width] in nats, needed with entropy_bound.
        temperature: of the choice, number >= 0 or float32 [batch]; T > 0 chooses by confidence / T + Gumbel noise, so
            that num_select draws without replacement from softmax(confidence / T) (Dream's alg_temp), inf chooses at
            random. Threshold is then compared with confidence / T + noise (inf: with the noise).
        seed: int or int64 [batch]; step: int or int64 [batch]: the noise is a function of (seed, position, step).
        editable: bool [batch, length], positions that may change although they hold a token; default: all.
        edit_threshold: number or float32 [batch]: an editable token with another proposal of at least that confidence
            becomes it (LLaDA2.1's token-to-token editing).
        remask_threshold: number or float32 [batch]: an editable token whose confidence is below it is a candidate
            again, and masked if it is not chosen; one more is chosen than were taken back, so that rows get ahead.
        done: bool [batch]; rows that are done are left alone, and rows become done when no mask is left in their window
            and nothing was edited. Written in place.
        return_transfer_index: also say which positions were chosen or edited.
        backend: None = the compiled one of tokens' device, or "reference".

    Raises:
        TypeError, ValueError: naming the argument, what came and what is supported; ValueError for a window outside of
            the text, of rows that are done too (on a GPU num_masked is -1 instead). Nothing has been written then.

    >>> tokens = torch.tensor([[5, 9, 9, 9]])
    >>> drawn, prob = torch.tensor([[1, 2, 3]]), torch.tensor([[0.5, 0.9, 0.8]])
    >>> unmask_select(tokens, drawn, prob, mask_id=9, window_start=1, num_select=1, threshold=0.75).num_masked
    tensor([1], dtype=torch.int32)
    >>> tokens
    tensor([[5, 9, 2, 3]])
    """
    chosen = backends.select(backend, _OP, tokens, proposed, confidence, entropy, editable, done)
    if tokens.dim() != 2 or proposed.dim() != 2 or tokens.shape[0] != proposed.shape[0]:
        raise ValueError(
            f"{_OP}: tokens, proposed: must be [batch, length] and [batch, width], got {list(tokens.shape)} and "
            f"{list(proposed.shape)}"
        )
    (batch, length), width, device = tokens.shape, proposed.shape[1], tokens.device
    _check("tokens", tokens, torch.int64, (batch, length))
    _check("proposed", proposed, torch.int64, (batch, width))
    _check("confidence", confidence, torch.float32, (batch, width))
    _check("entropy", entropy, torch.float32, (batch, width))
    _check("editable", editable, torch.bool, (batch, length))
    _check("done", done, torch.bool, (batch,))
    for name, written in (("tokens", tokens), ("done", done)):
        if written is not None and not written.is_contiguous():
            raise ValueError(
                f"{_OP}: {name}: is written in place and must be contiguous, got strides {list(written.stride())}; "
                "pass .contiguous() and copy the result back"
            )
    mask_id = operator.index(mask_id)
    if mask_id < 0:
        raise ValueError(f"{_OP}: mask_id: must be >= 0, got {mask_id}")
    if all(rule is None for rule in (num_select, threshold, factor, entropy_bound, edit_threshold, remask_threshold)):
        raise ValueError(
            f"{_OP}: nothing would be chosen: give num_select, threshold, factor or entropy_bound, or edit_threshold "
            "or remask_threshold"
        )
    if entropy_bound is not None and entropy is None:
        raise ValueError(f"{_OP}: entropy: needed with entropy_bound, float32 {[batch, width]}")
    if isinstance(window_start, int) and not 0 <= window_start <= length - (width if window_length is None else 0):
        raise ValueError(
            f"{_OP}: window_start: the window must lie in the text, got {window_start} with a width of {width} and a "
            f"text of {length}"
        )

    def per_row(name: str, value: Option, dtype: torch.dtype = torch.float32, *bounds: float) -> torch.Tensor | None:
        return None if value is None else option(_OP, name, value, batch, dtype, device, *bounds)

    if temperature is None or (isinstance(temperature, (int, float)) and temperature == 0):
        noise = (None, None, None)
    else:
        noise = (
            per_row("temperature", temperature, torch.float32, 0.0, float("inf")),
            per_row("seed", seed, torch.int64),
            per_row("step", step, torch.int64),
        )
    integers = {"dtype": torch.int32, "device": device}
    outputs = (
        tokens,
        torch.empty(batch, width, dtype=torch.bool, device=device) if return_transfer_index else None,
        torch.empty(batch, **integers),
        torch.empty(batch, **integers),
        done,
    )
    inputs = (
        proposed,
        confidence,
        entropy,
        per_row("window_start", window_start, torch.int64),
        per_row("window_length", window_length, torch.int64),
        per_row("num_select", num_select, torch.int32),
        per_row("threshold", threshold),
        per_row("factor", factor),
        per_row("entropy_bound", entropy_bound),
        *noise,
        editable,
        per_row("edit_threshold", edit_threshold),
        per_row("remask_threshold", remask_threshold),
        mask_id,
    )
    if chosen == "reference":
        _reference(*outputs, *inputs)
    else:
        backends.run(chosen, _OP, *outputs, *inputs)
    return UnmaskSelect(outputs[2], outputs[3], outputs[1])


def _check(name: str, tensor: torch.Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor is None:
        return
    if tensor.dtype != dtype:
        raise TypeError(f"{_OP}: {name}: must be {dtype}, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{_OP}: {name}: must be {list(shape)}, got {list(tensor.shape)}")


def _reference(
    tokens: torch.Tensor,
    transfer_index: torch.Tensor | None,
    num_masked: torch.Tensor,
    num_transferred: torch.Tensor,
    done: torch.Tensor | None,
    proposed: torch.Tensor,
    confidence: torch.Tensor,
    entropy: torch.Tensor | None,
    window_start: torch.Tensor,
    window_length: torch.Tensor | None,
    num_select: torch.Tensor | None,
    threshold: torch.Tensor | None,
    factor: torch.Tensor | None,
    entropy_bound: torch.Tensor | None,
    temperature: torch.Tensor | None,
    seed: torch.Tensor,
    step: torch.Tensor,
    editable: torch.Tensor | None,
    edit_threshold: torch.Tensor | None,
    remask_threshold: torch.Tensor | None,
    mask_id: int,
) -> None:
    """One row after the other, as csrc/ops.h states it."""
    batch, length = tokens.shape
    widths = [proposed.shape[1]] * batch if window_length is None else window_length.tolist()
    starts = window_start.tolist()
    for start, width in zip(starts, widths, strict=True):
        if not 0 <= width <= proposed.shape[1]:
            raise ValueError(f"{_OP}: window_length: must be from 0 to width, got {width}")
        if not 0 <= start <= length - width:
            raise ValueError(f"{_OP}: window_start: the window must lie in the text, got {start}")
    for row in range(batch):
        start, width = starts[row], widths[row]
        window = slice(start, start + width)
        old, new = tokens[row, window].clone(), proposed[row, :width]
        sure = confidence[row, :width]
        masked = old == mask_id
        finished = done is not None and bool(done[row])
        may_edit = ~masked if editable is None else ~masked & editable[row, window]
        edited = torch.zeros_like(masked)
        if edit_threshold is not None:
            edited = may_edit & (new != old) & (new != mask_id) & (sure >= edit_threshold[row])
        taken_back = torch.zeros_like(masked)
        if remask_threshold is not None:
            taken_back = may_edit & ~edited & (sure < remask_threshold[row])

        key = sure = torch.where(sure.isnan(), float("-inf"), sure)
        if temperature is not None and temperature[row] > 0:
            positions = torch.arange(start, start + width, device=tokens.device)
            noise = philox.selection_gumbel(seed[row], positions, step[row])
            key = noise if temperature[row].isinf() else sure / temperature[row] + noise
        candidates = ((masked | taken_back) & (new != mask_id)).nonzero()[:, 0]
        order = candidates[key[candidates].sort(descending=True, stable=True).indices]

        counts = [0]
        if num_select is not None:
            counts.append(int(num_select[row]))
        if taken_back.any():
            counts.append(1 + int(taken_back.sum()))
        if threshold is not None:
            counts.append(int((key[order] >= threshold[row]).sum()))
        if factor is not None and not factor[row].isnan():
            rank = torch.arange(len(order), device=tokens.device)
            passes = sure[order] >= 1 - factor[row] / (rank + 2)
            passes[:1] = True
            kept = int(passes.cumprod(0).sum())
            counts.append(len(order) if kept == len(order) - 1 else kept)
        if entropy_bound is not None:
            entropies = entropy[row, :width][order].double()
            spread = entropies.cumsum(0) - entropies.cummax(0).values
            counts.append(int((spread <= entropy_bound[row]).cumprod(0).sum()))
        kept = order[: max(counts)]

        changed = edited.clone()
        changed[kept] = True
        if not finished:
            tokens[row, window] = torch.where(changed, new, torch.where(taken_back, mask_id, old))
        num_masked[row] = (tokens[row, window] == mask_id).sum()
        num_transferred[row] = 0 if finished else changed.sum()
        if transfer_index is not None:
            transfer_index[row] = False
            transfer_index[row, :width] = changed & (not finished)
        if done is not None and num_masked[row] == 0 and not edited.any():
            done[row] = True
