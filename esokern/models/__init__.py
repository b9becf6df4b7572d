"""Networks, their checkpoints, and the model that comes with the package."""

from esokern.models.checkpoint import load_checkpoint, save_checkpoint
from esokern.models.denoiser import CallableDenoiser, Denoiser, Step
from esokern.models.network import FoldedNetwork, Network, NetworkConfig
from esokern.models.pretrained import load_model

__all__ = [
    "CallableDenoiser",
    "Denoiser",
    "FoldedNetwork",
    "Network",
    "NetworkConfig",
    "Step",
    "load_checkpoint",
    "load_model",
    "save_checkpoint",
]
