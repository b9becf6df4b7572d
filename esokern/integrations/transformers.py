"""Models of Hugging Face transformers on the attention of this package.

    from esokern.integrations import transformers as integration

    integration.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="esokern")

`register` enters the op under the name "esokern" where transformers looks up attention and masks. A mask is made once
per forward, as integers, and given to every layer. What cannot be served raises, and says what to use instead.

`TransformersDenoiser` makes a denoiser of a model: its hidden states in a step that sees both directions, with or
without a cache of keys and values in text order.
"""

from __future__ import annotations

import inspect
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from esokern.integrations.transformers_attention import ActiveStep, activated, attention_forward, denoising_step
from esokern.integrations.transformers_masks import attention_mask
from esokern.kv_cache import KVCache
from esokern.models.denoiser import Step

__all__ = ["NAME", "TransformersDenoiser", "denoising_step", "register"]

NAME = "esokern"


def register() -> None:
    """Make `attn_implementation="esokern"` and `model.set_attn_implementation("esokern")` work. Idempotent."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)


class TransformersDenoiser:
    """A causal or masked language model of transformers as a denoiser that sees both directions.

    Attributes:
        model: as given; its attention implementation is switched for the time of a call and put back.
        vocab_size, device, dtype: of its LM head, its input and its hidden states.
        head_weight [vocab_size, hidden], head_bias [vocab_size] or None, logit_softcap (float or None):
            logits = cap(hidden @ head_weight.T + head_bias), cap(x) = logit_softcap * tanh(x / logit_softcap).
        shift: is row i of the hidden states about token i + 1, as in models that were autoregressive ones (Dream)?
            Default: what config.shift_logits says, else False.

    The model is run once over two tokens to see how it is built. Raises TypeError or ValueError for one without a
    linear LM head, whose logits are more than the above, whose positions do not begin at 0, or whose layers do not all
    take their attention from the AttentionInterface of transformers.
    """

    def __init__(self, model: PreTrainedModel, *, shift: bool | None = None) -> None:
        register()
        if not isinstance(model, PreTrainedModel):
            raise TypeError(f"TransformersDenoiser: model: must be a PreTrainedModel, got {type(model).__name__}")
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear) or model.base_model is model:
            raise TypeError(
                "TransformersDenoiser: model: must be a base model with a linear LM head (AutoModelForCausalLM, "
                f"AutoModelForMaskedLM), {type(model).__name__} is {type(model.base_model).__name__} with "
                f"{type(head).__name__}"
            )
        self.model = model
        self.shift = getattr(model.config, "shift_logits", False) if shift is None else shift
        self.head_weight, self.head_bias = head.weight, head.bias
        self.vocab_size = head.weight.shape[0]
        self.device, self.dtype = model.base_model.device, head.weight.dtype
        self.logit_softcap = getattr(model.config, "final_logit_softcapping", None)
        self._before_head = _before_head(model)
        named = inspect.signature(model.base_model.forward).parameters
        tables = [m for name, m in model.named_modules() if name.endswith("position_embeddings")]
        if "position_ids" not in named or any(getattr(m, "padding_idx", None) is not None for m in tables):
            raise ValueError(
                f"TransformersDenoiser: model: must take position_ids that begin at 0, {type(model).__name__} does not"
            )
        self._options = {"use_cache": False} if "use_cache" in named else {}
        configs = {id(m.config): m.config for m in model.base_model.modules() if isinstance(m, PreTrainedModel)}
        self._configs = list(configs.values())
        # Models make no mask of their own out of one that has four dimensions.
        self._any_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)
        self._layers = self._look_at_model()

    def new_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache in text order: row p of a batch row is position p, for `length` positions."""
        sizes = {layer[1:] for layer in self._layers}
        if len(sizes) > 1 or sorted(layer[0] for layer in self._layers) != list(range(len(self._layers))):
            raise ValueError(
                f"TransformersDenoiser.new_cache: {type(self.model).__name__}: layers must be numbered and have one "
                f"size of keys, got (layer_idx, kv_heads, head_dim, dtype) {self._layers}; go without a cache"
            )
        kv_heads, head_dim, dtype = sizes.pop()
        return KVCache(len(self._layers), batch, length, kv_heads, head_dim, dtype=dtype, device=self.device)

    def hidden(self, tokens: Tensor, positions: Tensor, step: Step) -> Tensor:
        """[batch, seqlen, hidden]: what the LM head takes, for int64 tokens and positions [batch, seqlen].

        With step.cache the keys and values of the tokens go to their slots in it; gradients must not be needed then.
        """
        with denoising_step(step, positions=positions):
            return self._before_head(self._run(self.model.base_model, tokens, positions)[0])

    def _run(self, network: PreTrainedModel, tokens: Tensor, positions: Tensor) -> Any:
        """What the model, or the part of it before the head, returns in the active step."""
        before = [config._attn_implementation for config in self._configs]
        for config in self._configs:
            config._attn_implementation = NAME
        try:
            return network(tokens, attention_mask=self._any_mask, position_ids=positions, **self._options)
        finally:
            for config, name in zip(self._configs, before, strict=True):
                config._attn_implementation = name

    @torch.no_grad()
    def _look_at_model(self) -> list[tuple]:
        """Run it once and hold it to what this class says of it; returns what its layers' keys are."""
        positions = torch.arange(2, device=self.device)[None]
        probe = _Probe(Step(torch.full((1,), 2, dtype=torch.int32, device=self.device)), positions)
        name, config = type(self.model).__name__, self.model.base_model.config
        last: list[Tensor] = []
        keep_last = self.model.base_model.register_forward_hook(lambda module, args, output: last.append(output[0]))
        with activated(probe), keep_last:
            logits = self._run(self.model, positions % self.vocab_size, positions).logits.float()
        layers = getattr(config, "num_hidden_layers", None)
        if len(probe.layers) != layers:
            raise ValueError(
                f"TransformersDenoiser: model: {len(probe.layers)} of the {layers} layers of {name} take their "
                "attention from the AttentionInterface of transformers; all must"
            )
        kinds = getattr(config, "layer_types", None) or []
        windows = sum(kind == "sliding_attention" for kind in kinds)
        if set(kinds) - {"full_attention", "sliding_attention"} or windows > probe.windows:
            raise ValueError(
                f"TransformersDenoiser: model: layers of {name} must be full attention or say their sliding window, "
                f"got {sorted(set(kinds))}"
            )
        linear = nn.functional.linear(self._before_head(last[0]), self.head_weight, self.head_bias)
        capped = linear.float()
        if self.logit_softcap is not None:
            capped = self.logit_softcap * torch.tanh(capped / self.logit_softcap)
        error, size = (capped - logits).abs().max().item(), logits.abs().max().item()
        if not error <= 4 * torch.finfo(linear.dtype).eps * size:
            raise ValueError(
                f"TransformersDenoiser: model: the logits of {name} are more than a linear layer of its hidden states "
                f"(they differ by {error:.3g}, the largest is {size:.3g})"
            )
        return probe.layers


class _Probe(ActiveStep):
    """An active step that notes the layers that ask."""

    def __init__(self, step: Step, positions: Tensor) -> None:
        super().__init__(step, positions)
        self.layers: list[tuple] = []
        self.windows = 0

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scale: float | None, sliding: int | None):
        self.layers.append((getattr(module, "layer_idx", -1), *k.shape[2:], k.dtype))
        self.windows += sliding is not None
        return super().attend(module, q, k, v, scale, sliding)


def _before_head(model: PreTrainedModel) -> nn.Module:
    """What a masked language model does to its last hidden states before the linear head (ModernBERT, BERT)."""
    for path in ("head", "cls.predictions.transform"):
        with suppress(AttributeError):
            return model.get_submodule(path)
    return nn.Identity()
