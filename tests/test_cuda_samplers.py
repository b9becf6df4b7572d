"""Networks and samplers on a GPU: the tokens a CPU draws, in batches of any size."""

import dataclasses
import math

import pytest
import torch

from esokern import backend, decoders, generate, samplers
from esokern.models.network import Network, NetworkConfig

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or backend.cuda_architectures() is None, reason="needs a GPU and the CUDA kernels"
)

LENGTH = 48


def decoded(decoder, cache=None):
    """`generate` as the samplers are called."""

    def run(network, *, length, batch, seed, **filters):
        text = [[network.config.mask_id] * length] * batch
        return generate(network, text, decoder=dataclasses.replace(decoder, **filters), cache=cache, seed=seed)

    return run


SAMPLERS = {
    "esolm": lambda *args, **options: samplers.esolm.generate(*args, alpha_0=0.5, num_steps=8, **options),
    "esolm one by one": lambda *args, **options: samplers.esolm.generate(*args, num_steps=math.inf, **options),
    "esolm recomputed": lambda *args, **options: samplers.esolm.generate(*args, num_steps=8, cached=False, **options),
    "ar": samplers.autoregressive.generate,
    "bd3lm": lambda *args, **options: samplers.bd3lm.generate(*args, block_size=16, num_steps=4, **options),
    "mdlm": lambda *args, **options: samplers.mdlm.generate(*args, num_steps=8, **options),
    "LLaDA over a dual cache": decoded(decoders.LLaDA(steps=12, block_length=16, temperature=1.0), "dual"),
    "LLaDA over a delayed cache": decoded(decoders.LLaDA(steps=12, block_length=16, cfg_scale=1.0), "delayed"),
    "Fast-dLLM over a prefix cache": decoded(decoders.FastDLLM(threshold=0.02, block_length=16), "prefix"),
    "Dream": decoded(decoders.Dream(steps=8, temperature=1.0)),
    "entropy bound": decoded(decoders.EntropyBound(gamma=20.0, temperature=1.0)),
    "LLaDA2": decoded(decoders.BlockRefinement(block_length=16, steps=8, threshold=0.02, edit_threshold=0.05)),
}


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    made = Network(NetworkConfig(vocab_size=200, hidden_size=64, n_blocks=2, n_heads=2, length=LENGTH)).eval()
    for parameter in made.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    return made.fold()


@pytest.mark.parametrize("name", SAMPLERS)
def test_cuda_draws_what_a_cpu_draws(network, name):
    options = {"length": LENGTH, "batch": 3, "seed": 5}
    expected = SAMPLERS[name](network, **options)
    drawn = SAMPLERS[name](network.to("cuda"), **options)
    assert torch.equal(drawn.tokens.cpu(), expected.tokens)
    assert drawn.nfe == expected.nfe


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_rows_do_not_depend_on_the_batch(network, name, dtype):
    on_gpu = network.to("cuda", dtype)
    options = {"length": LENGTH, "top_p": 0.9, **({"schedule_seed": 1} if name.startswith("esolm") else {})}
    whole = SAMPLERS[name](on_gpu, batch=3, seed=[5, 6, 7], **options)
    alone = SAMPLERS[name](on_gpu, batch=1, seed=[6], **options)
    assert torch.equal(alone.tokens[0], whole.tokens[1])
