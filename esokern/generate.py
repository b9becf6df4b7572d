"""One `generate` for networks of this package, transformers models and any function, with any decoder and cache."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from esokern import decoders
from esokern.decoders.base import Decoder
from esokern.decoders.caches import POLICIES, Delayed, Policy
from esokern.decoders.loop import Loop
from esokern.decoders.native import Native
from esokern.decoders.text import Text, end_of_text
from esokern.models.denoiser import CallableDenoiser, Denoiser, NetworkDenoiser
from esokern.models.network import FoldedNetwork, Network
from esokern.samplers.run import Callback, GenerationResult, StepInfo, check_count, check_drawn, row_seeds

Prompt = torch.Tensor | Sequence[int] | Sequence[Sequence[int]] | Sequence[torch.Tensor]


def generate(
    model: Any,
    prompt: Prompt,
    *,
    decoder: Decoder | Native | None = None,
    cache: str | Policy | None = None,
    max_new_tokens: int | None = None,
    mask_id: int | None = None,
    eos_id: int | None = None,
    suppress_tokens: Sequence[int] = (),
    seed: int | Sequence[int] | torch.Tensor = 0,
    return_logprob: bool = False,
    report_divergence: bool = False,
    callback: Callback | None = None,
    progress: bool = False,
    backend: str | None = None,
) -> GenerationResult:
    """Generate text with a masked-diffusion model.

    Args:
        model: a network of this package (FoldedNetwork, or Network, which is folded); a transformers model whose
            attention is pluggable (Llama, Qwen2, ModernBERT, ...), taken as bidirectional, its config.shift_logits
            saying whether row i predicts token i + 1; a `LLaDAModelLM` or `DreamModel` of the published code; a
            `Denoiser`; or a function (tokens, positions, cache) -> logits [batch, seqlen, vocab], tokens and positions
            int64 [batch, seqlen] on the CPU, which is called once more to see its vocabulary (`models.CallableDenoiser`
            says the vocabulary and the device beforehand, and may have an LM head or a cache of its own).
        prompt: token ids: [length], [batch, length], or a list of rows of any lengths. mask_id stands where a token is
            to come, at any places.
        decoder: how (see esokern.decoders). Default: EsoLM() for a network of this package, LLaDA() for others.
        cache: None = whatever is exact: the cache of EsoLM, BD3LM and Autoregressive, no cache for bidirectional
            models. "none" = compute every step anew. "prefix", "dual", "delayed", or decoders.Prefix(), Dual(),
            Delayed(interval): approximate, for bidirectional models only. "exact": insist on an exact cache.
        max_new_tokens: masks to append to every row. None = none: the prompt has the masks.
        mask_id: id of the mask token. Default: the network's own, or the model's config.mask_token_id.
        eos_id: end of text: rows stop when they have generated it and no mask is left before it; what lies behind it
            becomes eos_id.
        suppress_tokens: ids that are never drawn, like mask_id (LLaDA's logits_eos_inf), by decoders of bidirectional
            models.
        seed: of row b is seed + b, or seed[b]. A row's tokens depend on its own prompt and seed, not on the batch (as
            far as the model's own layers do not; rows of EsoLM of one length share how many tokens each step takes,
            which is drawn from the seed of the first).
        return_logprob: log-probabilities of the drawn tokens.
        report_divergence: compare every step over an approximate cache with exact computation, for the result's
            `divergence`. Doubles the work.
        callback: called after each step with a StepInfo: which rows got which tokens at which positions.
        progress: show a bar of tokens.
        backend: of the kernels: None = compiled, or "reference".

    Returns:
        GenerationResult. Shorter rows are padded with eos_id, or mask_id without one; `row(i)` cuts that off.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is supported. RuntimeError if the model returned
        NaN where a token was to be drawn.

    >>> from esokern import decoders
    >>> from esokern.models import load_model
    >>> network, tokenizer = load_model()
    >>> result = generate(network, tokenizer.encode("ROMEO:"), max_new_tokens=16, decoder=decoders.EsoLM(alpha_0=0.5))
    """
    if isinstance(model, Network):
        model = model.fold()
    if decoder is None:
        decoder = decoders.EsoLM() if isinstance(model, FoldedNetwork) else decoders.LLaDA()
    if not isinstance(decoder, (Decoder, Native)):
        raise TypeError(f"decoder: must be one of esokern.decoders, got {type(decoder).__name__}")
    mask_id = _mask_id(model, mask_id)
    if eos_id is not None and (
        isinstance(eos_id, bool) or not isinstance(eos_id, int) or eos_id < 0 or eos_id == mask_id
    ):
        raise ValueError(f"eos_id: must be an id of the vocabulary other than mask_id, got {eos_id!r}")
    tokens, lengths = _texts(prompt, mask_id, max_new_tokens)
    seeds = row_seeds(seed, len(tokens))
    if isinstance(model, FoldedNetwork) and tokens.shape[1] > model.config.length:
        raise ValueError(
            f"prompt: {tokens.shape[1]} tokens, new ones included, exceed the network's length, {model.config.length}"
        )
    missing = int((tokens == mask_id).sum()) - int((tokens.shape[1] - lengths).sum())
    if missing == 0:
        raise ValueError(f"prompt: has no mask_id {mask_id} to replace; pass max_new_tokens to append some")
    with tqdm(total=missing, unit="token", disable=not progress) as bar:
        options = {"return_logprob": return_logprob, "callback": callback, "backend": backend}
        moved = bar.update if progress else None  # counting a step's tokens would wait for the device
        if isinstance(decoder, Native):
            if report_divergence:
                raise ValueError(f"report_divergence: {type(decoder).__name__} has no approximate cache to report on")
            if len(suppress_tokens):
                raise ValueError(f"suppress_tokens: {type(decoder).__name__} cannot, got {list(suppress_tokens)}")
            result = _run_native(model, decoder, cache, tokens, lengths, mask_id, seeds, moved, options)
        else:
            options |= {"eos_id": eos_id, "suppress_tokens": suppress_tokens, "report_divergence": report_divergence}
            result = _run_loop(model, decoder, cache, tokens, lengths, mask_id, seeds, moved, options)
    return _trim(result, tokens, lengths, mask_id, eos_id)


def _run_loop(
    model: Any,
    decoder: Decoder,
    cache: str | Policy | None,
    tokens: torch.Tensor,
    lengths: np.ndarray,
    mask_id: int,
    seeds: list[int],
    progress: Callable[[int], object] | None,
    options: dict[str, Any],
) -> GenerationResult:
    """A decoder of bidirectional models."""
    denoiser = _denoiser(model, tokens[:1, : lengths[0]], options["backend"])
    policy = _policy(cache, decoder, denoiser.shift)
    if options["report_divergence"] and policy is None:
        raise ValueError("report_divergence: without an approximate cache nothing diverges; pass one, or leave it out")
    if decoder.guidance and denoiser.logit_softcap is not None:
        raise ValueError("decoder: guidance needs a linear LM head, but this model caps its logits")
    if not 0 <= mask_id < denoiser.vocab_size:
        raise ValueError(f"mask_id: must lie in the vocabulary, [0, {denoiser.vocab_size}), got {mask_id}")
    outside = (tokens < 0) | (tokens >= denoiser.vocab_size)
    if outside.any():
        raise ValueError(f"prompt: ids must lie in [0, {denoiser.vocab_size}), got {int(tokens[outside][0])}")
    if len(options["suppress_tokens"]) and denoiser.logit_softcap is not None:
        raise ValueError("suppress_tokens: need logits of -inf, but this model caps its logits")
    if any(not 0 <= token < denoiser.vocab_size for token in options["suppress_tokens"]):
        raise ValueError(
            f"suppress_tokens: ids must lie in [0, {denoiser.vocab_size}), got {list(options['suppress_tokens'])}"
        )
    text = Text(tokens.to(denoiser.device), lengths, mask_id)
    loop = Loop(denoiser, text, decoder, policy=policy, seeds=seeds, progress=progress, **options)
    loop.run()
    return GenerationResult(
        tokens=text.tokens[:, :-1].clone(),
        decode_step=loop.decode_step[:, :-1].clone(),
        nfe=loop.nfe,
        seconds=time.perf_counter() - loop.start,
        forward_seconds=loop.forward_time.seconds(),
        sampling_seconds=loop.sampling_time.seconds(),
        logprob=None if loop.logprob is None else loop.logprob[:, :-1].clone(),
        divergence=loop.divergence,
    )


def _run_native(
    model: Any,
    decoder: Native,
    cache: str | Policy | None,
    tokens: torch.Tensor,
    lengths: np.ndarray,
    mask_id: int,
    seeds: list[int],
    progress: Callable[[int], object] | None,
    options: dict[str, Any],
) -> GenerationResult:
    """A sampler of this package's own networks, for rows of one length at a time."""
    if not isinstance(model, FoldedNetwork):
        raise TypeError(
            f"decoder: {type(decoder).__name__} needs a network of this package (esokern.models), got "
            f"{type(model).__name__}; for bidirectional models there are LLaDA, FastDLLM, Dream, EntropyBound, ..."
        )
    name = type(decoder).__name__
    if mask_id != model.config.mask_id:
        raise ValueError(f"mask_id: the network's is {model.config.mask_id}, got {mask_id}")
    if cache not in (None, "none", "exact"):
        raise ValueError(
            f"cache: {name} has an exact cache of its own, got {cache!r}; leave it out"
            if decoder.exact_cache
            else f"cache: {name} computes every step anew, got {cache!r}; the decoders LLaDA, FastDLLM, ... take it"
        )
    if cache == "exact" and not decoder.exact_cache:
        raise ValueError(_NO_EXACT_CACHE.format(name))
    parts: list[tuple[torch.Tensor, GenerationResult]] = []
    for length in sorted(set(lengths.tolist())):
        rows = torch.from_numpy(np.flatnonzero(lengths == length))
        result = decoder.of_rows(rows, len(lengths)).generate(
            model,
            tokens[rows, :length].to(model.device),
            cache != "none",
            seed=[seeds[row] for row in rows],
            **options | {"callback": _follow(options["callback"], rows, progress)},
        )
        parts.append((rows, result))
    return _join(parts, tokens)


def _follow(callback: Callback | None, rows: torch.Tensor, progress: Callable[[int], object] | None) -> Callback | None:
    """A callback of a part of the batch: moves the bar, and tells the caller's callback in the batch's own rows."""
    if callback is None and progress is None:
        return None

    def follow(step: StepInfo) -> None:
        if progress is not None:
            progress(len(step.tokens))
        if callback is not None:
            callback(dataclasses.replace(step, rows=rows.to(step.rows.device)[step.rows]))

    return follow


def _join(parts: list[tuple[torch.Tensor, GenerationResult]], tokens: torch.Tensor) -> GenerationResult:
    """The result of a batch from those of its parts, padded as `tokens` [batch, length] are."""
    first = parts[0][1]
    if len(parts) == 1:
        return first
    device = first.tokens.device
    whole = dataclasses.replace(
        first,
        tokens=tokens.to(device, copy=True),
        decode_step=torch.full(tokens.shape, -1, dtype=torch.int64, device=device),
        logprob=None if first.logprob is None else torch.zeros(tokens.shape, device=device),
        **{name: sum(getattr(part, name) for _, part in parts) for name in ("nfe", "seconds")},
        **{name: sum(getattr(part, name) for _, part in parts) for name in ("forward_seconds", "sampling_seconds")},
    )
    for rows, part in parts:
        width = part.tokens.shape[1]
        for name in ("tokens", "decode_step", "logprob"):
            if getattr(whole, name) is not None:
                getattr(whole, name)[rows.to(device), :width] = getattr(part, name)
    return whole


def _trim(
    result: GenerationResult, start: torch.Tensor, lengths: np.ndarray, mask_id: int, eos_id: int | None
) -> GenerationResult:
    """Padding behind the rows and behind their generated eos_id, and the check that every token could be drawn."""
    tokens, decode_step = result.tokens, result.decode_step
    places = torch.arange(tokens.shape[1], device=tokens.device)
    ends = torch.from_numpy(lengths).to(tokens.device)
    behind = places >= ends[:, None]
    if eos_id is not None:
        end = end_of_text(tokens, start.to(tokens.device) != mask_id, eos_id, mask_id)
        behind |= places > end[:, None]
    check_drawn((tokens == mask_id) & ~behind, "model")
    tokens[behind] = mask_id if eos_id is None else eos_id
    decode_step[behind] = -1
    if result.logprob is not None:
        result.logprob[behind] = 0
    return dataclasses.replace(result, lengths=ends)


# --- what the caller gave --------------------------------------------------------------------------------------------

_NO_EXACT_CACHE = (
    "cache: {} decodes a bidirectional model, in which every key and value changes with every token, so no cache is "
    'exact; leave it out, or choose an approximate one: "prefix", "dual" or "delayed"'
)


def _policy(cache: str | Policy | None, decoder: Decoder, shift: bool) -> Policy | None:
    if cache is None or cache == "none":
        return None
    if cache == "exact":
        raise ValueError(_NO_EXACT_CACHE.format(type(decoder).__name__))
    policy = POLICIES.get(cache) if isinstance(cache, str) else cache
    if not isinstance(policy, Policy):
        raise ValueError(f'cache: got {cache!r}, supported are None, "none", "exact", {", ".join(map(repr, POLICIES))}')
    name = type(decoder).__name__
    if decoder.edits and isinstance(policy, Delayed):
        raise ValueError(
            f"cache: {name} edits tokens, which Delayed does not compute again; use Prefix or Dual, or "
            "edit_threshold=None"
        )
    if decoder.edits and shift:
        raise ValueError(
            f"cache: {name} edits a block's first token, for which this model, whose outputs predict the next token, "
            "needs one that the cache leaves out; use no cache, or edit_threshold=None"
        )
    return policy


def _mask_id(model: Any, mask_id: int | None) -> int:
    if mask_id is None and isinstance(model, FoldedNetwork):
        return model.config.mask_id
    if mask_id is None:
        mask_id = getattr(getattr(model, "config", None), "mask_token_id", None)
    if mask_id is None:
        raise ValueError("mask_id: needed, the model's config names none (LLaDA's is 126336, Dream's 151666)")
    if isinstance(mask_id, bool) or not isinstance(mask_id, int) or mask_id < 0:
        raise ValueError(f"mask_id: must be an id of the vocabulary, got {mask_id!r}")
    return mask_id


def _texts(prompt: Prompt, mask_id: int, max_new_tokens: int | None) -> tuple[torch.Tensor, np.ndarray]:
    """int64 [batch, longest] on the host, mask_id where a token is to come and behind shorter rows, and the lengths."""
    if max_new_tokens is not None:
        check_count("max_new_tokens", max_new_tokens)
    if isinstance(prompt, str):
        raise TypeError(f"prompt: must be token ids, got the string {prompt!r}; encode it first")
    if isinstance(prompt, torch.Tensor):
        rows = [prompt] if prompt.dim() < 2 else list(prompt)
    else:
        several = len(prompt) > 0 and not isinstance(prompt[0], (int, np.integer))
        rows = [torch.as_tensor(row) for row in prompt] if several else [torch.as_tensor(prompt)]
    if not rows:
        raise ValueError("prompt: has no row")
    for row in rows:
        if row.dim() != 1 or (row.numel() and row.dtype not in (torch.int64, torch.int32)):
            raise ValueError(f"prompt: must be integer rows of token ids, got {row.dtype} {list(row.shape)}")
    lengths = np.array([len(row) + (max_new_tokens or 0) for row in rows])
    if lengths.min() == 0:
        raise ValueError("prompt: a row is empty; pass max_new_tokens to generate from nothing")
    tokens = torch.full((len(rows), int(lengths.max())), mask_id, dtype=torch.int64)
    for to, row in zip(tokens, rows, strict=True):
        to[: len(row)] = row
    return tokens, lengths


def _vocab_size(function: Callable, text: torch.Tensor) -> int:
    """Of the logits that a function returns for the text."""
    with torch.inference_mode():
        logits = function(text, torch.arange(text.shape[1])[None], None)
    if not isinstance(logits, torch.Tensor) or logits.dim() != 3 or logits.shape[:2] != text.shape:
        got = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ValueError(
            f"model: must return a tensor [1, {text.shape[1]}, vocab] for tokens {list(text.shape)}, got {got}"
        )
    return logits.shape[-1]


def _denoiser(model: Any, text: torch.Tensor, backend: str | None) -> Denoiser:
    """The model as decoders see it. text: int64 [1, length], for a function that has not said its vocabulary."""
    if isinstance(model, FoldedNetwork):
        return NetworkDenoiser(model, backend)
    if hasattr(model, "hidden") and hasattr(model, "new_cache"):
        return model
    if any(cls.__module__.split(".")[0] == "transformers" for cls in type(model).__mro__):
        from esokern.integrations import llada_dream, transformers  # need transformers, which is optional

        if llada_dream.is_llada_or_dream(model):
            model = llada_dream.as_transformers(model)
        return transformers.TransformersDenoiser(model)
    if callable(model):
        return CallableDenoiser(model, vocab_size=_vocab_size(model, text))
    raise TypeError(
        "model: must be a network of this package, a transformers model, a Denoiser or a function, got "
        f"{type(model).__name__}"
    )
