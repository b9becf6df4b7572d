"""Every mask constructor against booleans written straight from the papers' definitions, over all small cases."""

import itertools

import pytest
import torch

from esokern import masks
from esokern.masks import RankMask


def dense(rows, queries, keys, rule):
    """Booleans [len(rows), queries, keys] of rule(row, i, j)."""
    return torch.tensor(
        [[[bool(rule(row, i, j)) for j in range(keys)] for i in range(queries)] for row in rows], dtype=torch.bool
    ).reshape(len(rows), queries, keys)


def permutations(length):
    """Ranks of all denoising orders (a seventh of them at length 6)."""
    return list(itertools.permutations(range(length)))[:: 7 if length == 6 else 1]


def orders_with_cutoffs(length):
    """(rank, num_clean) for all orders and all numbers of clean tokens: each row of a batch has its own."""
    return [(rank, clean) for rank in permutations(length) for clean in range(length + 1)]


def eso_orders(length):
    """(rank, num_clean): clean tokens in any order, then the masks from left to right (Eso-LM, suppl. B.7)."""
    cases = set()
    for clean in range(length + 1):
        for order in itertools.permutations(range(length), clean):
            rest = [position for position in range(length) if position not in order]
            rank = [0] * length
            for place, position in enumerate([*order, *rest]):
                rank[position] = place
            cases.add((tuple(rank), clean))
    return sorted(cases)[:: 3 if length == 6 else 1]


def rank_tensor(cases):
    return torch.tensor([rank for rank, _ in cases], dtype=torch.int32)


def clean_tensor(cases):
    return torch.tensor([clean for _, clean in cases], dtype=torch.int32)


LENGTHS = range(1, 7)


def assert_mask(mask, expected):
    got = mask.dense().expand(expected.shape)
    assert torch.equal(got, expected), f"{int((got != expected).sum())} of {expected.numel()} pairs differ"


# --- masks without an order of their own


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (5, 5), (2, 6), (6, 2), (0, 3), (3, 0)])
def test_causal_is_aligned_at_the_last_token(queries, keys):
    assert_mask(masks.causal(queries, keys), dense([0], queries, keys, lambda _, i, j: keys - j >= queries - i))
    if queries == keys:
        assert torch.equal(masks.causal(queries).dense(), masks.causal(queries, keys).dense())


def test_bidirectional():
    assert_mask(masks.bidirectional(3, 5), torch.ones(1, 3, 5, dtype=torch.bool))
    assert_mask(masks.bidirectional(3), torch.ones(1, 3, 3, dtype=torch.bool))


@pytest.mark.parametrize("as_type", [list, lambda x: torch.tensor(x), lambda x: torch.tensor(x, dtype=torch.int32)])
def test_bidirectional_with_padding(as_type):
    lengths = [0, 1, 4, 5]
    mask = masks.bidirectional(3, 5, kv_lengths=as_type(lengths))
    assert_mask(mask, dense(lengths, 3, 5, lambda length, i, j: j < length))
    assert_mask(masks.bidirectional(3, 5, kv_lengths=2), dense([2], 3, 5, lambda length, i, j: j < length))


@pytest.mark.parametrize("length", LENGTHS)
def test_prefix_lm(length):
    prefixes = list(range(length + 1))
    expected = dense(prefixes, length, length, lambda prefix, i, j: j <= i or (i < prefix and j < prefix))
    assert_mask(masks.prefix_lm(length, torch.tensor(prefixes)), expected)
    for prefix in prefixes:
        assert_mask(masks.prefix_lm(length, prefix), expected[prefix : prefix + 1])


@pytest.mark.parametrize(("queries", "keys"), [(6, 6), (2, 6), (6, 3), (1, 5)])
def test_sliding_window(queries, keys):
    for left, right, prefix in itertools.product([-1, 0, 1, 4, 2**31], [-1, 0, 2, 2**31], [0, 1, 3]):
        mask = masks.sliding_window(queries, keys, window_size=(left, right), num_prefix=prefix)

        def rule(_, i, j, left=left, right=right, prefix=prefix):
            own = i + keys - queries  # the last query stands at the last key
            return j < prefix or ((left < 0 or j >= own - left) and (right < 0 or j <= own + right))

        assert_mask(mask, dense([0], queries, keys, rule))


@pytest.mark.parametrize("length", LENGTHS)
def test_block_causal(length):
    for block in range(1, length + 2):
        assert_mask(
            masks.block_causal(length, block),
            dense([block], length, length, lambda block, i, j: j // block <= i // block),
        )


@pytest.mark.parametrize("length", LENGTHS)
def test_block_diffusion(length):
    """BD3-LM (arXiv 2503.09573): M_BD (own block, both noisy), M_OBC (noisy to earlier clean blocks), M_BC (clean)."""
    for block in range(1, length + 2):

        def rule(_, q, kv, block=block):
            q_clean, kv_clean = q >= length, kv >= length
            q_block, kv_block = q % length // block, kv % length // block
            block_diagonal = q_block == kv_block and q_clean == kv_clean and not q_clean
            offset_block_causal = q_block > kv_block and kv_clean and not q_clean
            block_causal = q_block >= kv_block and kv_clean and q_clean
            return block_diagonal or offset_block_causal or block_causal

        assert_mask(masks.block_diffusion(length, block), dense([0], 2 * length, 2 * length, rule))


# --- masks on denoising orders


@pytest.mark.parametrize("length", LENGTHS)
def test_any_order(length):
    ranks = permutations(length)
    expected = dense(ranks, length, length, lambda rank, i, j: rank[j] <= rank[i])
    assert_mask(masks.any_order(torch.tensor(ranks)), expected)
    # new queries of their own rank over keys in memory order
    q_rank = torch.tensor([[0, length - 1]] * len(ranks))
    expected = dense(ranks, 2, length, lambda rank, i, j: rank[j] <= (0, length - 1)[i])
    assert_mask(masks.any_order(q_rank, torch.tensor(ranks, dtype=torch.int32)), expected)


@pytest.mark.parametrize("length", LENGTHS)
def test_esolm_diffusion_b(length):
    """Section 4.1: A_ij = 0 iff the rank of i is at least that of j."""
    cases = orders_with_cutoffs(length)
    expected = dense(cases, length, length, lambda case, i, j: case[0][i] >= case[0][j])
    assert_mask(masks.esolm_diffusion(rank_tensor(cases)), expected)
    assert_mask(masks.esolm_diffusion(rank_tensor(cases), clean_tensor(cases)), expected)


@pytest.mark.parametrize("length", LENGTHS)
def test_esolm_diffusion_a(length):
    """Suppl. D: clean tokens see all clean tokens; a mask sees all clean tokens, itself and earlier masks."""
    cases = orders_with_cutoffs(length)

    def rule(case, i, j):
        rank, num_clean = case
        i_clean, j_clean = rank[i] < num_clean, rank[j] < num_clean
        return j_clean if i_clean else (j_clean or i == j or rank[j] < rank[i])

    assert_mask(
        masks.esolm_diffusion(rank_tensor(cases), clean_tensor(cases), variant="A"), dense(cases, length, length, rule)
    )


@pytest.mark.parametrize("length", LENGTHS)
def test_esolm_diffusion_mixed(length):
    """The published code's "mixed": causal among clean tokens, masks see everything."""
    cases = orders_with_cutoffs(length)

    def rule(case, i, j):
        rank, num_clean = case
        return rank[j] <= rank[i] if rank[i] < num_clean else True

    mask = masks.esolm_diffusion(rank_tensor(cases), clean_tensor(cases), variant="mixed")
    assert_mask(mask, dense(cases, length, length, rule))


@pytest.mark.parametrize("variant", ["A", "B"])
@pytest.mark.parametrize("length", LENGTHS)
def test_esolm_sequential(length, variant):
    """Eqs. 26-32 on [z0 | x]; the clean tokens of z0, whose outputs nobody uses, as in the published code."""
    cases = eso_orders(length)

    def rule(case, q, kv):
        rank, num_clean = case
        i, j = q % length, kv % length
        i_clean, j_clean = rank[i] < num_clean, rank[j] < num_clean
        if q < length and kv < length:
            return i == j  # a mask, its own embedding; of z0 it sees nothing else
        if q >= length and kv < length:
            return False
        if q < length:
            if i_clean:  # the published code: offset-causal in the order
                return rank[j] < rank[i]
            return j_clean or j < i  # every clean x_j, and the clean copy of earlier masked tokens
        if i_clean:
            return j_clean and (variant == "A" or rank[j] <= rank[i])
        return j_clean or j <= i

    mask = masks.esolm_sequential(rank_tensor(cases), clean_tensor(cases), variant=variant)
    assert_mask(mask, dense(cases, 2 * length, 2 * length, rule))
    if variant == "B":
        assert_mask(masks.esolm_sequential(rank_tensor(cases)), mask.dense())


@pytest.mark.parametrize("length", LENGTHS)
def test_any_order_likelihood(length):
    """Section 3.3: the mask of a token sees itself and the true tokens before it in the order, for every order."""
    ranks = permutations(length)

    def rule(rank, q, kv):
        i, j = q % length, kv % length
        if kv < length:
            return q == kv
        return rank[j] < rank[i] if q < length else rank[j] <= rank[i]

    assert_mask(masks.any_order_likelihood(torch.tensor(ranks)), dense(ranks, 2 * length, 2 * length, rule))


def test_likelihood_is_block_diffusion_of_block_size_one_after_sorting():
    identity = torch.arange(6)[None]
    assert torch.equal(masks.any_order_likelihood(identity).dense(), masks.block_diffusion(6, 1).dense())


@pytest.mark.parametrize("noisy", ["independent", "causal"])
@pytest.mark.parametrize("length", range(1, 5))
def test_set_causal(length, noisy):
    """Set Diffusion (arXiv 2607.01775) over [x_t | x_0], with every partition into ordered sets, ties included."""
    sets = list(itertools.product(range(length), repeat=length))

    def rule(rank, q, kv):
        i, j = q % length, kv % length
        q_noisy, kv_noisy = q < length, kv < length
        if not q_noisy:
            return not kv_noisy and rank[j] <= rank[i]
        if not kv_noisy:
            return rank[j] < rank[i]
        return i == j if noisy == "independent" else rank[j] <= rank[i]

    assert_mask(masks.set_causal(torch.tensor(sets), noisy=noisy), dense(sets, 2 * length, 2 * length, rule))


def test_ranks_may_be_far_apart():
    """Ranks are only compared: gaps and values beyond the length change nothing."""
    rank = torch.tensor([[3, 0, 2, 1]])
    wide = torch.tensor([[10**9, 0, 5000, 7]])
    for make in (masks.any_order, masks.esolm_sequential, masks.set_causal):
        assert torch.equal(make(rank).dense(), make(wide).dense())


# --- the class


def test_dense_of_a_packed_mask_and_pack():
    single = [masks.causal(2), masks.sliding_window(3, window_size=(0, 0)), masks.bidirectional(1)]
    packed = masks.pack(single)
    assert packed.k_rank.shape == (6,)
    assert packed.prefix_end.shape == (6,)
    visible = packed.dense()
    for mask, rows in zip(single, (slice(0, 2), slice(2, 5), slice(5, 6)), strict=True):
        assert torch.equal(visible[rows, rows], mask.dense()[0])
    assert masks.pack(single[:1]).window_start is None


def test_to_and_identity():
    mask = masks.sliding_window(3, window_size=(1, 1))
    moved = mask.to("cpu")
    assert torch.equal(moved.dense(), mask.dense())
    assert masks.causal(2).to("cpu").window_start is None
    assert mask == mask and mask != moved  # noqa: PT018  (no elementwise comparison of tensors)


def test_device_argument():
    mask = masks.causal(3, device="meta")
    assert mask.k_rank.device.type == "meta"
    assert (
        masks.bidirectional(3, kv_lengths=torch.ones(2, dtype=torch.int32, device="meta")).k_rank.device.type == "meta"
    )


INT = torch.zeros(1, 3, dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: RankMask(INT, INT, INT), ValueError, "window_start and window_end go together"),
        (lambda: RankMask(INT, INT.long()), TypeError, "prefix_end must be int32, got torch.int64"),
        (lambda: RankMask(INT, None), TypeError, "prefix_end must be an int32 tensor, got NoneType"),
        (
            lambda: RankMask(INT[None], INT),
            ValueError,
            r"k_rank must be \[batch, seqlen\] or \[total\], got \(1, 1, 3\)",
        ),
        (
            lambda: RankMask(INT, INT, INT[:, :2], INT[:, :2]),
            ValueError,
            r"window_start must have the shape of prefix_end",
        ),
        (lambda: RankMask(None, INT).dense(), ValueError, "k_rank is None"),
        (lambda: masks.causal(-1), ValueError, "seqlen_q: must be at least 0, got -1"),
        (lambda: masks.bidirectional(2, 3, kv_lengths=[1, 4]), ValueError, "kv_lengths: must lie in 0 .. 3, got 4"),
        (lambda: masks.bidirectional(2, 3, kv_lengths=-1), ValueError, "kv_lengths: must lie in 0 .. 3, got -1"),
        (lambda: masks.bidirectional(2, 3, kv_lengths=INT), ValueError, r"kv_lengths: must be an int or \[batch\]"),
        (lambda: masks.bidirectional(2, kv_lengths=torch.ones(2)), TypeError, "kv_lengths: must be int32 or int64"),
        (lambda: masks.prefix_lm(3, 4), ValueError, "prefix_lengths: must lie in 0 .. 3, got 4"),
        (
            lambda: masks.any_order(torch.zeros(1, 3)),
            TypeError,
            "q_rank: must be an int32 or int64 tensor, got torch.float32",
        ),
        (lambda: masks.any_order([0, 1]), TypeError, "q_rank: must be an int32 or int64 tensor, got list"),
        (lambda: masks.any_order(torch.zeros(1, 1, 3).int()), ValueError, r"q_rank: must be \[batch, seqlen\]"),
        (lambda: masks.esolm_diffusion(INT, 2, variant="C"), ValueError, "variant: got 'C', supported are"),
        (lambda: masks.esolm_diffusion(INT, variant="A"), ValueError, 'num_clean: variant "A" needs'),
        (lambda: masks.esolm_diffusion(INT, 4, variant="A"), ValueError, "num_clean: must lie in 0 .. 3, got 4"),
        (
            lambda: masks.esolm_diffusion(INT.expand(2, 3), torch.ones(3, dtype=torch.int32), variant="A"),
            ValueError,
            r"num_clean: must be an int or \[batch\] = \[2\], got \[3\]",
        ),
        (lambda: masks.esolm_sequential(INT, variant="mixed"), ValueError, "variant: got 'mixed', supported are"),
        (lambda: masks.esolm_sequential(INT, variant="A"), ValueError, 'num_clean: variant "A" needs'),
        (lambda: masks.block_diffusion(3, 0), ValueError, "block_size: must be at least 1, got 0"),
        (lambda: masks.block_causal(3, 0), ValueError, "block_size: must be at least 1, got 0"),
        (lambda: masks.set_causal(INT, noisy="full"), ValueError, "noisy: got 'full', supported are"),
        (lambda: masks.sliding_window(3, window_size=(-2, 0)), ValueError, "window_size: .* got \\(-2, 0\\)"),
        (
            lambda: masks.sliding_window(3, window_size=(0, 0), num_prefix=-1),
            ValueError,
            "num_prefix: must be at least 0",
        ),
        (lambda: masks.pack([]), ValueError, "masks: got none"),
        (lambda: masks.pack([masks.prefix_lm(3, [1, 2])]), ValueError, "masks: each must be the mask of one sequence"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
