"""attention_with_kvcache: rotary, append, attend and commit against the reference, over back ends and layouts."""

import dataclasses
import itertools
import math
import re

import numpy as np
import pytest
import torch

from esokern.attention_with_kvcache import attention_with_kvcache
from esokern.kv_cache import KVCache
from esokern.masks import RankMask
from esokern.testing import POISON_INT, Guarded, assert_close, poison_, same_bits

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
CHUNK_MASKS = ("causal", "independent", "bidirectional")
chunk_masks = pytest.mark.parametrize("mask", CHUNK_MASKS)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


@dataclasses.dataclass
class Result:
    out: torch.Tensor
    lse: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    cache_seqlens: torch.Tensor


@dataclasses.dataclass
class Call:
    """The inputs of one call; run() works on copies of the caches, so that a call can be repeated."""

    q: torch.Tensor
    k: torch.Tensor | None
    v: torch.Tensor | None
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    cache_seqlens: torch.Tensor
    options: dict

    def run(self, backend, double=False, **options):
        def copy(tensor):
            return tensor.double() if double and tensor.is_floating_point() else tensor.clone()

        options = {**self.options, **options}
        for name in ("rotary_cos", "rotary_sin"):
            if options.get(name) is not None:
                options[name] = copy(options[name])
        q, k_cache, v_cache, cache_seqlens = map(copy, (self.q, self.k_cache, self.v_cache, self.cache_seqlens))
        k, v = (None if x is None else copy(x) for x in (self.k, self.v))
        out, lse = attention_with_kvcache(
            q, k_cache, v_cache, k, v, cache_seqlens=cache_seqlens, return_lse=True, backend=backend, **options
        )
        return Result(out, lse, k_cache, v_cache, cache_seqlens)

    def row(self, b):
        """The same call for batch row b alone (padded layout, contiguous cache)."""
        one = slice(b, b + 1)
        per_row = ("positions", "num_clean", "slots", "seqused_q")
        options = {
            name: value[one] if name in per_row and isinstance(value, torch.Tensor) else value
            for name, value in self.options.items()
        }
        if isinstance(options.get("mask"), RankMask):
            options["mask"] = rank_mask_row(options["mask"], one)
        k, v = (None if x is None else x[one] for x in (self.k, self.v))
        return Call(self.q[one], k, v, self.k_cache[one], self.v_cache[one], self.cache_seqlens[one], options)


def rank_mask_row(mask, one):
    tensors = (mask.k_rank, mask.prefix_end, mask.window_start, mask.window_end)
    return RankMask(*(x if x is None or x.shape[0] == 1 else x[one] for x in tensors))


def rotary(max_position, rotary_dim, dtype=torch.float32):
    angles = torch.arange(max_position)[:, None] / 10000 ** (torch.arange(0, rotary_dim, 2) / rotary_dim)
    return {"rotary_cos": angles.cos().to(dtype), "rotary_sin": angles.sin().to(dtype)}


def make_call(cached, rows, *, heads=4, kv_heads=2, head_dim=16, dtype=torch.float32, slack=3, append=True, **options):
    """A padded call for rows with `cached` committed tokens each; everything past them in the caches is poison."""
    batch, capacity = len(cached), max([*cached, 0]) + rows + slack
    q = torch.randn(batch, rows, heads, head_dim).to(dtype)
    k, v = (torch.randn(batch, rows, kv_heads, head_dim).to(dtype) for _ in range(2)) if append else (None, None)
    caches = [poison_(torch.empty(batch, capacity, kv_heads, head_dim, dtype=dtype)) for _ in range(2)]
    for cache, (b, length) in itertools.product(caches, enumerate(cached)):
        cache[b, :length] = torch.randn(length, kv_heads, head_dim).to(dtype)
    return Call(q, k, v, *caches, ints(*cached), options)


def with_rotary(rotary_dim, batch, rows, max_position=50, dtype=torch.float32):
    positions = torch.randint(0, max_position, (batch, rows), dtype=torch.int32)
    return {"positions": positions, **rotary(max_position, rotary_dim, dtype)}


def random_rank_mask(batch, rows, capacity):
    k_rank = torch.stack([torch.randperm(capacity) for _ in range(batch)]).int()
    prefix_end = torch.randint(-1, capacity, (batch, rows), dtype=torch.int32) // 2
    window_start = torch.randint(0, capacity, (batch, rows), dtype=torch.int32)
    return RankMask(k_rank, prefix_end, window_start, window_start + 4)


def check(backend, call, **options):
    """Output and lse within tolerance of float64; the caches and lengths exactly those of the reference."""
    result = call.run(backend, **options)
    gold = call.run("reference", double=True, **options)
    plain = call.run("reference", **options)
    assert_close(result.out, gold.out, plain.out, "out")
    assert_close(result.lse, gold.lse, plain.lse, "lse")
    assert same_bits(result.k_cache, plain.k_cache), "k_cache"
    assert same_bits(result.v_cache, plain.v_cache), "v_cache"
    assert torch.equal(result.cache_seqlens, plain.cache_seqlens), "cache_seqlens"
    return result


def assert_same(a, b):
    for field in dataclasses.fields(Result):
        assert same_bits(getattr(a, field.name), getattr(b, field.name)), field.name


# --- against the reference, and the reference against brute force


@dtypes
@pytest.mark.parametrize("mask", [*CHUNK_MASKS, "rank"])
@pytest.mark.parametrize(
    ("cached", "rows", "heads", "kv_heads", "head_dim", "rotary_dim"),
    [
        ([0], 1, 1, 1, 8, 8),
        ([5, 0, 16], 1, 4, 4, 64, 64),
        ([15, 62, 3], 3, 2, 1, 24, 16),
        ([17, 64], 7, 2, 2, 40, 0),
        ([131, 1], 16, 6, 2, 32, 32),
        ([9, 47], 65, 2, 2, 16, 16),
        ([200], 4, 4, 2, 256, 128),
    ],
)
def test_against_reference(backend, dtype, mask, cached, rows, heads, kv_heads, head_dim, rotary_dim):
    options = with_rotary(rotary_dim, len(cached), rows, dtype=dtype) if rotary_dim else {}
    call = make_call(cached, rows, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, **options)
    if mask == "rank":
        mask = random_rank_mask(len(cached), rows, call.k_cache.shape[1])
    num_clean = torch.randint(0, rows + 1, (len(cached),), dtype=torch.int32)
    check(backend, call, mask=mask, num_clean=num_clean, rotary_interleaved=rows % 2 == 0)


def brute_force(call, mask, num_clean, interleaved):
    """Row by row from the definitions, in float64: rotation by complex numbers, a Python rule for who sees whom."""
    outs = []
    cos, sin = (call.options[name].double() for name in ("rotary_cos", "rotary_sin"))
    half = cos.shape[1]

    def rotate(x, positions):
        turned = x[..., : 2 * half].double()
        pairs = turned.unflatten(-1, (half, 2) if interleaved else (2, half))
        pairs = pairs if interleaved else pairs.transpose(-1, -2)
        angle = torch.complex(cos[positions.long()], sin[positions.long()])[:, None]
        pairs = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * angle)
        pairs = pairs if interleaved else pairs.transpose(-1, -2)
        return torch.cat([pairs.flatten(-2), x[..., 2 * half :].double()], -1)

    for b, cached in enumerate(call.cache_seqlens.tolist()):
        q, k = (rotate(x[b], call.options["positions"][b]) for x in (call.q, call.k))
        keys = torch.cat([call.k_cache[b, :cached].double(), k])
        values = torch.cat([call.v_cache[b, :cached], call.v[b]]).double()

        def sees(i, j, b=b, cached=cached):
            j -= cached
            if j < 0 or mask == "bidirectional":
                return True
            if mask == "independent" and i >= num_clean[b]:
                return j < num_clean[b] or j == i
            return j <= i

        visible = torch.tensor([[sees(i, j) for j in range(len(keys))] for i in range(len(q))])
        group = call.q.shape[2] // call.k.shape[2]
        keys, values = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (keys, values))
        outs.append(
            torch.nn.functional.scaled_dot_product_attention(
                q.transpose(0, 1), keys, values, attn_mask=visible
            ).transpose(0, 1)
        )
    return torch.stack(outs)


@chunk_masks
@pytest.mark.parametrize("interleaved", [False, True], ids=["half_split", "interleaved"])
@pytest.mark.parametrize("rotary_dim", [16, 6])
def test_reference_against_brute_force(mask, interleaved, rotary_dim):
    call = make_call([4, 0, 9], 5, dtype=torch.float64, **with_rotary(rotary_dim, 3, 5))
    for num_clean in ([0, 2, 5], [3, 1, 0]):
        result = call.run("reference", mask=mask, num_clean=ints(*num_clean), rotary_interleaved=interleaved)
        expected = brute_force(call, mask, num_clean, interleaved)
        torch.testing.assert_close(result.out, expected, rtol=1e-12, atol=1e-12)


def test_num_clean_as_int_and_default(backend):
    call = make_call([4, 7], 5, mask="independent")
    for num_clean in (0, 2, 5):
        assert_same(call.run(backend, num_clean=num_clean), call.run(backend, num_clean=ints(num_clean, num_clean)))
    assert_same(call.run(backend), call.run(backend, mask="causal"))


@dtypes
def test_tables_of_another_dtype(backend, dtype):
    """cos and sin in float32 whatever the cache stores, or rounded as in the published sampler."""
    for table_dtype in DTYPES.values():
        check(backend, make_call([3, 8], 4, dtype=dtype, **with_rotary(16, 2, 4, dtype=table_dtype)))


def test_nothing_to_append(backend):
    """Without k and v the rows see the cache and only the cache, whatever the chunk mask."""
    call = make_call([6, 0, 21], 4, append=False, **with_rotary(16, 3, 4))
    results = [check(backend, call, mask=mask, num_clean=1) for mask in CHUNK_MASKS]
    assert same_bits(results[0].k_cache, call.k_cache)
    assert same_bits(results[0].out, results[1].out)
    assert same_bits(results[0].out, results[2].out)
    assert (results[0].out[1] == 0).all()
    assert (results[0].lse[1] == -math.inf).all()


def test_rank_masks(backend):
    """Sliding windows over the order of the cache, k_rank shared by the batch, and the row number as the rank."""
    call = make_call([11, 3], 5)
    capacity = call.k_cache.shape[1]
    own = call.cache_seqlens[:, None] + torch.arange(5, dtype=torch.int32)
    row_number = RankMask(None, torch.full_like(own, 1), own - 3, own)
    shared = RankMask(torch.arange(capacity, dtype=torch.int32)[None], row_number.prefix_end, own - 3, own)
    assert_same(check(backend, call, mask=row_number), check(backend, call, mask=shared))
    assert_same(check(backend, call, mask=RankMask(None, own)), call.run(backend, mask="causal"))
    see_nothing = check(backend, call, mask=RankMask(None, ints([-1] * 5)))
    assert (see_nothing.out == 0).all()
    assert (see_nothing.lse == -math.inf).all()


def test_long_cache(backend):
    """Beyond the length at which a kernel splits the keys."""
    for rows in (1, 8):
        call = make_call([2500, 17, 2048], rows, heads=2, kv_heads=1, head_dim=32)
        check(backend, call)
        check(backend, call, mask="independent", num_clean=0)


# --- commit and steps


@chunk_masks
def test_commit(backend, mask):
    call = make_call([4, 0, 9], 5)
    committed = check(backend, call, mask=mask, num_clean=ints(2, 0, 5), commit=True)
    assert committed.cache_seqlens.tolist() == [6, 0, 14]
    assert check(backend, call, mask=mask, num_clean=3, commit=True).cache_seqlens.tolist() == [7, 3, 12]
    assert check(backend, call, mask=mask, commit=True).cache_seqlens.tolist() == [9, 5, 14]
    assert call.run(backend, mask=mask).cache_seqlens.tolist() == [4, 0, 9]


@dtypes
def test_one_step_of_many_is_many_steps_of_one(backend, dtype):
    """Causal: the same rows one by one give the same cache, bit for bit, and the same outputs."""
    rows = 9
    call = make_call([5, 0], rows, dtype=dtype, **with_rotary(16, 2, rows))
    together = check(backend, call)
    gold = call.run("reference", double=True)
    plain = call.run("reference")
    k_cache, v_cache, lengths = call.k_cache.clone(), call.v_cache.clone(), call.cache_seqlens.clone()
    outs = []
    for i in range(rows):
        one = slice(i, i + 1)
        outs.append(
            attention_with_kvcache(
                *(call.q[:, one], k_cache, v_cache, call.k[:, one], call.v[:, one]),
                cache_seqlens=lengths,
                **{**call.options, "positions": call.options["positions"][:, one]},
                commit=True,
                backend=backend,
            )
        )
    assert_close(torch.cat(outs, 1), gold.out, plain.out)
    assert same_bits(k_cache, together.k_cache)
    assert same_bits(v_cache, together.v_cache)
    assert lengths.tolist() == [5 + rows, rows]


@dtypes
def test_independent_masks_are_alone(backend, dtype):
    """Each mask of a step gives what it gives as the only mask of the step."""
    clean, noisy = 3, 6
    call = make_call([5, 0], clean + noisy, dtype=dtype, **with_rotary(16, 2, clean + noisy))
    together = check(backend, call, mask="independent", num_clean=clean)
    gold = call.run("reference", double=True, mask="independent", num_clean=clean)
    plain = call.run("reference", mask="independent", num_clean=clean)
    for i in range(clean, clean + noisy):
        rows = [*range(clean), i]
        alone = Call(
            *(x[:, rows] for x in (call.q, call.k, call.v)),
            *(call.k_cache, call.v_cache, call.cache_seqlens),
            {**call.options, "positions": call.options["positions"][:, rows]},
        ).run(backend)
        assert_close(alone.out[:, -1], gold.out[:, i], plain.out[:, i])
        assert_close(alone.out[:, :-1], gold.out[:, :clean], plain.out[:, :clean])
    assert same_bits(together.k_cache, call.run(backend, mask="causal").k_cache)


def test_scratch_rows_are_overwritten(backend):
    """A step of masks leaves no trace: the next step gives the same bits with and without it."""
    masks_first = make_call([4, 2], 6)
    after = make_call([4, 2], 3)
    step = masks_first.run(backend)
    used, fresh = (
        Call(after.q, after.k, after.v, k_cache, v_cache, masks_first.cache_seqlens, {}).run(backend)
        for k_cache, v_cache in ((step.k_cache, step.v_cache), (masks_first.k_cache, masks_first.v_cache))
    )
    assert same_bits(used.out, fresh.out)
    assert same_bits(used.lse, fresh.lse)


# --- ragged rows


LENGTHS = [3, 0, 17, 1]


@dtypes
@pytest.mark.parametrize("mask", [*CHUNK_MASKS, "rank"])
def test_ragged_rows(backend, dtype, mask):
    """Packed, padded with seqused_q, and each row alone: the same bits. What is not in use is poison, and stays."""
    batch, rows = len(LENGTHS), max(LENGTHS)
    call = make_call([5, 8, 0, 30], rows, dtype=dtype, **with_rotary(16, batch, rows))
    capacity = call.k_cache.shape[1]
    num_clean = ints(2, 0, 9, 1)
    rank_mask = random_rank_mask(batch, rows, capacity)
    used = torch.arange(rows) < torch.tensor(LENGTHS)[:, None]
    for tensor in (call.q, call.k, call.v, call.options["positions"], rank_mask.prefix_end, rank_mask.window_end):
        tensor[~used] = math.nan if tensor.is_floating_point() else POISON_INT
    padded_mask = rank_mask if mask == "rank" else mask
    padded = check(backend, call, mask=padded_mask, num_clean=num_clean, seqused_q=ints(*LENGTHS), commit=True)
    assert (padded.out[~used] == 0).all()
    assert (padded.lse.transpose(1, 2)[~used] == -math.inf).all()

    guarded = Guarded(torch.full_like(call.q, 7.0))
    call.run(backend, mask=padded_mask, num_clean=num_clean, seqused_q=ints(*LENGTHS), out=guarded.tensor)
    guarded.check()
    assert (guarded.tensor[~used] == 7.0).all()
    assert same_bits(guarded.tensor[used], padded.out[used])

    if mask == "rank":
        bounds = (rank_mask.prefix_end[used], rank_mask.window_start[used], rank_mask.window_end[used])
        mask = RankMask(rank_mask.k_rank, *bounds)
    packed_call = Call(
        *(x[used] for x in (call.q, call.k, call.v)),
        *(call.k_cache, call.v_cache, call.cache_seqlens),
        {**call.options, "positions": call.options["positions"][used], "mask": mask, "num_clean": num_clean},
    )
    cu_seqlens_q = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    packed = check(backend, packed_call, cu_seqlens_q=cu_seqlens_q, commit=True)
    assert same_bits(packed.out, padded.out[used])
    assert same_bits(packed.lse, padded.lse.transpose(1, 2)[used].transpose(0, 1))
    assert same_bits(packed.k_cache, padded.k_cache)
    assert packed.cache_seqlens.tolist() == padded.cache_seqlens.tolist() == [7, 8, 9, 31]


@dtypes
@pytest.mark.parametrize("mask", [*CHUNK_MASKS, "rank"])
def test_batch_invariance(backend, dtype, mask):
    """A row alone, and with one thread or two: the same bits."""
    if backend == "reference":  # consists of torch's matrix products, which make no such promise
        return
    call = make_call([70, 0, 9, 2100], 11, dtype=dtype, **with_rotary(16, 4, 11), num_clean=ints(2, 0, 9, 11))
    call.options["mask"] = random_rank_mask(4, 11, call.k_cache.shape[1]) if mask == "rank" else mask
    torch.set_num_threads(2)
    together = call.run(backend)
    torch.set_num_threads(1)
    assert_same(call.run(backend), together)
    for b in range(4):
        alone = call.row(b).run(backend)
        assert same_bits(alone.out[0], together.out[b])
        assert same_bits(alone.lse[0], together.lse[b])
        assert same_bits(alone.k_cache[0], together.k_cache[b])


@pytest.mark.parametrize(("cached", "rows"), [([], 3), ([4, 2], 0), ([0, 0], 0), ([0, 3], 1)], ids=str)
def test_empty(backend, cached, rows):
    call = make_call(cached, rows)
    result = check(backend, call)
    assert result.out.shape == (len(cached), rows, 4, 16)
    assert result.lse.shape == (len(cached), 4, rows)
    packed = Call(call.q.flatten(0, 1), call.k.flatten(0, 1), call.v.flatten(0, 1), *dataclasses.astuple(call)[3:])
    cu_seqlens_q = torch.arange(len(cached) + 1, dtype=torch.int32) * rows
    assert check(backend, packed, cu_seqlens_q=cu_seqlens_q).out.shape == (len(cached) * rows, 4, 16)


def test_full_cache(backend):
    check(backend, make_call([9, 9], 5, slack=0))


# --- caches


def to_pages(call, page_size, spare=3):
    """The call on a paged cache of the same content: pages in random order, table entries not in use poisoned."""
    batch, capacity = call.k_cache.shape[:2]
    max_pages = -(-capacity // page_size)
    pages = torch.randperm(batch * max_pages + spare)
    page_table = pages[: batch * max_pages].view(batch, max_pages).int()
    k_cache, v_cache = (
        poison_(torch.empty(len(pages), page_size, *cache.shape[2:], dtype=cache.dtype))
        for cache in (call.k_cache, call.v_cache)
    )
    for b, row in itertools.product(range(batch), range(capacity)):
        page = page_table[b, row // page_size]
        k_cache[page, row % page_size] = call.k_cache[b, row]
        v_cache[page, row % page_size] = call.v_cache[b, row]
    for b, cached in enumerate(call.cache_seqlens.tolist()):
        keys = cached + (0 if call.k is None else call.q.shape[1])
        poison_(page_table[b, -(-keys // page_size) :])
    return dataclasses.replace(
        call, k_cache=k_cache, v_cache=v_cache, options={**call.options, "page_table": page_table}
    )


@dtypes
@pytest.mark.parametrize("page_size", [1, 5, 16, 64])
def test_paged(backend, dtype, page_size):
    """Bit for bit the contiguous result; unused pages and table entries are poison."""
    call = make_call([70, 0, 9], 11, dtype=dtype, **with_rotary(16, 3, 11), num_clean=ints(2, 0, 9))
    for mask in CHUNK_MASKS:
        paged_call = to_pages(call, page_size)
        paged = check(backend, paged_call, mask=mask)
        contiguous = call.run(backend, mask=mask)
        assert same_bits(paged.out, contiguous.out)
        assert same_bits(paged.lse, contiguous.lse)
        table = paged_call.options["page_table"]
        for b, keys in enumerate((81, 11, 20)):
            row = torch.arange(keys)
            assert same_bits(
                paged.k_cache[table[b, row // page_size].long(), row % page_size], contiguous.k_cache[b, row]
            )


def test_paged_with_ranks_and_shared_pages(backend):
    """Two batch rows that read the same prefix page."""
    call = to_pages(make_call([6, 6], 4), page_size=5)
    table = call.options["page_table"]
    table[1, 0] = table[0, 0]
    mask = random_rank_mask(2, 4, 5 * table.shape[1])
    check(backend, call, mask=mask)


def test_cache_batch_idx(backend):
    """A batch of some rows of a larger cache, in any order; the other rows stay as they are."""
    call = make_call([7, 0, 12], 4, **with_rotary(16, 3, 4))
    large = [poison_(torch.empty(6, *cache.shape[1:])) for cache in (call.k_cache, call.v_cache)]
    index = torch.tensor([4, 0, 2])
    for cache, part in zip(large, (call.k_cache, call.v_cache), strict=True):
        cache[index] = part
    chosen = dataclasses.replace(call, k_cache=large[0], v_cache=large[1])
    result = check(backend, chosen, cache_batch_idx=index.int())
    expected = call.run(backend)
    assert same_bits(result.out, expected.out)
    assert same_bits(result.k_cache[index], expected.k_cache)
    assert result.k_cache[[1, 3, 5]].isnan().all()


@dtypes
def test_strided_caches_and_rows(backend, dtype):
    """Caches that are views of one tensor [2, ...], by-head layouts, q, k and v of one projection; guards stay."""
    call = make_call([7, 0, 12], 4, heads=2, dtype=dtype, **with_rotary(16, 3, 4))
    expected = call.run(backend)
    options = {**call.options, "cache_seqlens": call.cache_seqlens, "backend": backend}

    both = torch.stack([call.k_cache, call.v_cache], 2)  # [batch, max_seqlen, 2, kv_heads, head_dim]
    qkv = torch.stack([call.q, call.k, call.v], 2).unbind(2)
    out = attention_with_kvcache(qkv[0], both[:, :, 0], both[:, :, 1], *qkv[1:], **options)
    assert same_bits(out, expected.out)
    assert same_bits(both, torch.stack([expected.k_cache, expected.v_cache], 2))

    by_head = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (call.k_cache, call.v_cache)]
    rows = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (call.q, call.k, call.v)]
    assert same_bits(attention_with_kvcache(rows[0], *by_head, *rows[1:], **options), expected.out)
    assert same_bits(by_head[0], expected.k_cache)

    guarded = [Guarded(x) for x in (call.k_cache, call.v_cache, poison_(torch.empty_like(call.q)))]
    out = attention_with_kvcache(
        call.q, guarded[0].tensor, guarded[1].tensor, call.k, call.v, out=guarded[2].tensor, **options
    )
    assert out is guarded[2].tensor
    assert same_bits(out, expected.out)
    assert same_bits(guarded[0].tensor, expected.k_cache)
    assert same_bits(guarded[1].tensor, expected.v_cache)
    for memory in guarded:
        memory.check()


def test_strided_integers(backend):
    """Columns of larger tensors, as samplers slice them."""
    call = make_call([7, 0, 12], 4, mask="independent", **with_rotary(16, 3, 4), num_clean=ints(1, 2, 3))
    wide = {
        name: poison_(torch.empty(*value.shape, 3, dtype=torch.int32))
        for name, value in (("positions", call.options["positions"]), ("num_clean", call.options["num_clean"]))
    }
    for name, tensor in wide.items():
        tensor[..., 1] = call.options[name]
    lengths = Guarded(call.cache_seqlens[:, None])
    caches = call.k_cache.clone(), call.v_cache.clone()
    out = attention_with_kvcache(
        *(call.q, *caches, call.k, call.v),
        **{**call.options, **{name: tensor[..., 1] for name, tensor in wide.items()}},
        cache_seqlens=lengths.tensor[:, 0],
        commit=True,
        backend=backend,
    )
    expected = call.run(backend, commit=True)
    assert same_bits(out, expected.out)
    assert torch.equal(lengths.tensor[:, 0], expected.cache_seqlens)
    lengths.check()


@dtypes
def test_slots(backend, dtype):
    """A cache in text order: rows go where they belong, over what was there; -1 goes nowhere; all rows see all keys."""
    length, rows = 19, 5
    call = make_call([length, length, 6], rows, dtype=dtype, **with_rotary(16, 3, rows), mask="bidirectional")
    slots = torch.stack([torch.randperm(length)[:rows], torch.randperm(length)[:rows], torch.randperm(6)[:rows]]).int()
    slots[1, 2] = -1
    slots[2, 0] = 11  # behind the keys: written, not seen
    result = check(backend, call, slots=slots)
    expected_v = call.v_cache.clone()
    for b, i in itertools.product(range(3), range(rows)):
        if slots[b, i] >= 0:
            expected_v[b, slots[b, i]] = call.v[b, i]
    assert same_bits(result.v_cache, expected_v)

    ranks = random_rank_mask(3, rows, call.k_cache.shape[1])
    check(backend, call, slots=slots, mask=ranks)
    paged = to_pages(call, page_size=4)
    paged.options["page_table"][2, 2] = paged.options["page_table"][2, 3] = 0
    paged.options["page_table"][2, 2] = paged.k_cache.shape[0] - 1
    used = set(paged.options["page_table"][paged.options["page_table"] < POISON_INT].tolist())
    if len(used) == int((paged.options["page_table"] < POISON_INT).sum()):
        assert same_bits(check(backend, paged, slots=slots).out, result.out)


def test_slots_packed(backend):
    call = make_call([12, 12], 3, mask="bidirectional")
    slots = ints([0, 5, 11], [7, -1, 2])
    expected = check(backend, call, slots=slots)
    packed = Call(
        *(x.flatten(0, 1) for x in (call.q, call.k, call.v)),
        call.k_cache,
        call.v_cache,
        call.cache_seqlens,
        call.options,
    )
    result = check(backend, packed, slots=slots.flatten(), cu_seqlens_q=ints(0, 3, 6))
    assert same_bits(result.out, expected.out.flatten(0, 1))
    assert same_bits(result.k_cache, expected.k_cache)


def test_text_order_equals_denoising_order(backend):
    """The same tokens with the same visibility, cached by place in the text or by order: the same attention."""
    length = 24
    k, v = torch.randn(2, 1, length, 2, 16)
    q = torch.randn(1, 3, 4, 16)
    order = torch.randperm(length)  # order[r]: the position denoised at step r
    rank = torch.empty(length, dtype=torch.int32)
    rank[order] = torch.arange(length, dtype=torch.int32)
    bounds = ints([3, 11, 20])
    in_order = attention_with_kvcache(
        q, k[:, order], v[:, order], cache_seqlens=ints(length), mask=RankMask(None, bounds), backend=backend
    )
    in_text = attention_with_kvcache(
        q, k.clone(), v.clone(), cache_seqlens=ints(length), mask=RankMask(rank[None], bounds), backend=backend
    )
    torch.testing.assert_close(in_order, in_text, rtol=1e-5, atol=1e-5)


# --- torch operators


def test_opcheck():
    call = make_call([3, 0], 4, **with_rotary(16, 2, 4))
    cache = [torch.randn_like(call.k_cache) for _ in range(2)]  # opcheck compares tensors, and NaN equals nothing
    options = call.options
    arguments = (
        *(torch.zeros_like(call.q), torch.zeros(2, 4, 4), call.q, *cache, call.k, call.v, call.cache_seqlens),
        *(options["positions"], options["rotary_cos"], options["rotary_sin"], ints(1, 2)),
        *(None,) * 9,
        *(1, False, True, 0.25),
    )
    torch.library.opcheck(torch.ops.esokern.attention_with_kvcache, arguments)


def test_compile():
    """A step of two layers as one graph; caches and lengths change in place."""
    cache = KVCache(2, batch=2, max_seqlen=20, kv_heads=2, head_dim=16, dtype=torch.float32, device="cpu")
    twin = KVCache(2, batch=2, max_seqlen=20, kv_heads=2, head_dim=16, dtype=torch.float32, device="cpu")
    call = make_call([0, 0], 4, **with_rotary(16, 2, 4), mask="independent", num_clean=ints(1, 3))

    def step(q, k, v, layers, cache_seqlens):
        for k_cache, v_cache in layers:
            q = q + attention_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=cache_seqlens, **call.options)
        out, lse = attention_with_kvcache(
            q, *layers[0], k, v, cache_seqlens=cache_seqlens, commit=True, return_lse=True, **call.options
        )
        return out, lse

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        expected = step(call.q, call.k, call.v, [twin.layer(0), twin.layer(1)], twin.cache_seqlens)
        out = compiled(call.q, call.k, call.v, [cache.layer(0), cache.layer(1)], cache.cache_seqlens)
        assert torch.equal(out[0], expected[0])
        assert torch.equal(out[1], expected[1])
        assert torch.equal(cache.k_cache, twin.k_cache)
        assert cache.cache_seqlens.tolist() == twin.cache_seqlens.tolist()
    assert cache.cache_seqlens.tolist() == [3, 9]


def test_numpy_arrays(backend):
    """The caller's own arrays are written in place; the result is an array."""
    if torch.get_default_device().type == "cuda":
        pytest.skip("NumPy arrays lie on the host")
    call = make_call([3, 0], 4, **with_rotary(16, 2, 4))
    expected = call.run(backend, commit=True)
    arrays = [x.clone().numpy() for x in (call.q, call.k_cache, call.v_cache, call.k, call.v, call.cache_seqlens)]
    options = {name: value.numpy() for name, value in call.options.items()}
    out, lse = attention_with_kvcache(
        *arrays[:5], cache_seqlens=arrays[5], **options, commit=True, return_lse=True, backend=backend
    )
    assert isinstance(out, np.ndarray)
    for array, tensor in zip((out, lse, arrays[1], arrays[2], arrays[5]), dataclasses.astuple(expected), strict=True):
        assert same_bits(torch.from_numpy(array), tensor)


# --- errors


def fails(backend, error, message, *, cached=(5, 2), rows=3, change=None, **options):
    """The call raises, and neither cache nor lengths nor out changed."""
    call = make_call(list(cached), rows, **with_rotary(16, 2, 3))
    for name, value in (change or {}).items():
        setattr(call, name, value(getattr(call, name)))
    options = {**call.options, **options}
    tensors = (call.k_cache, call.v_cache, call.cache_seqlens)
    before = [tensor.clone() for tensor in tensors]
    out = poison_(torch.empty_like(call.q))
    with pytest.raises(error, match=message):
        attention_with_kvcache(
            *(call.q, call.k_cache, call.v_cache, call.k, call.v),
            **{"cache_seqlens": call.cache_seqlens, "out": out, "backend": backend, **options},
        )
    assert all(same_bits(a, b) for a, b in zip(before, tensors, strict=True))
    assert out.isnan().all() if out.is_floating_point() else True


VALUE_ERRORS = {
    "overflow": ({"cache_seqlens": ints(5, 9)}, r"\[1\]: the cache holds 11 rows; got 9 committed and 3 rows"),
    "negative_length": ({"cache_seqlens": ints(5, -1)}, r"cache_seqlens\[1\]: the cache holds 11 rows; got -1"),
    "position_too_large": ({"positions": ints([0, 1, 2], [0, 50, 1])}, r"positions\[1\]: must lie in 0 .. 49, got 50"),
    "position_negative": ({"positions": ints([-1, 1, 2], [0, 5, 1])}, r"positions\[0\]: must lie in 0 .. 49, got -1"),
    "num_clean": ({"num_clean": ints(3, 4), "mask": "independent"}, r"num_clean\[1\]: must lie in 0 .. 3, got 4"),
    "slots": (
        {"slots": ints([0, 1, 2], [0, 11, 1]), "mask": "bidirectional"},
        r"slots\[1\]: must lie in -1 .. 10, got 11",
    ),
    "slots_negative": (
        {"slots": ints([0, 1, -2], [0, 1, 2]), "mask": "bidirectional"},
        r"slots\[0\]: must lie in -1 .. 10, got -2",
    ),
    "slots_length": (
        {"slots": ints([0, 1, 2], [0, 1, 2]), "mask": "bidirectional", "cache_seqlens": ints(5, 12)},
        r"cache_seqlens\[1\]: the cache holds 11 rows; got 12 committed and 0 rows",
    ),
    "cache_batch_idx": ({"cache_batch_idx": ints(0, 2)}, r"cache_batch_idx\[1\]: must lie in 0 .. 1, got 2"),
    "page_table": ({"page_table": ints([0], [POISON_INT])}, r"page_table\[1\]: must lie in 0 .. 1, got 2147480000"),
    "page_of_slot": (
        {
            "page_table": ints([0, 0], [1, -5]),
            "slots": ints([0, 1, 2], [0, 12, 2]),
            "mask": "bidirectional",
        },
        r"page_table\[1\]: must lie in 0 .. 1, got -5",
    ),
    "seqused_q": ({"seqused_q": ints(3, 4)}, r"seqused_q\[1\]: must lie in 0 .. 3, got 4"),
}  # fmt: skip


@pytest.mark.parametrize("case", VALUE_ERRORS)
def test_value_errors(backend, case):
    """Values are checked on every back end, before anything is written, and named where the host can see them."""
    options, message = VALUE_ERRORS[case]
    if backend != "cuda":
        fails(backend, ValueError, message, **options)
        return
    # A GPU does not stop for the host: the batch row that is wrong becomes NaN, and nothing of it is written.
    bad = int(re.search(r"\[(\d)", message)[1])
    call = make_call([5, 2], 3, **with_rotary(16, 2, 3))
    options = {name: value.to(call.q.device) if name != "mask" else value for name, value in options.items()}
    call.cache_seqlens = options.pop("cache_seqlens", call.cache_seqlens)
    result = call.run(backend, commit="slots" not in options, **options)
    assert result.out[bad].isnan().all()
    assert result.lse[bad].isnan().all()
    assert not result.out[1 - bad].isnan().any()
    assert same_bits(result.k_cache[bad], call.k_cache[bad])
    assert same_bits(result.v_cache[bad], call.v_cache[bad])
    assert result.cache_seqlens[bad] == call.cache_seqlens[bad]


def test_packed_value_errors(backend):
    call = make_call([5, 2], 3)
    packed = Call(*(x.flatten(0, 1) for x in (call.q, call.k, call.v)), *dataclasses.astuple(call)[3:])
    for ends in ((0, 7, 6), (1, 2, 6), (0, 3, 5)):
        if backend == "cuda":
            result = packed.run(backend, cu_seqlens_q=ints(*ends))
            assert result.out.isnan().all()
            assert same_bits(result.k_cache, packed.k_cache)
            continue
        with pytest.raises(ValueError, match="cu_seqlens_q: must rise from 0 to 6"):
            packed.run(backend, cu_seqlens_q=ints(*ends))


TABLE = torch.ones(50, 8)
RANKS = RankMask(torch.zeros(1, 7, dtype=torch.int32), torch.zeros(1, 3, dtype=torch.int32))


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (TypeError, "k: must have q's dtype torch.float32, got torch.float16", {"change": {"k": torch.Tensor.half}}),
        (TypeError, "k_cache: must have q's dtype", {"change": {"k_cache": torch.Tensor.half}}),
        (ValueError, "k and v go together; v is missing", {"change": {"v": lambda v: None}}),
        (ValueError, r"q: must be \[batch, seqlen_q, heads, head_dim\], got shape", {"change": {"q": lambda q: q[0]}}),
        (ValueError, r"k: must be \[2, 3, 2, 16\], got \[2, 2, 2, 16\]", {"change": {"k": lambda k: k[:, :2]}}),
        (ValueError, r"v: must be \[2, 3, 2, 16\], got \[2, 2, 2, 16\]", {"change": {"v": lambda v: v[:, :2]}}),
        (ValueError, r"k_cache: must be \[batch or pages, .*\], got shape", {"change": {"k_cache": lambda x: x[0]}}),
        (ValueError, "v_cache: must have the shape of k_cache", {"change": {"v_cache": lambda x: x[:, 1:]}}),
        (ValueError, "k_cache: must have q's head_dim 8, got 16", {"change": {"q": lambda q: q[..., :8]}}),
        (ValueError, "k_cache: kv_heads must divide q's 3 heads, got 2", {"change": {"q": lambda q: q[:, :, :3]}}),
        (
            ValueError,
            "k_cache: must have one row per batch row, 2, got 1; cache_batch_idx chooses rows",
            {"change": {"k_cache": lambda x: x[:1], "v_cache": lambda x: x[:1]}},
        ),
        (TypeError, r"cache_seqlens: must be an int32 tensor \[batch\], got list", {"cache_seqlens": [5, 2]}),
        (TypeError, "cache_seqlens: must be int32, got torch.int64", {"cache_seqlens": torch.tensor([5, 2])}),
        (ValueError, r"cache_seqlens: must be \[batch\] = \[2\], got \[3\]", {"cache_seqlens": ints(5, 2, 0)}),
        (ValueError, r"positions: must be \[batch, seqlen_q\] = \[2, 3\], got \[3\]", {"positions": ints(0, 1, 2)}),
        (ValueError, "positions: must be given with rotary_cos", {"positions": None}),
        (ValueError, "go together; rotary_sin is missing", {"rotary_sin": None}),
        (ValueError, "rotary_sin: must have the shape of rotary_cos", {"rotary_sin": TABLE[:4]}),
        (TypeError, "rotary_sin: must both be", {"rotary_sin": TABLE.half()}),
        (
            ValueError,
            r"rotary_cos: must be .* up to head_dim 16, got \[50, 9\]",
            {"rotary_cos": torch.ones(50, 9), "rotary_sin": torch.ones(50, 9)},
        ),
        (ValueError, 'mask: got \'full\', supported are "causal"', {"mask": "full"}),
        (ValueError, "mask: got None, supported are", {"mask": None}),
        (ValueError, r"mask.k_rank: must be \[2, 11\] or \[1, 11\], got \[1, 7\]", {"mask": RANKS}),
        (
            ValueError,
            'mask: must be "bidirectional" or a RankMask with slots, which have no order, got \'causal\'',
            {"slots": ints([0, 1, 2], [0, 1, 2])},
        ),
        (
            ValueError,
            "slots: say where k and v go, but k and v are None",
            {
                "slots": ints([0, 1, 2], [0, 1, 2]),
                "mask": "bidirectional",
                "change": {"k": lambda k: None, "v": lambda v: None},
            },
        ),
        (
            ValueError,
            "commit: nothing to commit, k and v are None",
            {"commit": True, "change": {"k": lambda k: None, "v": lambda v: None}},
        ),
        (
            ValueError,
            "commit: nothing to commit, slots are given",
            {"commit": True, "slots": ints([0, 1, 2], [0, 1, 2]), "mask": "bidirectional"},
        ),
        (ValueError, "num_clean: must lie in 0 .. 3 rows of this call, got 4", {"num_clean": 4}),
        (TypeError, "num_clean: must be an int or int32 .*, got float", {"num_clean": 1.0}),
        (ValueError, r"num_clean: must be \[batch\] = \[2\], got \[1\]", {"num_clean": ints(1)}),
        (
            ValueError,
            "cache_batch_idx: is for contiguous caches",
            {"page_table": ints([0], [1]), "cache_batch_idx": ints(0, 1)},
        ),
        (ValueError, r"page_table: must be \[batch, max_pages\] = \[2, 1\], got \[1, 1\]", {"page_table": ints([0])}),
        (
            ValueError,
            "seqused_q: is for padded layouts",
            {"seqused_q": ints(1), "cu_seqlens_q": ints(0, 3), "change": {"q": lambda q: q[0]}},
        ),
        (ValueError, "softmax_scale: must be finite, got inf", {"softmax_scale": math.inf}),
        (ValueError, r"out: must have q's shape \[2, 3, 4, 16\], got \[2, 3, 4, 8\]", {"out": torch.empty(2, 3, 4, 8)}),
        (ValueError, "k: requires grad, and this op has no gradient", {"change": {"k": torch.Tensor.requires_grad_}}),
        (ValueError, "backend: got 'tpu', supported are", {"backend": "tpu"}),
        (ValueError, "all tensors must be on one device, got cpu, meta", {"change": {"k": lambda k: k.to("meta")}}),
    ],
)  # fmt: skip
def test_errors(error, message, options):
    fails(options.get("backend"), error, message, **{k: v for k, v in options.items() if k != "backend"})


def test_layout_errors():
    """What only the kernels ask: contiguous last dimensions, head_dim and dtype."""

    def turned(x):
        return x.transpose(1, 3).contiguous().transpose(1, 3)

    for name in ("q", "k", "v_cache"):
        fails(None, ValueError, f"{name}: the last dimension must be contiguous", change={name: turned})
    small = {name: lambda x: x[..., :12] for name in ("q", "k", "v", "k_cache", "v_cache")}
    no_rotary = {"rotary_cos": None, "rotary_sin": None}
    fails(None, ValueError, "multiple of 8 up to 256, got 12", change=small, **no_rotary)
    double = dict.fromkeys(small, torch.Tensor.double)
    fails(None, TypeError, "the compiled back ends take float32.*torch.float64", change=double)


def test_no_gradient_needed_under_no_grad(backend):
    call = make_call([2], 2)
    call.q.requires_grad_()
    with torch.no_grad():
        call.run(backend)
