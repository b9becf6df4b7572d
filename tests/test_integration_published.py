"""`swap_attention`: same outputs and gradients, caches that go on, everything put back, clear refusals.

On stand-ins for the published code; test_published_checkouts.py does it on that code itself.
"""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch

import published_standins as standins
from esokern import masks
from esokern.integrations.published import swap_attention
from esokern.testing import assert_close
from published_standins import BD3LM, DIM, EsoLM, Network, SetDiffusion

BATCH, LENGTH = 2, 24
VALID = torch.ones(BATCH, LENGTH, dtype=torch.bool)
VALID[1, :5] = False
CUTOFFS = torch.tensor([9, 4])


def four(mask):
    return mask.dense()[:, None]


def additive(mask):
    return torch.zeros(four(mask).shape).masked_fill(~four(mask), torch.finfo(torch.float32).min)


def block_mask(visible, length):
    return standins.create_block_mask(visible, None, None, length, length, device="cpu")


def two_blocks(block, *args, **kwargs):
    return Network(*(block(*args, **kwargs) for _ in range(2)))


# name: (network, arguments of forward behind x, tokens, rows to compare)
CASES = {
    "LLaDA": (lambda: two_blocks(standins.LLaDALlamaBlock), lambda d: (), LENGTH, None),
    "LLaDA, GQA": (lambda: two_blocks(standins.LLaDALlamaBlock, 2), lambda d: (), LENGTH, None),
    "Dream": (lambda: two_blocks(standins.DreamSdpaAttention, 1), lambda d: ("full",), LENGTH, None),
    "Dream, padded": (
        lambda: two_blocks(standins.DreamSdpaAttention, 2),
        lambda d: ((VALID[:, None, :] & VALID[:, :, None])[:, None],),
        LENGTH,
        VALID,
    ),
    **{
        f"Eso-LM, {mode}": (
            lambda mode=mode: EsoLM.EsoLMDiT(EsoLM.DDiTBlock(), EsoLM.DDiTBlock(), diffusion_attn_mode=mode),
            lambda d: (CUTOFFS,),
            LENGTH,
            None,
        )
        for mode in ("causal", "bidirectional", "mixed", "mixed2")
    },
    **{
        f"Eso-LM, sequential {mode}": (
            lambda mode=mode: EsoLM.EsoLMDiT(EsoLM.DDiTBlock(), EsoLM.DDiTBlock(), sequential_attn_mode=mode),
            lambda d: (CUTOFFS, True),
            2 * LENGTH,
            None,
        )
        for mode in ("causal", "mixed")
    },
    "Eso-LM, AR": (
        lambda: two_blocks(EsoLM.DDiTBlockCausal),
        lambda d: (standins.angles(LENGTH, d),),
        LENGTH,
        None,
    ),
    "BD3-LM": (
        lambda: two_blocks(BD3LM.DDiTBlock),
        lambda d: (four(masks.block_diffusion(LENGTH, 8))[0, 0],),
        2 * LENGTH,
        None,
    ),
    "BD3-LM, flex": (
        lambda: two_blocks(BD3LM.DDiTBlock, "flex"),
        lambda d: (block_mask(lambda b, h, q, k: q // 8 >= k // 8, LENGTH),),
        LENGTH,
        None,
    ),
    "BD3-LM, exported": (
        lambda: two_blocks(BD3LM.Exported.DDiTBlock),
        lambda d: (four(masks.block_causal(LENGTH, 8))[0, 0],),
        LENGTH,
        None,
    ),
    "BD3-LM, exported causal": (lambda: two_blocks(BD3LM.Exported.DDiTBlock, True), lambda d: (), LENGTH, None),
    "BD3-LM, AR": (lambda: two_blocks(BD3LM.DDiTBlockCausal), lambda d: (), LENGTH, None),
    "Set Diffusion": (
        lambda: two_blocks(SetDiffusion.DDiTBlock),
        lambda d: (additive(masks.set_causal(torch.arange(LENGTH))).to(d),),
        2 * LENGTH,
        None,
    ),
    "Set Diffusion, flex": (
        lambda: two_blocks(SetDiffusion.DDiTBlock, "flex_attention"),
        lambda d: (block_mask(lambda b, h, q, k: q >= k, LENGTH),),
        LENGTH,
        None,
    ),
    "Set Diffusion, cache": (
        lambda: two_blocks(SetDiffusion.DDiTBlock),
        lambda d: (
            additive(masks.causal(LENGTH, LENGTH + 7)).to(d),
            None,
            None,
            torch.linspace(-1, 1, 7 * DIM).view(7, 4, 16).to(d),
        ),
        LENGTH,
        None,
    ),
    "Set Diffusion, AR": (lambda: two_blocks(SetDiffusion.DDiTBlockCausal), lambda d: ("not read",), LENGTH, None),
}


def outputs_and_gradients(network, x, arguments, rows):
    network.zero_grad()
    out = network(x, *arguments)
    if rows is not None:
        out = out[rows]
    (out * torch.linspace(-1, 1, DIM, dtype=out.dtype)).sum().backward()
    return out.detach(), torch.cat([p.grad.flatten() for p in network.parameters()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_same_outputs_and_gradients(case, dtype):
    make, arguments, tokens, rows = CASES[case]
    network = make().to(dtype)
    x = torch.randn(BATCH, tokens, DIM, dtype=dtype)
    plain = outputs_and_gradients(network, x, arguments(dtype), rows)
    double = copy.deepcopy(network).double()
    gold = outputs_and_gradients(double, x.double(), arguments(torch.float64), rows)
    with swap_attention(network) as handle:
        assert len(handle.families) == 2
        ours = outputs_and_gradients(network, x, arguments(dtype), rows)
    for name, *three in zip(("out", "gradients"), ours, gold, plain, strict=True):
        assert_close(*three, name=name)
    assert not torch.equal(ours[0], plain[0]), "as if nothing had been swapped"
    again = outputs_and_gradients(network, x, arguments(dtype), rows)
    assert torch.equal(again[0], plain[0])
    assert torch.equal(again[1], plain[1])


STEPS = [0, 3, 4, 9, 10, 16]  # where the tokens of each step begin; the first step has masks alone


def sample_esolm(network, x):
    """The steps of a cached sampler: the tokens that became clean, then the ones being decoded."""
    cos, sin = standins.angles(x.shape[1], x.dtype)
    for block in network.blocks:
        block.reset_kv_cache()
    out = []
    for i in range(len(STEPS) - 1):
        first, start, end = STEPS[max(i - 1, 0)], STEPS[i], STEPS[i + 1]
        tables = (cos[:, first:end], sin[:, first:end])
        out.append(
            Network.forward(
                network, x[:, first:end], tables, kv_cache=True, num_clean=start - first, num_clean_and_mask=end - first
            )
        )
    alone = {"kv_cache": True, "num_clean": 0, "num_clean_and_mask": 4}  # masks alone see no cache, as published
    out.append(Network.forward(network, x[:, 12:], (cos[:, 12:], sin[:, 12:]), **alone))
    return torch.cat(out, 1)


def sample_esolm_causal(network, x):
    cos, sin = standins.angles(x.shape[1], x.dtype)
    for block in network.blocks:
        block.reset_kv_cache()
    rows = range(x.shape[1])
    return torch.cat([network(x[:, i : i + 1], (cos[:, i : i + 1], sin[:, i : i + 1]), kv_cache=True) for i in rows], 1)


def sample_bd3lm(network, x):
    for block in network.blocks:
        block.kv_cache, block.cache_idx = x.new_zeros(len(x), 32, 3, 4, 16), 0
    out = []
    for start in range(0, x.shape[1], 8):
        out.append(network(x[:, start : start + 8]))
        for block in network.blocks:
            block.cache_idx += 8
    return torch.cat(out, 1)


def sample_sets(network, x):
    cos, sin = standins.angles(x.shape[1], x.dtype)
    for block in network.blocks:
        block.k_cache, block.v_cache, block.num_clean_cached = None, None, 0
    out = []
    for i in range(len(STEPS) - 1):
        first, start, end = STEPS[max(i - 1, 0)], STEPS[i], STEPS[i + 1]
        tables = (cos[:, first:end], sin[:, first:end])
        out.append(network(x[:, first:end], None, tables, start - first))
        out.append(
            network(x[:, start:end], None, (cos[:, start:end], sin[:, start:end]), 0)
        )  # sees the cache, stays out
    return torch.cat(out, 1)


SAMPLERS = {
    "Eso-LM": (lambda: EsoLM.EsoLMDiT(EsoLM.DDiTBlock(), EsoLM.DDiTBlock()), sample_esolm),
    "Eso-LM, AR": (lambda: two_blocks(EsoLM.DDiTBlockCausal), sample_esolm_causal),
    "BD3-LM": (lambda: two_blocks(BD3LM.DDiTBlock), sample_bd3lm),
    "Set Diffusion": (lambda: two_blocks(SetDiffusion.DDiTBlock), sample_sets),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", SAMPLERS)
@torch.no_grad()
def test_cached_samplers(case, dtype, backend):
    make, sample = SAMPLERS[case]
    network, x = make().to(dtype), torch.randn(BATCH, 16, DIM, dtype=dtype)
    plain, gold = sample(network, x), sample(copy.deepcopy(network).double(), x.double())
    with swap_attention(network, backend=backend):
        ours = sample(network, x)
    assert_close(ours, gold, plain)
    assert not torch.equal(ours, plain)
    assert torch.equal(sample(network, x), plain)


@torch.no_grad()
def test_a_cache_goes_on_through_a_swap():
    network, x = EsoLM.EsoLMDiT(EsoLM.DDiTBlock()), torch.randn(BATCH, 16, DIM)
    cos, sin = standins.angles(16, x.dtype)
    network.blocks[0].reset_kv_cache()

    def step(first, start, end):
        tables = (cos[:, first:end], sin[:, first:end])
        return Network.forward(
            network, x[:, first:end], tables, kv_cache=True, num_clean=start - first, num_clean_and_mask=end - first
        )

    step(0, 6, 8)
    with swap_attention(network):
        ours = step(6, 8, 12)
    last = step(8, 12, 16)
    network.blocks[0].reset_kv_cache()
    step(0, 6, 8)
    plain, plain_last = step(6, 8, 12), step(8, 12, 16)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(last, plain_last)


@pytest.mark.parametrize("sequential", [False, True])
@torch.no_grad()
def test_no_mask_of_ours_stays_in_a_network(sequential):
    network, x = EsoLM.EsoLMDiT(EsoLM.DDiTBlock()), torch.randn(BATCH, LENGTH, DIM)
    with swap_attention(network):
        ours = network(x, CUTOFFS, sequential)
    assert network.mdlm_mask is None
    assert network.seq_mask is None
    torch.testing.assert_close(network(x, CUTOFFS, sequential), ours)


@torch.no_grad()
def test_only_the_rows_that_a_block_keeps_are_computed():
    block = BD3LM.DDiTBlock()
    qkv = torch.randn(BATCH, 24, 3, 4, 16)
    qkv[:, :16, 0] = torch.nan  # queries of cached blocks
    block.kv_cache = torch.zeros(1)
    with swap_attention(block):
        out = block.cross_attn(qkv)
    assert out.shape == (BATCH, 8, DIM)
    assert out.isfinite().all()


def test_other_instances_and_copies():
    network, other = two_blocks(standins.LLaDALlamaBlock), two_blocks(standins.LLaDALlamaBlock)
    before = [dict(block.__dict__) for block in network.blocks]
    handle = swap_attention(network)
    assert "_scaled_dot_product_attention" not in other.blocks[0].__dict__
    assert "2 modules of LLaDA" in repr(handle)
    handle.restore()
    handle.restore()
    assert "restored" in repr(handle)
    assert [block.__dict__.keys() for block in network.blocks] == [found.keys() for found in before]
    assert not network.blocks[0]._forward_pre_hooks


@torch.no_grad()
def test_a_copy_of_a_swapped_model_has_its_own_caches():
    network = EsoLM.EsoLMDiT(EsoLM.DDiTBlock())
    x = torch.randn(1, 16, DIM)
    with swap_attention(network):
        twin = copy.deepcopy(network)
        out = sample_esolm(twin, x)
        assert not hasattr(network.blocks[0], "k_cache")
        assert torch.equal(sample_esolm(network, x), out)


def test_nested_handles_and_exceptions():
    network = two_blocks(standins.LLaDALlamaBlock)
    block = network.blocks[0]
    outer = swap_attention(network)
    found = block.__dict__["_scaled_dot_product_attention"]
    with contextlib.suppress(KeyError), swap_attention(network, backend="reference"):
        assert block.__dict__["_scaled_dot_product_attention"] is not found
        with pytest.raises(RuntimeError, match="restore the later handle first"):
            outer.restore()
        raise KeyError
    assert block.__dict__["_scaled_dot_product_attention"] is found
    outer.restore()
    assert "_scaled_dot_product_attention" not in block.__dict__


def test_the_reference_back_end_serves_float64_and_any_head_dim():
    network = two_blocks(standins.LLaDALlamaBlock).double()
    x = torch.randn(1, 8, DIM).double()
    plain = network(x)
    with swap_attention(network), pytest.raises(TypeError, match='float64; backend="reference"'):
        network(x)
    with swap_attention(network, backend="reference"):
        torch.testing.assert_close(network(x), plain)


@torch.no_grad()
def test_autocast():
    network = two_blocks(standins.DreamSdpaAttention, 2)
    network.blocks[1].attn_qkv.register_forward_hook(lambda module, arguments, out: out.float())  # as rotary would
    dtypes = []
    network.blocks[1].register_forward_hook(lambda module, arguments, out: dtypes.append(out.dtype))
    x = torch.randn(BATCH, LENGTH, DIM)
    with torch.autocast("cpu", torch.bfloat16):
        plain = network(x)
        with swap_attention(network):
            ours = network(x)
    assert dtypes == [torch.bfloat16, torch.bfloat16]
    assert_close(ours, network(x).double(), plain)


@torch.no_grad()
def test_a_scale_of_its_own():
    block = standins.LLaDALlamaBlock()
    q, k, v = torch.randn(3, 1, 4, 8, 16)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.7)
    with swap_attention(block):
        torch.testing.assert_close(block._scaled_dot_product_attention(q, k, v, scale=0.7), plain)


@torch.no_grad()
def test_a_mask_is_read_once_per_forward_and_never_from_the_last(monkeypatch):
    from esokern.integrations import published_attention

    read = []
    understand = published_attention.understand
    monkeypatch.setattr(published_attention, "understand", lambda *a: read.append(1) or understand(*a))
    with torch.inference_mode():
        network = two_blocks(BD3LM.DDiTBlock)
        x, mask = torch.randn(1, LENGTH, DIM), four(masks.block_causal(LENGTH, 8))[0, 0].clone()
        swap_attention(network)
        first = network(x, mask)
        assert len(read) == 1
        mask.copy_(four(masks.block_causal(LENGTH, 4))[0, 0])  # the same memory
        second = network(x, mask)
    assert len(read) == 2
    assert not torch.equal(first, second)


@torch.no_grad()
def test_a_mask_that_changed_is_read_again_by_a_block_alone():
    network = two_blocks(BD3LM.DDiTBlock)
    x, mask = torch.randn(1, LENGTH, DIM), four(masks.block_causal(LENGTH, 8))[0, 0].clone()
    block = network.blocks[1]
    plain = block(x, mask), block(x, mask.copy_(four(masks.block_causal(LENGTH, 4))[0, 0]))
    mask.copy_(four(masks.block_causal(LENGTH, 8))[0, 0])
    with swap_attention(network):
        ours = block(x, mask), block(x, mask.copy_(four(masks.block_causal(LENGTH, 4))[0, 0]))
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("network", "error", "message"),
    [
        (torch.nn.Linear(2, 2), TypeError, "Linear has no attention that is served. Served: LLaDA"),
        (Network(standins.UNKNOWN.Other()), TypeError, "esokern.integrations.transformers"),
        (Network(standins.UNKNOWN.DDiTBlock()), TypeError, "DDiTBlock: of an unknown code base. Served: LLaDA"),
        (Network(standins.DreamAttention()), ValueError, 'DreamAttention is not served; load .*"sdpa"'),
        (Network(BD3LM.DDiTBlock("flash_attn")), ValueError, "attn_backend: got 'flash_attn', served"),
        (Network(SetDiffusion.DDiTBlock("flash_attn")), ValueError, "attn_backend: got 'flash_attn', served"),
    ],
)
def test_models_that_are_refused(network, error, message):
    before = [set(module.__dict__) for module in network.modules()]
    with pytest.raises(error, match=message):
        swap_attention(network)
    assert [set(module.__dict__) for module in network.modules()] == before


def test_another_revision_is_refused(monkeypatch):
    good = EsoLM.DDiTBlock()
    network = Network(good, EsoLM.DDiTBlock())
    monkeypatch.setattr(EsoLM.DDiTBlock, "forward", lambda self, x: x)
    with pytest.raises(TypeError, match=r"DDiTBlock\.forward does not use flex_attention_multi_headed: this revision"):
        swap_attention(network)
    assert "_attention_with_kv_cache" not in good.__dict__


def test_calls_that_are_refused():
    network = two_blocks(standins.LLaDALlamaBlock)
    x = torch.randn(1, 8, DIM)
    block = network.blocks[0]
    q = torch.randn(1, 4, 8, 16)
    with swap_attention(network):
        block.dropout = 0.1
        network.train()
        with pytest.raises(ValueError, match=r"attention dropout is not served, got 0\.1"):
            network(x)
        network.eval()
        network(x)
        with pytest.raises(ValueError, match="is_causal"):
            block._scaled_dot_product_attention(q, q, q, is_causal=True)
        with pytest.raises(ValueError, match="a bias is not served"):
            block._scaled_dot_product_attention(q, q, q, attn_mask=torch.randn(8, 8))
    for causal in (BD3LM.DDiTBlockCausal(), SetDiffusion.DDiTBlock()):
        qkv = torch.randn(1, 8, 3, 4, 16)
        arguments = {} if hasattr(causal, "kv_cache") else {"causal": True}
        with swap_attention(causal), pytest.raises(ValueError, match="mask"):
            causal.cross_attn(qkv, mask=torch.ones(8, 8, dtype=torch.bool), **arguments)
