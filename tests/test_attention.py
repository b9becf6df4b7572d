"""attention: against the reference in float64, over back ends, instruction sets, dtypes, masks and layouts."""

import math

import numpy as np
import pytest
import torch

from attention_cases import MASKS, dtypes, random_mask
from esokern import masks
from esokern.attention import attention
from esokern.testing import Guarded, assert_close, poison_, same_bits


def tensors(batch, seqlen_q, seqlen_kv, heads=2, kv_heads=1, head_dim=16, dtype=torch.float32):
    q = torch.randn(batch, seqlen_q, heads, head_dim).to(dtype)
    k, v = (torch.randn(batch, seqlen_kv, kv_heads, head_dim).to(dtype) for _ in range(2))
    return q, k, v


def check(backend, q, k, v, **options):
    """The op on these inputs is within tolerance of the float64 reference; returns out and lse."""
    out, lse = attention(q, k, v, return_lse=True, backend=backend, **options)
    gold = attention(q.double(), k.double(), v.double(), return_lse=True, backend="reference", **options)
    plain = attention(q, k, v, return_lse=True, backend="reference", **options)
    assert_close(out, gold[0], plain[0], "out")
    assert_close(lse, gold[1], plain[1], "lse")
    return out, lse


@dtypes
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("batch", "seqlen_q", "seqlen_kv", "heads", "kv_heads", "head_dim"),
    [
        (1, 1, 1, 1, 1, 8),
        (2, 1, 33, 4, 1, 64),
        (2, 3, 64, 2, 1, 24),
        (3, 7, 15, 2, 2, 24),
        (1, 16, 16, 3, 1, 16),
        (2, 17, 65, 6, 2, 40),
        (1, 32, 17, 2, 1, 56),
        (1, 65, 127, 2, 2, 128),
        (2, 150, 140, 2, 1, 8),
        (1, 3, 259, 4, 2, 256),
    ],
)
def test_against_reference(backend, dtype, mask, batch, seqlen_q, seqlen_kv, heads, kv_heads, head_dim):
    q, k, v = tensors(batch, seqlen_q, seqlen_kv, heads, kv_heads, head_dim, dtype)
    check(backend, q, k, v, mask=MASKS[mask](batch, seqlen_q, seqlen_kv))


@pytest.mark.parametrize("heads", [1, 4], ids=["few_rows", "many_rows"])
@pytest.mark.parametrize("seqlen_kv", [2048, 2049, 4133])
def test_long_sequence(backend, heads, seqlen_kv):
    """Keys beyond the length at which a kernel splits them, also where a whole split is hidden."""
    q, k, v = tensors(1, 5, seqlen_kv, heads=heads, head_dim=32)
    check(backend, q, k, v)
    check(backend, q, k, v, mask=masks.causal(5, seqlen_kv))
    check(backend, q, k, v, mask=masks.sliding_window(5, seqlen_kv, window_size=(40, 0)))
    check(backend, q, k, v, mask=masks.bidirectional(5, seqlen_kv, kv_lengths=0))


@pytest.mark.parametrize("mask", ["none", "causal", "any_order", "window"])
def test_reference_is_attention(mask):
    """The reference itself, against torch's scaled_dot_product_attention with the dense mask."""
    q, k, v = tensors(2, 9, 13, heads=6, kv_heads=2, dtype=torch.float64)
    rank_mask = MASKS[mask](2, 9, 13)
    dense = None if rank_mask is None else rank_mask.dense()[:, None]
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), *(x.repeat_interleave(3, 2).transpose(1, 2) for x in (k, v)), attn_mask=dense
    )
    out = attention(q, k, v, mask=rank_mask, backend="reference")
    sees_any = torch.ones(1, 1, 1, 1) if dense is None else dense.any(-1)[:, 0, :, None, None]
    torch.testing.assert_close(out, expected.transpose(1, 2).nan_to_num() * sees_any, rtol=1e-12, atol=1e-12)


@dtypes
def test_every_mask_of_the_models(backend, dtype):
    """The published masks at a length of several tiles, different cutoffs per row."""
    length = 37
    rank = torch.stack([torch.randperm(length) for _ in range(3)])
    num_clean = torch.tensor([0, 11, 37])
    single = [
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


def test_order_in_memory_does_not_matter(backend):
    """Keys and queries permuted in memory, ranks with them: the same attention, permuted."""
    length = 70
    q, k, v = tensors(1, length, length)
    sorted_out = attention(q, k, v, mask=masks.causal(length), backend=backend)
    order = torch.randperm(length)
    mask = masks.any_order(order[None])
    out = attention(q[:, order], k[:, order], v[:, order], mask=mask, backend=backend)
    torch.testing.assert_close(out, sorted_out[:, order], rtol=1e-5, atol=1e-5)


# --- layouts


LENGTHS_Q, LENGTHS_K = [5, 0, 17, 1, 3], [9, 4, 33, 2, 0]


def cu_seqlens(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


@dtypes
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
def test_packed(backend, dtype, masked):
    q, k, v = (x[0] for x in tensors(1, sum(LENGTHS_Q), sum(LENGTHS_K), heads=4, kv_heads=2, dtype=dtype))
    single = [
        random_mask(1, nq, nk) if nk else masks.bidirectional(nq, nk)
        for nq, nk in zip(LENGTHS_Q, LENGTHS_K, strict=True)
    ]
    mask = masks.pack(single) if masked else None
    cu_q, cu_k = cu_seqlens(LENGTHS_Q), cu_seqlens(LENGTHS_K)
    out, lse = check(backend, q, k, v, mask=mask, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    for b, row_mask in enumerate(single):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        row_out, row_lse = attention(
            q[None, rows],
            k[None, keys],
            v[None, keys],
            mask=row_mask if masked else None,
            return_lse=True,
            backend=backend,
        )
        assert same_bits(out[rows], row_out[0])
        assert same_bits(lse[:, rows], row_lse[0])


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]], ids=str)
def test_packed_without_tokens(backend, lengths):
    q, k, v = (x[0] for x in tensors(1, 0, 0))
    cu = cu_seqlens(lengths)
    out, lse = attention(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, return_lse=True, backend=backend)
    assert out.shape == (0, 2, 16)
    assert lse.shape == (2, 0)


@dtypes
def test_strided_inputs(backend, dtype):
    """(batch, heads, seqlen, head_dim) tensors seen transposed, and q, k, v as slices of one projection."""
    q, k, v = tensors(2, 19, 19, heads=4, kv_heads=4, head_dim=24, dtype=dtype)
    mask = masks.causal(19)
    expected = attention(q, k, v, mask=mask, return_lse=True, backend=backend)
    by_head = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    projection = torch.stack([q, k, v], 2).unbind(2)
    padded = [Guarded(x).tensor for x in (q, k, v)]
    reversed_batch = [x.flip(0) for x in (q, k, v)]
    for strided in (by_head, projection, padded, [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]):
        out, lse = attention(*strided, mask=mask, return_lse=True, backend=backend)
        assert same_bits(out, expected[0])
        assert same_bits(lse, expected[1])
    out = attention(*reversed_batch, mask=mask, backend=backend)
    assert same_bits(out.flip(0), expected[0])


def test_broadcast_keys(backend):
    """One key sequence for the whole batch: stride 0 over the batch, for k, v and k_rank."""
    q, k, v = tensors(3, 5, 21)
    k, v = (x[:1].expand(3, -1, -1, -1) for x in (k, v))
    check(backend, q, k, v)
    mask = masks.any_order(torch.randint(0, 21, (3, 5)), torch.randperm(21)[None])
    out, _ = check(backend, q, k, v, mask=mask)
    assert torch.equal(out, attention(q, k.contiguous(), v.contiguous(), mask=mask, backend=backend))


@dtypes
def test_out_is_filled_and_nothing_else(backend, dtype):
    q, k, v = tensors(2, 9, 33, heads=3, dtype=dtype)
    mask = random_mask(2, 9, 33)
    expected = attention(q, k, v, mask=mask, backend=backend)
    plain = poison_(torch.empty_like(q))
    assert attention(q, k, v, mask=mask, out=plain, backend=backend) is plain
    assert same_bits(plain, expected)
    guarded = Guarded(poison_(torch.empty_like(q)))
    attention(q, k, v, mask=mask, out=guarded.tensor, backend=backend)
    assert same_bits(guarded.tensor, expected)
    guarded.check()


# --- edges


def test_rows_that_see_nothing(backend):
    """Zero output, lse of minus infinity; also where a whole tile of keys is hidden, and with finite neighbours."""
    q, k, v = tensors(2, 40, 150)
    prefix_end = torch.full((2, 40), -1, dtype=torch.int32)
    prefix_end[0, 3] = 0
    prefix_end[1, 17:] = 149
    mask = masks.RankMask(torch.arange(150, dtype=torch.int32)[None], prefix_end)
    out, lse = check(backend, q, k, v, mask=mask)
    hidden = prefix_end < 0
    assert (out[hidden] == 0).all()
    assert (lse.transpose(1, 2)[hidden] == -math.inf).all()
    assert torch.equal(out[0, 3, 0], v[0, 0, 0])


@pytest.mark.parametrize(("batch", "seqlen_q", "seqlen_kv"), [(0, 3, 3), (2, 0, 3), (2, 3, 0), (0, 0, 0)])
def test_empty(backend, batch, seqlen_q, seqlen_kv):
    q, k, v = tensors(batch, seqlen_q, seqlen_kv)
    for mask in (None, masks.bidirectional(seqlen_q, seqlen_kv)):
        out, lse = attention(q, k, v, mask=mask, return_lse=True, backend=backend)
        assert out.shape == q.shape
        assert lse.shape == (batch, 2, seqlen_q)
        assert (out == 0).all()
        assert (lse == -math.inf).all()


@dtypes
def test_large_and_equal_scores(backend, dtype):
    """Scores beyond the range of exp, and all alike: no overflow, weights exact."""
    q, k, v = tensors(1, 5, 70, dtype=dtype)
    check(backend, q * 8, k * 8, v, softmax_scale=16.0)
    check(backend, q, k, v, softmax_scale=-1.0)
    _, lse = check(backend, q, k, v, softmax_scale=0.0)
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(70)))
    check(backend, torch.zeros_like(q), k, v)


def test_softmax_scale_default(backend):
    q, k, v = tensors(1, 3, 8, head_dim=64)
    assert same_bits(attention(q, k, v, backend=backend), attention(q, k, v, softmax_scale=0.125, backend=backend))


# --- invariance


@dtypes
def test_batch_invariance(backend, dtype):
    """A batch row alone gives the bits it gives in the batch; so with one thread or two."""
    q, k, v = tensors(4, 21, 131, heads=4, kv_heads=2, head_dim=32, dtype=dtype)
    mask = random_mask(4, 21, 131)
    torch.set_num_threads(2)
    out, lse = attention(q, k, v, mask=mask, return_lse=True, backend=backend)
    if backend == "cpu":  # torch's matrix products, of which the reference consists, make no such promise
        for b in range(4):
            row = slice(b, b + 1)
            bounds = (mask.k_rank[row], mask.prefix_end[row], mask.window_start[row], mask.window_end[row])
            row_out, row_lse = attention(
                q[row], k[row], v[row], mask=masks.RankMask(*bounds), return_lse=True, backend=backend
            )
            assert same_bits(out[row], row_out)
            assert same_bits(lse[row], row_lse)
        torch.set_num_threads(1)
        again = attention(q, k, v, mask=mask, return_lse=True, backend=backend)
        assert same_bits(out, again[0])
        assert same_bits(lse, again[1])


# --- gradients


def test_reference_is_differentiable():
    q, k, v = (x.requires_grad_() for x in tensors(1, 4, 6, heads=2, kv_heads=1, head_dim=3, dtype=torch.float64))
    mask = masks.RankMask(torch.arange(6).int()[None], torch.tensor([[3, -1, 5, 0]], dtype=torch.int32))

    def both(q, k, v):
        out, lse = attention(q, k, v, mask=mask, return_lse=True, backend="reference")
        return out, lse[..., [0, 2, 3]]  # the second query sees nothing: lse is minus infinity there

    assert torch.autograd.gradcheck(both, (q, k, v))


# --- torch operators


def operator_arguments(dtype=torch.float32):
    q, k, v = tensors(2, 5, 9, dtype=dtype)
    mask = random_mask(2, 5, 9)
    bounds = (mask.k_rank, mask.prefix_end, mask.window_start, mask.window_end)
    return (torch.empty_like(q), torch.empty(2, 2, 5), q, k, v, None, None, *bounds, 0.25)


def test_opcheck():
    arguments = operator_arguments()
    torch.library.opcheck(torch.ops.esokern.attention, arguments)
    nothing = (None,) * 6
    torch.library.opcheck(torch.ops.esokern.attention, (arguments[0], None, *arguments[2:5], *nothing, 0.25))


def test_compile():
    """A whole graph, for two shapes, with and without a mask."""

    def layer(q, k, v, k_rank, prefix_end):
        out = attention(q * 2, k, v, mask=masks.RankMask(k_rank, prefix_end))
        other, lse = attention(q, k, v, return_lse=True)
        return out + other, lse

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for seqlen in (4, 7):
        q, k, v = tensors(2, seqlen, 11)
        mask = masks.causal(seqlen, 11)
        expected = layer(q, k, v, mask.k_rank, mask.prefix_end)
        out = compiled(q, k, v, mask.k_rank, mask.prefix_end)
        assert torch.equal(out[0], expected[0])
        assert torch.equal(out[1], expected[1])


def test_numpy_arrays(backend):
    if torch.get_default_device().type == "cuda":
        pytest.skip("NumPy arrays lie on the host")
    q, k, v = tensors(2, 3, 5)
    mask = masks.causal(3, 5)
    out, lse = attention(*(x.numpy() for x in (q, k, v)), mask=mask, return_lse=True, backend=backend)
    expected = attention(q, k, v, mask=mask, return_lse=True, backend=backend)
    assert same_bits(torch.from_numpy(out), expected[0])
    assert same_bits(torch.from_numpy(lse), expected[1])
    given = np.empty_like(out)
    assert attention(*(x.numpy() for x in (q, k, v)), mask=mask, out=given, backend=backend) is given
    assert (given == out).all()


# --- errors


Q, K, V = tensors(2, 3, 4)
CU = torch.tensor([0, 3], dtype=torch.int32)


def packed_call(cu_q, cu_k):
    q, k, v = Q[0], K[0], V[0]
    return attention(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: attention(Q.numpy().tolist(), K, V), TypeError, "q: must be a torch.Tensor, got list"),
        (
            lambda: attention(Q.int(), K.int(), V.int()),
            TypeError,
            "q: must be float32, bfloat16 or float16, got torch.int32",
        ),
        (lambda: attention(Q, K.half(), V), TypeError, "k: must have q's dtype torch.float32, got torch.float16"),
        (
            lambda: attention(Q.double(), K.double(), V.double()),
            TypeError,
            "q: the compiled back ends take float32.*float64",
        ),
        (
            lambda: attention(Q[0], K, V),
            ValueError,
            r"q: must be \[batch, seqlen_q, heads, head_dim\], got .* cu_seqlens",
        ),
        (lambda: attention(Q, K[0], V), ValueError, r"k: must be \[batch, seqlen_kv, kv_heads, head_dim\], got shape"),
        (
            lambda: attention(Q, K, V[:, :1]),
            ValueError,
            r"v: must have the shape of k \[2, 4, 1, 16\], got \[2, 1, 1, 16\]",
        ),
        (lambda: attention(Q, K[..., :8], V[..., :8]), ValueError, "k: must have q's head_dim 16, got 8"),
        (
            lambda: attention(Q, *[x.expand(2, 4, 3, 16) for x in (K, V)]),
            ValueError,
            "k: kv_heads must divide q's 2 heads, got 3",
        ),
        (lambda: attention(Q, K[:1], V[:1]), ValueError, "k: must have q's batch size 2, got 1"),
        (lambda: attention(Q[..., :4], K[..., :4], V[..., :4]), ValueError, "q: .* multiple of 8 up to 256, got 4"),
        (lambda: attention(Q, K, V, softmax_scale=math.nan), ValueError, "softmax_scale: must be finite, got nan"),
        (lambda: attention(Q, K, V, mask="causal"), TypeError, "mask: must be a RankMask .*, got str"),
        (
            lambda: attention(Q, K, V, mask=masks.causal(3, 5)),
            ValueError,
            r"mask.k_rank: must be \[2, 4\] or \[1, 4\], got \[1, 5\]",
        ),
        (
            lambda: attention(Q, K, V, mask=masks.causal(2, 4)),
            ValueError,
            r"mask.prefix_end: must be \[2, 3\] or \[1, 3\], got",
        ),
        (
            lambda: attention(Q, K, V, mask=masks.RankMask(None, torch.zeros(1, 3, dtype=torch.int32))),
            ValueError,
            "mask.k_rank: must be given",
        ),
        (
            lambda: attention(Q, K, V, out=Q.half()),
            TypeError,
            "out: must have q's dtype torch.float32, got torch.float16",
        ),
        (
            lambda: attention(Q, K, V, out=Q[:1]),
            ValueError,
            r"out: must have q's shape \[2, 3, 2, 16\], got \[1, 3, 2, 16\]",
        ),
        (lambda: attention(Q, K, V, backend="tpu"), ValueError, "attention: backend: got 'tpu', supported are"),
        (lambda: attention(Q, K.to("meta"), V), ValueError, "attention: all tensors must be on one device"),
        (lambda: attention(*(x.to("meta") for x in (Q, K, V))), ValueError, "no compiled back end for device meta"),
        (lambda: attention(Q[0], K[0], V[0], cu_seqlens_q=CU), ValueError, "go together; cu_seqlens_k is missing"),
        (
            lambda: attention(Q, K, V, cu_seqlens_q=CU, cu_seqlens_k=CU),
            ValueError,
            r"q: must be \[total_q, heads, head_dim\]",
        ),
        (lambda: packed_call(CU.long(), CU), TypeError, "cu_seqlens_q: must be int32, got torch.int64"),
        (lambda: packed_call(CU, CU[:1]), ValueError, r"cu_seqlens_k: must be \[batch \+ 1\] = \[2\], got \[1\]"),
        (lambda: packed_call(CU[:0], CU), ValueError, r"cu_seqlens_q: must be \[batch \+ 1\] and begin with 0"),
        (
            lambda: packed_call(torch.tensor([0, 4]).int(), torch.tensor([0, 4]).int()),
            ValueError,
            "cu_seqlens_q: must rise from 0 to 3",
        ),
        (
            lambda: packed_call(torch.tensor([1, 3]).int(), torch.tensor([0, 4]).int()),
            ValueError,
            "cu_seqlens_q: must rise from 0 to 3",
        ),
        (lambda: packed_call(CU, torch.tensor([0, 3]).int()), ValueError, "cu_seqlens_k: must rise from 0 to 4"),
        (
            lambda: packed_call(torch.tensor([0, -1, 3]).int(), torch.tensor([0, 2, 4]).int()),
            ValueError,
            "cu_seqlens_q: must rise",
        ),
        (
            lambda: attention(*(x.transpose(1, 3).contiguous().transpose(1, 3) for x in (Q, K, V))),
            ValueError,
            "q: the last dimension must be contiguous",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_reference_takes_what_kernels_do_not():
    """float64, any head_dim, any strides."""
    q, k, v = tensors(1, 3, 4, head_dim=5, dtype=torch.float64)
    out = attention(q, k, v, backend="reference")
    moved = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v)]
    torch.testing.assert_close(attention(*moved, backend="reference"), out)
