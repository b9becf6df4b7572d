"""Decoders and caches for `esokern.generate`.

Of bidirectional networks, whose caches are approximate: LLaDA, FastDLLM, Dream, EntropyBound, FirstHitting,
BlockRefinement and JointThreshold (LLaDA2.x); Prefix, Dual, Delayed. Of this package's networks: EsoLM, BD3LM and
Autoregressive, whose caches are exact, and MDLM.
"""

from esokern.decoders.base import Decoder
from esokern.decoders.caches import Delayed, Dual, Prefix
from esokern.decoders.dream import Dream
from esokern.decoders.entropy_bound import EntropyBound
from esokern.decoders.first_hitting import FirstHitting
from esokern.decoders.llada import FastDLLM, LLaDA
from esokern.decoders.llada2 import BlockRefinement, JointThreshold
from esokern.decoders.native import BD3LM, MDLM, Autoregressive, EsoLM, Native

__all__ = [
    "BD3LM",
    "MDLM",
    "Autoregressive",
    "BlockRefinement",
    "Decoder",
    "Delayed",
    "Dream",
    "Dual",
    "EntropyBound",
    "EsoLM",
    "FastDLLM",
    "FirstHitting",
    "JointThreshold",
    "LLaDA",
    "Native",
    "Prefix",
]
