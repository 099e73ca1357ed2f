"""The op and its portable implementations against dense float64 softmax under the rule's own mask."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library

from visionfuse.kernels.attention import (
    UnsupportedError,
    block_sparse_attention,
    implementations,
    select_implementation,
    unsupported_reasons,
)
from visionfuse.kernels.order import Order
from visionfuse.kernels.plan import (
    BlockShape,
    Neighborhood,
    TokenLayout,
    compress,
    neighborhood_mask,
    plan_attention,
)

PORTABLE = ["reference", "blocks"]


def dense(q, k, v, mask, scale=None):
    """(B, S, H, D) attention in float64 under a bool mask [..., S_q, S_k], and its lse."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * (scale or 1 / math.sqrt(q.shape[-1]))
    scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)
    return (weights @ v).transpose(1, 2), scores.logsumexp(-1)


def small_plan(grid=(9, 14), text=5, window=(5, 7), **spec):
    layout = TokenLayout.joint(text=text, grids=[grid])
    rule = Neighborhood(window=window, **spec)
    plan = plan_attention(
        layout,
        rule,
        order=Order(kind="tiled", tile=(4, 5)),
        shape=BlockShape(block_q=16, block_k=8, padded=True),
    )
    mask = torch.ones(layout.length, layout.length, dtype=torch.bool)
    mask[text:, text:] = neighborhood_mask(rule.resolve(grid))
    return plan, mask[plan.permutation][:, plan.permutation]


def inputs(plan, *, batch=2, heads=4, kv_heads=None, dim=16, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(plan.length_q, heads)] + [(plan.length_k, kv_heads or heads)] * 2
    return [torch.randn(batch, s, h, dim, generator=generator, dtype=dtype) for s, h in shapes]


@pytest.fixture
def poisoned(monkeypatch):
    """Every torch.empty* comes back full of NaN: an unwritten output shows."""
    for name in ("empty", "empty_like"):
        original = getattr(torch, name)

        def filled(*args, _original=original, **kwargs):
            x = _original(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        monkeypatch.setattr(torch, name, filled)


@pytest.mark.parametrize("impl", PORTABLE)
@pytest.mark.parametrize(("kv_heads", "dim"), [(4, 16), (2, 40), (1, 64)])
def test_equals_float64(impl, kv_heads, dim, poisoned):
    plan, mask = small_plan()
    q, k, v = inputs(plan.blocks, kv_heads=kv_heads, dim=dim)
    out, lse = block_sparse_attention(q, k, v, plan.blocks, impl=impl, return_lse=True)
    expected, expected_lse = dense(q, k, v, mask)
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=0)
    torch.testing.assert_close(lse.double(), expected_lse, atol=2e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_inside_twice_the_error_of_sdpa(dtype):
    plan, mask = small_plan()
    q, k, v = inputs(plan.blocks, dtype=dtype, dim=32)
    expected, _ = dense(q, k, v, mask)
    stock = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask
    ).transpose(1, 2)
    budget = 2 * (stock.double() - expected).abs().max() + 2 * torch.finfo(dtype).eps
    out = block_sparse_attention(q, k, v, plan.blocks, impl="blocks")
    assert out.dtype == dtype
    assert (out.double() - expected).abs().max() <= budget


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_any_mask_by_head_and_batch(data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    sq, sk = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    lead = data.draw(st.sampled_from([(), (4,), (2, 4), (2, 1)]))
    mask = torch.rand(*lead, sq, sk, generator=generator) < data.draw(st.sampled_from([0.05, 0.6]))
    plan = compress(mask, block_q=8, block_k=8)
    q, k, v = inputs(plan, kv_heads=2)
    expected, expected_lse = dense(q, k, v, mask)
    for impl in PORTABLE:
        out, lse = block_sparse_attention(q, k, v, plan, impl=impl, return_lse=True)
        torch.testing.assert_close(out.double(), expected, atol=3e-6, rtol=0)
        torch.testing.assert_close(lse.double(), expected_lse, atol=3e-6, rtol=0)


def test_reads_strided_inputs():
    plan, mask = small_plan()
    qkv = torch.randn(2, plan.blocks.length_q, 3, 4, 16)
    q, k, v = qkv.unbind(2)
    out = block_sparse_attention(q, k, v, plan.blocks, impl="blocks")
    torch.testing.assert_close(out.double(), dense(q, k, v, mask)[0], atol=2e-6, rtol=0)


@pytest.mark.parametrize("impl", PORTABLE)
def test_gradients_equal_dense_gradients(impl):
    plan, mask = small_plan()
    leaves = [x.requires_grad_() for x in inputs(plan.blocks, kv_heads=2)]
    weight = torch.randn(leaves[0].shape)
    out = block_sparse_attention(*leaves, plan.blocks, impl=impl)
    got = torch.autograd.grad((out * weight).sum(), leaves)
    expected = torch.autograd.grad((dense(*leaves, mask)[0] * weight).sum(), leaves)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g.double(), e.double(), atol=1e-5, rtol=1e-5)


def test_compiles_without_graph_breaks():
    plan, mask = small_plan()
    q, k, v = inputs(plan.blocks)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def layer(q, k, v):
        return block_sparse_attention(q * 1.0, k, v, plan.blocks, impl="blocks") + 0.0

    torch.testing.assert_close(layer(q, k, v).double(), dense(q, k, v, mask)[0], atol=2e-6, rtol=0)


def test_op_passes_opcheck():
    plan, _ = small_plan()
    q, k, v = inputs(plan.blocks)
    library.opcheck(
        torch.ops.visionfuse.block_sparse_attention.default,
        (q, k, v, plan.blocks.to_tensors(), plan.blocks.scalars(), [], 0.25, "blocks", True, "model", None, None),
    )  # fmt: skip


def test_auto_chooses_and_says_why():
    name, reasons = select_implementation("cpu", torch.float32, 64)
    assert name == "blocks"
    assert any(reason.startswith("triton") for reason in reasons)
    plan, _ = small_plan()
    q, k, v = inputs(plan.blocks)
    auto = block_sparse_attention(q, k, v, plan.blocks)
    assert torch.equal(auto, block_sparse_attention(q, k, v, plan.blocks, impl="blocks"))


def test_named_implementation_raises_with_its_reasons():
    plan, _ = small_plan()
    q, k, v = inputs(plan.blocks, dim=300, dtype=torch.float64)
    reasons = unsupported_reasons("triton", q, k, v, plan.blocks)
    with pytest.raises(UnsupportedError, match="cannot run here"):
        block_sparse_attention(q.requires_grad_(), k, v, plan.blocks, impl="triton")
    q.requires_grad_(False)
    assert len(reasons) >= 2
    assert "triton" in implementations()
    with pytest.raises(UnsupportedError, match="cannot run here") as error:
        block_sparse_attention(q, k, v, plan.blocks, impl="triton")
    assert all(reason in str(error.value) for reason in reasons)


def test_bad_inputs_are_refused():
    plan, _ = small_plan()
    q, k, v = inputs(plan.blocks)
    for args, message in [
        ((q[:, 1:], k, v), "The plan is for"),
        ((q, k, v[..., :8]), "Expected q"),
        ((q, k[:1], v[:1]), "share batch"),
        ((q[:, :, :3], k[:, :, :2], v[:, :, :2]), "divide query heads"),
        ((q, k.half(), v.half()), "share a floating dtype"),
    ]:
        with pytest.raises(ValueError, match=message):
            block_sparse_attention(*args, plan.blocks)
    with pytest.raises(ValueError, match="Unknown implementation"):
        block_sparse_attention(q, k, v, plan.blocks, impl="magic")
    with pytest.raises(ValueError, match="variants"):
        block_sparse_attention(
            *(torch.randn(2, 8, 4, 16) for _ in range(3)),
            compress(torch.rand(3, 4, 8, 8) < 0.5, block_q=8, block_k=8),
        )
