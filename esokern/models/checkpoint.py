"""Reading and writing networks: safetensors folders, single files, and Lightning ``.ckpt`` files of the published runs.

A folder holds ``model.safetensors`` (or shards) and ``config.json``. No file is trusted: pickled code never runs, and
whatever does not fit is reported by the names of the first tensors that differ.
"""

from __future__ import annotations

import json
import os
import pickle
import types
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from esokern.models.network import Network, NetworkConfig, rotary_frequencies

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
PREFIX = "backbone."
# Tables some published models store beside their parameters; computed here instead.
_TABLES = ("block_diff_mask", "sampling_eps_min", "sampling_eps_max")
# Other names the published config files use.
_ALIASES = {"hidden_dim": "hidden_size", "model_length": "length"}
_SHOWN = 5  # names per kind of mismatch in an error


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Call `write(temporary)`, flush to disk, rename to `path`: a crash leaves the old file or the new one, whole."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.chmod(temporary, 0o644)  # some writers leave files that only their owner can read
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load_checkpoint(
    path: str | Path,
    *,
    n_heads: int | None = None,
    length: int | None = None,
    ema: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Network:
    """A network in evaluation mode, on the CPU.

    Args:
        path: a folder with safetensors and perhaps a ``config.json``, a ``.safetensors`` file (a ``config.json`` beside
            it is read), or a torch ``.ckpt`` / ``.pt`` file of Lightning or of `esokern.train`.
        n_heads: needed only where neither a config nor a rotary table says it; default there: heads of 64.
        length: context length, where no config says it; default there: 1024.
        ema: take the averaged weights of a torch file that has them (as the published samplers do).
        dtype: of the parameters.

    Raises:
        ValueError: the file is missing, truncated, corrupt, or its tensors are not those of such a network.
    """
    source = Path(path)
    if source.is_dir():
        tensors, config = _read_safetensors_folder(source), _read_config(source / CONFIG)
    elif not source.is_file():
        raise ValueError(f"no checkpoint at {source}")
    elif source.suffix == ".safetensors":
        tensors, config = _read_safetensors(source), _read_config(source.parent / CONFIG)
    else:
        tensors, config = _read_torch(source, ema)
    tensors = _strip(tensors)
    try:
        if config is None:
            config = _infer(tensors, n_heads, length)
        network_config = NetworkConfig.from_dict(config)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{source}: the settings of the network are not usable: {error}") from error
    return _build(network_config, tensors, source).to(dtype).eval()


def save_checkpoint(
    network: Network, folder: str | Path, *, dtype: torch.dtype | None = None, extra: Mapping[str, Any] | None = None
) -> None:
    """Write ``model.safetensors`` (published names) and ``config.json`` into `folder`, each file whole or not at all.

    dtype: storage type of the parameters; default: as they are. The rotary table stays float32.
    extra: further JSON fields of the config, beside "network".
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, tensor in network.state_dict().items():
        stored = torch.float32 if name.endswith("inv_freq") else dtype or tensor.dtype
        tensors[name] = tensor.detach().to("cpu", stored).contiguous()
    config = {"format": "esokern", "network": network.config.to_dict(), **dict(extra or {})}
    write_atomically(target / WEIGHTS, lambda file: save_file(tensors, file, metadata={"format": "pt"}))
    write_atomically(target / CONFIG, lambda file: file.write_text(json.dumps(config, indent=1) + "\n"))


def read_config(path: str | Path) -> dict[str, Any]:
    """The whole ``config.json`` of a folder, {} if it has none."""
    file = Path(path) / CONFIG
    return _read_json(file) if file.is_file() else {}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds a {type(values).__name__}; a JSON object is needed")
    return values


def _read_config(file: Path) -> dict[str, Any] | None:
    """Network settings from our own config.json or a published one; None if it does not hold them."""
    if not file.is_file():
        return None
    values = _read_json(file)
    if "network" in values:
        return values["network"]
    values = {_ALIASES.get(name, name): value for name, value in values.items()}
    needed = ("vocab_size", "hidden_size", "n_blocks", "n_heads", "length")
    if not all(name in values for name in needed):
        return None
    known = (*needed, "cond_dim", "adaln", "dropout")
    return {name: values[name] for name in known if name in values}


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a whole safetensors file (truncated or corrupt): {error}") from error


def _read_safetensors_folder(folder: Path) -> dict[str, Tensor]:
    files = [folder / WEIGHTS] if (folder / WEIGHTS).is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"no .safetensors file in {folder}")
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors.update(_read_safetensors(file))
    return tensors


def _strip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without the `backbone.` that published files put in front; what such files hold besides is dropped."""
    if any(name.startswith(PREFIX) for name in tensors):
        tensors = {name[len(PREFIX) :]: t for name, t in tensors.items() if name.startswith(PREFIX)}
    return {name: t for name, t in tensors.items() if not name.endswith(_TABLES)}


def _infer(tensors: Mapping[str, Tensor], n_heads: int | None, length: int | None) -> dict[str, Any]:
    """Network settings from tensor shapes."""
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    for name in ("vocab_embed.embedding", "blocks.0.attn_qkv.weight", "blocks.0.mlp.0.weight"):
        if len(shapes.get(name, ())) != 2:
            found = ", ".join(list(shapes)[:_SHOWN]) or "nothing"
            raise ValueError(f"{name} is missing or no matrix, so this is not such a network; the file holds {found}")
    vocab_size, hidden_size = shapes["vocab_embed.embedding"]
    block_ids = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
    if n_heads is None and "rotary_emb.inv_freq" in shapes:
        n_heads = hidden_size // (2 * shapes["rotary_emb.inv_freq"][0])
    if n_heads is None:
        if hidden_size % 64:
            raise ValueError(f"hidden_size {hidden_size} is no multiple of 64; pass n_heads")
        n_heads = hidden_size // 64
    adaln = "sigma_map.mlp.0.weight" in shapes
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "n_blocks": len(block_ids),
        "n_heads": n_heads,
        "length": 1024 if length is None else length,
        "cond_dim": shapes["sigma_map.mlp.0.weight"][0] if adaln else 1,
        "adaln": adaln,
        "mlp_ratio": shapes["blocks.0.mlp.0.weight"][0] // hidden_size,
    }


def _build(config: NetworkConfig, tensors: dict[str, Tensor], source: Path) -> Network:
    """The network with `tensors` in it, or ValueError naming the first that differ."""
    with torch.device("meta"):  # no memory, no random weights
        network = Network(config)
    wanted = {name: tuple(t.shape) for name, t in network.state_dict().items()}
    missing = [name for name in wanted if name not in tensors and name != "rotary_emb.inv_freq"]
    unexpected = [name for name in tensors if name not in wanted]
    shapes = [
        f"{name} is {tuple(tensors[name].shape)}, not {shape}"
        for name, shape in wanted.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    kinds = [
        f"{kind}: {', '.join(names[:_SHOWN])}" + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("shape", shapes))
        if names
    ]
    if kinds:
        raise ValueError(f"{source} does not hold a network of {config}. {'; '.join(kinds)}")
    broken = [name for name, t in tensors.items() if not t.is_floating_point() or not t.isfinite().all()]
    if broken:
        raise ValueError(f"{source} holds values that are no finite numbers in {', '.join(broken[:_SHOWN])}")
    tensors = {"rotary_emb.inv_freq": rotary_frequencies(config.head_dim, config.rope_base)} | tensors
    network.load_state_dict({name: t.float() for name, t in tensors.items()}, assign=True)
    return network


# --- torch files ----------------------------------------------------------------------------------------------------


def _read_torch(file: Path, ema: bool) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    content = _load_without_code(file)
    if not isinstance(content, dict):
        raise ValueError(
            f"{file} holds a {type(content).__name__}; a dict of tensors or a Lightning checkpoint is needed"
        )
    state = content.get("state_dict", content)
    if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ValueError(f"{file} has no plain state_dict of tensors. {_HOW_TO_CONVERT}")
    tensors = dict(state)
    if ema and content.get("ema") is not None:
        tensors.update(_averaged(content["ema"], tensors, file))
    config = content.get("network_config")
    return tensors, config if isinstance(config, dict) else None


def _averaged(ema: Any, state: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """The averaged parameters by name. The file lists them without names, in the order of the state dict."""
    shadow = ema.get("shadow_params") if isinstance(ema, Mapping) else None
    if not isinstance(shadow, (list, tuple)) or not all(isinstance(t, Tensor) for t in shadow):
        raise ValueError(f"{file}: `ema` has no list of tensors `shadow_params`; ema=False takes the plain weights")
    prefixed = any(name.startswith(PREFIX) for name in state)
    names = [
        name
        for name in state
        if name.startswith(PREFIX if prefixed else "") and not name.endswith(("inv_freq", *_TABLES))
    ]
    if len(names) != len(shadow):
        raise ValueError(f"{file}: `ema` holds {len(shadow)} tensors for {len(names)} parameters")
    for name, tensor in zip(names, shadow, strict=True):
        if tensor.shape != state[name].shape:
            raise ValueError(
                f"{file}: `ema` does not follow the parameters' order: {name} is {tuple(state[name].shape)}, "
                f"its average {tuple(tensor.shape)}"
            )
    return dict(zip(names, shadow, strict=True))


_HOW_TO_CONVERT = (
    "Where you trust the file, load it with the code that made it and save the tensors alone: "
    "safetensors.torch.save_file({n: t.contiguous() for n, t in model.state_dict().items()}, 'model.safetensors')"
)


def _load_without_code(file: Path) -> Any:
    """The content of a torch file. Objects other than tensors and plain containers come back as inert placeholders."""
    if not zipfile.is_zipfile(file):
        raise ValueError(
            f"{file} is not a whole torch file of the zip format (truncated, corrupt or older). {_HOW_TO_CONVERT}"
        )
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        pass  # holds other objects, such as a training configuration
    except (RuntimeError, EOFError, OSError, KeyError) as error:
        raise ValueError(f"{file} is corrupt: {error}") from error
    try:
        return torch.load(file, map_location="cpu", weights_only=False, pickle_module=_INERT_PICKLE)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{file} cannot be read without executing code it contains: {error}. {_HOW_TO_CONVERT}"
        ) from error


class _Placeholder:
    """Stands for an object of a class that is not imported; takes whatever pickle does to it and keeps nothing."""

    def __new__(cls, *_args, **_kwargs):
        return super().__new__(cls)

    def __init__(self, *_args, **_kwargs):
        pass

    def __call__(self, *_args, **_kwargs):
        return self

    def __setstate__(self, _state):
        pass

    def __setitem__(self, _key, _value):
        pass

    def append(self, _value):
        pass

    def extend(self, _values):
        pass


_HARMLESS: dict[tuple[str, str], Callable] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): defaultdict,
    ("builtins", "set"): set,
    ("builtins", "dict"): dict,
    ("builtins", "list"): list,
    ("builtins", "int"): int,
    ("builtins", "float"): float,
    ("torch", "Size"): torch.Size,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
} | {("torch", str(t).removeprefix("torch.")): t for t in (torch.float32, torch.float16, torch.bfloat16, torch.int64)}


class _InertUnpickler(pickle.Unpickler):
    """Resolves only what `_HARMLESS` lists; every other global is a placeholder class, so no foreign code runs."""

    def find_class(self, module: str, name: str) -> Any:
        return _HARMLESS.get((module, name), _Placeholder)


_INERT_PICKLE = types.ModuleType("inert_pickle")
_INERT_PICKLE.Unpickler = _InertUnpickler
_INERT_PICKLE.UnpicklingError = pickle.UnpicklingError
