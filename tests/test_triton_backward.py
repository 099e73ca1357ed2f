"""Gradients in Triton: in the interpreter here, on the GPU where there is one, against the float64 oracle."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from visionfuse.kernels.attention import (
    RelativeBias,
    UnsupportedError,
    block_sparse_attention,
    reference,
    triton,
)
from visionfuse.kernels.attention.transposed import transpose
from visionfuse.kernels.plan import Neighborhood, TokenLayout, compress, plan_attention
from visionfuse.kernels.plan.planner import BlockShape
from visionfuse.testing import (
    assert_within_budget,
    dense_bias,
    plan_mask,
    poisoned_memory,
    random_bias,
    random_plan,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def tensors(plan, *, batch=1, heads=1, kv_heads=None, dim=32, dtype=torch.float32, seed=0):
    """q, k, v and the gradient of the output."""
    g = torch.Generator().manual_seed(seed)
    queries = (batch, plan.length_q, heads, dim)
    keys = (batch, plan.length_k, kv_heads or heads, dim)
    return [torch.randn(s, generator=g).to(DEVICE, dtype) for s in (queries, keys, keys, queries)]


def low_precision(q, k, v, grad, grad_lse, plan, scale, bias):
    """What a careful dense kernel computes: fp32 sums of products in q's dtype, `out` as it is stored."""
    low, group = q.dtype, q.shape[2] // k.shape[2]
    mask = plan_mask(plan, q.shape[0], q.shape[2])
    added = dense_bias(bias, plan).float() if bias is not None else 0.0
    q, k, v, grad = (x.float().transpose(1, 2) for x in (q, k, v, grad))
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q @ k.mT * scale + added).masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1, keepdim=True)  # rounded, as the forward stores it
    lse = lse.masked_fill(lse == -torch.inf, 0.0)
    eps = torch.finfo(torch.float32).eps
    # Differences of rounded numbers that may cancel (a query with one key) have the errors of both.
    p = (scores - lse + eps * (scores.masked_fill(~mask, 0.0).abs() + lse.abs())).exp()
    out = (p.to(low).float() @ v).to(low).float()
    delta = (grad * out).sum(-1, keepdim=True) - grad_lse[..., None]
    dp = grad @ v.mT
    ds = p * (dp - delta + 2 * eps * (dp.abs() + delta.abs()))
    p, rounded = p.to(low).float(), ds.to(low).float()
    d_k, d_v = (x.unflatten(1, (-1, group)).sum(2) for x in (rounded.mT @ q * scale, p.mT @ grad))
    found = [x.transpose(1, 2).to(low) for x in (rounded @ k * scale, d_k, d_v)]
    if isinstance(bias, RelativeBias):
        found.append(bias.gradient(torch.zeros_like(bias.table, dtype=torch.float32), ds))
    return found


def check(plan, *, scale=0.3, bias=None, lse_gradient=True, impl="triton", **options):
    plan = plan.to(DEVICE)
    check_gradients(*tensors(plan, **options), plan, scale, bias, lse_gradient, impl)


def check_gradients(q, k, v, grad, plan, scale, bias=None, lse_gradient=True, impl="triton"):
    g = torch.Generator().manual_seed(7)
    grad_lse = torch.randn(q.shape[0], q.shape[2], q.shape[1], generator=g).to(DEVICE)
    has_table = isinstance(bias, RelativeBias)
    wide = replace(bias, table=bias.table.double()) if has_table else bias
    exact = reference.backward(
        grad.double(), grad_lse if lse_gradient else None, q.double(), k.double(), v.double(), None, None,
        plan, scale, wide, has_table,
    )  # fmt: skip
    low = low_precision(q, k, v, grad, grad_lse * lse_gradient, plan, scale, bias)
    with poisoned_memory():
        out, lse = block_sparse_attention(
            q, k, v, plan, scale=scale, return_lse=True, impl=impl, bias=bias
        )
        own = grad_lse if lse_gradient else None
        found = triton.backward(grad, own, q, k, v, out, lse, plan, scale, bias, has_table)
    for what, x, got, e, l in zip(("dq", "dk", "dv"), (q, k, v), found, exact, low, strict=False):
        assert (got.shape, got.dtype) == (x.shape, x.dtype)
        assert_within_budget(got, e, l, what=what)
    if has_table:
        assert found[3].dtype == bias.table.dtype
        # Through delta it has the rounding errors of `out`, which is stored in q's dtype.
        assert_within_budget(found[3].to(q.dtype), exact[3], low[3], what="dtable")
    else:
        assert found[3] is None


# Every kind of entry ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["intervals", "bits"])
@pytest.mark.parametrize("ragged", [False, True])
def test_random_lists(kind, ragged):
    plan = random_plan(
        1, length_q=70, length_k=90, block_q=32, block_k=32, kind=kind, ragged=ragged
    )
    assert plan.full.start.numel()
    assert plan.partial.start.numel()
    check(plan)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits(dtype):
    check(random_plan(2, length_q=50, length_k=70, block_q=32, block_k=16), dtype=dtype)


@pytest.mark.parametrize("dim", [16, 40, 72, 128, 160])
def test_head_dims(dim):
    plan = random_plan(3, length_q=40, length_k=40, block_q=32, block_k=16)
    check(plan, dim=dim, scale=dim**-0.5)


@pytest.mark.parametrize(("block_q", "block_k"), [(8, 8), (24, 20), (64, 16), (16, 64)])
def test_blocks_of_any_size(block_q, block_k):
    check(random_plan(4, length_q=36, length_k=36, block_q=block_q, block_k=block_k, kind="bits"))


def test_tiles_and_entries_in_parts():
    """Blocks of a plan may be larger than what is multiplied at once."""
    for kind in ("bits", "intervals"):
        check(random_plan(5, length_q=150, length_k=150, block_q=128, block_k=128, kind=kind))


def test_several_bound_tables_and_many_axes():
    plan = random_plan(
        5, length_q=40, length_k=60, block_q=32, block_k=16, axes=6, tables=3, partial=0.6
    )
    for x in (plan.mask.lo, plan.mask.hi, plan.mask.coord):
        x.mul_(1000).sub_(3000)
    check(plan)


def test_grouped_heads_and_variants():
    plan = random_plan(6, length_q=24, length_k=24, block_q=16, block_k=16, variants=4)
    for shape in ((2, 1), (2, 2)):
        variant = (torch.arange(shape[0] * shape[1], dtype=torch.int32) * 3 % 4).view(shape)
        check(replace(plan, variant=variant), batch=2, heads=2, kv_heads=1)


def test_queries_without_keys_get_no_gradient():
    mask = torch.rand(2, 2, 37, 45, generator=torch.Generator().manual_seed(0)) < 0.2
    mask[1, 0, 5] = False  # a row without keys inside a tile with some
    mask[0, 1] = False  # a head that sees nothing: empty lists
    check(compress(mask, block_q=16, block_k=32), batch=2, heads=2, lse_gradient=False)


def test_keys_that_nobody_visits_get_no_gradient():
    """And what they hold does not matter."""
    plan = random_plan(7, length_q=40, length_k=48, block_q=32, block_k=32, full=0.5, partial=0.2)
    plan = plan.to(DEVICE)
    q, k, v, grad = tensors(plan)
    seen = torch.zeros(48, dtype=torch.bool)
    for lists in (plan.full, plan.partial):
        for start, count in zip(lists.start.tolist(), lists.count.tolist(), strict=True):
            seen[start : start + count] = True
    assert not seen.all(), "every key is visited, choose another seed"
    k[:, ~seen], v[:, ~seen] = torch.nan, torch.nan
    out, lse = triton.forward(q, k, v, plan, 0.3, True)
    d_q, d_k, d_v, _ = triton.backward(grad, None, q, k, v, out, lse, plan, 0.3)
    assert d_q.isfinite().all()
    for x in (d_k, d_v):
        assert x[:, seen].isfinite().all()


@pytest.mark.parametrize("scale", [0.0, -0.5, 5.0])
def test_scales(scale):
    check(random_plan(8, length_q=40, length_k=40, block_q=32, block_k=16), scale=scale)


@pytest.mark.parametrize("kind", ["relative", "block"])
@pytest.mark.parametrize("mask", ["intervals", "bits"])
def test_biases(kind, mask):
    plan = random_plan(
        9, length_q=50, length_k=60, block_q=32, block_k=32, kind=mask, variants=2, tables=2
    ).to(DEVICE)
    bias = random_bias(kind, plan, batch=2, heads=2)
    check(plan, batch=2, heads=2, kv_heads=1, bias=bias)


def test_a_table_shared_by_heads_in_sixteen_bits():
    plan = random_plan(10, length_q=40, length_k=50, block_q=32, block_k=16).to(DEVICE)
    bias = random_bias("relative", plan, dtype=torch.float16)
    check(plan, heads=2, dtype=torch.float16, bias=bias)


@pytest.mark.parametrize(
    ("layout", "spec"),
    [
        (TokenLayout.joint(text=5, grids=[(9, 7)]), Neighborhood(window=(4, 3), stride=(2, 1))),
        (TokenLayout.joint(grids=[(70,)]), Neighborhood(window=9, dilation=3, causal=True)),
        (TokenLayout.joint(grids=[(3, 5, 4)]), Neighborhood(window=(2, 3, 2), stride=(1, 3, 2))),
    ],
    ids=["text and image", "line", "video"],
)
def test_neighborhoods(layout, spec):
    shape = BlockShape(block_q=32, block_k=16, padded=True)
    check(plan_attention(layout, spec, shape=shape).blocks)


# Transposed lists ----------------------------------------------------------------------------------


def pairs_of(plan, lists):
    """How often the visits of `lists` compute each pair that they make visible: int [variants, Sq, Sk]."""
    seen = torch.zeros(plan.variants, plan.length_q, plan.length_k, dtype=torch.int32)
    for visits in (lists.whole, lists.cut, lists.partial):
        for row in range(plan.variants * lists.blocks if visits else 0):
            variant, block = divmod(row, lists.blocks)
            k0 = int(lists.k_start[block])
            for i in range(visits.offset[row], visits.offset[row + 1]):
                q0, qn, r0, tile, lo, hi, entry, column = (int(x[i]) for x in visits[1:])
                part = torch.ones(qn, hi - lo, dtype=torch.bool)
                if visits is lists.whole:
                    assert (lo, hi) == (0, int(lists.k_count[block]))
                if visits is lists.partial:
                    own = plan.partial_mask(slice(entry, entry + 1), tile)[0]
                    part = own[r0 : r0 + qn, column + lo : column + hi]
                seen[variant, q0 : q0 + qn, k0 + lo : k0 + hi] += part
    return seen


@given(data=st.data())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_visits_are_the_visible_pairs(data):
    pick = lambda *values: data.draw(st.sampled_from(values))
    plan = random_plan(
        data.draw(st.integers(0, 10**6)), length_q=data.draw(st.integers(1, 60)),
        length_k=data.draw(st.integers(1, 60)), block_q=pick(8, 16), block_k=pick(8, 13),
        kind=pick("intervals", "bits"), variants=pick(1, 2), full=pick(0.0, 0.05, 0.4, 1.0),
        partial=pick(0.05, 0.3), ragged=pick(True, False),
    )  # fmt: skip
    width = pick(8, 16, 64)
    lists = transpose(plan, rows=pick(4, 16), width=width)
    visible = torch.stack([plan.dense_mask(v) for v in range(plan.variants)])
    assert torch.equal(pairs_of(plan, lists), visible.int())
    assert int(lists.k_count.sum()) == plan.length_k
    assert int(lists.k_count.min()) > 0
    assert int(lists.k_count.max()) <= width
    assert (lists.order.long().sort(1).values == torch.arange(lists.blocks)).all()


def test_key_blocks_follow_the_entries_of_planned_tiles():
    """Tiles of 3 x 5 do not divide 9 x 14: blocks on a grid of 16 keys would cut every second entry."""
    plan = plan_attention(
        TokenLayout.joint(text=7, grids=[(9, 14)]), Neighborhood(window=(3, 5)),
        shape=BlockShape(block_q=16, block_k=16, padded=True),
    ).blocks  # fmt: skip
    lists = transpose(plan, rows=16, width=16)
    entries = plan.full.start.numel() + plan.partial.start.numel()
    assert lists.whole.tile.numel() + lists.partial.tile.numel() == entries
    assert lists.cut is None
    assert transpose(replace(plan), rows=16, width=16) is lists


def test_neighbouring_entries_make_wider_blocks():
    plan = compress(torch.ones(100, 128, dtype=torch.bool), block_q=32, block_k=16)
    lists = transpose(plan, rows=32, width=64)
    assert lists.blocks == 2
    assert lists.whole.tile.numel() == 4 * 2


# Through the op ------------------------------------------------------------------------------------


def test_strided_inputs_and_gradients():
    plan = random_plan(9, length_q=40, length_k=40, block_q=32, block_k=16).to(DEVICE)
    fused = torch.randn(2, 40, 3, 2, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    q, k, v = fused.unbind(2)
    heads_first = v.transpose(1, 2).contiguous().transpose(1, 2)
    dim_first = k.movedim(3, 1).contiguous().movedim(1, 3)
    grad = torch.randn(2, 2, 40, 1, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    check_gradients(
        q, dim_first, heads_first, grad.expand(-1, -1, -1, 32).transpose(1, 2), plan, 0.3
    )


def test_result_is_deterministic():
    plan = random_plan(10, length_q=40, length_k=60, block_q=32, block_k=16).to(DEVICE)
    q, k, v, grad = tensors(plan)
    bias = random_bias("relative", plan)
    out, lse = triton.forward(q, k, v, plan, 0.3, True, bias)
    first, second = (
        triton.backward(grad, None, q, k, v, out, lse, plan, 0.3, bias, True) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("precision", ["model", "int8"])
def test_the_op(precision):
    """Rounded operands too: their gradients are those of exact attention."""
    plan = random_plan(11, length_q=40, length_k=40, block_q=32, block_k=16, ragged=False).to(
        DEVICE
    )
    *leaves, grad = tensors(plan, dtype=torch.float16)
    found = []
    for impl, p in (("triton", precision), ("reference", "model")):
        own = [x.detach().requires_grad_() for x in leaves]
        out = block_sparse_attention(*own, plan, impl=impl, precision=p)
        found.append(torch.autograd.grad(out, own, grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=4e-3, rtol=4e-3)


def test_unsupported_inputs_are_refused_before_the_forward():
    plan = random_plan(12, length_q=8, length_k=8, block_q=16, block_k=16).to(DEVICE)
    q, k, v, _ = tensors(plan, dim=300)
    with pytest.raises(UnsupportedError, match="head dim may be at most 256"):
        block_sparse_attention(q.requires_grad_(), k, v, plan, impl="triton")


# Sweeps --------------------------------------------------------------------------------------------


def _sweep(data):
    pick = lambda *values: data.draw(st.sampled_from(values))
    variants = pick(1, 1, 2)
    plan = random_plan(
        data.draw(st.integers(0, 10**6)), length_q=data.draw(st.integers(1, 40)),
        length_k=data.draw(st.integers(1, 40)), block_q=pick(16, 20, 64), block_k=pick(16, 24, 64),
        kind=pick("intervals", "bits"), axes=pick(1, 2, 4), tables=pick(1, 2), variants=variants,
        ragged=pick(True, False), full=pick(0.0, 0.4, 1.0),
    ).to(DEVICE)  # fmt: skip
    kind = pick(None, "relative", "block")
    bias = random_bias(kind, plan, heads=variants) if kind else None
    check(
        plan, heads=variants, dim=pick(16, 24), dtype=pick(torch.float32, torch.float16), bias=bias
    )


@given(data=st.data())
@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_sweep(data):
    _sweep(data)


@pytest.mark.skipif(DEVICE == "cuda", reason="every draw would be compiled")
@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_long_sweep(data):
    _sweep(data)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: too large for the interpreter")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("impl", ["triton", "gluon_sm90"])
def test_real_sizes(impl, dtype, dim):
    """The planner's own blocks, pipelined loops, odd grids with text."""
    if dtype == torch.float32 and (dim == 256 or impl == "gluon_sm90"):
        pytest.skip("no such forward")
    layout = TokenLayout.joint(text=77, grids=[(5, 15, 22)])
    spec = Neighborhood(window=(3, 7, 9), stride=(1, 2, 1))
    plan = plan_attention(layout, spec, impl=impl, head_dim=dim, device=DEVICE).blocks
    check(plan, batch=2, heads=2, dim=dim, dtype=dtype, scale=dim**-0.5, impl=impl)
