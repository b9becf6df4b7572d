"""NumPy (and CuPy) arrays through the ops: shared memory in, the same kind out."""

import contextlib
import math
import sys
import types
from typing import NamedTuple

import numpy as np
import pytest
import torch

from esokern.arrays import accept_arrays
from esokern.backend import cuda_architectures
from esokern.fused_linear import fused_linear
from esokern.unmask_sample import merge_vocab_shards, unmask_sample, unmask_sample_from_logits
from esokern.unmask_select import unmask_select


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor | None


@accept_arrays(writes=("cache",))
def record(x, cache=None, *, out=None, option="a", many=()):
    """Stands for an op: writes into cache, returns what it got and something new."""
    assert all(isinstance(tensor, torch.Tensor) for tensor in (x, *many))
    if cache is not None:
        cache += 1
    return Pair(cache if cache is not None else x, x * 2 if option == "a" else None)


def test_shared_and_returned():
    x, cache = np.arange(6.0, dtype=np.float32).reshape(2, 3), np.zeros(3, dtype=np.int32)
    result = record(x, cache, many=[x, x[0]])
    assert isinstance(result, Pair)
    assert result.first is cache  # written in place and returned: the caller's own array
    assert cache.tolist() == [1, 1, 1]
    assert isinstance(result.second, np.ndarray)
    assert result.second.dtype == np.float32
    assert result.second.tolist() == (x * 2).tolist()
    assert record(x, option="b").first is x


def test_torch_is_untouched():
    x = torch.ones(2)
    assert record(x).first is x
    assert record(torch.nn.Parameter(x)).second.requires_grad
    assert record.__name__ == "record"
    with torch.inference_mode():
        assert record(x, many=(x,)).first is x


def test_no_copies():
    base = np.arange(24.0).reshape(4, 6)

    @accept_arrays()
    def address(x):
        return x.data_ptr(), x.stride()

    for view in (base, base[1:], base[:, ::2], base.T, base[0], np.broadcast_to(base[0], (5, 6))):
        assert address(view) == (view.ctypes.data, tuple(stride // 8 for stride in view.strides))
    read_only = base.view()
    read_only.flags.writeable = False
    if np.lib.NumpyVersion(np.__version__) >= "2.1.0":
        assert address(read_only)[0] == base.ctypes.data
    for dtype in ("float32", "float16", "float64", "int32", "int64", "bool", "uint8"):
        assert address(np.ones(3, dtype=dtype))[1] == (1,)


def test_errors():
    x, cache = np.ones(2, dtype=np.float32), np.zeros(2, dtype=np.float32)
    with pytest.raises(
        TypeError, match=r"record: arguments must be arrays of one kind, got numpy \(x\), torch \(cache\)"
    ):
        record(x, torch.zeros(2))
    with pytest.raises(TypeError, match=r"one kind, got torch \(x\), numpy \(many\)"):
        record(torch.zeros(2), many=[x])
    cache.flags.writeable = False
    with pytest.raises(ValueError, match="record: cache: is written in place, but the array is read-only"):
        record(x, cache)
    with pytest.raises(ValueError, match=r"record: x: strides \(-4,\) bytes are negative"):
        record(x[::-1])
    with pytest.raises(ValueError, match=r"record: x: strides .* no multiple of the 4-byte element"):
        record(np.zeros(3, dtype=[("a", "f4"), ("b", "i2")])["a"])
    with pytest.raises(TypeError, match="record: x: got a NumPy array of uint16, supported are"):
        record(np.ones(2, dtype=np.uint16))
    with pytest.raises(TypeError, match="record: x: got a NumPy array of >f4, supported are native"):
        record(np.ones(2, dtype=">f4"))
    with pytest.raises(TypeError, match="record: x: got a NumPy array of object"):
        record(np.array([None]))
    with pytest.raises(TypeError, match="missing a required argument: 'x'"):
        record(cache=cache)
    with pytest.raises(TypeError, match="writes: record has no argument caches"):
        accept_arrays(writes=("caches",))(record)


def test_bfloat16():
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="NumPy has no bfloat16 without ml_dtypes")
    x = np.arange(4, dtype=ml_dtypes.bfloat16)
    result = record(x).second
    assert result.dtype == ml_dtypes.bfloat16
    assert result.astype(np.float32).tolist() == [0, 2, 4, 6]


@pytest.fixture
def host_backend(backend):
    """The back ends that take CPU memory, which is where NumPy's arrays are."""
    if torch.empty(0).is_cuda:
        pytest.skip("NumPy's arrays are not on a GPU")
    return backend


def test_fused_linear(host_backend):
    backend = host_backend
    generator = np.random.default_rng(0)
    x, weight = (generator.standard_normal(shape, dtype=np.float32) for shape in ((3, 8), (5, 8)))
    bias, out = np.ones(5, dtype=np.float32), np.zeros((3, 5), dtype=np.float32)
    result = fused_linear(x, weight, bias, normalize_eps=1e-5, activation="gelu_tanh", out=out, backend=backend)
    assert result is out
    expected = fused_linear(
        *map(torch.from_numpy, (x, weight, bias)), normalize_eps=1e-5, activation="gelu_tanh", backend=backend
    )
    assert np.array_equal(out, expected.numpy())
    out.flags.writeable = False
    with pytest.raises(ValueError, match="fused_linear: out: is written in place"):
        fused_linear(x, weight, out=out, backend=backend)
    with pytest.raises(TypeError, match="fused_linear: arguments must be arrays of one kind"):
        fused_linear(x, torch.from_numpy(weight), backend=backend)


def test_unmask_sample(host_backend):
    backend = host_backend
    generator = np.random.default_rng(0)
    hidden, weight = (generator.standard_normal(shape, dtype=np.float32) for shape in ((3, 8), (50, 8)))
    options = {
        "tokens": np.array([49, 3, 49]),
        "mask_id": 49,
        "temperature": np.array([0.0, 1.0, 0.5], dtype=np.float32),
        "top_p": np.float32(0.9),  # NumPy's numbers are numbers
        "seed": np.int64(4),
        "positions": np.arange(3),
        "return_lse": True,
    }
    drawn = unmask_sample(hidden, weight, **options, backend=backend)
    tensors = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
    expected = unmask_sample(torch.from_numpy(hidden), torch.from_numpy(weight), **tensors, backend=backend)
    for ours, theirs in zip(drawn, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert isinstance(ours, np.ndarray)
            assert np.array_equal(ours, theirs.numpy())
    assert options["tokens"].tolist() == [49, 3, 49]
    logits = hidden @ weight.T
    options = {"positions": np.arange(3), "return_score": True, "return_lse": True, "backend": backend}
    parts = [
        unmask_sample_from_logits(logits[:, start : start + 25], vocab_start=start, **options) for start in (0, 25)
    ]
    merged = merge_vocab_shards(parts)
    whole = unmask_sample_from_logits(logits, positions=np.arange(3), backend=backend)
    assert isinstance(merged.tokens, np.ndarray)
    assert np.array_equal(merged.tokens, whole.tokens)
    np.testing.assert_allclose(merged.logprob, whole.logprob, rtol=1e-5)
    assert math.isfinite(merged.lse.sum())


def test_unmask_select(host_backend):
    generator = np.random.default_rng(0)
    tokens, done = np.full((2, 9), 7), np.zeros(2, dtype=bool)
    proposed, confidence = generator.integers(7, size=(2, 6)), generator.random((2, 6), dtype=np.float32)
    options = {"mask_id": 7, "window_start": np.array([0, 3]), "num_select": 2, "return_transfer_index": True}
    text, finished = (torch.from_numpy(array.copy()) for array in (tokens, done))
    result = unmask_select(tokens, proposed, confidence, **options, done=done, backend=host_backend)
    assert [type(field) for field in result] == [np.ndarray] * 3
    options["window_start"] = torch.from_numpy(options["window_start"])
    inputs = map(torch.from_numpy, (proposed, confidence))
    expected = unmask_select(text, *inputs, **options, done=finished, backend=host_backend)
    assert np.array_equal(tokens, text.numpy())
    assert (tokens != 7).sum() == 4
    assert np.array_equal(done, finished.numpy())
    for ours, theirs in zip(result, expected, strict=True):
        assert np.array_equal(ours, theirs.numpy())
    for name in ("tokens", "done"):
        arrays = {"tokens": tokens.copy(), "done": done.copy()}
        arrays[name].flags.writeable = False
        with pytest.raises(ValueError, match=f"unmask_select: {name}: is written in place"):
            unmask_select(
                proposed=proposed, confidence=confidence, mask_id=7, num_select=1, backend=host_backend, **arrays
            )


class _Stream(NamedTuple):
    ptr: int


class _Device(NamedTuple):
    id: int


class FakeCupyArray:
    """What the door asks of a CuPy array, over a NumPy one."""

    def __init__(self, array, device=3):
        self.array, self.dtype, self.strides, self.device = array, array.dtype, array.strides, _Device(device)

    def view(self, dtype):
        return FakeCupyArray(self.array.view(dtype))

    def __dlpack__(self, **options):
        return self.array.__dlpack__()

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


FakeCupyArray.__name__, FakeCupyArray.__module__ = "ndarray", "cupy._core.core"


@pytest.fixture
def fake_cupy(monkeypatch):
    """CuPy without a GPU: yields the streams that were torch's current one, as (pointer, device)."""
    entered = []

    @contextlib.contextmanager
    def stream(external):
        entered.append(external)
        yield
        entered.append("left")

    module = types.ModuleType("cupy")
    module.cuda = types.SimpleNamespace(get_current_stream=lambda device: _Stream(1000 + device))
    module.from_dlpack = lambda tensor: FakeCupyArray(tensor.numpy())
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda pointer, device: (pointer, device))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    return entered


def test_cupy_stream_and_errors_without_a_gpu(fake_cupy):
    x, cache = FakeCupyArray(np.arange(3, dtype=np.float32)), FakeCupyArray(np.zeros(3, dtype=np.int32))
    result = record(x, cache, many=[x])
    assert fake_cupy == [(1003, 3), "left"]
    assert result.first is cache
    assert cache.array.tolist() == [1, 1, 1]
    assert isinstance(result.second, FakeCupyArray)
    assert result.second.array.tolist() == [0, 2, 4]
    with pytest.raises(TypeError, match=r"one kind, got cupy \(x\), torch \(cache\)"):
        record(x, torch.zeros(2))
    with pytest.raises(TypeError, match="record: x: got a CuPy array of uint16, supported are"):
        record(FakeCupyArray(np.ones(2, dtype=np.uint16)))
    with pytest.raises(ValueError, match=r"record: x: strides \(-4,\) .* pass cupy.ascontiguousarray"):
        record(FakeCupyArray(np.ones(2, dtype=np.float32)[::-1]))


def test_cupy_bfloat16_without_a_gpu(fake_cupy):
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="CuPy has no bfloat16 without ml_dtypes")
    result = record(FakeCupyArray(np.arange(4, dtype=ml_dtypes.bfloat16))).second
    assert result.dtype == ml_dtypes.bfloat16
    assert result.array.astype(np.float32).tolist() == [0, 2, 4, 6]


@pytest.fixture
def cupy():
    module = pytest.importorskip("cupy", reason="CuPy is not installed")
    if not module.cuda.is_available() or not torch.cuda.is_available():
        pytest.skip("CuPy or torch finds no GPU")
    return module


def test_cupy(cupy):
    x = cupy.arange(6, dtype=cupy.float32)
    result = record(x)
    assert result.first is x
    assert isinstance(result.second, cupy.ndarray)
    assert result.second.tolist() == (x * 2).tolist()
    drawn = unmask_sample_from_logits(cupy.zeros((2, 9)), temperature=0, backend="reference")
    assert isinstance(drawn.tokens, cupy.ndarray)


def test_cupy_stream(cupy):
    """The op waits for nothing and is waited for by nothing, so it must be on the caller's stream to be right."""

    @accept_arrays()
    def current(x):
        streams.append(torch.cuda.current_stream().cuda_stream)
        return x * 2

    streams = []
    with cupy.cuda.Stream(non_blocking=True) as stream:
        x = cupy.zeros(2**26, dtype=cupy.float32)
        for _ in range(20):
            x += 1
        total = current(x).sum()
        assert streams == [stream.ptr]
        assert float(total) == 2 * 20 * 2**26
    current(x)
    assert streams[1] == cupy.cuda.get_current_stream().ptr


def test_cupy_bfloat16(cupy):
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="CuPy has no bfloat16 without ml_dtypes")
    try:
        x = cupy.asarray(np.arange(4, dtype=ml_dtypes.bfloat16))
    except (TypeError, ValueError) as error:
        pytest.skip(f"this CuPy knows no bfloat16: {error}")
    result = record(x).second
    assert isinstance(result, cupy.ndarray)
    assert result.dtype == ml_dtypes.bfloat16
    assert cupy.asnumpy(result).astype(np.float32).tolist() == [0, 2, 4, 6]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_cupy_kernel(cupy, dtype):
    if cuda_architectures() is None:
        pytest.skip("the CUDA kernels were not built")
    generator = np.random.default_rng(0)
    x, weight = (generator.standard_normal(shape).astype(dtype) for shape in ((3, 64), (40, 64)))
    out = cupy.zeros((3, 40), dtype=dtype)
    assert fused_linear(cupy.asarray(x), cupy.asarray(weight), out=out) is out
    expected = fused_linear(x, weight, backend="reference")
    np.testing.assert_allclose(cupy.asnumpy(out), expected, atol=2e-5 if dtype == "float32" else 2e-2)
