"""add_norm against float64: its sum, its gathered rows, its memory, its invariance and its errors."""

import pytest
import torch

from esokern.add_norm import add_norm
from esokern.fused_linear import fused_linear
from esokern.testing import Guarded, assert_close, same_bits

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
OPTIONS = {
    "plain": (),
    "residual": ("residual",),
    "scale": ("weight",),
    "shift": ("bias",),
    "all": ("residual", "weight", "bias"),
    "tokens": ("tokens",),
    "tokens all": ("tokens", "residual", "weight", "bias"),
}


def inputs(rows, hidden, dtype=torch.float32, names=OPTIONS["all"], vocab=11):
    given = {
        "residual": (2 * torch.randn(rows, hidden) + 0.5).to(dtype),
        "tokens": torch.randint(0, vocab, (rows,)),
        "weight": (1 + 0.3 * torch.randn(hidden)).to(dtype),
        "bias": torch.randn(hidden).to(dtype),
    }
    x = (torch.randn(vocab if "tokens" in names else rows, hidden) - 0.3).to(dtype)
    return x, {name: given[name] for name in names}


def defined(x, residual=None, tokens=None, weight=None, bias=None, eps=1e-5):
    """The formula, each operation in the dtype of its inputs."""
    total = x if tokens is None else x[tokens]
    if residual is not None:
        total = residual + total
    centred = total - total.mean(-1, keepdim=True)
    out = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    if weight is not None:
        out = out * weight
    return out if bias is None else out + bias, total


def wide(values):
    return {name: value.double() if value.is_floating_point() else value for name, value in values.items()}


def check(x, options, backend):
    out, total = add_norm(x, **options, backend=backend)
    gold, gold_sum = defined(x.double(), **wide(options))
    plain, plain_sum = defined(x, **options)
    assert_close(out, gold, plain)
    assert torch.equal(total, plain_sum)  # one addition, rounded once: there is only one right result
    assert_close(total, gold_sum, plain_sum, "sum")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("names", OPTIONS.values(), ids=OPTIONS)
def test_options(backend, names, dtype):
    check(*inputs(6, 72, dtype, names), backend)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    ("rows", "hidden"),
    # The last ones: more than a warp, a block and what they hold in registers; odd sizes are read element by element.
    [(1, 1), (2, 7), (5, 33), (3, 256), (4, 1000), (2, 1031), (3, 1032), (2, 4096), (1, 8200), (1, 8197), (1, 12288)],
)
def test_shapes(backend, rows, hidden, dtype):
    check(*inputs(rows, hidden, dtype), backend)
    check(*inputs(rows, hidden, dtype, OPTIONS["tokens"]), backend)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("hidden", [40, 12288])
def test_out_is_a_function_of_the_returned_sum(backend, hidden, dtype):
    if backend == "reference":
        pytest.skip("torch's layer_norm promises no bits")
    x, options = inputs(3, hidden, dtype)
    out, total = add_norm(x, **options, backend=backend)
    del options["residual"]
    again, same = add_norm(total, **options, backend=backend)
    assert same is total
    assert same_bits(again, out)
    x, options = inputs(3, hidden, dtype)
    assert same_bits(
        add_norm(x, **options, return_sum=False, backend=backend), add_norm(x, **options, backend=backend)[0]
    )


def test_normalises_as_fused_linear_does(backend):
    x, _ = inputs(5, 72, names=())
    expected = fused_linear(x, torch.eye(72), normalize_eps=1e-5, backend=backend)
    torch.testing.assert_close(add_norm(x, backend=backend)[0], expected)


def test_large_mean_and_constant_rows(backend):
    x = torch.randn(40, 64)
    x[3:] += 1e4  # enough rows that the plain computation's worst error is a typical one
    x[2] = 3.0
    out, _ = add_norm(x, backend=backend)
    assert_close(out, defined(x.double())[0], defined(x)[0])
    assert out[2].abs().max() < 1e-3


@pytest.mark.parametrize("hidden", [40, 12288])
def test_not_finite_stays_in_its_row(backend, hidden):
    x, options = inputs(5, hidden)
    expected, expected_sum = add_norm(x, **options, backend=backend)
    x[1, 3], options["residual"][3, 0] = float("nan"), float("inf")
    out, total = add_norm(x, **options, backend=backend)
    assert out[1].isnan().all()
    assert not out[3].isfinite().any()
    for ours, theirs in ((out, expected), (total, expected_sum)):
        assert same_bits(ours[::2], theirs[::2])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("hidden", [129, 768])
def test_row_alone_is_row_in_batch(backend, hidden, dtype):
    if backend == "reference":
        pytest.skip("a promise of the compiled back ends")
    x, options = inputs(150, hidden, dtype)
    residual = options.pop("residual")
    torch.set_num_threads(1)
    whole, _ = add_norm(x, residual, **options, backend=backend)
    torch.set_num_threads(2)
    for start, stop in [(0, 150), (0, 1), (7, 8), (149, 150), (3, 19), (1, 90)]:
        part, _ = add_norm(x[start:stop], residual[start:stop], **options, backend=backend)
        assert same_bits(part, whole[start:stop])


@pytest.mark.parametrize("guard", [8, 3])
def test_strides_and_guards(backend, guard):
    """Rows of wider memory, aligned and not, go in and come out; nothing beside them is read or written."""
    for hidden in (32, 33):
        for names in (OPTIONS["all"], OPTIONS["tokens all"]):
            x, options = inputs(9, hidden, torch.bfloat16, names)
            expected, expected_sum = add_norm(x, **options, backend=backend)
            blank = torch.zeros(9, hidden, dtype=torch.bfloat16)
            x, residual, out, total = (Guarded(t, guard) for t in (x, options["residual"], blank, blank))
            options["residual"] = residual.tensor
            result = add_norm(x.tensor, **options, out=out.tensor, sum_out=total.tensor, backend=backend)
            assert result[0] is out.tensor
            assert result[1] is total.tensor
            assert same_bits(out.tensor, expected)
            assert same_bits(total.tensor, expected_sum)
            for guarded in (x, residual, out, total):
                guarded.check()


@pytest.mark.parametrize("hidden", [40, 12288])
def test_in_place(backend, hidden):
    x, options = inputs(5, hidden)
    expected, expected_sum = add_norm(x, **options, backend=backend)
    stream = options["residual"].clone()
    out, total = add_norm(x, stream, weight=options["weight"], bias=options["bias"], sum_out=stream, backend=backend)
    assert total is stream
    assert same_bits(out, expected)
    assert same_bits(stream, expected_sum)
    both, stream = x.clone(), options["residual"].clone()
    options["residual"] = stream
    out, total = add_norm(both, **options, out=both, sum_out=stream, backend=backend)
    assert same_bits(both, expected)
    assert same_bits(stream, expected_sum)


def test_leading_dimensions(backend):
    x, options = inputs(24, 16)
    expected, expected_sum = add_norm(x, **options, backend=backend)
    options["residual"] = options["residual"].view(2, 3, 4, 16)
    out, total = add_norm(x.view(2, 3, 4, 16), **options, backend=backend)
    assert same_bits(out.view(24, 16), expected)
    assert same_bits(total.view(24, 16), expected_sum)
    one, _ = add_norm(
        x[0], options["residual"][0, 0, 0], weight=options["weight"], bias=options["bias"], backend=backend
    )
    torch.testing.assert_close(one, expected[0])
    table, options = inputs(24, 16, names=OPTIONS["tokens"])
    tokens = options["tokens"].view(4, 6)
    for given in (tokens, tokens.int(), tokens.T.contiguous().T):
        out, total = add_norm(table, tokens=given, backend=backend)
        assert torch.equal(total, table[tokens])
        assert out.shape == (4, 6, 16)


def test_no_rows(backend):
    for shape in [(0, 8), (3, 0, 8)]:
        x = torch.randn(shape)
        out, total = add_norm(x, x, backend=backend)
        assert out.shape == total.shape == shape
    out, _ = add_norm(torch.randn(5, 8), tokens=torch.zeros(0, dtype=torch.int64), backend=backend)
    assert out.shape == (0, 8)


@pytest.mark.parametrize("bad", [-1, 11, 2**40, -(2**40)])
def test_a_token_outside_the_table(backend, bad):
    table, options = inputs(4, 24, names=("tokens", "residual"))
    expected, expected_sum = add_norm(table, **options, backend=backend)
    options["tokens"][2] = bad
    out, total = torch.zeros(4, 24), torch.zeros(4, 24)
    if backend == "cuda":  # nothing waits for the host there: the row says so itself
        add_norm(table, **options, out=out, sum_out=total, backend=backend)
        assert out[2].isnan().all()
        assert total[2].isnan().all()
        others = torch.tensor([0, 1, 3])
        assert same_bits(out[others], expected[others])
        assert same_bits(total[others], expected_sum[others])
    else:
        with pytest.raises(ValueError, match=rf"add_norm: tokens: each must be a row of x \(got {bad}\)"):
            add_norm(table, **options, out=out, sum_out=total, backend=backend)
        assert not out.any()
        assert not total.any()


X = torch.zeros(3, 4)
ERRORS = [
    ({"x": torch.zeros(())}, ValueError, r"x: must be \[\.\.\., hidden\] with hidden >= 1, got \[\]"),
    ({"x": torch.zeros(3, 0)}, ValueError, r"x: must be \[\.\.\., hidden\] with hidden >= 1, got \[3, 0\]"),
    ({"x": X.double()}, TypeError, r"x: got torch\.float64, supported are float32"),
    ({"x": torch.zeros(4, 3).T}, ValueError, "last dimensions must be contiguous, stride"),
    ({"residual": torch.zeros(4)}, ValueError, r"residual: must be \[3, 4\], got \[4\]"),
    ({"residual": X.half()}, TypeError, r"residual: must have the dtype of x, torch\.float32, got torch\.float16"),
    ({"weight": torch.zeros(3)}, ValueError, r"weight: must be \[4\], got \[3\]"),
    ({"weight": torch.zeros(8)[::2]}, ValueError, "weight and bias must be contiguous"),
    ({"bias": torch.zeros(4).half()}, TypeError, "bias: must have the dtype of x"),
    ({"tokens": torch.zeros(2)}, TypeError, r"tokens: must be int64 or int32, got torch\.float32"),
    ({"x": torch.zeros(1, 3, 4), "tokens": torch.zeros(2).int()}, ValueError, "x: must be a table"),
    ({"out": torch.zeros(3, 5)}, ValueError, r"out: must be \[3, 4\], got \[3, 5\]"),
    ({"sum_out": X.half()}, TypeError, "sum_out: must have the dtype of x"),
    (
        {"x": torch.zeros(2, 3, 4), "out": torch.zeros(3, 2, 4).transpose(0, 1)},
        ValueError,
        "out: leading dimensions",
    ),
    ({"eps": -1.0}, ValueError, r"eps: must be finite and >= 0, got -1\.0"),
    ({"backend": "abacus"}, ValueError, "backend: got 'abacus'"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS, ids=[message[:30] for _, _, message in ERRORS])
def test_errors(change, error, message):
    with pytest.raises(error, match=f"add_norm: {message}"):
        add_norm(**{"x": X, **change})


def test_outputs_share_memory_with_nothing_but_an_input_itself(backend):
    if backend == "reference":
        pytest.skip("it computes before it writes")
    buffer, other = torch.randn(6, 16), torch.randn(4, 8)
    x = buffer[:4, :8]
    for name in ("out", "sum_out"):
        for shared in (buffer[1:5, :8], buffer[:4, 4:12]):
            with pytest.raises(ValueError, match="shares memory with x"):
                add_norm(x, **{name: shared}, backend=backend)
            with pytest.raises(ValueError, match="shares memory with residual"):
                add_norm(other, x, **{name: shared}, backend=backend)
        with pytest.raises(ValueError, match="shares memory with x"):
            add_norm(x, tokens=torch.arange(4), **{name: x}, backend=backend)
    with pytest.raises(ValueError, match="out and sum share memory"):
        add_norm(x, other, out=other, sum_out=other, backend=backend)
    side_by_side = buffer[:4, 8:]
    add_norm(x, out=side_by_side, backend=backend)
    assert same_bits(side_by_side, add_norm(x, backend=backend)[0])


def test_gradients():
    x, options = inputs(3, 8)
    x.requires_grad_()
    with pytest.raises(ValueError, match="an input requires grad"):
        add_norm(x, **options)
    out, total = add_norm(x, **options, backend="reference")
    (out.square().sum() + total.sum()).backward()
    expected = torch.autograd.functional.jacobian(
        lambda t: sum((defined(t, **options)[0].square().sum(), defined(t, **options)[1].sum())), x.detach()
    )
    torch.testing.assert_close(x.grad, expected)


def test_numpy(backend):
    if torch.get_default_device().type == "cuda":
        pytest.skip("NumPy arrays lie on the host")
    x, options = inputs(3, 8, names=OPTIONS["tokens all"])
    expected, expected_sum = add_norm(x, **options, backend=backend)
    out, total = add_norm(x.numpy(), **{name: t.numpy() for name, t in options.items()}, backend=backend)
    assert (out == expected.numpy()).all()
    assert (total == expected_sum.numpy()).all()


def test_opcheck():
    x, options = inputs(3, 16, names=OPTIONS["tokens all"])
    operator = torch.ops.esokern.add_norm.default
    blank = torch.empty(3, 16), torch.empty(3, 16)
    given = (options["tokens"], options["residual"], options["weight"], options["bias"])
    torch.library.opcheck(operator, (*blank, x, *given, 1e-5))
    torch.library.opcheck(operator, (blank[0], None, blank[1].zero_(), None, None, None, None, 1e-5))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic):
    table = torch.randn(11, 16)

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=dynamic)
    def block(tokens, stream):
        out, stream = add_norm(table, stream, tokens=tokens)
        return add_norm(out * 2, stream, return_sum=False)

    for rows in (2, 5):
        tokens, stream = torch.randint(0, 11, (rows,)), torch.randn(rows, 16)
        out, total = add_norm(table, stream, tokens=tokens)
        assert torch.equal(block(tokens, stream), add_norm(out * 2, total)[0])
