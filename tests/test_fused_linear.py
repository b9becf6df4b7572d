"""fused_linear against float64, its memory, its invariance and its errors."""

import pytest
import torch
from torch.nn import functional

from esokern.fused_linear import fused_linear
from esokern.testing import Guarded, assert_close, same_bits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "norm": {"normalize_eps": 1e-5},
    "gelu": {"bias": True, "activation": "gelu_tanh"},
    "residual": {"residual": True},
    "all": {"bias": True, "normalize_eps": 1e-6, "activation": "gelu_tanh", "residual": True},
}


def inputs(rows, in_features, out_features, dtype=torch.float32, bias=False, residual=False, **options):
    x = (2 * torch.randn(rows, in_features) + 0.5).to(dtype)
    weight = (torch.randn(out_features, in_features) / max(in_features, 1) ** 0.5).to(dtype)
    options["bias"] = torch.randn(out_features).to(dtype) if bias else None
    options["residual"] = torch.randn(rows, out_features).to(dtype) if residual else None
    return x, weight, options


def defined(x, weight, bias, normalize_eps=None, activation=None, residual=None):
    """The formula, each operation in the dtype of its inputs."""
    if normalize_eps is not None:
        centred = x - x.mean(-1, keepdim=True)
        x = centred / (centred.square().mean(-1, keepdim=True) + normalize_eps).sqrt()
    y = x @ weight.mT
    if bias is not None:
        y = y + bias
    if activation == "gelu_tanh":
        y = functional.gelu(y, approximate="tanh")
    return y if residual is None else residual + y


def check(x, weight, options, backend):
    wide = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    gold = defined(x.double(), weight.double(), **wide)
    out = fused_linear(x, weight, **options, backend=backend)
    assert_close(out, gold, defined(x, weight, **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options(backend, options, dtype):
    check(*inputs(6, 72, 40, dtype, **options), backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize(
    ("rows", "in_features", "out_features"),
    [
        (1, 1, 1),
        (1, 256, 768),
        (2, 7, 31),
        (3, 129, 16),
        (8, 64, 65),
        (16, 33, 257),
        (17, 512, 48),
        (20, 64, 136),
        (130, 40, 34),
        (150, 72, 264),
    ],
)
def test_shapes(backend, rows, in_features, out_features, dtype):
    check(*inputs(rows, in_features, out_features, dtype, **OPTIONS["all"]), backend)
    check(*inputs(rows, in_features, out_features, dtype, bias=True), backend)


def test_large_mean_and_constant_rows(backend):
    """Normalising subtracts the mean before it squares: 1e4 + noise keeps the noise; a constant row becomes 0."""
    x, weight, _ = inputs(40, 64, 32)
    x[3:] += 1e4  # enough rows that the plain computation's worst error is a typical one
    x[2] = 3.0
    gold = defined(x.double(), weight.double(), None, 1e-5)
    out = fused_linear(x, weight, normalize_eps=1e-5, backend=backend)
    assert_close(out, gold, defined(x, weight, None, 1e-5))
    assert out[2].abs().max() < 1e-3


def test_gelu_far_out(backend):
    x = torch.tensor([[-1e4], [-30.0], [-9.0], [0.0], [9.0], [30.0], [1e4]])
    out = fused_linear(x, torch.ones(1, 1), activation="gelu_tanh", backend=backend)
    torch.testing.assert_close(out, functional.gelu(x, approximate="tanh"), atol=1e-6, rtol=1e-6)


def test_not_finite_stays_in_its_row(backend):
    x, weight, options = inputs(5, 40, 20, **OPTIONS["all"])
    expected = fused_linear(x, weight, **options, backend=backend)
    x[1, 3], x[3, 0] = float("nan"), float("inf")
    out = fused_linear(x, weight, **options, backend=backend)
    assert out[1].isnan().all()
    assert not out[3].isfinite().any()
    assert same_bits(out[::2], expected[::2])


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize(("rows", "in_features", "out_features"), [(35, 129, 70), (140, 136, 72)])
def test_row_alone_is_row_in_batch(backend, rows, in_features, out_features, dtype):
    if backend == "reference":
        pytest.skip("a promise of the compiled back ends")
    x, weight, options = inputs(rows, in_features, out_features, dtype, **OPTIONS["all"])
    residual = options.pop("residual")
    torch.set_num_threads(1)
    whole = fused_linear(x, weight, **options, residual=residual, backend=backend)
    torch.set_num_threads(2)
    for start, stop in [(0, rows), (0, 1), (7, 8), (rows - 1, rows), (0, 2), (3, 19), (1, 35), (1, rows)]:
        part = fused_linear(x[start:stop], weight, **options, residual=residual[start:stop], backend=backend)
        assert same_bits(part, whole[start:stop])


def test_strides_and_guards(backend):
    """Rows of wider memory go in and come out; nothing beside them is read or written."""
    x, weight, options = inputs(9, 33, 21, **OPTIONS["all"])
    expected = fused_linear(x, weight, **options, backend=backend)
    x, weight, residual, out = (Guarded(tensor) for tensor in (x, weight, options["residual"], torch.zeros(9, 21)))
    options["residual"] = residual.tensor
    result = fused_linear(x.tensor, weight.tensor, **options, out=out.tensor, backend=backend)
    assert result is out.tensor
    torch.testing.assert_close(result, expected)
    for guarded in (x, weight, residual, out):
        guarded.check()


def test_residual_in_place(backend):
    x, weight, options = inputs(9, 33, 21, **OPTIONS["all"])
    expected = fused_linear(x, weight, **options, backend=backend)
    stream = options["residual"]
    assert fused_linear(x, weight, **options, out=stream, backend=backend) is stream
    assert same_bits(stream, expected)


def test_leading_dimensions(backend):
    x, weight, options = inputs(24, 16, 12, **OPTIONS["all"])
    expected = fused_linear(x, weight, **options, backend=backend)
    options["residual"] = options["residual"].view(2, 3, 4, 12)
    shaped = fused_linear(x.view(2, 3, 4, 16), weight, **options, backend=backend)
    assert shaped.shape == (2, 3, 4, 12)
    assert same_bits(shaped.view(24, 12), expected)
    out = torch.empty(2, 3, 4, 12)
    fused_linear(x.view(2, 3, 4, 16), weight, **options, out=out, backend=backend)
    assert same_bits(out, shaped)
    swapped = x.view(4, 6, 16).transpose(0, 1)  # its leading dimensions cannot be one
    torch.testing.assert_close(
        fused_linear(swapped, weight, backend=backend), fused_linear(swapped.contiguous(), weight, backend=backend)
    )
    one = fused_linear(x[0], weight, backend=backend)
    assert one.shape == (12,)
    torch.testing.assert_close(one, fused_linear(x[:1], weight, backend=backend)[0])


def test_no_rows(backend):
    for shape in [(0, 8), (3, 0, 8)]:
        out = fused_linear(torch.randn(shape), torch.randn(5, 8), normalize_eps=1e-5, backend=backend)
        assert out.shape == (*shape[:-1], 5)


X, WEIGHT = torch.zeros(3, 4), torch.zeros(6, 4)
ERRORS = [
    ({"x": torch.zeros(3, 5)}, ValueError, r"x: must be \[\.\.\., 4\] for a weight \[6, 4\], got \[3, 5\]"),
    ({"x": torch.zeros(3, 4, dtype=torch.float64)}, TypeError, r"x: got torch\.float64, supported are float32"),
    ({"x": torch.zeros(4, 3).T}, ValueError, "last dimensions must be contiguous, stride"),
    ({"weight": torch.zeros(4)}, ValueError, r"weight: must be \[out_features, in_features\], got \[4\]"),
    ({"weight": torch.zeros(4, 6).T}, ValueError, "last dimensions must be contiguous, stride"),
    ({"weight": WEIGHT.half()}, TypeError, r"weight: must have the dtype of x, torch\.float32, got torch\.float16"),
    ({"bias": torch.zeros(4)}, ValueError, r"bias: must be \[6\], got \[4\]"),
    ({"bias": torch.zeros(6).half()}, TypeError, "bias: must have the dtype of x"),
    ({"residual": torch.zeros(6)}, ValueError, r"residual: must be \[3, 6\], got \[6\]"),
    ({"residual": torch.zeros(3, 6).half()}, TypeError, "residual: must have the dtype of x"),
    ({"out": torch.zeros(3, 5)}, ValueError, r"out: must be \[3, 6\], got \[3, 5\]"),
    (
        {"x": torch.zeros(2, 3, 4), "out": torch.zeros(3, 2, 6).transpose(0, 1)},
        ValueError,
        "out: leading dimensions",
    ),
    ({"activation": "gelu"}, ValueError, "activation: got 'gelu', supported are None and"),
    ({"normalize_eps": -1.0}, ValueError, r"normalize_eps: must be finite and >= 0, or None, got -1\.0"),
    ({"backend": "tpu"}, ValueError, "backend: got 'tpu'"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS, ids=[message[:30] for _, _, message in ERRORS])
def test_errors(change, error, message):
    with pytest.raises(error, match=f"fused_linear: {message}"):
        fused_linear(**{"x": X, "weight": WEIGHT, **change})


def test_gradients():
    x, weight, options = inputs(3, 8, 5, **OPTIONS["all"])
    x.requires_grad_()
    with pytest.raises(ValueError, match="an input requires grad"):
        fused_linear(x, weight, **options)
    fused_linear(x, weight, **options, backend="reference").square().sum().backward()
    expected = torch.autograd.functional.jacobian(lambda t: defined(t, weight, **options).square().sum(), x.detach())
    torch.testing.assert_close(x.grad, expected)
    with torch.no_grad():
        fused_linear(x, weight, **options)


def test_out_may_not_share_memory_with_x():
    weight = torch.eye(8)
    buffer = torch.randn(4, 16)
    side_by_side = buffer[:, 8:]
    expected = fused_linear(buffer[:, :8].clone(), weight)
    assert torch.equal(fused_linear(buffer[:, :8], weight, out=side_by_side), expected)
    for out in (buffer[:, :8], buffer[:, 4:12]):
        with pytest.raises(ValueError, match="out shares memory with x"):
            fused_linear(buffer[:, :8], weight, out=out)
