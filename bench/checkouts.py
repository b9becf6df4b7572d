"""Models of other repositories at any size with random weights, out of the user's own checkouts of them.

    git clone https://github.com/NVlabs/Fast-dLLM           # LLaDA and Dream, with their samplers
    git clone https://github.com/s-sahoo/Eso-LMs
    git clone https://github.com/kuleshov-group/bd3lms
    git clone https://github.com/kuleshov-group/setdlms

They need torch, transformers (4.46 to 4.49), einops, omegaconf and hydra-core. What their files import and sampling
never calls (lightning, timm, data loaders, metrics, flash_attn) is stood in for. Nothing else of them is changed, but
that caches which are hard-coded to be bfloat16 on a GPU are made where and in the dtype the model is.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers  # noqa: F401  which looks for the packages that are stood in for, so before them

VOCAB = 512


class _Anything:
    """Takes any arguments, any attribute, and does nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()

    def __call__(self, *args: object, **kwargs: object) -> Any:
        return _Anything()


class _LightningModule(torch.nn.Module):
    """What samplers use of lightning's class."""

    def save_hyperparameters(self) -> None:
        pass

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


class _StandIn(types.ModuleType):
    """A module that has every name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _LightningModule if name == "LightningModule" else type(name, (_Anything,), {})


def _found(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of a parent
        return False


@contextlib.contextmanager
def _imports(folder: Path, not_called: tuple[str, ...] = (), own_not_called: tuple[str, ...] = ()) -> Iterator[None]:
    """Imports come from a checkout; afterwards its module names are free again, since others have the same ones.

    not_called: packages that are stood in for if they are not installed; own_not_called: modules of the checkout.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: not there; bench/checkouts.py says where to get it")
    missing = [name for name in not_called if not _found(name)] + list(own_not_called)
    parents = {name.rsplit(".", i)[0] for name in missing for i in range(1, name.count(".") + 1)}
    stand_ins = {name: _StandIn(name) for name in missing + [name for name in parents if not _found(name)]}
    before = dict(sys.modules)
    sys.modules.update(stand_ins)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name, module in list(sys.modules.items()):
            if name in stand_ins or str(getattr(module, "__file__", None) or "").startswith(str(folder)):
                del sys.modules[name]
        sys.modules.update({name: module for name, module in before.items() if name not in sys.modules})


def with_random_weights(model: torch.nn.Module, seed: int = 0, std: float = 0.03) -> torch.nn.Module:
    """Nothing zero, as after training, and no dropout."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=std, generator=generator)
    return model.eval()


def llada(
    root: Path, *, hidden: int, layers: int, heads: int, kv_heads: int | None = None, length: int, vocab: int = VOCAB
) -> Any:
    """LLaDA (Fast-dLLM's file) and its module of samplers."""
    with _imports(root / "Fast-dLLM" / "llada"):
        config = importlib.import_module("model.configuration_llada").LLaDAConfig(
            d_model=hidden,
            n_heads=heads,
            n_kv_heads=kv_heads or heads,
            n_layers=layers,
            mlp_hidden_size=4 * hidden,
            max_sequence_length=length,
            vocab_size=vocab,
            embedding_size=vocab,
            mask_token_id=vocab - 1,
            eos_token_id=vocab - 2,
            pad_token_id=vocab - 2,
            block_type="llama",
            activation_type="silu",
            layer_norm_type="rms",
            rms_norm_eps=1e-5,
            rope=True,
            rope_full_precision=True,
            include_bias=False,
            weight_tying=False,
            attention_dropout=0.0,
            embedding_dropout=0.0,
            residual_dropout=0.0,
            init_device="cpu",
        )
        config.use_cache = False
        model = importlib.import_module("model.modeling_llada").LLaDAModelLM(config, init_params=True)
        samplers = importlib.import_module("generate")
    return with_random_weights(model), samplers


def dream(root: Path, *, hidden: int, layers: int, heads: int, kv_heads: int, length: int, vocab: int = VOCAB) -> Any:
    """Dream (Fast-dLLM's file), which samples by its own method `diffusion_generate`."""
    with _imports(root / "Fast-dLLM" / "dream"):
        config = importlib.import_module("model.configuration_dream").DreamConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=length,
            mask_token_id=vocab - 1,
            pad_token_id=vocab - 2,
        )
        model = importlib.import_module("model.modeling_dream").DreamModel(config)
        model.generation_config = importlib.import_module("model.generation_utils").DreamGenerationConfig()
    return with_random_weights(model)


class _Tokenizer:
    """What samplers ask of a tokenizer: the last id but one is bos and eos, the last the mask."""

    mask_token = "[MASK]"

    def __init__(self, vocab: int) -> None:
        self.vocab_size = vocab
        self.bos_token_id = self.eos_token_id = vocab - 2
        self.mask_token_id = vocab - 1

    def __len__(self) -> int:
        return self.vocab_size


_NOT_SAMPLING = (("lightning", "timm.scheduler", "hydra.utils", "flash_attn.layers.rotary"), ("dataloader", "metrics"))


def esolm(
    root: Path,
    *,
    hidden: int,
    layers: int,
    heads: int,
    length: int,
    vocab: int = VOCAB,
    steps: int = 16,
    alpha_0: float = 1.0,
    diffusion_attn_mode: str = "causal",
    sequential_attn_mode: str = "causal",
    causal: bool = False,
) -> Any:
    """Eso-LM, or with `causal` AR: the whole algorithm object, `backbone` and `generate_samples` among it."""
    from omegaconf import OmegaConf

    with _imports(root / "Eso-LMs", *_NOT_SAMPLING):
        algo = importlib.import_module("algo")
        config = {
            "algo": {
                "name": "ar" if causal else "esolm",
                "backbone": "dit" if causal else "esolm_dit",
                "parameterization": "ar" if causal else "subs",
                "causal_attention": causal,
                "time_conditioning": False,
                "prepend_token": "none",
                "T": 0,
                "subs_masking": False,
                "alpha_0": alpha_0,
                "batch_split": 1.0,
                "diffusion_shuffle": True,
                "diffusion_attn_mode": diffusion_attn_mode,
                "sequential_shuffle": True,
                "sequential_attn_mode": sequential_attn_mode,
                "loss_type": "elbo",
            },
            "model": _dit_size(hidden, layers, heads, length) | {"scale_by_sigma": True},
            "attn": {"dynamic_shape": True},
            "prior": {"type": "none"},
            "sampling": {
                "predictor": "ancestral",
                "noise_removal": "none",
                "steps": steps,
                "p_nucleus": 1.0,
                "kv_cache": True,
                "profile_throughput": False,
                "subcontext_len": 0,
            },
            "training": {"ema": 0.0, "antithetic_sampling": True, "sampling_eps": 1e-3},
            "eval": {"gen_ppl_eval_model_name_or_path": "", "perplexity_batch_size": 1, "num_iw_orders": 0},
            "optim": {"lr": 3e-4},
        }
        model = (algo.AR if causal else algo.EsoLM)(OmegaConf.create(config), _Tokenizer(vocab))
    return with_random_weights(model)


def _dit_size(hidden: int, layers: int, heads: int, length: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "cond_dim": 128,
        "length": length,
        "n_blocks": layers,
        "n_heads": heads,
        "dropout": 0.0,
        "tie_word_embeddings": False,
    }


def bd3lm(
    root: Path,
    *,
    hidden: int,
    layers: int,
    heads: int,
    length: int,
    block_size: int,
    vocab: int = VOCAB,
    attn_backend: str = "sdpa",
    kv_cache: bool = True,
) -> Any:
    """BD3-LM: the whole algorithm object, `backbone` and `_semi_ar_sampler` among it."""
    from omegaconf import OmegaConf

    with _imports(root / "bd3lms", *_NOT_SAMPLING):
        diffusion = importlib.import_module("diffusion")
        config = {
            "algo": {
                "name": "bd3lm",
                "backbone": "dit",
                "parameterization": "subs",
                "time_conditioning": False,
                "T": 0,
                "sampler": "semi_ar",
                "cross_attn": True,
                "ignore_bos": True,
                "mdlm_loss_scale": False,
                "var_min": False,
            },
            "mode": "train",
            "block_size": block_size,
            "model": _dit_size(hidden, layers, heads, length) | {"attn_backend": attn_backend},
            "loader": {"eval_batch_size": 1},
            "noise": {"type": "loglinear"},
            "sampling": {"kv_cache": kv_cache, "nucleus_p": 1.0, "first_hitting": True, "var_length": False},
            "training": {"ema": 0.0, "antithetic_sampling": True},
        }
        model = diffusion.Diffusion(OmegaConf.create(config), _Tokenizer(vocab))

    def reset_kv_cache(eval_batch_size: int = 1) -> None:
        for block in model.backbone.blocks:
            block.kv_cache = torch.zeros(
                eval_batch_size, model.backbone.max_seqlen, 3 * hidden, device=model.device, dtype=model.dtype
            )
            block.cache_idx = 0

    model.backbone.reset_kv_cache = reset_kv_cache
    return with_random_weights(model)


def set_diffusion(
    root: Path,
    *,
    hidden: int,
    layers: int,
    heads: int,
    length: int,
    block_size: int = 4,
    vocab: int = VOCAB,
    causal: bool = False,
) -> Any:
    """Set Diffusion: the denoiser, `backbone` and `generate` among it, and its class of generation settings."""
    with _imports(root / "setdlms", ("flash_attn.layers.rotary", "transformers.models.qwen3.modeling_qwen3")):
        diffusion = importlib.import_module("src.denoiser.diffusion")
        noise = {
            "_target_": "src.noise_schedule.noise_schedules.StaggeredNoise",
            "eps": 1e-3,
            "block_size": length,
            "desired_block_size": block_size,
            "max_block_size": 2 * block_size,
            "length": length,
        }
        backbone = {
            "_target_": "src.backbone.dit.DIT",
            "length": length,
            "causal_attention": causal,
            "adaln": False,
            "hidden_size": hidden,
            "cond_dim": 128,
            "n_heads": heads,
            "num_layers": layers,
            "dropout": 0.0,
            "tie_word_embeddings": False,
            "attn_backend": "sdpa",
            "vocab_size": vocab,
            "block_size": length,
            "pretrained_model_name_or_path": None,
        }
        config = diffusion.BD3LMConfig(
            length=length,
            backbone_config=backbone,
            noise_config=noise,
            tokenization_config={
                "vocab_size": vocab,
                "mask_token_id": vocab - 1,
                "pad_token_id": vocab - 1,
                "bos_token_id": vocab - 2,
                "eos_token_id": vocab - 2,
            },
            attn_backend="sdpa",
            block_size=length,
        )
        model = diffusion.SetDLM(config, tokenizer=_Tokenizer(vocab))
        settings = diffusion.SetDiffusionGenerationConfig(
            block_size=length,
            max_window_size=2 * block_size,
            sampling_strategy="predict_and_noise",
            noise_removal=False,
            confidence_based_noising=True,
            align_inputs_to_blocks=False,
            use_cache=True,
        )
    return with_random_weights(model), settings
