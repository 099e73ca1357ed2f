"""Gradients of the op: the oracle against finite differences, `blocks` against the oracle, eager and compiled."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library

from visionfuse.kernels.attention import (
    RelativeBias,
    UnsupportedError,
    block_sparse_attention,
    blocks,
    reference,
)
from visionfuse.kernels.attention.ops import block_sparse_attention_op
from visionfuse.kernels.plan import compress
from visionfuse.testing import random_bias, random_plan

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="GPU: test_triton_backward.py")


def small_plan(seed=1, variants=2, **options):
    return random_plan(
        seed, length_q=9, length_k=11, block_q=4, block_k=5, variants=variants, **options
    )


def tensors(plan, *, batch=1, heads=1, kv_heads=None, dim=16, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    keys = (batch, plan.length_k, kv_heads or heads, dim)
    shapes = ((batch, plan.length_q, heads, dim), keys, keys)
    return [torch.randn(s, generator=g).to(dtype) for s in shapes]


def gradients(q, k, v, plan, bias=None, *, impl, scale=0.3, precision="model", seed=9):
    """Of a random sum of out and lse, for q, k, v and the table of a relative bias."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    if isinstance(bias, RelativeBias):
        leaves.append(bias.table.detach().clone().requires_grad_())
        bias = RelativeBias(leaves[3], bias.q_index, bias.k_index)
    out, lse = block_sparse_attention(
        *leaves[:3], plan, scale=scale, impl=impl, bias=bias, return_lse=True, precision=precision
    )
    g = torch.Generator().manual_seed(seed)
    loss = (out * torch.randn(out.shape, generator=g)).sum()
    loss = (
        loss + (lse * torch.randn(lse.shape, generator=g)).masked_fill(lse == -torch.inf, 0).sum()
    )
    return torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("impl", ["reference", "blocks"])
@pytest.mark.parametrize("bias", [None, "relative", "block"])
def test_equal_finite_differences(impl, bias):
    plan = small_plan(kind="bits")
    q, k, v = tensors(plan, heads=2, kv_heads=1, dim=3, dtype=torch.float64)
    added = random_bias(bias, plan, heads=2, dtype=torch.float64) if bias else None

    def attend(q, k, v, *table):
        moved = RelativeBias(*table, added.q_index, added.k_index) if table else added
        return block_sparse_attention(q, k, v, plan, impl=impl, bias=moved)

    leaves = [q, k, v, *([added.table] if bias == "relative" else [])]
    assert torch.autograd.gradcheck(attend, [x.requires_grad_() for x in leaves])


@pytest.mark.parametrize("bias", [None, "relative", "block"])
@pytest.mark.parametrize("kind", ["intervals", "bits"])
def test_blocks_equal_the_oracle(kind, bias):
    plan = random_plan(
        2, length_q=70, length_k=90, block_q=32, block_k=32, kind=kind, variants=2, tables=2
    )
    q, k, v = tensors(plan, batch=2, heads=2, kv_heads=1)
    added = random_bias(bias, plan, batch=2, heads=2) if bias else None
    got, expected = (gradients(q, k, v, plan, added, impl=i) for i in ("blocks", "reference"))
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, atol=2e-5, rtol=1e-5)


def test_queries_without_keys_get_no_gradient():
    mask = torch.rand(2, 2, 37, 45, generator=torch.Generator().manual_seed(0)) < 0.2
    mask[1, 0, 5] = False
    mask[0, 1] = False
    plan = compress(mask, block_q=16, block_k=32)
    q, k, v = tensors(plan, batch=2, heads=2)
    for impl in ("reference", "blocks"):
        d_q, d_k, d_v = gradients(q, k, v, plan, impl=impl)
        assert all(x.isfinite().all() for x in (d_q, d_k, d_v))
        assert (d_q[1, 5, 0] == 0).all()
        assert all((x[0, :, 1] == 0).all() for x in (d_q, d_k, d_v))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits_are_summed_in_fp32(dtype):
    plan = random_plan(3, length_q=60, length_k=70, block_q=16, block_k=16)
    q, k, v = tensors(plan, dtype=dtype)
    got, expected = (gradients(q, k, v, plan, impl=i) for i in ("blocks", "reference"))
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == dtype
        torch.testing.assert_close(g, e, atol=1e-5, rtol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_rounded_precisions_pass_gradients_straight_through(precision):
    plan = random_plan(4, length_q=40, length_k=40, block_q=16, block_k=16)
    q, k, v = tensors(plan, dtype=torch.bfloat16)
    rounded = block_sparse_attention(q, k, v, plan, precision=precision)
    assert not torch.equal(rounded, block_sparse_attention(q, k, v, plan))
    exact = gradients(q, k, v, plan, impl="auto")
    for g, e in zip(gradients(q, k, v, plan, impl="auto", precision=precision), exact, strict=True):
        assert torch.equal(g, e)


@pytest.mark.parametrize("bias", [None, "relative", "block"])
def test_compiles_without_graph_breaks(bias):
    plan = small_plan()
    q, k, v = tensors(plan, heads=2)
    added = random_bias(bias, plan, heads=2) if bias else None
    more = added.to_tensors() if added else []

    def step(q, k, v, more):
        moved = type(added)(*more) if added else None
        return block_sparse_attention(q * 1.0, k, v, plan, bias=moved) + 0.0

    weight = torch.randn(q.shape)
    found = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        own = [x.clone() for x in more]
        if bias == "relative":
            leaves.append(own[0].requires_grad_())
        found.append(torch.autograd.grad((run(*leaves[:3], own) * weight).sum(), leaves))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_exports_for_training():
    plan = small_plan(variants=1)
    q, k, v = tensors(plan)

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor(0.5))

        def forward(self, q, k, v):
            return block_sparse_attention(q * self.weight, k, v, plan)

    layer = Layer()
    exported = torch.export.export(layer, (q, k, v), strict=False).module()
    for module in (layer, exported):
        module(q, k, v).sum().backward()
    torch.testing.assert_close(exported.weight.grad, layer.weight.grad)


def test_op_passes_opcheck():
    plan = small_plan()
    q, k, v = (x.requires_grad_() for x in tensors(plan, heads=2))
    bias = random_bias("relative", plan, heads=2).to_tensors()
    bias[0].requires_grad_()
    arguments = (q, k, v, plan.to_tensors(), plan.scalars(), bias, 0.25, "blocks", True, "model",
                 None, None)  # fmt: skip
    library.opcheck(block_sparse_attention_op, arguments)


def test_plans_stay_cached_in_the_backward(monkeypatch):
    """What is derived from a plan is kept by the identity of its tensors, also of saved ones."""
    plan = small_plan()
    calls, runs = [], blocks._runs
    monkeypatch.setattr(blocks, "_runs", lambda entries: calls.append(1) or runs(entries))
    gradients(*tensors(plan, heads=2), plan, impl="blocks")
    assert len(calls) == 2  # full and partial entries, once


def test_sparse_backward_skips_what_is_not_visited():
    plan = compress(torch.eye(8, dtype=torch.bool).repeat_interleave(16, 0).repeat_interleave(16, 1),
                    block_q=16, block_k=16)  # fmt: skip
    q, k, v = tensors(plan)
    with torch.profiler.profile(with_flops=True) as profile:
        gradients(q, k, v, plan, impl="blocks")
    flops = sum(e.flops for e in profile.key_averages() if "mm" in e.key)
    assert 0 < flops < 128 * 128 * 16 * 2 * 5


def test_no_backward():
    plan = small_plan(variants=1)
    q, k, v = tensors(plan)
    q.requires_grad_()
    with pytest.raises(UnsupportedError, match="no backward"):
        block_sparse_attention(q, k, v, plan, impl="flex", precision="int8")
    with torch.no_grad():
        block_sparse_attention(q, k, v, plan, impl="blocks")


@given(st.data())
@settings(max_examples=20, deadline=None)
def test_any_mask_by_head_and_batch(data):
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    sq, sk = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 30))
    lead = data.draw(st.sampled_from([(), (4,), (2, 4), (2, 1)]))
    mask = torch.rand(*lead, sq, sk, generator=g) < data.draw(st.sampled_from([0.05, 0.6]))
    plan = compress(mask, block_q=8, block_k=8)
    q, k, v = tensors(plan, batch=2, heads=4, kv_heads=2)
    kind = data.draw(st.sampled_from([None, "relative", "block"]))
    bias = random_bias(kind, plan, batch=2, heads=4) if kind else None
    exact = reference.backward(
        torch.ones_like(q), None, q, k, v, None, None, plan, 0.3, bias, kind == "relative"
    )
    got = blocks.backward(
        torch.ones_like(q), None, q, k, v, None, None, plan, 0.3, bias, kind == "relative"
    )
    for a, b in zip(got, exact, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)
