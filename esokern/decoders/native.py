"""Decoders of this package's own networks whose order of decoding makes their caches exact: settings for `samplers`."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from esokern.decoders.base import PER_ROW
from esokern.samplers import autoregressive, bd3lm, esolm, mdlm
from esokern.samplers.run import Option, per_row

if TYPE_CHECKING:
    from esokern.models.network import FoldedNetwork
    from esokern.samplers.run import GenerationResult


@dataclass(frozen=True, kw_only=True)
class Native:
    """A sampler of `esokern.samplers` with its settings; the fields are that sampler's arguments."""

    temperature: Option = 1.0
    top_k: Option = None
    top_p: Option = None
    min_p: Option = None

    exact_cache: ClassVar[bool] = True  # does the order of decoding make one possible?

    def of_rows(self, rows: torch.Tensor, batch: int) -> Native:
        """The settings of some rows of a batch."""
        options = {name: per_row(name, getattr(self, name), batch) for name in PER_ROW}
        return replace(self, **{name: v[rows] for name, v in options.items() if isinstance(v, torch.Tensor)})

    def generate(self, network: FoldedNetwork, tokens: Any, cached: bool, **common: Any) -> GenerationResult:
        """`samplers.<name>.generate` with these settings."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class EsoLM(Native):
    """Eso-LM (B): a parallel phase in random order, then left to right (samplers.esolm)."""

    alpha_0: float = 0.25
    num_steps: float = math.inf

    def generate(self, network: FoldedNetwork, tokens: Any, cached: bool, **common: Any) -> GenerationResult:
        return esolm.generate(network, tokens, cached=cached, **asdict(self), **common)


@dataclass(frozen=True, kw_only=True)
class BD3LM(Native):
    """BD3-LM: blocks from left to right (samplers.bd3lm)."""

    block_size: int = 16
    num_steps: float = 16

    def generate(self, network: FoldedNetwork, tokens: Any, cached: bool, **common: Any) -> GenerationResult:
        return bd3lm.generate(network, tokens, cached=cached, **asdict(self), **common)


@dataclass(frozen=True, kw_only=True)
class Autoregressive(Native):
    """Left to right, one token a step (samplers.autoregressive). start_token: before a text with no given beginning."""

    start_token: int = 0

    def generate(self, network: FoldedNetwork, tokens: Any, cached: bool, **common: Any) -> GenerationResult:
        return autoregressive.generate(network, tokens, cached=cached, **asdict(self), **common)


@dataclass(frozen=True, kw_only=True)
class MDLM(Native):
    """MDLM's ancestral sampler, for a bidirectional network (samplers.mdlm)."""

    num_steps: float = 128

    exact_cache: ClassVar[bool] = False

    def generate(self, network: FoldedNetwork, tokens: Any, cached: bool, **common: Any) -> GenerationResult:
        return mdlm.generate(network, tokens, **asdict(self), **common)
