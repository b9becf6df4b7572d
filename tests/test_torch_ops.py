"""The torch operators of the sampling, loss and linear ops: schema, fakes, torch.compile without graph breaks."""

import pytest
import torch

from esokern.fused_linear import fused_linear
from esokern.unmask_sample import unmask_sample, unmask_sample_from_logits
from esokern.unmask_select import unmask_select


def test_opcheck_fused_linear():
    x, weight, bias, residual = torch.randn(3, 16), torch.randn(8, 16), torch.randn(8), torch.randn(3, 8)
    operator = torch.ops.esokern.fused_linear.default
    torch.library.opcheck(operator, (torch.empty(3, 8), x, weight, bias, residual, 1e-5, 1))
    torch.library.opcheck(operator, (torch.empty(3, 8), x, weight, None, None, -1.0, 0))


@pytest.mark.parametrize("from_logits", [False, True])
def test_opcheck_unmask_sample(from_logits):
    rows, vocab = 3, 40
    tokens = torch.full((rows,), 39)
    statistics = [torch.empty(rows) for _ in range(6)]
    if from_logits:
        statistics[1:] = [None] * 5
    inputs = (None, None, None, torch.randn(rows, vocab))
    if not from_logits:
        inputs = (torch.randn(rows, 16), torch.randn(vocab, 16), torch.randn(vocab), None)
    temperature = torch.ones(rows)
    filters = (
        (None, None, None) if from_logits else (torch.full((rows,), 5, dtype=torch.int32), temperature * 0.9, None)
    )
    counters = (torch.arange(rows), torch.arange(rows), torch.zeros(rows, dtype=torch.int64))
    invalid = torch.empty(rows, dtype=torch.bool)
    arguments = (tokens, *statistics, invalid, *inputs, temperature, *filters, *counters, 39, 0, 0.0, 0, 0)
    torch.library.opcheck(torch.ops.esokern.unmask_sample.default, arguments)


@pytest.mark.parametrize("everything", [False, True])
def test_opcheck_unmask_select(everything):
    batch, width, mask_id = 3, 6, 9
    tokens, proposed = torch.full((batch, width + 2), mask_id), torch.randint(9, (batch, width))
    counts = [torch.empty(batch, dtype=torch.int32) for _ in range(2)]
    one, number = torch.ones(batch, dtype=torch.int64), torch.full((batch,), 0.5)
    if everything:
        flags, done = torch.empty(batch, width, dtype=torch.bool), torch.tensor([False, False, True])
        options = (
            torch.rand(batch, width),
            one,
            one * 4,
            one.int(),
            *[number] * 4,
            one,
            one,
            tokens == 3,
            number,
            number,
        )
    else:
        flags, done = None, None
        options = (None, one, None, one.int(), *[None] * 9)
    arguments = (tokens, flags, *counts, done, proposed, torch.rand(batch, width), *options, mask_id)
    torch.library.opcheck(torch.ops.esokern.unmask_select.default, arguments)


def test_opcheck_masked_cross_entropy():
    rows, vocab = 5, 40
    head = (torch.randn(rows, 16), torch.randn(vocab, 16), torch.randn(vocab))
    targets, lse, grad = torch.tensor([3, -1, 0, 38, -1]), torch.full((rows,), 20.0), torch.ones(rows)
    operators = torch.ops.esokern
    row_values = (torch.empty(rows), torch.empty(rows))
    torch.library.opcheck(operators.masked_cross_entropy.default, (*row_values, *head, targets, 39, 0.0))
    dlogits = torch.empty(rows, vocab)
    arguments = (*head, targets, lse, grad, 39, 2.0)
    torch.library.opcheck(operators.masked_cross_entropy_backward.default, (dlogits, *arguments))
    for gradients in ([torch.empty_like(tensor) for tensor in head], [None, torch.empty_like(head[1]), None]):
        torch.library.opcheck(operators.masked_cross_entropy_gradients.default, (*gradients, *arguments, "cpu"))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_fused_linear(dynamic):
    weight, bias = torch.randn(8, 16), torch.randn(8)

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=dynamic)
    def block(x, residual):
        x = fused_linear(x, weight, bias, normalize_eps=1e-5, activation="gelu_tanh")
        return fused_linear(x, weight.T.contiguous(), residual=residual)

    for rows in (2, 5):
        x = torch.randn(2, rows, 16)
        inner = fused_linear(x, weight, bias, normalize_eps=1e-5, activation="gelu_tanh")
        expected = fused_linear(inner, weight.T.contiguous(), residual=x)
        assert torch.equal(block(x, x), expected)


def test_compiled_fused_linear_in_place():
    weight = torch.randn(16, 16)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def add(x, stream):
        fused_linear(x, weight, residual=stream, out=stream)
        return stream * 1

    x, stream = torch.randn(3, 16), torch.randn(3, 16)
    expected = fused_linear(x, weight, residual=stream)
    returned = add(x, stream)
    assert torch.equal(returned, expected)
    assert torch.equal(stream, expected)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_unmask_sample(dynamic):
    weight, bias = torch.randn(40, 16), torch.randn(40)

    def step(hidden, tokens, positions, temperature, index):
        drawn = unmask_sample(
            hidden, weight, bias, tokens=tokens, mask_id=39, temperature=temperature, top_p=0.9, seed=3, step=index,
            positions=positions, return_prob=True, return_lse=True,
        )  # fmt: skip
        again = unmask_sample_from_logits(hidden @ weight.T, positions=positions, temperature=0.5, step=index)
        return drawn.tokens, drawn.logprob, drawn.prob * 2, drawn.lse, drawn.invalid, again.tokens

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (3, 4):
        tokens = torch.full((rows,), 39)
        tokens[1] = 5
        arguments = (torch.randn(rows, 16), tokens, torch.arange(rows), torch.linspace(0, 1, rows), torch.tensor(7))
        for ours, expected in zip(compiled(*arguments), step(*arguments), strict=True):
            assert torch.equal(ours, expected)
        assert (tokens == 39).sum() == rows - 1
    greedy = torch.compile(
        lambda h: unmask_sample(h, weight, temperature=0.0).tokens, fullgraph=True, backend="aot_eager"
    )
    hidden = torch.randn(3, 16)
    assert torch.equal(greedy(hidden), (hidden @ weight.T).argmax(1))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_unmask_select(dynamic):
    """In place, with values that change from call to call, and rows and columns that do."""

    def step(tokens, proposed, confidence, done, threshold, start, index):
        result = unmask_select(
            tokens, proposed, confidence, mask_id=9, window_start=start, num_select=1, threshold=threshold,
            temperature=0.2, seed=3, step=index, done=done, return_transfer_index=True,
        )  # fmt: skip
        return result.num_masked * 1, result.num_transferred, result.transfer_index, tokens + 0

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch, width in ((2, 6), (3, 8)):
        tokens, done = torch.full((batch, width + 3), 9), torch.zeros(batch, dtype=torch.bool)
        done[0] = True
        given = (torch.randint(9, (batch, width)), torch.rand(batch, width))
        options = (torch.linspace(0, 3, batch), torch.arange(batch), torch.tensor(7))
        text, finished = tokens.clone(), done.clone()
        ours = compiled(text, *given, finished, *options)
        for a, b in zip((*ours, text, finished), (*step(tokens, *given, done, *options), tokens, done), strict=True):
            assert torch.equal(a, b)
        assert (text == 9).sum() < text.numel()
