"""Samplers over one network: each takes a FoldedNetwork and tokens, and returns a GenerationResult."""

from esokern.samplers import autoregressive, bd3lm, esolm, mdlm, schedule

__all__ = ["autoregressive", "bd3lm", "esolm", "mdlm", "schedule"]
