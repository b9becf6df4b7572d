"""Gradients of attention: against float64 autograd, over back ends, instruction sets, dtypes, masks and layouts."""

import functools
import itertools
import math

import pytest
import torch

from attention_cases import MASKS, dtypes, random_mask
from esokern import backend as backends
from esokern import masks
from esokern.attention import attend, attention
from esokern.testing import Guarded, assert_close, poison_, same_bits


def tensors(batch, seqlen_q, seqlen_kv, heads=2, kv_heads=1, head_dim=16, dtype=torch.float32):
    """q, k, v, dout, dlse."""
    q, dout = (torch.randn(batch, seqlen_q, heads, head_dim).to(dtype) for _ in range(2))
    k, v = (torch.randn(batch, seqlen_kv, kv_heads, head_dim).to(dtype) for _ in range(2))
    return q, k, v, dout, torch.randn(batch, heads, seqlen_q)


def slices(cu_seqlens):
    return [slice(*ends) for ends in itertools.pairwise(cu_seqlens.tolist())]


def plain_attention(q, k, v, mask=None, softmax_scale=None, cu_seqlens_q=None, cu_seqlens_k=None):
    """Plain PyTorch in the dtype of q: the yardstick of what rounding may cost."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    visible = None if mask is None else mask.dense()
    if cu_seqlens_q is None:
        return attend(q, k, v, visible, scale)
    out, lse = zip(
        *(
            attend(q[rows], k[keys], v[keys], None if visible is None else visible[rows, keys], scale)
            for rows, keys in zip(slices(cu_seqlens_q), slices(cu_seqlens_k), strict=True)
        ),
        strict=True,
    )
    return torch.cat(out), torch.cat(lse, -1)


def gradients(function, q, k, v, dout, dlse):
    """dq, dk, dv of function(q, k, v) -> out, lse. What is None of dout and dlse does not reach the loss."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    used = [(y, dy.to(y.dtype)) for y, dy in zip(function(*leaves), (dout, dlse), strict=True) if dy is not None]
    outputs, arrived = zip(*used, strict=True)
    return torch.autograd.grad(outputs, leaves, arrived, materialize_grads=True)


def ours(backend, q, k, v, dout, dlse, **options):
    return gradients(functools.partial(attention, return_lse=True, backend=backend, **options), q, k, v, dout, dlse)


def check(backend, q, k, v, dout, dlse, **options):
    """The gradients of the op on these inputs are within tolerance of float64 autograd; returns them."""
    got = ours(backend, q, k, v, dout, dlse, **options)
    gold = ours("reference", q.double(), k.double(), v.double(), dout, dlse, **options)
    plain = gradients(functools.partial(plain_attention, **options), q, k, v, dout, dlse)
    for name, *values in zip(("dq", "dk", "dv"), got, gold, plain, strict=True):
        assert_close(*values, name)
    return got


def assert_same_bits(got, expected):
    for name, a, b in zip(("dq", "dk", "dv"), got, expected, strict=True):
        assert same_bits(a, b), name


@dtypes
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("batch", "seqlen_q", "seqlen_kv", "heads", "kv_heads", "head_dim"),
    [
        (1, 1, 1, 1, 1, 8),
        (2, 1, 33, 4, 1, 64),
        (3, 15, 16, 2, 2, 24),
        (1, 16, 15, 3, 1, 16),
        (2, 17, 65, 6, 2, 40),
        (1, 63, 17, 2, 1, 56),
        (1, 65, 130, 2, 2, 128),
        (1, 130, 63, 4, 2, 8),
        (1, 5, 70, 2, 1, 256),
        (1, 66, 9, 1, 1, 200),
    ],
)
def test_against_float64(backend, dtype, mask, batch, seqlen_q, seqlen_kv, heads, kv_heads, head_dim):
    inputs = tensors(batch, seqlen_q, seqlen_kv, heads, kv_heads, head_dim, dtype)
    check(backend, *inputs, mask=MASKS[mask](batch, seqlen_q, seqlen_kv))


@dtypes
def test_every_mask_of_the_models(backend, dtype):
    """The published masks at a length of several tiles, different cutoffs per row."""
    length = 37
    rank = torch.stack([torch.randperm(length) for _ in range(3)])
    num_clean = torch.tensor([0, 11, 37])
    single = [
        masks.causal(length),
        masks.bidirectional(length),
        masks.any_order(rank),
        masks.prefix_lm(length, num_clean),
        *(masks.esolm_diffusion(rank, num_clean, variant=variant) for variant in ("A", "B", "mixed")),
        masks.block_causal(length, 4),
    ]
    double = [
        *(masks.esolm_sequential(rank, num_clean, variant=variant) for variant in ("A", "B")),
        masks.any_order_likelihood(rank),
        masks.block_diffusion(length, 5),
        *(masks.set_causal(rank // 3, noisy=noisy) for noisy in ("independent", "causal")),
    ]
    for mask in single:
        check(backend, *tensors(3, length, length, dtype=dtype), mask=mask)
    for mask in double:
        check(backend, *tensors(3, 2 * length, 2 * length, dtype=dtype), mask=mask)


@dtypes
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 1)], ids=["one_head", "grouped"])
def test_long_sequence(backend, dtype, heads, kv_heads):
    """Many tiles of queries and of keys, most of them hidden whole from each other."""
    seqlen = 390
    inputs = tensors(1, seqlen, seqlen, heads=heads, kv_heads=kv_heads, head_dim=8, dtype=dtype)
    check(backend, *inputs, mask=masks.causal(seqlen))
    check(backend, *inputs, mask=masks.esolm_sequential(torch.randperm(seqlen // 2)))


@dtypes
def test_many_keys(backend, dtype):
    """Keys beyond the length at which a kernel splits them among tasks; also where a whole split is hidden."""
    seqlen_q, seqlen_kv = 20, 2085
    inputs = tensors(2, seqlen_q, seqlen_kv, heads=4, kv_heads=2, head_dim=8, dtype=dtype)
    check(backend, *inputs, mask=masks.any_order(torch.randint(0, seqlen_kv, (2, seqlen_q)), torch.randperm(seqlen_kv)))
    check(backend, *inputs, mask=masks.sliding_window(seqlen_q, seqlen_kv, window_size=(40, 0)))
    got = check(backend, *inputs)
    if backend != "reference":
        got = ours(backend, *inputs, deterministic=True)
        torch.set_num_threads(1)
        assert_same_bits(ours(backend, *(x[1:] for x in inputs), deterministic=True), [x[1:] for x in got])


@pytest.mark.parametrize("through", ["out", "lse"])
def test_through_one_result_alone(backend, through):
    q, k, v, dout, dlse = tensors(2, 9, 21, heads=4, kv_heads=2)
    arrived = (dout, None) if through == "out" else (None, dlse)
    got = check(backend, q, k, v, *arrived, mask=random_mask(2, 9, 21))
    if through == "lse":
        assert (got[2] == 0).all()


def test_without_lse(backend):
    """attention(...) that returns out alone has the gradients of one that also returned lse."""
    q, k, v, dout, _ = tensors(2, 9, 21)
    mask = random_mask(2, 9, 21)
    alone = gradients(lambda *x: (attention(*x, mask=mask, backend=backend), None), q, k, v, dout, None)
    assert_same_bits(alone, ours(backend, q, k, v, dout, None, mask=mask))


# --- layouts


LENGTHS_Q, LENGTHS_K = [5, 0, 17, 1, 3], [9, 4, 33, 2, 0]


def cu_seqlens(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


@dtypes
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
def test_packed(backend, dtype, masked):
    """Also bit for bit what each sequence gives alone; keys without queries have gradients of 0."""
    inputs = tensors(1, sum(LENGTHS_Q), sum(LENGTHS_K), heads=4, kv_heads=2, dtype=dtype)
    q, k, v, dout, dlse = (x[0] for x in inputs)
    single = [
        random_mask(1, nq, nk) if nk else masks.bidirectional(nq, nk)
        for nq, nk in zip(LENGTHS_Q, LENGTHS_K, strict=True)
    ]
    mask = masks.pack(single) if masked else None
    cu_q, cu_k = cu_seqlens(LENGTHS_Q), cu_seqlens(LENGTHS_K)
    dq, dk, dv = check(backend, q, k, v, dout, dlse, mask=mask, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    assert (dk[9:13] == 0).all()
    assert (dv[9:13] == 0).all()
    if backend == "reference":  # whose matrix products round by their sizes
        return
    options = {"deterministic": True}
    dq, dk, dv = ours(backend, q, k, v, dout, dlse, mask=mask, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **options)
    for rows, keys, row_mask in zip(slices(cu_q), slices(cu_k), single, strict=True):
        row = (q[None, rows], k[None, keys], v[None, keys], dout[None, rows], dlse[None, :, rows])
        alone = ours(backend, *row, mask=row_mask if masked else None, **options)
        assert_same_bits((dq[None, rows], dk[None, keys], dv[None, keys]), alone)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]], ids=str)
def test_packed_without_tokens(backend, lengths):
    q, k, v, dout, dlse = (x[0] for x in tensors(1, 0, 0))
    cu = cu_seqlens(lengths)
    if lengths or backend != "reference":  # torch.cat of no sequences has no graph
        got = ours(backend, q, k, v, dout, dlse, cu_seqlens_q=cu, cu_seqlens_k=cu)
        assert [x.shape for x in got] == [q.shape, k.shape, v.shape]


@dtypes
def test_strided_inputs(backend, dtype):
    """(batch, heads, seqlen, head_dim) tensors seen transposed, slices of one projection, rows with gaps."""
    inputs = tensors(2, 19, 19, heads=4, kv_heads=4, head_dim=24, dtype=dtype)
    options = {"mask": masks.causal(19), "deterministic": True}
    expected = ours(backend, *inputs, **options)
    *floats, dlse = inputs
    by_head = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in floats]
    projection = torch.stack(floats, 2).unbind(2)
    padded = [Guarded(x).tensor for x in floats]
    sequence_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in floats]
    for strided in (by_head, projection, padded, sequence_first):
        assert_same_bits(
            ours(backend, *strided, dlse.transpose(1, 2).contiguous().transpose(1, 2), **options), expected
        )


def test_expanded_and_transposed_dout(backend):
    """What autograd sends back: one number for all of out (a sum), or a tensor whose last dimension is strided."""
    q, k, v, dout, _ = tensors(2, 19, 21)
    one = torch.ones(()).expand(dout.shape)
    assert_same_bits(ours(backend, q, k, v, one, None), ours(backend, q, k, v, torch.ones_like(dout), None))
    moved = dout.transpose(1, 3).contiguous().transpose(1, 3)
    assert_same_bits(ours(backend, q, k, v, moved, None), ours(backend, q, k, v, dout, None))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = attention(*leaves, return_lse=True, backend=backend)
    (out.sum() + lse.sum()).backward()
    expected = ours(backend, q, k, v, torch.ones_like(dout), torch.ones_like(lse))
    assert_same_bits([x.grad for x in leaves], expected)


def test_broadcast_keys(backend):
    """One key sequence for the whole batch: stride 0 going in, the sum over the batch coming out."""
    q, k, v, dout, dlse = tensors(3, 5, 21)
    leaves = [x.requires_grad_() for x in (q, k[:1].clone(), v[:1].clone())]
    shared = [leaves[0], *(x.expand(3, -1, -1, -1) for x in leaves[1:])]
    out, lse = attention(*shared, return_lse=True, backend=backend)
    dq, dk, dv = torch.autograd.grad([out, lse], leaves, [dout, dlse])
    expected = ours(backend, *(x.detach().contiguous() for x in shared), dout, dlse)
    for got, wanted in zip((dq, dk, dv), (expected[0], *(x.sum(0, keepdim=True) for x in expected[1:])), strict=True):
        torch.testing.assert_close(got, wanted)


# --- edges


@dtypes
def test_what_sees_nothing_and_what_nobody_sees(backend, dtype):
    """Gradients of exactly 0, whole tiles of them too; the dlse of a query that sees nothing counts for nothing."""
    q, k, v, dout, dlse = tensors(2, 70, 150, heads=4, dtype=dtype)
    prefix_end = torch.full((2, 70), -1, dtype=torch.int32)
    prefix_end[0, 3] = 0
    prefix_end[1, 66:] = 140
    mask = masks.RankMask(torch.arange(150, dtype=torch.int32)[None], prefix_end)
    blind = prefix_end < 0
    dlse.transpose(1, 2)[blind] = math.nan
    dq, dk, dv = ours(backend, q, k, v, dout, dlse, mask=mask)
    dlse.transpose(1, 2)[blind] = 0.0
    assert_same_bits((dq, dk, dv), check(backend, q, k, v, dout, dlse, mask=mask))
    assert (dq[blind] == 0).all()
    for unseen in (dk[0, 1:], dk[1, 141:], dv[0, 1:], dv[1, 141:]):
        assert (unseen == 0).all()
    assert (dv[0, 0] != 0).all()


@pytest.mark.parametrize(("batch", "seqlen_q", "seqlen_kv"), [(0, 3, 3), (2, 0, 3), (2, 3, 0), (0, 0, 0)])
def test_empty(backend, batch, seqlen_q, seqlen_kv):
    q, k, v, _, _ = tensors(batch, seqlen_q, seqlen_kv)
    for mask in (None, masks.bidirectional(seqlen_q, seqlen_kv)):
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out, lse = attention(*leaves, mask=mask, return_lse=True, backend=backend)
        for x, gradient in zip(leaves, torch.autograd.grad(out.sum() + lse.sum(), leaves), strict=True):
            assert gradient.shape == x.shape
            assert (gradient == 0).all()


@dtypes
def test_scales(backend, dtype):
    """The other sign, scores all alike."""
    q, k, v, dout, dlse = tensors(1, 5, 70, dtype=dtype)
    check(backend, q, k, v, dout, dlse, softmax_scale=-1.0)
    dq, dk, _ = check(backend, q, k, v, dout, dlse, softmax_scale=0.0)
    assert (dq == 0).all()
    assert (dk == 0).all()
    check(backend, torch.zeros_like(q), k, v, dout, dlse)


def test_large_scores(backend):
    """Beyond the range of exp. Weights come from lse again, whose float32 steps are all the precision that is left."""
    q, k, v, dout, dlse = tensors(1, 5, 70)
    options = {"softmax_scale": 64.0}
    lse = attention(q, k, v, return_lse=True, backend="reference", **options)[1]
    assert lse.max() > 200
    got = ours(backend, q, k, v, dout, dlse, **options)
    gold = ours("reference", q.double(), k.double(), v.double(), dout, dlse, **options)
    step = torch.finfo(torch.float32).eps * lse.abs().max().item()
    for x, y in zip(got, gold, strict=True):
        torch.testing.assert_close(x.double(), y, atol=16 * step * y.abs().max().item(), rtol=0)


# --- invariance


@dtypes
def test_batch_invariance(backend, dtype):
    """A batch row alone gives the bits it gives in the batch; so with one thread or two, and at every repetition."""
    if backend == "reference":
        pytest.skip("torch's matrix products, of which the reference consists, make no such promise")
    inputs = tensors(3, 70, 131, heads=4, kv_heads=2, head_dim=32, dtype=dtype)
    mask = random_mask(3, 70, 131)
    torch.set_num_threads(2)
    got = ours(backend, *inputs, mask=mask, deterministic=True)
    assert_same_bits(ours(backend, *inputs, mask=mask, deterministic=True), got)
    for b in range(3):
        row = slice(b, b + 1)
        row_mask = masks.RankMask(mask.k_rank[row], mask.prefix_end[row], mask.window_start[row], mask.window_end[row])
        alone = ours(backend, *(x[row] for x in inputs), mask=row_mask, deterministic=True)
        assert_same_bits([x[row] for x in got], alone)
    torch.set_num_threads(1)
    assert_same_bits(ours(backend, *inputs, mask=mask, deterministic=True), got)


# --- the operator itself


def raw_arguments(dtype=torch.float32, mask=random_mask):
    """Arguments of torch.ops.esokern.attention_backward by name, in order; the gradients are poison."""
    q, k, v, dout, dlse = tensors(2, 21, 35, heads=4, kv_heads=2, dtype=dtype)
    mask = mask(2, 21, 35)
    bounds = (mask.k_rank, mask.prefix_end, mask.window_start, mask.window_end)
    out, lse = attention(q, k, v, mask=mask, softmax_scale=0.25, return_lse=True, backend="reference")
    written = {name: poison_(torch.empty_like(x)) for name, x in (("dq", q), ("dk", k), ("dv", v))}
    floats = {"q": q, "k": k, "v": v, "out": out, "lse": lse, "dout": dout, "dlse": dlse}
    integers = {"cu_seqlens_q": None, "cu_seqlens_k": None}
    integers |= dict(zip(("k_rank", "prefix_end", "window_start", "window_end"), bounds, strict=True))
    return written | floats | integers | {"softmax_scale": 0.25, "deterministic": True}


def skip_reference(backend):
    if backend == "reference":
        pytest.skip("plain torch has no kernel")


@dtypes
def test_all_is_written_and_nothing_else(backend, dtype):
    """Poison in and around the gradients, poison around every float that is read."""
    skip_reference(backend)
    arguments = raw_arguments(dtype)
    backends.run(backend, "attention_backward", *arguments.values())
    for name in ("dq", "dk", "dv"):
        assert arguments[name].isfinite().all(), name
    guards = {name: Guarded(x) for name, x in arguments.items() if name[0] != "l" and _is_float(x)}
    for name in ("dq", "dk", "dv"):
        poison_(guards[name].tensor)
    guarded = arguments | {name: guard.tensor for name, guard in guards.items()}
    backends.run(backend, "attention_backward", *guarded.values())
    for name, guard in guards.items():
        guard.check()
        assert same_bits(guard.tensor, arguments[name]), name


def _is_float(x):
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def changed(name, function):
    return lambda arguments: arguments | {name: function(arguments[name])}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("dq", lambda x: x[:, :-1]), "dq, out and dout must have the shape of q"),
        (changed("dout", lambda x: x[..., :8]), "dq, out and dout must have the shape of q"),
        (changed("dk", lambda x: x[:, :, :1]), "v, dk and dv must have the shape of k"),
        (changed("v", lambda x: x[:1]), "v, dk and dv must have the shape of k"),
        (changed("dv", torch.Tensor.half), "must have one dtype"),
        (changed("out", torch.Tensor.double), "must have one dtype"),
        (changed("q", lambda x: x[0]), r"q and k must be \[batch, seqlen, heads, head_dim\]"),
        (changed("lse", lambda x: x[:, :, :-1]), r"lse and dlse must be \[batch, heads, seqlen_q\]"),
        (changed("dlse", lambda x: x.transpose(1, 2)), r"lse and dlse must be \[batch, heads, seqlen_q\]"),
        (changed("lse", torch.Tensor.double), "dtype"),
        (changed("dlse", torch.Tensor.half), "dtype"),
        (changed("k_rank", lambda x: x[:, :-1]), r"k_rank must be \[batch, seqlen_kv\]"),
        (changed("k_rank", torch.Tensor.long), "dtype"),
        (changed("prefix_end", lambda x: None), "k_rank and prefix_end go together"),
        (changed("window_end", lambda x: None), "window_start and window_end go together"),
        (changed("window_start", lambda x: x[:1]), r"must be \[batch, seqlen_q\]"),
        (changed("cu_seqlens_q", lambda x: torch.zeros(3, dtype=torch.int32)), "cu_seqlens_k go together"),
        (changed("dout", lambda x: x.transpose(1, 3).contiguous().transpose(1, 3)), "last dimension.*contiguous"),
        (changed("dq", lambda x: x.transpose(1, 3).contiguous().transpose(1, 3)), "last dimension.*contiguous"),
    ],
)
def test_raw_errors(backend, change, message):
    skip_reference(backend)
    arguments = change(raw_arguments())
    with pytest.raises(ValueError, match=message):
        backends.run(backend, "attention_backward", *arguments.values())


def test_raw_head_dim(backend):
    skip_reference(backend)
    cut = {name: x[..., :12] if _is_float(x) and x.dim() == 4 else x for name, x in raw_arguments().items()}
    with pytest.raises(ValueError, match="head_dim: supported are multiples of 8 up to 256"):
        backends.run(backend, "attention_backward", *cut.values())


def test_raw_heads(backend):
    skip_reference(backend)
    arguments = raw_arguments()
    for name in ("k", "v", "dk", "dv"):
        arguments[name] = arguments[name].repeat(1, 1, 2, 1)[:, :, :3]
    with pytest.raises(ValueError, match="kv_heads must divide heads"):
        backends.run(backend, "attention_backward", *arguments.values())


def test_opcheck():
    arguments = list(raw_arguments().values())
    torch.library.opcheck(torch.ops.esokern.attention_backward.default, arguments)
    q, k, v, dout, _ = tensors(1, 3, 4)
    out, lse = attention(q, k, v, return_lse=True, backend="reference")
    gradients_of = [torch.empty_like(x) for x in (q, k, v)]
    plain = [*gradients_of, q, k, v, out, lse, dout, *[None] * 7, 0.25, False]
    torch.library.opcheck(torch.ops.esokern.attention_backward.default, plain)


# --- autograd


@pytest.fixture
def calls(monkeypatch):
    """(op, arguments) of every kernel that runs."""
    seen = []
    run = backends.run
    monkeypatch.setattr(backends, "run", lambda chosen, op, *args: (seen.append((op, args)), run(chosen, op, *args))[1])
    return seen


def test_nothing_is_kept_where_no_gradient_is_wanted(calls):
    q, k, v, _, _ = tensors(1, 3, 4)
    assert attention(q, k, v).grad_fn is None
    q.requires_grad_()
    with torch.no_grad():
        assert attention(q, k, v).grad_fn is None
    with torch.inference_mode():
        attention(q, k, v)
    assert [args[1] for _, args in calls] == [None] * 3, "lse"
    assert attention(q, k, v).grad_fn is not None
    assert calls[-1][1][1] is not None


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_some_inputs_alone(backend, wanted):
    q, k, v, dout, _ = tensors(1, 9, 12)
    expected = ours(backend, q, k, v, dout, None)
    floats = [x.requires_grad_(i in wanted) for i, x in enumerate((q, k, v))]
    out = attention(*floats, backend=backend)
    got = torch.autograd.grad(out, [floats[i] for i in wanted], dout)
    for i, gradient in zip(wanted, got, strict=True):
        torch.testing.assert_close(gradient, expected[i])


@pytest.mark.parametrize("name", MASKS)
def test_reference_gradcheck(name):
    q, k, v, _, _ = tensors(1, 4, 6, head_dim=3, dtype=torch.float64)
    mask = MASKS[name](1, 4, 6)
    blind = torch.zeros(1, 4, dtype=torch.bool) if mask is None else ~mask.dense().any(-1)

    def both(q, k, v):
        out, lse = attention(q, k, v, mask=mask, return_lse=True, backend="reference")
        return out, lse.masked_fill(blind[:, None], 0.0)  # minus infinity has no numeric derivative

    assert torch.autograd.gradcheck(both, [x.requires_grad_() for x in (q, k, v)])


def test_second_derivative_is_refused():
    q, k, v, _, _ = (x.requires_grad_() for x in tensors(1, 3, 4))
    (dq,) = torch.autograd.grad(attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


@pytest.mark.parametrize("which", ["q", "out"])
def test_out_is_refused_where_a_gradient_is_needed(which):
    q, k, v, out, _ = tensors(1, 3, 3)
    {"q": q, "out": out}[which].requires_grad_()
    with pytest.raises(ValueError, match="attention: out: must be None where an input or out requires grad"):
        attention(q, k, v, out=out)
    with torch.no_grad():
        assert attention(q, k, v, out=out) is out


def test_deterministic_reaches_the_kernel(calls):
    q, k, v, _, _ = (x.requires_grad_() for x in tensors(1, 3, 4))
    attention(q, k, v).sum().backward()
    attention(q, k, v, deterministic=True).sum().backward()
    torch.use_deterministic_algorithms(True)
    try:
        attention(q, k, v).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert [args[-1] for op, args in calls if op == "attention_backward"] == [False, True, True]


def test_compile():
    """A whole graph forward and backward, for two shapes, with and without a mask."""

    def layer(q, k, v, k_rank, prefix_end):
        out = attention(q * 2, k, v, mask=masks.RankMask(k_rank, prefix_end))
        other, lse = attention(q, k, v, return_lse=True)
        return out + other, lse

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for seqlen in (4, 7):
        inputs = tensors(2, seqlen, 11)
        mask = masks.causal(seqlen, 11)
        bounds = {"k_rank": mask.k_rank, "prefix_end": mask.prefix_end}
        expected, got = (gradients(functools.partial(f, **bounds), *inputs) for f in (layer, compiled))
        assert_same_bits(got, expected)


def test_compile_packed():
    cu_q, cu_k = cu_seqlens(LENGTHS_Q), cu_seqlens(LENGTHS_K)
    inputs = [x[0] for x in tensors(1, sum(LENGTHS_Q), sum(LENGTHS_K))]

    def layer(q, k, v):
        return attention(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, return_lse=True, deterministic=True)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_same_bits(gradients(compiled, *inputs), gradients(layer, *inputs))


def test_raw_cu_seqlens(backend):
    """Sequences that do not add up are an error on the CPU. A GPU does not stop for the host: its gradients are NaN."""
    skip_reference(backend)
    good = torch.tensor([0, 5, 7, 20], dtype=torch.int32)
    q, k, v, dout, dlse = (x[0] for x in tensors(1, 20, 20, heads=4, kv_heads=2))
    for ends in ([0, 5, 3, 20], [1, 5, 7, 20], [0, 5, 7, 19], [0, -4, 7, 20]):
        bad = torch.tensor(ends, dtype=torch.int32)
        for cu_seqlens in ((bad, good), (good, bad)):
            gradients = [torch.zeros_like(x) for x in (q, k, v)]
            optional = (*cu_seqlens, None, None, None, None)
            arguments = (*gradients, q, k, v, q, torch.zeros(4, 20), dout, dlse, *optional, 1.0, True)
            if backend == "cuda":
                backends.run(backend, "attention_backward", *arguments)
                assert all(x.isnan().all() for x in gradients)
            else:
                with pytest.raises(ValueError, match="cu_seqlens"):
                    backends.run(backend, "attention_backward", *arguments)
