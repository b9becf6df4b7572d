"""The loop of every decoder: window after window, forward, draw, choose, until no mask is left.

Rows of a batch go through their windows together, i-th window by i-th window, and leave one when they are done with it;
what a row gets does not depend on the others. Only positions that a step may choose go to the LM head. Decoders that
know how many tokens a step keeps wait for no device; others read one number per row and step.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from esokern.decoders.base import PER_ROW, Decoder
from esokern.decoders.caches import BlockState, Policy
from esokern.decoders.text import Text, Window, end_of_text
from esokern.kv_cache import KVCache
from esokern.masked_cross_entropy import masked_cross_entropy
from esokern.models.denoiser import Denoiser, Step
from esokern.samplers.run import Divergence, StepInfo, Stopwatch, on_device, per_row
from esokern.unmask_sample import UnmaskSample, unmask_sample, unmask_sample_from_logits
from esokern.unmask_select import UnmaskSelect, unmask_select

_STEPS = 1 << 20  # of a window that its noise can tell apart


class Loop:
    """One generation. `run` decodes `text` in place; nfe, decode_step [batch, length + 1], logprob and divergence then
    say how it went. Seeds: one per row; stopped rows have an eos_id with no mask before it."""

    def __init__(
        self,
        model: Denoiser,
        text: Text,
        decoder: Decoder,
        *,
        policy: Policy | None,
        seeds: list[int],
        eos_id: int | None,
        suppress_tokens: Sequence[int],
        return_logprob: bool,
        report_divergence: bool,
        callback: Callable[[StepInfo], None] | None,
        progress: Callable[[int], None] | None,
        backend: str | None,
    ) -> None:
        self.start = time.perf_counter()
        self.model, self.text, self.decoder, self.policy, self.backend = model, text, decoder, policy, backend
        self.eos_id, self.callback, self.progress = eos_id, callback, progress
        device, shape = text.tokens.device, text.tokens.shape
        self.device = device
        self.seeds = torch.tensor(seeds, dtype=torch.int64, device=device)
        self.decode_step = torch.full(shape, -1, dtype=torch.int64, device=device)
        self.logprob = torch.zeros(shape, device=device) if return_logprob else None
        self.divergence = Divergence() if report_divergence else None
        self.nfe = self.index = 0
        self.forward_time, self.sampling_time = Stopwatch(device), Stopwatch(device)
        self.stopped = np.zeros(shape[0], dtype=bool)
        self.options = {name: per_row(name, getattr(decoder, name), shape[0], device) for name in PER_ROW}
        # Of what distribution: it only matters where it decides.
        self.statistics = "model" if decoder.measure == "random" else decoder.statistics
        # Guidance runs each row twice, the second time without its given tokens.
        self.copies = 2 if decoder.guidance > 0 else 1
        self.suppressed = torch.tensor(suppress_tokens, dtype=torch.int64, device=device)
        self.head_bias = model.head_bias
        if len(self.suppressed) and model.head_weight is not None:
            bias = model.head_weight.new_zeros(model.vocab_size) if model.head_bias is None else model.head_bias
            self.head_bias = bias.index_fill(0, self.suppressed, -math.inf)
        self.cache: KVCache | None = None
        if policy is not None:
            self.cache = model.new_cache(self.copies * shape[0], text.spare)
            if self.cache is None:
                raise ValueError(f"cache: this model cannot use one, got {policy!r}; leave it out")

    @torch.inference_mode()
    def run(self) -> None:
        """Decode the text in place."""
        masked = (self.text.tokens == self.text.mask_id).cpu().numpy()
        windows: list[list[tuple[int, int]]] = []
        for row, length in enumerate(self.text.lengths):
            places = np.flatnonzero(masked[row, :length])
            windows.append(self.decoder.windows(int(places[0]), int(length)) if len(places) else [])
        for number in range(max(map(len, windows))):
            # Rows whose texts have different numbers of windows may have different numbers of steps in each.
            for count in sorted({len(own) for own in windows if number < len(own)}):
                rows = [r for r, own in enumerate(windows) if len(own) == count and not self.stopped[r]]
                rows = [r for r in rows if masked[r, slice(*windows[r][number])].any()]
                if rows:
                    bounds = np.array([windows[r][number] for r in rows])
                    self._decode_window(number, count, np.array(rows), *bounds.T, masked)

    def _decode_window(
        self, number: int, num_windows: int, rows: np.ndarray, begin: np.ndarray, end: np.ndarray, masked: np.ndarray
    ) -> None:
        """Decode window `number` of num_windows, [begin, end), of the rows."""
        decoder, text = self.decoder, self.text
        left = np.array([masked[row, b:e].sum() for row, b, e in zip(rows, begin, end, strict=True)])
        without_masks = np.zeros_like(left)  # steps that began without one
        settled = [torch.zeros_like(text.given)] * 2
        # A network that predicts the next token says at the token before the window what its first one is, and cached
        # steps leave that out. So the first step, which computes everything, decodes the first one and nothing else.
        alone = self.policy is not None and self.policy.window_only and self.model.shift
        options = decoder.options(left - alone * masked[rows, begin], num_windows, int(alone))
        if alone:
            options = itertools.chain([{"num_select": 1}], options)
        alive = np.arange(len(rows))  # of the rows above
        window: Window | None = None
        for step, wanted in enumerate(options):
            if len(alive) == 0:
                break
            wanted = {name: v[alive] if isinstance(v, np.ndarray) else v for name, v in wanted.items()}
            opening = alone and step == 0
            counted = not opening and wanted.keys() <= {"num_select", "temperature"}  # what is kept is known beforehand
            # A step that keeps nothing changes nothing, unless it is one by which a cache is filled or counts.
            skips = self.policy is None or (self.policy.window_only and step > 0)
            if counted and skips and not np.any(wanted["num_select"]):
                continue
            own, first, last = rows[alive], begin[alive], end[alive]
            if window is None:
                window = Window(text, self.seeds, own, first, first + 1 if opening else last)
            else:
                window.look(text)
            state = BlockState(step, first, last, self._lengths(own, last), settled[0][window.rows], self.model.shift)
            hidden, exact = self._forward(window, state)
            result = self._step(window, hidden, exact, wanted, number * _STEPS + step)
            settled = [settled[1], text.tokens != text.mask_id]
            if counted:
                left[alive] -= np.minimum(left[alive], wanted["num_select"])
                going = left[alive] > 0
            else:
                remaining, moved = (n.cpu().numpy() for n in (result.num_masked, result.num_transferred))
                without_masks[alive] += left[alive] == 0
                left[alive] = left[alive] - moved if opening else remaining
                # A step that moves nothing where it must: no token could be drawn, which the caller finds.
                stuck = (remaining > 0) & (moved == 0) & (decoder.measure != "random")
                going = (left[alive] > 0) & ~stuck
                going |= (left[alive] == 0) & (moved > 0) & decoder.refines(step, without_masks[alive])
            if self.eos_id is not None:
                self._look_for_eos(own)
                going &= ~self.stopped[own]
            if opening or not going.all():
                window = None
            alive = alive[going]

    def _lengths(self, rows: np.ndarray, end: np.ndarray) -> np.ndarray:
        """[n]: how much of each row's text there is while the window up to `end` is decoded."""
        lengths = self.text.lengths[rows]
        return lengths if self.decoder.whole_text else np.minimum(lengths, end)

    def _look_for_eos(self, rows: np.ndarray) -> None:
        """Stop the rows that have a generated eos_id and no mask before it."""
        text = self.text
        end = end_of_text(text.tokens[rows], text.given[rows], self.eos_id, text.mask_id)
        self.stopped[rows] = (end < text.spare).cpu().numpy()

    # --- the network -------------------------------------------------------------------------------------------------

    def _forward(self, window: Window, state: BlockState) -> tuple[Tensor, Tensor | None]:
        """Hidden states [n, width, hidden] of the window, and those of an exact pass if divergence is asked for."""
        positions = None if self.policy is None else self.policy.rows(state)
        hidden = self._pass(window, state.lengths, positions, self.cache)
        self.nfe += 1
        exact = None
        if self.divergence is not None and positions is not None:
            exact = self._pass(window, state.lengths, None, None)
        return hidden, exact

    def _pass(
        self, window: Window, text_lengths: np.ndarray, positions: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        """Hidden states of the window. Everything below the lengths is computed, or `positions` [n, seqlen] (-1 = none)
        over the cache."""
        text, rows, longest = self.text, window.rows, int(text_lengths.max())
        lengths = on_device(text_lengths, self.device)
        asked = (window.positions - int(self.model.shift)).clamp(min=0)  # whose output is about the window's tokens
        if positions is None:
            places = torch.arange(longest, device=self.device).expand(len(rows), -1)
            slots = torch.where(places < lengths[:, None], places, -1)
            column = asked.clamp(max=longest - 1)
        else:
            slots, places = positions, positions.clamp(min=0)
            columns = torch.arange(slots.shape[1], device=self.device).expand(len(rows), -1)
            column_of = torch.zeros(len(rows), text.spare + 1, dtype=torch.int64, device=self.device)
            column_of.scatter_(1, torch.where(slots < 0, text.spare, slots), columns)
            column = column_of.gather(1, asked)
        tokens, cache_rows = text.tokens[rows[:, None], places], rows
        host_lengths = text_lengths.tolist()
        if self.copies == 2:
            blank = torch.where(text.given[rows[:, None], places], text.mask_id, tokens)
            tokens, places, slots = torch.cat([tokens, blank]), places.repeat(2, 1), slots.repeat(2, 1)
            lengths, cache_rows = lengths.repeat(2), torch.cat([rows, rows + len(text.tokens)])
            host_lengths = 2 * host_lengths
        step = Step(lengths.int(), host_lengths=host_lengths)
        if cache is not None:
            seqused = (slots >= 0).sum(1, dtype=torch.int32)
            step = Step(lengths.int(), cache, slots.int(), seqused, cache_rows.int(), host_lengths=host_lengths)
        with self.forward_time:
            hidden = self.model.hidden(tokens, places, step)
        if self.copies == 2:  # the head is linear, so what holds for logits holds for hidden states
            seen, blank = hidden.chunk(2)
            hidden = blank + (self.decoder.guidance + 1) * (seen - blank)
        return hidden[torch.arange(len(rows), device=self.device)[:, None], column]

    # --- the tokens --------------------------------------------------------------------------------------------------

    def _step(
        self, window: Window, hidden: Tensor, exact: Tensor | None, wanted: dict[str, object], noise_step: int
    ) -> UnmaskSelect:
        """Draw tokens for the window's masks, and write those that `wanted` asks for into the text."""
        text, measure, shape = self.text, self.decoder.measure, window.positions.shape
        edits = "edit_threshold" in wanted
        select = {
            "mask_id": text.mask_id,
            "window_start": window.starts,
            "window_length": window.lengths,
            "seed": window.seeds,
            "step": noise_step,
            "editable": ~text.given[window.rows] if edits else None,
            "return_transfer_index": True,
            "backend": self.backend,
        }
        for name, value in wanted.items():
            select[name] = on_device(value, self.device) if isinstance(value, np.ndarray) else value
        tokens = text.tokens[window.rows]
        with self.sampling_time:
            if measure == "random":  # where first, then what
                select.setdefault("temperature", math.inf)
                anything, equal = torch.full(shape, text.other, device=self.device), hidden.new_zeros(shape).float()
                result = unmask_select(tokens, anything, equal, **select)
                masks = torch.where(result.transfer_index, text.mask_id, text.other)
                drawn = self._draw(window, hidden, masks, wanted, noise_step)
            else:
                drawn = self._draw(window, hidden, None if edits else window.tokens, wanted, noise_step)
                confidence = {"prob": drawn.prob, "margin": drawn.margin, "neg_entropy": drawn.entropy}[measure]
                if measure == "neg_entropy":
                    confidence = -confidence
                if "entropy_bound" in wanted:
                    select["entropy"] = drawn.entropy.view(shape)
                result = unmask_select(tokens, drawn.tokens.view(shape), confidence.view(shape), **select)
        changed = result.transfer_index
        self._write(text.tokens, window, changed, drawn.tokens)
        self._write(self.decode_step, window, changed, torch.full_like(drawn.tokens, self.index))
        if self.logprob is not None:
            self._write(self.logprob, window, changed, self._model_logprob(hidden, drawn, changed))
        if exact is not None:
            asked = window.tokens == text.mask_id
            self.divergence.add(self._logits(exact[asked]), self._logits(hidden[asked]))
        if self.progress is not None:
            self.progress(int((changed & (window.tokens == text.mask_id)).sum()))
        if self.callback is not None:
            row, column = changed.nonzero(as_tuple=True)
            info = window.rows[row], window.positions[row, column], drawn.tokens.view(shape)[row, column]
            self.callback(StepInfo(self.index, "diffusion", *info))
        self.index += 1
        return result

    def _write(self, to: Tensor, window: Window, changed: Tensor, values: Tensor) -> None:
        """to[row, position] = value where something changed; the rest lands in the spare column."""
        places = torch.where(changed, window.positions, self.text.spare)
        to[window.rows[:, None], places] = values.view(places.shape)
        if to is self.text.tokens:
            to[:, self.text.spare] = self.text.mask_id

    def _draw(
        self, window: Window, hidden: Tensor, tokens: Tensor | None, wanted: dict[str, object], noise_step: int
    ) -> UnmaskSample:
        """Draws [n * width] for the masks of tokens [n, width], or for every column."""
        model, decoder, width = self.model, self.decoder, hidden.shape[1]
        options = {
            name: value[window.rows].repeat_interleave(width) if isinstance(value, Tensor) else value
            for name, value in self.options.items()
        }
        options |= {
            "tokens": None if tokens is None else tokens.flatten(),
            "mask_id": self.text.mask_id,
            "filter_order": decoder.filter_order,
            "statistics": self.statistics,
            "seed": window.token_seeds,
            "positions": window.positions.flatten(),
            "step": noise_step,
            "logit_softcap": model.logit_softcap,
            "return_logprob": self.logprob is not None,
            "return_prob": decoder.measure == "prob",
            "return_margin": decoder.measure == "margin",
            "return_entropy": decoder.measure == "neg_entropy" or "entropy_bound" in wanted,
            "backend": self.backend,
        }
        flat = hidden.flatten(0, 1)
        if model.head_weight is None:
            if len(self.suppressed):
                flat = flat.index_fill(1, self.suppressed, -math.inf)
            return unmask_sample_from_logits(flat, **options)
        return unmask_sample(flat, model.head_weight, self.head_bias, **options)

    def _model_logprob(self, hidden: Tensor, drawn: UnmaskSample, changed: Tensor) -> Tensor:
        """Log-probabilities [n * width] of the drawn tokens at temperature 1 without filters, where changed."""
        if self.statistics == "model":
            return drawn.logprob
        model, mask_id, flat = self.model, self.text.mask_id, hidden.flatten(0, 1)
        targets = torch.where(changed.flatten() & (drawn.tokens != mask_id), drawn.tokens, -100)
        if model.head_weight is None:
            logprob = self._logits(flat).log_softmax(-1).gather(1, targets.clamp(min=0)[:, None])[:, 0]
            return torch.where(targets < 0, 0.0, logprob)
        options = {"mask_id": mask_id, "logit_softcap": model.logit_softcap or 0.0, "backend": self.backend}
        return -masked_cross_entropy(flat, model.head_weight, targets, bias=self.head_bias, **options)

    def _logits(self, hidden: Tensor) -> Tensor:
        """[n, vocab] float32, without the mask's column."""
        model = self.model
        if model.head_weight is not None:
            hidden = torch.nn.functional.linear(hidden, model.head_weight, self.head_bias)
        logits = hidden.float()
        if model.logit_softcap is not None:
            logits = model.logit_softcap * torch.tanh(logits / model.logit_softcap)
        never = torch.cat([self.suppressed, self.suppressed.new_tensor([self.text.mask_id])])
        return logits.index_fill(1, never, -1e30)  # as good as -inf, whose differences are NaN
