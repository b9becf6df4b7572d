"""KVCache: its sizes, its bookkeeping, its errors; and a toy model whose cached steps equal one pass from scratch."""

import pytest
import torch

from esokern import masks
from esokern.attention import attention
from esokern.attention_with_kvcache import attention_with_kvcache
from esokern.kv_cache import KVCache


def make(**changes):
    sizes = {"num_layers": 3, "batch": 2, "max_seqlen": 10, "kv_heads": 2, "head_dim": 8}
    return KVCache(**{**sizes, "dtype": torch.float32, "device": "cpu", **changes})


def test_contiguous():
    cache = make(dtype=torch.bfloat16)
    k_cache, v_cache = cache.layer(1)
    assert k_cache.shape == v_cache.shape == (2, 10, 2, 8)
    assert k_cache.dtype == cache.dtype == torch.bfloat16
    assert cache.page_table is None
    assert cache.memory_bytes == 2 * 3 * 2 * 10 * 2 * 8 * 2
    assert cache.cache_seqlens.tolist() == [0, 0]
    assert cache.num_layers == 3
    assert k_cache.data_ptr() != cache.layer(2)[0].data_ptr()
    assert cache.layer(1)[0] is k_cache


def test_paged():
    cache = make(page_size=4)
    assert cache.layer(0)[0].shape == (6, 4, 2, 8)
    assert cache.page_table.dtype == torch.int32
    assert cache.page_table.shape == (2, 3)
    assert sorted(cache.page_table.flatten().tolist()) == list(range(6))


def test_repr():
    text = repr(make(page_size=4))
    for part in (
        "num_layers=3",
        "batch=2",
        "max_seqlen=10",
        "kv_heads=2",
        "head_dim=8",
        "float32",
        "page_size=4",
        "MiB",
    ):
        assert part in text


def test_commit_crop_reset():
    cache = make()
    lengths = cache.cache_seqlens
    cache.commit(3)
    cache.commit(torch.tensor([0, 4], dtype=torch.int32))
    assert lengths.tolist() == [3, 7]
    assert cache.longest == 7
    cache.check_room(3)
    cache.commit(0)
    cache.crop(5)
    assert lengths.tolist() == [3, 5]
    cache.reset()
    assert lengths.tolist() == [0, 0]
    assert lengths is cache.cache_seqlens
    cache.commit(10)


def test_bounds_are_kept_without_reading_the_device():
    """On a device whose values cannot be read (meta stands for it), the longest row is known to the host."""
    cache = make(device="meta")
    cache.commit(4)
    cache.commit(torch.ones(2, dtype=torch.int32, device="meta"), at_most=3)
    assert cache.longest == 7
    with pytest.raises(ValueError, match="max_seqlen = 10 rows; got 7 committed and 4 to append"):
        cache.check_room(4)
    cache.crop(6)
    assert cache.longest == 6
    cache.commit(torch.ones(2, dtype=torch.int32, device="meta"), at_most=[0, 4])
    cache.commit(torch.ones(2, dtype=torch.int32, device="meta"), at_most=[4, 0])
    assert cache.longest == 10  # of one row; the maxima of the calls add up to more
    with pytest.raises(ValueError, match=r"got 10 committed and \[0, 1\] to commit"):
        cache.commit(torch.ones(2, dtype=torch.int32, device="meta"), at_most=[0, 1])
    with pytest.raises(ValueError, match=r"at_most: must be a number or 2 of them, got \[1\]"):
        cache.commit(torch.ones(2, dtype=torch.int32, device="meta"), at_most=[1])
    with pytest.raises(ValueError, match="at_most: must be given for a num on meta"):
        cache.commit(torch.ones(2, dtype=torch.int32, device="meta"))
    repr(cache)


def test_outlives_inference_mode():
    with torch.inference_mode():
        cache = make()
        cache.commit(1)
    cache.commit(1)
    cache.layer(0)[0][0, 0] = 1.0
    assert cache.longest == 2


ONES = torch.ones(2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: make(batch=0), ValueError, "KVCache: batch: must be at least 1, got 0"),
        (lambda: make(page_size=0), ValueError, "KVCache: page_size: must be at least 1, got 0"),
        (lambda: make(head_dim=8.0), TypeError, "KVCache: head_dim: must be an int, got float"),
        (lambda: make(dtype=torch.int8), TypeError, "KVCache: dtype: must be float32, .*, got torch.int8"),
        (lambda: make().layer(3), ValueError, r"KVCache.layer: index: must lie in 0 .. 2, got 3"),
        (lambda: make().check_room(11), ValueError, "holds max_seqlen = 10 rows; got 0 committed and 11 to append"),
        (lambda: make().commit(11), ValueError, "holds max_seqlen = 10 rows; got 0 committed and 11 to commit"),
        (lambda: make().commit(ONES * 11), ValueError, r"got 0 committed and \[11, 11\] to commit"),
        (lambda: make().commit(-1), ValueError, "num: must be at least 0, got -1"),
        (lambda: make().commit(-ONES), ValueError, r"num: must be at least 0, got \[-1, -1\]"),
        (lambda: make().commit(1.5), TypeError, "num: must be an int or int32 .*, got float"),
        (lambda: make().commit(ONES.long()), TypeError, "num: must be int32, got torch.int64"),
        (lambda: make().commit(ONES[:1]), ValueError, r"num: must be \[batch\] = \[2\], got \[1\]"),
        (lambda: make().commit(ONES.to("meta"), at_most=1), ValueError, "num: must be on cpu, got meta"),
        (lambda: make().crop(11), ValueError, "max_length: must lie in 0 .. 10, got 11"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_failed_commit_changes_nothing():
    cache = make()
    cache.commit(4)
    with pytest.raises(ValueError, match="to commit"):
        cache.commit(torch.tensor([1, 7], dtype=torch.int32))
    assert cache.cache_seqlens.tolist() == [4, 4]


@pytest.mark.parametrize("page_size", [None, 4], ids=["contiguous", "paged"])
def test_steps_of_a_model(backend, page_size):
    """Three layers of attention with residuals, Eso-LM steps [clean of the last step | masks of this one]: what the
    cached loop computes for each row equals one pass over all rows in denoising order."""
    layers, batch, heads, head_dim, steps = 3, 2, 2, 8, (3, 4, 1, 2)
    total = sum(steps)
    clean = torch.randn(batch, total, heads, head_dim)
    noisy = torch.randn(batch, total, heads, head_dim)
    weights = torch.randn(layers, 3, head_dim, head_dim) / head_dim**0.5

    def network(x, attend):
        for layer in range(layers):
            x = x + attend(layer, *(x @ weight for weight in weights[layer]))
        return x

    cache = make(max_seqlen=total, page_size=page_size)
    begin = previous = 0
    for count in steps:
        x = torch.cat([clean[:, previous:begin], noisy[:, begin : begin + count]], 1)
        cache.check_room(x.shape[1])

        def cached(layer, q, k, v):
            return attention_with_kvcache(
                q,
                *cache.layer(layer),
                k,
                v,
                cache_seqlens=cache.cache_seqlens,
                page_table=cache.page_table,
                backend=backend,
            )

        out = network(x, cached)
        cache.commit(begin - previous)
        assert cache.longest == begin

        everything = torch.cat([clean[:, :begin], noisy[:, begin : begin + count]], 1)
        mask = masks.causal(begin + count)
        scratch = network(everything, lambda _, q, k, v, mask=mask: attention(q, k, v, mask=mask, backend="reference"))
        torch.testing.assert_close(out, scratch[:, previous:], rtol=1e-4, atol=1e-4)
        previous, begin = begin, begin + count
