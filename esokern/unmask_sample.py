"""Unmask-sampling: the LM head and the draw of a token in one call, without the [rows, vocab] logits in between."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch

from esokern import backend as _backend
from esokern import philox
from esokern.arrays import accept_arrays
from esokern.per_row import option, values_visible

_OP = "unmask_sample"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FILTER_ORDERS = {"top_k_first": 0, "joint": 1, "top_p_first": 1}
_STATISTICS = {"model": 0, "sampling": 1}
_MAX_TEMPERATURE = 1e30  # a product with the noise stays finite in float32
_MIN_TOP_P = 2.0**-126  # a smaller one may round to 0, which would keep nothing


class UnmaskSample(NamedTuple):
    """What a draw returns, [rows] each; None = not asked for. Statistics are float32; logarithms are natural.

    tokens:  int64 (int32 if `tokens` was), the row's token after the call
    logprob: log-probability of the drawn token in the distribution that `statistics` names; prob = exp(logprob)
    margin:  p(best) - p(second) of that distribution
    entropy: of that distribution
    lse:     its log-normaliser, log sum exp(logit) or, for "sampling", log sum exp(logit / temperature)
    score:   logit + temperature * noise of the drawn token
    invalid: bool; the row had a NaN or +inf logit, or no finite one, and its token did not change

    A row that is carried over (its token was not mask_id) is certain: logprob 0, prob 1, margin 1, entropy 0, lse 0,
    score +inf. An invalid row has NaN everywhere, except that lse and score are -inf if no logit was finite.
    """

    tokens: torch.Tensor
    logprob: torch.Tensor | None
    prob: torch.Tensor | None
    margin: torch.Tensor | None
    entropy: torch.Tensor | None
    lse: torch.Tensor | None
    score: torch.Tensor | None
    invalid: torch.Tensor


@accept_arrays()
def unmask_sample(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    tokens: torch.Tensor | None = None,
    mask_id: int | None = None,
    temperature: float | torch.Tensor = 1.0,
    top_k: int | torch.Tensor | None = None,
    top_p: float | torch.Tensor | None = None,
    min_p: float | torch.Tensor | None = None,
    filter_order: str = "top_k_first",
    seed: int | torch.Tensor = 0,
    positions: torch.Tensor | None = None,
    step: int | torch.Tensor = 0,
    logit_softcap: float | None = None,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    statistics: str = "model",
    return_logprob: bool = True,
    return_prob: bool = False,
    return_margin: bool = False,
    return_entropy: bool = False,
    return_lse: bool = False,
    return_score: bool = False,
    backend: str | None = None,
) -> UnmaskSample:
    """Draw one token per row from softmax((hidden weight^T + bias) / temperature), LM head included.

    The draw is argmax over ids of logit + temperature * Gumbel noise, in float32; equal scores go to the lowest id. The
    noise is a function of the row's seed, position and step and of the id (`esokern.philox.gumbel`): the same bits for
    any batch, order of rows, thread count, vocabulary shard and back end.

    Args:
        hidden: [rows, hidden_size] float32, bfloat16 or float16, after the final norm.
        weight: [vocab, hidden_size], dtype of hidden; a vocabulary shard passes its rows and `vocab_start`.
        bias: [vocab], dtype of hidden.
        tokens: [rows] int64 or int32, not modified. Rows whose entry is not `mask_id` are carried over; without a
            mask_id all rows are drawn. None = all rows are drawn.
        mask_id: id of the mask token, never drawn; None = no id is suppressed.
        temperature: finite, >= 0, number or [rows]; 0 = the most likely token (greedy).
        top_k: keep the k most likely ids (equal logits: lower ids first); <= 0 or None = all. Number or [rows].
        top_p: in (0, 1], keep an id if the ids before it hold less than top_p of the mass; 1 or None = all. Number or
            [rows].
        min_p: in [0, 1], keep ids with p >= min_p * max p; 0 or None = all. Number or [rows].
            Filters act on softmax(logit / temperature), at temperature 0 on softmax(logit).
        filter_order: "top_k_first": top_p's mass is of what top_k left; "joint": of the whole vocabulary. "top_p_first"
            keeps the same ids as "joint".
        seed: int or [rows] int64. Rows of different sequences need different seeds: noise repeats where seed, position
            and step do.
        positions: [rows] int64 or int32, each row's place in its text; may be left out only at temperature 0.
        step: int or [rows] int64 or int32, the denoising step. Of positions and step the low 32 bits count.
        logit_softcap: c > 0, logits become c * tanh(logit / c).
        vocab_start: id of the first row of weight.
        vocab_size: of the whole vocabulary, if weight is a shard of it. Filters need the whole; without them, draw from
            each shard with return_score (and return_lse for logprob, prob or entropy), then `merge_vocab_shards`.
        statistics: distribution that logprob, prob, margin, entropy and lse describe: "model", softmax(logit), or
            "sampling", the filtered softmax(logit / temperature) (softmax(logit) filtered at temperature 0).
        return_logprob ... return_score: which fields of the result to compute.
        backend: None = the compiled one of hidden's device, "reference" = PyTorch on any device, float64 too.

    Returns:
        UnmaskSample. If `tokens` is None, an invalid row holds mask_id, or 0 without one.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is supported. Values inside tensors are checked
        on the CPU only, and not under torch.compile.

    >>> hidden, weight = torch.randn(2, 8), torch.randn(100, 8)
    >>> tokens = torch.tensor([99, 5])
    >>> drawn = unmask_sample(hidden, weight, tokens=tokens, mask_id=99, seed=1, positions=torch.arange(2))
    >>> drawn.tokens[1].item()
    5
    """
    chosen = _backend.select(backend, "unmask_sample", hidden, weight, bias, tokens)
    _check_matrix("hidden", "[rows, hidden_size]", hidden, chosen)
    _check_matrix("weight", "[vocab, hidden_size]", weight, chosen)
    if weight.dtype != hidden.dtype:
        raise TypeError(f"unmask_sample: weight: must have the dtype of hidden, {hidden.dtype}, got {weight.dtype}")
    vocab = weight.shape[0]
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"unmask_sample: hidden: must be [rows, {weight.shape[1]}] for a weight {list(weight.shape)}, "
            f"got {list(hidden.shape)}"
        )
    if bias is not None:
        if bias.dtype != hidden.dtype:
            raise TypeError(f"unmask_sample: bias: must have the dtype of hidden, {hidden.dtype}, got {bias.dtype}")
        if bias.shape != (vocab,):
            raise ValueError(f"unmask_sample: bias: must be [{vocab}], got {list(bias.shape)}")
    # fmt: off
    return _sample(
        chosen, hidden, weight, bias, None, tokens, mask_id, temperature, top_k, top_p, min_p, filter_order, seed,
        positions, step, logit_softcap, vocab_start, vocab_size, statistics, return_logprob, return_prob, return_margin,
        return_entropy, return_lse, return_score,
    )
    # fmt: on


@accept_arrays()
def unmask_sample_from_logits(
    logits: torch.Tensor,
    *,
    tokens: torch.Tensor | None = None,
    mask_id: int | None = None,
    temperature: float | torch.Tensor = 1.0,
    top_k: int | torch.Tensor | None = None,
    top_p: float | torch.Tensor | None = None,
    min_p: float | torch.Tensor | None = None,
    filter_order: str = "top_k_first",
    seed: int | torch.Tensor = 0,
    positions: torch.Tensor | None = None,
    step: int | torch.Tensor = 0,
    logit_softcap: float | None = None,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    statistics: str = "model",
    return_logprob: bool = True,
    return_prob: bool = False,
    return_margin: bool = False,
    return_entropy: bool = False,
    return_lse: bool = False,
    return_score: bool = False,
    backend: str | None = None,
) -> UnmaskSample:
    """`unmask_sample` on logits [rows, vocab] float32, bfloat16 or float16 that exist already; the rest is the same.

    >>> unmask_sample_from_logits(torch.tensor([[0.0, 2.0, 1.0]]), temperature=0).tokens
    tensor([1])
    """
    chosen = _backend.select(backend, "unmask_sample", logits, tokens)
    _check_matrix("logits", "[rows, vocab]", logits, chosen)
    # fmt: off
    return _sample(
        chosen, None, None, None, logits, tokens, mask_id, temperature, top_k, top_p, min_p, filter_order, seed,
        positions, step, logit_softcap, vocab_start, vocab_size, statistics, return_logprob, return_prob, return_margin,
        return_entropy, return_lse, return_score,
    )
    # fmt: on


@accept_arrays()
def merge_vocab_shards(shards: Sequence[UnmaskSample]) -> UnmaskSample:
    """The draw from a whole vocabulary out of the draws from its shards, in any order.

    Each shard was drawn with the same options, its own `vocab_start`, and return_score=True. The best score wins, equal
    scores go to the lowest id: the same token as an unsharded call with the same logits. lse is combined; logprob, prob
    and entropy are recomputed and need every shard's lse. A margin cannot be derived from shards and is refused.

    A row is invalid if a shard met a NaN or +inf, or if no shard had a finite logit.
    """
    if len(shards) == 0:
        raise ValueError("merge_vocab_shards: shards: got none")
    for index, shard in enumerate(shards):
        if shard.score is None:
            raise ValueError(f"merge_vocab_shards: shards[{index}]: has no score; draw with return_score=True")
        if shard.tokens.shape != shards[0].tokens.shape:
            raise ValueError(
                f"merge_vocab_shards: shards[{index}]: has {len(shard.tokens)} rows, shards[0] {len(shards[0].tokens)}"
            )
        if shard.margin is not None:
            raise ValueError(
                f"merge_vocab_shards: shards[{index}]: has a margin, which cannot be merged; draw without return_margin"
            )
        for name in ("logprob", "prob", "entropy", "lse"):
            if (getattr(shard, name) is None) != (getattr(shards[0], name) is None):
                raise ValueError(f"merge_vocab_shards: {name}: given by some shards and not by others")
    first = shards[0]
    if first.lse is None and (first.logprob is not None or first.prob is not None or first.entropy is not None):
        raise ValueError(
            "merge_vocab_shards: logprob, prob and entropy need every shard's lse; draw with return_lse=True, "
            "or with return_logprob=False"
        )

    scores = torch.stack([shard.score for shard in shards])
    tokens = torch.stack([shard.tokens for shard in shards])
    not_a_number = scores.isnan()
    best = scores.amax(0)
    contenders = (scores == best) | not_a_number
    winner = torch.where(contenders, tokens, torch.iinfo(tokens.dtype).max).argmin(0, keepdim=True)
    invalid = not_a_number.any(0) | (best == -torch.inf)
    carried = best == torch.inf

    def of_winner(values: torch.Tensor) -> torch.Tensor:
        return values.gather(0, winner)[0]

    lse = logprob = prob = entropy = None
    if first.lse is not None:
        shard_lse = torch.stack([shard.lse for shard in shards])
        lse = torch.where(carried, 0.0, shard_lse.logsumexp(0))
        if first.logprob is not None or first.prob is not None:
            shard_logprob = torch.stack([s.prob.log() if s.logprob is None else s.logprob for s in shards])
            logprob = of_winner(shard_logprob) + (of_winner(shard_lse) - lse)
            logprob = torch.where(invalid, torch.nan, torch.where(carried, 0.0, logprob))
            prob = None if first.prob is None else logprob.exp()
            logprob = None if first.logprob is None else logprob
        if first.entropy is not None:
            # -sum p log p, with p = exp(shard_lse - lse) * (the shard's own p).
            share = (shard_lse - lse).exp()
            parts = torch.stack([shard.entropy for shard in shards]) + (lse - shard_lse)
            entropy = torch.where(share > 0, share * parts, 0.0).sum(0)
            entropy = torch.where(invalid, torch.nan, torch.where(carried, 0.0, entropy))
    return UnmaskSample(of_winner(tokens), logprob, prob, None, entropy, lse, best, invalid)


def _check_matrix(name: str, shape: str, tensor: torch.Tensor, backend: str) -> None:
    if tensor.dtype not in _DTYPES and not (tensor.dtype == torch.float64 and backend == "reference"):
        raise TypeError(
            f"unmask_sample: {name}: got {tensor.dtype}, supported are float32, bfloat16 and float16"
            ' (and float64 with backend="reference")'
        )
    if tensor.dim() != 2:
        raise ValueError(f"unmask_sample: {name}: must be {shape}, got {list(tensor.shape)}")
    if tensor.stride(1) != 1 and tensor.shape[1] > 1 and backend != "reference":
        raise ValueError(
            f"unmask_sample: {name}: the last dimension must be contiguous, got strides {list(tensor.stride())}; "
            "call .contiguous() first"
        )


def _sample(
    backend: str,
    hidden: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    logits: torch.Tensor | None,
    tokens: torch.Tensor | None,
    mask_id: int | None,
    temperature: float | torch.Tensor,
    top_k: int | torch.Tensor | None,
    top_p: float | torch.Tensor | None,
    min_p: float | torch.Tensor | None,
    filter_order: str,
    seed: int | torch.Tensor,
    positions: torch.Tensor | None,
    step: int | torch.Tensor,
    logit_softcap: float | None,
    vocab_start: int,
    vocab_size: int | None,
    statistics: str,
    return_logprob: bool,
    return_prob: bool,
    return_margin: bool,
    return_entropy: bool,
    return_lse: bool,
    return_score: bool,
) -> UnmaskSample:
    source = hidden if logits is None else logits
    rows, device = source.shape[0], source.device
    vocab = logits.shape[1] if weight is None else weight.shape[0]
    if vocab == 0:
        raise ValueError(f"unmask_sample: {'logits' if weight is None else 'weight'}: the vocabulary is empty")
    if vocab_start < 0 or (vocab_size is not None and vocab_start + vocab > vocab_size):
        raise ValueError(
            f"unmask_sample: vocab_start: ids {vocab_start} .. {vocab_start + vocab - 1} must lie in the vocabulary"
            + ("" if vocab_size is None else f" of vocab_size {vocab_size}")
        )
    if mask_id is not None:
        mask_id = operator.index(mask_id)
        if mask_id < 0:
            raise ValueError(f"unmask_sample: mask_id: must be >= 0 or None, got {mask_id}")
    if filter_order not in _FILTER_ORDERS:
        raise ValueError(
            f"unmask_sample: filter_order: got {filter_order!r}, supported are {', '.join(_FILTER_ORDERS)}"
        )
    if statistics not in _STATISTICS:
        raise ValueError(f"unmask_sample: statistics: got {statistics!r}, supported are {', '.join(_STATISTICS)}")
    if logit_softcap is None:
        logit_softcap = 0.0
    elif not 0.0 < logit_softcap < float("inf"):
        raise ValueError(f"unmask_sample: logit_softcap: must be finite and > 0, or None, got {logit_softcap}")

    temperature_rows = option(_OP, "temperature", temperature, rows, torch.float32, device, 0.0, _MAX_TEMPERATURE)
    top_k_rows = None
    if top_k is not None and not (isinstance(top_k, int) and (top_k <= 0 or top_k >= vocab)):
        top_k_rows = option(_OP, "top_k", top_k, rows, torch.int32, device)
    top_p_rows = None
    if top_p is not None and not (isinstance(top_p, (int, float)) and top_p == 1):
        top_p_rows = option(
            _OP, "top_p", top_p, rows, torch.float32, device, 5e-324, 1.0, supported="in (0, 1]", raise_to=_MIN_TOP_P
        )
    min_p_rows = None
    if min_p is not None and not (isinstance(min_p, (int, float)) and min_p == 0):
        min_p_rows = option(_OP, "min_p", min_p, rows, torch.float32, device, 0.0, 1.0)
    if (vocab_start != 0 or (vocab_size is not None and vocab_size != vocab)) and not (
        top_k_rows is None and top_p_rows is None and min_p_rows is None
    ):
        raise ValueError(
            "unmask_sample: top_k, top_p, min_p: filters need the whole vocabulary, but this call has ids "
            f"{vocab_start} .. {vocab_start + vocab - 1} only. Draw without filters and use merge_vocab_shards, or "
            "gather the logits and use unmask_sample_from_logits"
        )
    seed_rows = option(_OP, "seed", seed, rows, torch.int64, device)
    step_rows = option(_OP, "step", step, rows, torch.int64, device, 0, 2**32 - 1, only_numbers=True)
    if positions is not None:
        if not isinstance(positions, torch.Tensor):
            raise TypeError(
                f"unmask_sample: positions: must be an int64 or int32 tensor [rows], got {type(positions).__name__}"
            )
        positions = option(_OP, "positions", positions, rows, torch.int64, device)
    elif isinstance(temperature, torch.Tensor) or temperature > 0:
        if not _all_zero(temperature_rows):
            raise ValueError(
                "unmask_sample: positions: needed when a temperature is > 0, an int64 or int32 tensor [rows] with each "
                "row's place in its text. The noise of a row comes from its seed, position and step; a default by row "
                "number would make a draw depend on the batch around it"
            )
        positions = torch.zeros_like(seed_rows)
    else:
        positions = seed_rows  # greedy: not used

    if tokens is None:
        new_tokens = torch.full((rows,), 0 if mask_id is None else mask_id, dtype=torch.int64, device=device)
    else:
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"unmask_sample: tokens: must be int64 or int32, got {tokens.dtype}")
        if tokens.shape != (rows,):
            raise ValueError(f"unmask_sample: tokens: must be [{rows}], got {list(tokens.shape)}")
        new_tokens = tokens.clone()
        if tokens.dtype == torch.int32:
            new_tokens = new_tokens.to(torch.int64)

    order, statistics_code = _FILTER_ORDERS[filter_order], _STATISTICS[statistics]
    kernel_mask_id = -1 if mask_id is None else mask_id
    if backend == "reference":
        if logits is None:
            compute = torch.promote_types(hidden.dtype, torch.float32)
            logits = hidden.to(compute) @ weight.to(compute).T
            if bias is not None:
                logits = logits + bias.to(compute)
        # fmt: off
        result = _reference(
            logits, new_tokens, kernel_mask_id, temperature_rows, top_k_rows, top_p_rows, min_p_rows, order == 0,
            seed_rows, positions, step_rows, logit_softcap, vocab_start, statistics_code == 1,
        )
        # fmt: on
        wanted = (True, return_logprob, return_prob, return_margin, return_entropy, return_lse, return_score, True)
        result = UnmaskSample(*(field if want else None for field, want in zip(result, wanted, strict=True)))
    else:
        new = temperature_rows.new_empty  # float32 on the right device
        result = UnmaskSample(
            new_tokens,
            new(rows) if return_logprob else None,
            new(rows) if return_prob else None,
            new(rows) if return_margin else None,
            new(rows) if return_entropy else None,
            new(rows) if return_lse else None,
            new(rows) if return_score else None,
            new(rows, dtype=torch.bool),
        )
        # fmt: off
        _backend.run(
            backend, "unmask_sample", *result, hidden, weight, bias, logits, temperature_rows, top_k_rows, top_p_rows,
            min_p_rows, seed_rows, positions, step_rows, kernel_mask_id, vocab_start, float(logit_softcap), order,
            statistics_code,
        )
        # fmt: on
    if tokens is not None and tokens.dtype != torch.int64:
        result = result._replace(tokens=result.tokens.to(tokens.dtype))
    return result


def _all_zero(temperature: torch.Tensor) -> bool:
    return values_visible(temperature) and not temperature.any()


def _reference(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    mask_id: int,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
    top_k_first: bool,
    seed: torch.Tensor,
    positions: torch.Tensor,
    step: torch.Tensor,
    logit_softcap: float,
    vocab_start: int,
    sampling_statistics: bool,
) -> UnmaskSample:
    """The same in plain PyTorch with all logits at once, in float32 (float64 for float64 logits)."""
    compute = torch.promote_types(logits.dtype, torch.float32)
    logits = logits.to(compute)
    if logit_softcap > 0:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    vocab = logits.shape[1]
    ids = torch.arange(vocab_start, vocab_start + vocab, device=logits.device)
    logits = logits.masked_fill(ids == mask_id, -torch.inf)
    broken = (logits.isnan() | (logits == torch.inf)).any(1)
    empty = (logits == -torch.inf).all(1)
    invalid = broken | empty
    logits = torch.where(invalid[:, None], 0.0, logits)  # their results are replaced below

    noisy = temperature > 0
    temperature = temperature.to(compute)[:, None]
    relative = logits - logits.amax(1, keepdim=True)
    tempered = torch.where(noisy[:, None], relative / temperature, relative)
    keep = _filter(logits, tempered, top_k, top_p, min_p, top_k_first)

    scores = logits
    if bool(noisy.any()):
        noise = philox.gumbel(seed, positions, step, vocab_start, vocab)
        scores = torch.where(noisy[:, None], logits + temperature * noise.to(compute), logits)
    score, chosen = scores.masked_fill(~keep, -torch.inf).max(1)

    if sampling_statistics:
        shifted, shift = tempered.masked_fill(~keep, -torch.inf), logits.amax(1)
        shift = torch.where(noisy, shift / temperature[:, 0], shift)
    else:
        shifted, shift = relative, logits.amax(1)
    shifted_lse = shifted.logsumexp(1)
    log_probs = shifted - shifted_lse[:, None]
    probs = log_probs.exp()
    logprob = log_probs.gather(1, chosen[:, None])[:, 0]
    best_two = probs.topk(min(2, vocab), 1).values
    margin = best_two[:, 0] - best_two[:, 1] if vocab > 1 else best_two[:, 0]
    entropy = -torch.where(probs > 0, probs * log_probs, 0.0).sum(1)
    lse = shift + shifted_lse

    drawn = (tokens == mask_id) if mask_id >= 0 else torch.ones_like(invalid)
    nothing = torch.where(broken, torch.nan, -torch.inf).to(compute)

    def finish(values: torch.Tensor, of_invalid: float | torch.Tensor, of_carried: float) -> torch.Tensor:
        return torch.where(drawn, torch.where(invalid, of_invalid, values), of_carried)

    return UnmaskSample(
        tokens=torch.where(drawn & ~invalid, chosen + vocab_start, tokens),
        logprob=finish(logprob, torch.nan, 0.0),
        prob=finish(logprob.exp(), torch.nan, 1.0),
        margin=finish(margin, torch.nan, 1.0),
        entropy=finish(entropy, torch.nan, 0.0),
        lse=finish(lse, nothing, 0.0),
        score=finish(score, nothing, torch.inf),
        invalid=drawn & invalid,
    )


def _filter(
    logits: torch.Tensor,
    tempered: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
    top_k_first: bool,
) -> torch.Tensor:
    """Which ids may be drawn, bool [rows, vocab]. tempered: logits over temperature, the largest 0 in every row.

    The order is that of the logits: dividing by the temperature may round different ones together.
    """
    candidates = tempered > -torch.inf
    if top_k is None and top_p is None and min_p is None:
        return candidates
    order = logits.sort(dim=1, descending=True, stable=True).indices  # stable: equal logits by id
    ordered = tempered.gather(1, order)
    keep = ordered > -torch.inf
    if top_k is not None:
        limit = torch.where(top_k > 0, top_k, tempered.shape[1])
        within_top_k = torch.arange(tempered.shape[1], device=tempered.device) < limit[:, None]
        if top_k_first:
            ordered = ordered.masked_fill(~within_top_k, -torch.inf)
        keep = keep & within_top_k
    if top_p is not None:
        mass = ordered.double().softmax(1)
        before = torch.cat([torch.zeros_like(mass[:, :1]), mass.cumsum(1)[:, :-1]], 1)
        keep = keep & ((before < top_p[:, None]) | (top_p >= 1)[:, None])
    if min_p is not None:
        keep = keep & ((ordered >= min_p.to(ordered.dtype).log()[:, None]) | (min_p <= 0)[:, None])
    return torch.zeros_like(candidates).scatter(1, order, keep)
