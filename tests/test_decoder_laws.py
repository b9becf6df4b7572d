"""Decoders that draw: every text of a tiny model is as frequent as enumerating all orders and draws says."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from esokern import decoders, generate
from esokern.models import CallableDenoiser

LENGTH, VOCAB, MASK = 3, 3, 3  # texts of 3 tokens of 3, and the mask: each text has its own random logits
TABLE = 2.5 * torch.randn((VOCAB + 1) ** LENGTH, LENGTH, VOCAB + 1, generator=torch.Generator().manual_seed(4))
ROWS = 20_000


def table_model(tokens, positions, cache):
    digits = torch.tensor([(VOCAB + 1) ** power for power in range(LENGTH)])
    return TABLE[(tokens * digits).sum(1)]


@functools.cache
def probabilities(text, temperature=1.0):
    """[LENGTH, VOCAB] of a text."""
    logits = table_model(torch.tensor([text]), None, None)[0, :, :VOCAB].double()
    return (logits / temperature).softmax(-1).numpy()


def draws(text, temperature=1.0, positions=None):
    """(probability, {position: token}) of every joint draw at the masks of a text."""
    law = probabilities(text, temperature)
    masks = [at for at, token in enumerate(text) if token == MASK] if positions is None else positions
    for tokens in itertools.product(range(VOCAB), repeat=len(masks)):
        yield (
            np.prod([law[at, token] for at, token in zip(masks, tokens, strict=True)]),
            dict(zip(masks, tokens, strict=True)),
        )


def law_of(rule, text=(MASK,) * LENGTH, step=0):
    """{text: probability} of a decoder: rule(text, step) yields (probability, what is filled in)."""
    if MASK not in text:
        return {text: 1.0}
    law = {}
    for probability, filled in rule(text, step):
        if probability > 0:
            after = tuple(filled.get(at, token) for at, token in enumerate(text))
            for end, share in law_of(rule, after, step + 1).items():
                law[end] = law.get(end, 0.0) + probability * share
    return law


def uniform(count):
    """`count` of the masks, all choices alike, then their tokens."""

    def rule(text, step):
        masks = [at for at, token in enumerate(text) if token == MASK]
        choices = list(itertools.combinations(masks, min(count[step], len(masks))))
        for chosen in choices:
            for probability, filled in draws(text, positions=chosen):
                yield probability / len(choices), filled

    return rule


def most_confident(count, temperature, confidence_temperature):
    """Tokens for all masks, of which `count` with the highest probability at the second temperature stay."""

    def rule(text, step):
        sure = probabilities(text, confidence_temperature)
        for probability, drawn in draws(text, temperature):
            order = sorted(drawn, key=lambda at: -sure[at, drawn[at]])
            yield probability, {at: drawn[at] for at in order[: count[step]]}

    return rule


def above_threshold(threshold, temperature, confidence_temperature):
    def rule(text, step):
        sure = probabilities(text, confidence_temperature)
        for probability, drawn in draws(text, temperature):
            order = sorted(drawn, key=lambda at: -sure[at, drawn[at]])
            yield probability, {at: drawn[at] for at in order if at == order[0] or sure[at, drawn[at]] >= threshold}

    return rule


def independent(keep):
    """Every mask by itself with the probability of the step."""

    def rule(text, step):
        masks = [at for at, token in enumerate(text) if token == MASK]
        for kept in itertools.product((False, True), repeat=len(masks)):
            weight = np.prod([keep[step] if k else 1 - keep[step] for k in kept])
            chosen = list(itertools.compress(masks, kept))
            for probability, filled in draws(text, 0.8, chosen):
                yield weight * probability, filled

    return rule


def softly(count, alg_temp, temperature):
    """Draws without replacement from softmax(confidence / alg_temp)."""

    def rule(text, step):
        sure = probabilities(text, temperature)
        for probability, drawn in draws(text, temperature):
            weights = {at: np.exp(sure[at, token] / alg_temp) for at, token in drawn.items()}
            for order in itertools.permutations(drawn, min(count[step], len(drawn))):
                share, left = 1.0, sum(weights.values())
                for at in order:
                    share, left = share * weights[at] / left, left - weights[at]
                yield probability * share, {at: drawn[at] for at in order}

    return rule


def entropy_bounded(gamma):
    def rule(text, step):
        law = probabilities(text)
        entropy = -(law * np.log(law)).sum(-1)
        order = sorted((at for at, token in enumerate(text) if token == MASK), key=lambda at: entropy[at])
        kept = [at for n, at in enumerate(order) if sum(entropy[b] for b in order[:n]) <= gamma]
        yield from draws(text, positions=kept)

    return rule


TIMES = np.linspace(1, 1e-3, 4)
SHARES = [*(1 - TIMES[1:] / TIMES[:-1])[:-1], 1.0]
LAWS = {
    "first hitting": (decoders.FirstHitting(), uniform([1, 1, 1])),
    "llada random": (decoders.LLaDA(steps=2, remasking="random", temperature=1.0), uniform([2, 1])),
    "llada": (decoders.LLaDA(steps=2, temperature=2.0), most_confident([2, 1], 2.0, 1.0)),
    "fast-dllm": (decoders.FastDLLM(threshold=0.6, temperature=1.4), above_threshold(0.6, 1.4, 1.0)),
    "dream origin": (decoders.Dream(steps=3, alg="origin", temperature=0.8), independent(SHARES)),
    "dream maskgit_plus": (
        decoders.Dream(steps=3, alg="maskgit_plus", temperature=2.0),
        most_confident([0, 1, 2], 2.0, 2.0),
    ),
    "dream alg_temp": (
        decoders.Dream(steps=3, alg="maskgit_plus", temperature=1.2, alg_temp=0.2),
        softly([0, 1, 2], 0.2, 1.2),
    ),
    "dream confidence_threshold": (
        decoders.Dream(alg="confidence_threshold", threshold=0.5, temperature=1.6),
        above_threshold(0.5, 1.6, 1.6),
    ),
    "entropy bound": (decoders.EntropyBound(gamma=0.6, temperature=1.0), entropy_bounded(0.6)),
}


@pytest.mark.parametrize("name", LAWS)
def test_texts_have_the_exact_distribution(name):
    decoder, rule = LAWS[name]
    law = law_of(rule)
    assert sum(law.values()) == pytest.approx(1)
    model = CallableDenoiser(table_model, vocab_size=VOCAB + 1)
    result = generate(model, [[MASK] * LENGTH] * ROWS, decoder=decoder, mask_id=MASK)
    codes = (result.tokens * torch.tensor([VOCAB**power for power in range(LENGTH)])).sum(1)
    seen = torch.bincount(codes, minlength=VOCAB**LENGTH).numpy()
    texts = [tuple(code // VOCAB**power % VOCAB for power in range(LENGTH)) for code in range(VOCAB**LENGTH)]
    expected = ROWS * np.array([law.get(text, 0.0) for text in texts])
    common = expected > 5
    assert seen[~common].sum() <= expected[~common].sum() + 5 * np.sqrt(expected[~common].sum()) + 1
    observed = np.append(seen[common], seen[~common].sum())
    awaited = np.append(expected[common], expected[~common].sum() + 1e-9)
    keep = awaited > 1
    statistic = ((observed - awaited)[keep] ** 2 / awaited[keep]).sum()
    assert stats.chi2.sf(statistic, keep.sum() - 1) > 1e-4
