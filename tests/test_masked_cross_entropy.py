"""masked_cross_entropy and its gradient against float64, and what must hold bit for bit."""

import importlib
import math

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from esokern import backend as backends
from esokern.masked_cross_entropy import masked_cross_entropy
from esokern.testing import Guarded, assert_close, same_bits
from esokern.unmask_sample import unmask_sample

card = importlib.import_module("esokern.masked_cross_entropy")  # the package's attribute is the function

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SKIP = -100


def inputs(rows, hidden_size, vocab, dtype=torch.float32, bias=True, skip=0.4, mask_id=None):
    """hidden, weight, bias, targets other than mask_id (the last one); a share of the targets is skipped."""
    hidden = torch.randn(rows, hidden_size).to(dtype)
    weight = (3 * torch.randn(vocab, hidden_size) / hidden_size**0.5).to(dtype)
    targets = torch.randint(vocab - 1, (rows,))
    targets += targets >= (vocab - 1 if mask_id is None else mask_id)
    targets[torch.rand(rows) < skip] = SKIP
    return hidden, weight, torch.randn(vocab).to(dtype) if bias else None, targets


def defined(hidden, weight, bias, targets, *, weights=None, mask_id=-1, logit_softcap=0.0):
    """The formula in plain PyTorch, the head in the dtype of its inputs, what follows in float32 or float64."""
    logits = functional.linear(hidden, weight, bias)
    if logit_softcap > 0:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = logits.masked_fill(torch.arange(len(weight)) == mask_id, -math.inf)
    nll = functional.cross_entropy(logits, targets, ignore_index=SKIP, reduction="none")
    nll = nll if weights is None else nll * weights
    return nll, logits.logsumexp(-1).masked_fill(targets == SKIP, 0.0)


def gradients(function, hidden, weight, bias, upstream):
    """[nll, lse, dhidden, dweight, dbias] of sum(upstream * nll)."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in (hidden, weight, bias)]
    nll, lse = function(*leaves)
    (nll * upstream).sum().backward()
    return [nll.detach(), lse.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]


def check(backend, hidden, weight, bias, targets, **options):
    upstream = torch.randn(len(hidden)) / max(len(hidden), 1)

    def ours(hidden, weight, bias):
        return masked_cross_entropy(hidden, weight, targets, bias=bias, **options, return_lse=True, backend=backend)

    def plain(hidden, weight, bias):
        return defined(hidden, weight, bias, targets, **options)

    wide = [None if x is None else x.double() for x in (hidden, weight, bias)]
    golds, plains = gradients(plain, *wide, upstream), gradients(plain, hidden, weight, bias, upstream)
    names = ("nll", "lse", "dhidden", "dweight", "dbias")
    for name, out, gold, near in zip(
        names, gradients(ours, hidden, weight, bias, upstream), golds, plains, strict=False
    ):
        assert_close(out, gold, near, name)


OPTIONS = {
    "plain": {},
    "mask": {"mask_id": 610},
    "softcap": {"mask_id": 610, "logit_softcap": 2.5},
    "mask outside the head": {"mask_id": 611},
    "weights": {"mask_id": 610, "weights": True},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options(backend, options, dtype):
    options = dict(options)
    if "weights" in options:
        options["weights"] = 1 / (torch.rand(37) + 0.01)
    check(backend, *inputs(37, 48, 611, dtype), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize(
    ("rows", "hidden_size", "vocab"),
    [(1, 8, 2), (3, 64, 17), (17, 33, 257), (65, 24, 1031), (2, 136, 513), (270, 16, 66), (4100, 8, 5)],
)
def test_shapes(backend, rows, hidden_size, vocab, dtype):
    check(backend, *inputs(rows, hidden_size, vocab, dtype, bias=rows % 2 == 1), mask_id=vocab - 1)
    check(backend, *inputs(rows, hidden_size, vocab, dtype, bias=False, skip=0.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("gathered", [True, False])
def test_gradients_in_parts(backend, dtype, gathered, monkeypatch):
    """Of the vocabulary, when dlogits may take little memory; with skipped rows left out, or as zeros (on a GPU)."""
    monkeypatch.setattr(card, "GRADIENT_BYTES", {"cpu": 1, "cuda": 1})
    if not gathered:
        monkeypatch.setattr(card, "_predicted", lambda targets: None)
    check(backend, *inputs(33, 40, 700, dtype), mask_id=699, logit_softcap=4.0)
    check(backend, *inputs(33, 40, 700, dtype, mask_id=128), mask_id=128)


def test_memory(backend, monkeypatch):
    """No tensor of the call, forward and backward, is as large as a tenth of the logits."""
    if backend == "reference":
        pytest.skip("has all logits")
    monkeypatch.setattr(card, "GRADIENT_BYTES", {"cpu": 2**16, "cuda": 2**16})
    hidden, weight, bias, targets = inputs(128, 8, 3000)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    hidden.requires_grad_()
    weight.requires_grad_()
    with Watch():
        masked_cross_entropy(hidden, weight, targets, bias=bias, backend=backend).sum().backward()
    assert weight.numel() <= largest < 128 * 3000 // 10


# ---- bit for bit -----------------------------------------------------------------------------------------------


@pytest.fixture
def compiled(backend):
    if backend == "reference":
        pytest.skip("a promise of the compiled back ends")
    return backend


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("logit_softcap", [0.0, 3.0])
def test_lse_is_that_of_unmask_sample(compiled, dtype, logit_softcap):
    hidden, weight, bias, targets = inputs(37, 65, 1500, dtype, mask_id=17)
    nll, lse = masked_cross_entropy(
        hidden, weight, targets, bias=bias, mask_id=17, logit_softcap=logit_softcap, return_lse=True, backend=compiled
    )
    drawn = unmask_sample(
        hidden, weight, bias, mask_id=17, temperature=0.0, logit_softcap=logit_softcap or None, return_lse=True,
        backend=compiled,
    )  # fmt: skip
    live = targets != SKIP
    assert same_bits(lse[live], drawn.lse[live])
    assert (lse[~live] == 0).all()
    assert (nll[~live] == 0).all()


def backward_op(backend, hidden, weight, bias, targets, lse, grad, out=None, mask_id=-1, logit_softcap=0.0):
    """dlogits; targets < 0 are skipped."""
    dlogits = hidden.new_empty(len(hidden), len(weight)) if out is None else out
    arguments = (dlogits, hidden, weight, bias, targets, lse, grad, mask_id, logit_softcap)
    backends.run(backend, "masked_cross_entropy_backward", *arguments)
    return dlogits


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16", "f16"])
def test_row_alone_is_row_in_batch_on_any_threads(compiled, dtype):
    rows = 37
    hidden, weight, bias, targets = inputs(rows, 65, 700, dtype)
    grad = torch.randn(rows)

    def run(pick):
        nll, lse = masked_cross_entropy(
            hidden[pick], weight, targets[pick], bias=bias, mask_id=699, return_lse=True, backend=compiled
        )
        dlogits = backward_op(compiled, hidden[pick], weight, bias, targets[pick], lse, grad[pick], mask_id=699)
        return nll, lse, dlogits

    torch.set_num_threads(1)
    whole = run(torch.arange(rows))
    torch.set_num_threads(2)
    picks = [
        torch.arange(rows),
        torch.randperm(rows),
        *(torch.arange(n) for n in (1, 2, 3, 16, 17)),
        torch.tensor([36]),
    ]
    for pick in picks:
        assert all(same_bits(part, all_rows[pick]) for part, all_rows in zip(run(pick), whole, strict=True))


def test_part_of_the_vocabulary(compiled):
    """dlogits of a range of ids are those of the whole, a target behind the range is none of its columns."""
    hidden, weight, bias, targets = inputs(20, 32, 600)
    _, lse = masked_cross_entropy(hidden, weight, targets, bias=bias, return_lse=True, backend=compiled)
    grad = torch.rand(20)
    whole = backward_op(compiled, hidden, weight, bias, targets, lse, grad)
    part = backward_op(compiled, hidden, weight[:256], bias[:256], targets, lse, grad)
    assert same_bits(part, whole[:, :256])


# ---- what is not read ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gathered", [True, False])
def test_skipped_tokens_are_not_read(backend, gathered, monkeypatch):
    if not gathered:
        monkeypatch.setattr(card, "_predicted", lambda targets: None)
    hidden, weight, bias, targets = inputs(37, 48, 300)
    weights, upstream = torch.rand(37), torch.rand(37)
    live = targets != SKIP

    def run(hidden, weights):
        def function(hidden, weight, bias):
            return masked_cross_entropy(
                hidden, weight, targets, bias=bias, weights=weights, mask_id=299, return_lse=True, backend=backend
            )

        return gradients(function, hidden, weight, bias, upstream)

    expected = run(hidden, weights)
    hidden[~live], weights[~live] = math.nan, math.nan
    nll, lse, dhidden, *others = out = run(hidden, weights)
    assert all(same_bits(a, b) for a, b in zip(out, expected, strict=True))
    assert all(tensor.isfinite().all() for tensor in others)
    assert not nll[~live].any()
    assert not lse[~live].any()
    assert not dhidden[~live].any()
    assert dhidden[live].any(1).all()


def test_strides_and_guards(backend):
    hidden, weight, bias, targets = inputs(9, 33, 150)
    options = {"bias": bias, "mask_id": 149, "backend": backend}
    expected = masked_cross_entropy(hidden, weight, targets, **options)
    wide_hidden, wide_weight = torch.full((18, 50), math.nan), torch.full((150, 47), math.nan)
    wide_hidden[::2, 5:38], wide_weight[:, :33] = hidden, weight
    wide_hidden.requires_grad_()
    strided_targets = torch.stack([targets, targets], 1)[:, 0]
    nll = masked_cross_entropy(wide_hidden[::2, 5:38], wide_weight[:, :33], strided_targets, **options)
    torch.testing.assert_close(nll, expected)
    nll.sum().backward()
    inside = torch.zeros(18, 50, dtype=torch.bool)
    inside[::2, 5:38] = True
    assert not wide_hidden.grad[~inside].any()
    assert wide_hidden.grad.isfinite().all()
    if backend != "reference":
        dlogits = Guarded(torch.full((9, 150), math.nan))
        lse, grad = torch.full((9,), 3.0), torch.ones(9)
        backward_op(backend, hidden, weight, bias, targets, lse, grad, out=dlogits.tensor)
        dlogits.check()
        assert same_bits(dlogits.tensor, backward_op(backend, hidden, weight, bias, targets, lse, grad))


def test_mask_token_has_no_gradient(backend):
    hidden, weight, bias, targets = (x.requires_grad_() if x.is_floating_point() else x for x in inputs(20, 16, 40))
    masked_cross_entropy(hidden, weight, targets, bias=bias, mask_id=39, backend=backend).sum().backward()
    assert not weight.grad[39].any()
    assert bias.grad[39] == 0
    assert weight.grad[:39].any(1).all()


# ---- numbers ---------------------------------------------------------------------------------------------------


def test_huge_logits(backend):
    """exp never overflows: the likelihood of the best id is 1, of any other exp of a large difference."""
    hidden, weight, targets = torch.eye(3, 16) * 1e4, torch.zeros(50, 16), torch.tensor([7, 8, 9])
    weight[7, 0] = weight[5, 1] = 1.0  # logits 1e4 at (0, 7) and (1, 5), the others 0
    hidden.requires_grad_()
    nll = masked_cross_entropy(hidden, weight, targets, backend=backend)
    torch.testing.assert_close(nll, torch.tensor([0.0, 1e4, math.log(50)]))
    nll.sum().backward()
    expected = torch.zeros(3, 16)
    expected[1, 1] = 1.0
    expected[2, :2] = 1 / 50
    torch.testing.assert_close(hidden.grad, expected)


def test_not_finite_stays_in_its_row(backend):
    hidden, weight, bias, targets = inputs(6, 24, 200, skip=0.0)
    expected = masked_cross_entropy(hidden, weight, targets, bias=bias, backend=backend)
    hidden[1, 3], hidden[4, 0] = math.nan, math.inf
    nll = masked_cross_entropy(hidden, weight, targets, bias=bias, backend=backend)
    assert nll[[1, 4]].isnan().all()
    assert same_bits(nll[[0, 2, 3, 5]], expected[[0, 2, 3, 5]])


def test_likelihood_of_all_ids_is_one(backend):
    hidden, weight, bias, _ = inputs(1, 16, 90)
    ids = torch.arange(89)
    nll = masked_cross_entropy(hidden.expand(89, 16), weight, ids, bias=bias, mask_id=89, backend=backend)
    torch.testing.assert_close((-nll).exp().sum(), torch.tensor(1.0))


# ---- the call --------------------------------------------------------------------------------------------------


def test_leading_dimensions_and_types(backend):
    hidden, weight, bias, targets = inputs(24, 16, 60)
    options = {"bias": bias, "mask_id": 59, "backend": backend}
    expected = masked_cross_entropy(hidden, weight, targets, **options)
    assert expected.dtype == torch.float32
    shaped, lse = masked_cross_entropy(
        hidden.view(2, 3, 4, 16), weight, targets.view(2, 3, 4), **options, return_lse=True
    )
    assert shaped.shape == lse.shape == (2, 3, 4)
    assert same_bits(shaped.view(24), expected)
    assert same_bits(masked_cross_entropy(hidden, weight, targets.int(), **options), expected)
    pad = targets.masked_fill(targets == SKIP, 59)  # the mask's id may stand for none
    assert same_bits(masked_cross_entropy(hidden, weight, pad, **options, ignore_index=59), expected)
    one = masked_cross_entropy(hidden[0], weight, torch.tensor(3), **options)
    assert one.shape == ()


@pytest.mark.parametrize("rows", [0, 5])
def test_nothing_predicted(backend, rows):
    hidden, weight, bias, targets = inputs(rows, 8, 20, skip=1.1)
    out = gradients(
        lambda h, w, b: masked_cross_entropy(h, w, targets, bias=b, return_lse=True, backend=backend),
        hidden, weight, bias, torch.ones(rows),
    )  # fmt: skip
    assert [tensor.shape for tensor in out] == [(rows,), (rows,), (rows, 8), (20, 8), (20,)]
    assert not any(tensor.any() for tensor in out)


def test_without_gradients(backend):
    hidden, weight, bias, targets = inputs(5, 8, 20)
    expected = masked_cross_entropy(hidden, weight, targets, bias=bias, backend=backend)
    weight.requires_grad_()
    with torch.no_grad():
        assert not masked_cross_entropy(hidden, weight, targets, bias=bias, backend=backend).requires_grad
    with torch.inference_mode():
        assert same_bits(masked_cross_entropy(hidden, weight, targets, bias=bias, backend=backend), expected)
    nll, lse = masked_cross_entropy(hidden, weight, targets, bias=bias, return_lse=True, backend=backend)
    assert nll.requires_grad
    assert not lse.requires_grad


@pytest.mark.parametrize("needed", ["hidden", "weight", "bias"])
def test_only_the_gradients_that_are_needed(compiled, needed, monkeypatch):
    tensors = dict(zip(("hidden", "weight", "bias", "targets"), inputs(5, 8, 20), strict=True))
    tensors[needed].requires_grad_()
    seen = []
    compute = card._gradients
    monkeypatch.setattr(card, "_gradients", lambda *args: (seen.append(args[:3]), compute(*args)))
    masked_cross_entropy(**tensors, backend=compiled).sum().backward()
    ((dhidden, dweight, dbias),) = seen
    assert [dhidden is not None, dweight is not None, dbias is not None] == [
        needed == name for name in ("hidden", "weight", "bias")
    ]
    assert tensors[needed].grad.any()


def test_second_derivative(compiled):
    hidden, weight, _, targets = inputs(5, 8, 20)
    hidden.requires_grad_()
    (grad,) = torch.autograd.grad(
        masked_cross_entropy(hidden, weight, targets, backend=compiled).square().sum(), hidden, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_reference_gradcheck():
    hidden, weight, bias, targets = inputs(6, 5, 9, torch.float64)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    options = {"weights": torch.rand(6), "mask_id": 8, "logit_softcap": 2.0, "backend": "reference"}

    def function(hidden, weight, bias):
        return masked_cross_entropy(hidden, weight, targets, bias=bias, **options)

    assert function(*leaves).dtype == torch.float64
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_autocast(backend, amp):
    """A float32 head under autocast is what functional.linear would do: cast, and a float32 gradient."""
    hidden, weight, bias, targets = inputs(11, 24, 70)
    upstream = torch.rand(11)

    def function(enabled, *tensors):
        def loss(hidden, weight, bias):
            with torch.autocast(hidden.device.type, amp, enabled=enabled):
                return masked_cross_entropy(
                    hidden, weight, targets, bias=bias, mask_id=69, return_lse=True, backend=backend
                )

        return gradients(loss, *tensors, upstream)

    cast = function(False, hidden.to(amp), weight.to(amp), bias.to(amp))
    mixed = function(True, hidden.to(amp), weight, bias)
    full = function(True, hidden, weight, bias)
    assert mixed[3].dtype == full[2].dtype == torch.float32
    for a, b, c in zip(cast, mixed, full, strict=True):
        assert same_bits(a.float(), b.float())
        assert same_bits(a.float(), c.float())


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    _, weight, bias, _ = inputs(1, 16, 70)

    def loss(hidden, weight, bias, targets, weights):
        nll, lse = masked_cross_entropy(
            hidden, weight, targets, bias=bias, weights=weights, mask_id=69, return_lse=True
        )
        return nll.sum() * 2, lse

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (6, 9):
        hidden, _, _, targets = inputs(2 * rows, 16, 70)
        results = []
        for function in (loss, compiled):
            leaves = [x.clone().requires_grad_() for x in (hidden.view(2, rows, 16), weight, bias)]
            value, lse = function(*leaves, targets.view(2, rows), torch.ones(2, rows))
            value.backward()
            results.append([value.detach(), lse, *(leaf.grad for leaf in leaves)])
        assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
        with torch.no_grad():
            assert torch.equal(compiled(hidden, weight, bias, targets, torch.ones(2 * rows))[0], results[0][0])


def test_numpy():
    hidden, weight, bias, targets = inputs(5, 8, 20)
    expected = masked_cross_entropy(hidden, weight, targets, bias=bias)
    nll = masked_cross_entropy(hidden.numpy(), weight.numpy(), targets.numpy(), bias=bias.numpy())
    assert isinstance(nll, np.ndarray)
    assert np.array_equal(nll, expected.numpy())


# ---- errors ----------------------------------------------------------------------------------------------------

HIDDEN, WEIGHT, TARGETS = torch.zeros(3, 4), torch.zeros(9, 4), torch.tensor([1, -100, 2])
ERRORS = [
    ({"hidden": torch.zeros(3, 5)}, ValueError, r"hidden: must be \[\.\.\., 4\] for a weight \[9, 4\], got \[3, 5\]"),
    ({"hidden": torch.zeros(3, 4, dtype=torch.float64)}, TypeError, "hidden: got torch.float64, supported are float32"),
    ({"hidden": torch.zeros(4, 3).T}, ValueError, "hidden and weight must be matrices with a contiguous last"),
    ({"weight": torch.zeros(9, 4).bfloat16()}, TypeError, "weight: must have the dtype of hidden, torch.float32, got"),
    ({"weight": torch.zeros(0, 4)}, ValueError, r"weight: must be \[vocab, hidden_size\] with a vocab > 0, got"),
    ({"weight": torch.zeros(4)}, ValueError, r"weight: must be \[vocab, hidden_size\]"),
    ({"weight": torch.zeros(4, 9).T}, ValueError, "hidden and weight must be matrices with a contiguous last"),
    ({"bias": torch.zeros(8)}, ValueError, r"bias: must be \[9\], got \[8\]"),
    ({"bias": torch.zeros(9).half()}, TypeError, "bias: must have the dtype of hidden"),
    ({"targets": torch.zeros(3)}, TypeError, "targets: must be int64 or int32, got torch.float32"),
    ({"targets": torch.tensor([1, 2])}, ValueError, r"targets: must be \[3\] for a hidden \[3, 4\], got \[2\]"),
    ({"targets": torch.tensor([1, 9, 12])}, ValueError, r"targets: must be ids in \[0, 9\), or .* is 9, at flat"),
    ({"targets": torch.tensor([-100, 3, -1])}, ValueError, "targets: .* ignore_index -100; .* is -1, at flat index 2"),
    ({"mask_id": 2}, ValueError, "targets: .* other than mask_id 2, or .* is 2, at flat index 2"),
    ({"ignore_index": 1}, ValueError, "targets: .* or ignore_index 1; .* is -100, at flat index 1"),
    ({"weights": torch.ones(3).double()}, TypeError, "weights: must be float32, got torch.float64"),
    ({"weights": torch.ones(1)}, ValueError, r"weights: must be \[3\] for a hidden \[3, 4\], got \[1\]"),
    ({"mask_id": -2}, ValueError, "mask_id: must be >= 0, or -1 for none, got -2"),
    ({"logit_softcap": -1.0}, ValueError, r"logit_softcap: must be finite and >= 0, got -1\.0"),
    ({"logit_softcap": math.nan}, ValueError, "logit_softcap: must be finite and >= 0, got nan"),
    ({"backend": "tpu"}, ValueError, "backend: got 'tpu'"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), ERRORS, ids=[message[:40] for _, _, message in ERRORS])
def test_errors(change, error, message):
    with pytest.raises(error, match=f"masked_cross_entropy: {message}"):
        masked_cross_entropy(**{"hidden": HIDDEN, "weight": WEIGHT, "targets": TARGETS, **change})


def test_wrong_ids_in_the_kernel(compiled):
    """Where the card cannot look: an error on the CPU, NaN in its row on a GPU. The mask's logit is -inf."""
    hidden, weight, _, targets = inputs(4, 8, 20, skip=0.0)
    lse, target_logit = torch.zeros(4), torch.zeros(4)

    def run():
        arguments = (lse, target_logit, hidden, weight, None, targets, 19, 0.0)
        backends.run(compiled, "masked_cross_entropy", *arguments)

    targets[1] = 19
    run()
    assert target_logit.isinf().tolist() == [False, True, False, False]
    assert lse.isfinite().all()
    targets[2] = 20
    if compiled == "cpu":
        with pytest.raises(ValueError, match=r"targets: an id must be < vocab \(got 20\)"):
            run()
    else:
        run()
        assert lse.isnan().tolist() == target_logit.isnan().tolist() == [False, False, True, False]
