"""Compiled kernels for masked-diffusion language models.

Ops: attention, attention_with_kvcache, unmask_sample, unmask_sample_from_logits, merge_vocab_shards,
unmask_select, fused_linear, add_norm, masked_cross_entropy.
Around them: generate (any model, decoder and cache), decoders, masks (rank-integer masks), KVCache, models (networks,
checkpoints), samplers (Eso-LM, MDLM, BD3-LM, AR).
"""

import torch as _torch  # noqa: F401  (first: the kernels share its OpenMP runtime)

from esokern import decoders, masks
from esokern.add_norm import add_norm
from esokern.attention import attention
from esokern.attention_with_kvcache import attention_with_kvcache
from esokern.backend import built_isas, get_isa, set_isa, supported_isas
from esokern.fused_linear import fused_linear
from esokern.generate import generate
from esokern.kv_cache import KVCache
from esokern.masked_cross_entropy import masked_cross_entropy
from esokern.masks import RankMask
from esokern.unmask_sample import UnmaskSample, merge_vocab_shards, unmask_sample, unmask_sample_from_logits
from esokern.unmask_select import UnmaskSelect, unmask_select

__version__ = "0.1.0"

__all__ = [
    "KVCache",
    "RankMask",
    "UnmaskSample",
    "UnmaskSelect",
    "add_norm",
    "attention",
    "attention_with_kvcache",
    "built_isas",
    "decoders",
    "fused_linear",
    "generate",
    "get_isa",
    "masked_cross_entropy",
    "masks",
    "merge_vocab_shards",
    "set_isa",
    "supported_isas",
    "unmask_sample",
    "unmask_sample_from_logits",
    "unmask_select",
]
