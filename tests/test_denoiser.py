"""Models as decoders see them: this package's networks on every back end, functions, caches of their own."""

from __future__ import annotations

import pytest
import torch

from decoder_toys import DECODERS, MASK_ID, ToyDenoiser, as_function, tiny_network
from esokern import decoders, generate
from esokern.models import CallableDenoiser, Network, NetworkConfig, Step
from esokern.samplers import autoregressive, bd3lm, esolm, mdlm


@pytest.fixture(autouse=True)
def _one_thread():
    """Everything here is tiny: more threads only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def network():
    return tiny_network()


PROMPTS = [[1, 2, 3, 4], [5, MASK_ID, 7], [8, 9]]


@pytest.mark.parametrize("name", ["llada", "dream margin", "joint_threshold", "entropy_bound"])
def test_functions_are_models(network, name):
    """Logits, or hidden states with a head: what the network itself gives, up to the rounding of its logits."""
    options = {"decoder": DECODERS[name], "max_new_tokens": 12, "mask_id": MASK_ID}
    expected = generate(network, PROMPTS, **options).tokens
    logits = CallableDenoiser(as_function(network), vocab_size=24)
    assert torch.equal(generate(logits, PROMPTS, **options).tokens, expected)

    def hidden(tokens, positions, cache):
        lengths = torch.full((len(tokens),), tokens.shape[1], dtype=torch.int32)
        return network.forward(tokens, positions, step=Step(lengths))

    head = CallableDenoiser(hidden, vocab_size=24, head_weight=network.head_weight, head_bias=network.head_bias)
    assert torch.equal(generate(head, PROMPTS, **options).tokens, expected)


@pytest.mark.parametrize("toy", ["llada", "dream"])
@pytest.mark.parametrize("cache", ["prefix", "dual", "delayed"])
def test_functions_may_bring_a_cache(toy, cache):
    """The toy models as functions of (tokens, positions, step), over a cache that they made."""
    model = ToyDenoiser(toy)
    function = CallableDenoiser(
        model.hidden,
        vocab_size=model.vocab_size,
        head_weight=model.head_weight,
        shift=model.shift,
        new_cache=model.new_cache,
    )
    decoder = decoders.Dream(steps=8, block_length=8, alg="entropy")
    options = {"decoder": decoder, "cache": cache, "max_new_tokens": 16, "mask_id": model.mask_id}
    expected = generate(model, [[1, 2, 3], [4]], report_divergence=True, **options)
    assert torch.equal(generate(function, [[1, 2, 3], [4]], **options).tokens, expected.tokens)
    assert expected.divergence.kl > 1e-4


def test_a_soft_cap_belongs_to_the_head(network):
    """Of logits that a function caps itself, and of those that the head caps, the same tokens are drawn."""
    plain = as_function(network)
    capped = CallableDenoiser(lambda *step: 2 * torch.tanh(plain(*step) / 2), vocab_size=24)
    head = CallableDenoiser(plain, vocab_size=24, logit_softcap=2.0)
    options = {"max_new_tokens": 12, "mask_id": MASK_ID, "return_logprob": True}
    for decoder in (decoders.FirstHitting(), DECODERS["dream margin"]):
        results = [generate(model, [[1, 2, 3], [4]], decoder=decoder, **options) for model in (capped, head)]
        assert torch.equal(results[0].tokens, results[1].tokens)
        torch.testing.assert_close(results[0].logprob, results[1].logprob)


def test_guidance_is_the_formula_on_logits(network):
    """un + (scale + 1) (cond - un), with every given token masked in the other half."""
    plain, prompt = as_function(network), [1, 2, 3, 4]

    def guided(tokens, positions, cache):
        blank = tokens.clone()
        blank[:, : len(prompt)] = MASK_ID
        seen, unseen = plain(tokens, positions, None), plain(blank, positions, None)
        return unseen + 2.5 * (seen - unseen)

    model = CallableDenoiser(guided, vocab_size=24)
    options = {"max_new_tokens": 12, "mask_id": MASK_ID}
    expected = generate(model, prompt, decoder=decoders.LLaDA(steps=6), **options)
    result = generate(network, prompt, decoder=decoders.LLaDA(steps=6, cfg_scale=1.5), **options)
    assert torch.equal(result.tokens, expected.tokens)
    assert result.nfe == expected.nfe == 6
    without = generate(network, prompt, decoder=decoders.LLaDA(steps=6), **options)
    assert not torch.equal(without.tokens, expected.tokens)


def test_back_ends_agree(network, backend):
    """Every back end draws the same tokens, with and without a cache."""
    if backend == "cuda" and torch.cuda.is_available():
        pytest.skip("the network lies on the CPU")
    for decoder, cache in (
        (decoders.Dream(steps=3, alg="entropy", temperature=0.5), "dual"),
        (DECODERS["fast_dllm"], None),
    ):
        options = {"decoder": decoder, "cache": cache, "max_new_tokens": 4}
        expected = generate(network, [[1, 2], [3]], backend="reference", **options)
        result = generate(network, [[1, 2], [3]], backend=backend, **options)
        assert torch.equal(result.tokens, expected.tokens)
        assert torch.equal(result.decode_step, expected.decode_step)


def test_native_decoders_are_the_samplers(network):
    """Rows of one length are one call of the sampler."""
    prompts = [[1, 2, 3], [4], [5, MASK_ID, 7]]
    full = torch.full((3, 11), MASK_ID)
    for row, prompt in enumerate(prompts):
        full[row, : len(prompt)] = torch.tensor(prompt)
    samplers = (
        (decoders.EsoLM(alpha_0=0.5, num_steps=4, top_p=0.9), esolm, {"alpha_0": 0.5, "num_steps": 4, "top_p": 0.9}),
        (decoders.BD3LM(block_size=4, num_steps=2), bd3lm, {"block_size": 4, "num_steps": 2}),
        (decoders.Autoregressive(temperature=0.7), autoregressive, {"temperature": 0.7}),
        (decoders.MDLM(num_steps=4), mdlm, {"num_steps": 4}),
    )
    for decoder, sampler, options in samplers:
        result = generate(network, prompts, decoder=decoder, max_new_tokens=8, seed=4, return_logprob=True)
        long = sampler.generate(network, full[[0, 2]], seed=[4, 6], return_logprob=True, **options)
        short = sampler.generate(network, full[1:2, :9], seed=5, return_logprob=True, **options)
        for name in ("tokens", "decode_step", "logprob"):
            assert torch.equal(getattr(result, name)[[0, 2]], getattr(long, name))
            assert torch.equal(getattr(result, name)[1, :9], getattr(short, name)[0])
        assert result.nfe == long.nfe + short.nfe
        if decoder.exact_cache:
            again = generate(network, prompts, decoder=decoder, max_new_tokens=8, seed=4, cache="none")
            exact = generate(network, prompts, decoder=decoder, max_new_tokens=8, seed=4, cache="exact")
            assert torch.equal(again.tokens, result.tokens)
            assert torch.equal(exact.tokens, result.tokens)


def test_networks_in_training_form_are_folded():
    torch.manual_seed(0)
    unfolded = Network(NetworkConfig(vocab_size=24, hidden_size=16, n_blocks=1, n_heads=2, length=16))
    options = {"decoder": decoders.FirstHitting(), "max_new_tokens": 8, "backend": "reference"}
    assert torch.equal(
        generate(unfolded, [1, 2], **options).tokens, generate(unfolded.fold(), [1, 2], **options).tokens
    )


def test_the_default_decoder_fits_the_model(network):
    own = generate(network, [1, 2], max_new_tokens=6)
    assert torch.equal(own.tokens, generate(network, [1, 2], max_new_tokens=6, decoder=decoders.EsoLM()).tokens)
    options = {"max_new_tokens": 6, "mask_id": MASK_ID}
    model = CallableDenoiser(as_function(network), vocab_size=24)
    assert torch.equal(
        generate(model, [1, 2], **options).tokens,
        generate(network, [1, 2], decoder=decoders.LLaDA(), **options).tokens,
    )
