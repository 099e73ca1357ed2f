"""The portable Triton forward: in the interpreter here, on the GPU where there is one. (Its 8-bit paths:
test_triton_8bit.py; the kernel for whole entries on Hopper: test_triton_sm90.py; compiled for GPUs that are not
here: test_compile_matrix.py.)
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from visionfuse.kernels.attention.prepared import prepare
from visionfuse.kernels.attention.triton import host
from visionfuse.kernels.attention.triton.operands import shared_memory
from visionfuse.kernels.plan import tiles
from visionfuse.kernels.plan.block_plan import BlockPlan
from visionfuse.kernels.plan.compress import compress
from visionfuse.kernels.plan.layout import TokenLayout
from visionfuse.kernels.plan.neighborhood import Neighborhood
from visionfuse.kernels.plan.planner import BlockShape, plan_attention
from visionfuse.testing import check_attention, dense_attention, random_plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def tensors(plan, *, batch=1, heads=1, kv_heads=None, dim=32, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = (
        (batch, plan.length_q, heads, dim),
        *[(batch, plan.length_k, kv_heads or heads, dim)] * 2,
    )
    return tuple(torch.randn(s, generator=g).to(DEVICE, dtype) for s in shapes)


def check(plan, scale=0.3, **options):
    plan = plan.to(DEVICE)
    check_attention(host.forward, *tensors(plan, **options), plan, scale)


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
    check(
        random_plan(3, length_q=40, length_k=40, block_q=32, block_k=16), dim=dim, scale=dim**-0.5
    )


@pytest.mark.parametrize(("block_q", "block_k"), [(8, 8), (24, 20), (64, 16), (16, 64)])
def test_blocks_of_any_size(block_q, block_k):
    check(random_plan(4, length_q=66, length_k=66, block_q=block_q, block_k=block_k, kind="bits"))


def test_several_bound_tables_and_many_axes():
    plan = random_plan(
        5, length_q=40, length_k=60, block_q=32, block_k=16, axes=6, tables=3, partial=0.6
    )
    # Wide coordinates: six axes do not fit one word.
    for x in (plan.mask.lo, plan.mask.hi, plan.mask.coord):
        x.mul_(1000).sub_(3000)
    assert prepare(plan, 16).words == 3
    check(plan)


def test_grouped_heads_and_variants():
    plan = random_plan(6, length_q=24, length_k=24, block_q=16, block_k=16, variants=4)
    for shape in ((2, 1), (1, 2), (2, 2)):
        variant = (torch.arange(shape[0] * shape[1], dtype=torch.int32) * 3 % 4).view(shape)
        changed = replace(plan, variant=variant)
        check(changed, batch=2, heads=2, kv_heads=1)


def test_mask_of_batch_and_heads():
    mask = torch.rand(2, 2, 37, 45, generator=torch.Generator().manual_seed(0)) < 0.2
    mask[1, 0, 5] = False  # a row without keys inside a tile with some
    mask[0, 1] = False  # a head that sees nothing: empty lists
    check(compress(mask, block_q=16, block_k=32), batch=2, heads=2)


def test_rows_without_keys_are_zero():
    mask = torch.zeros(20, 20, dtype=torch.bool)
    mask[3, 4] = True
    plan = compress(mask, block_q=16, block_k=16).to(DEVICE)
    q, k, v = tensors(plan)
    out, lse = host.forward(q, k, v, plan, 1.0, True)
    alone = torch.arange(20, device=DEVICE) == 3
    torch.testing.assert_close(out[:, alone], v[:, 4:5])
    assert (out[:, ~alone] == 0).all()
    assert (lse[..., ~alone] == -torch.inf).all()


def test_masked_columns_do_not_leak_nan():
    """What lies behind a short run belongs to other tiles and may hold anything."""
    plan = random_plan(7, length_q=40, length_k=48, block_q=32, block_k=32, full=0.5, partial=0.2)
    plan = plan.to(DEVICE)
    q, k, v = tensors(plan)
    seen = torch.zeros(48, dtype=torch.bool)
    for lists in (plan.full, plan.partial):
        for start, count in zip(lists.start.tolist(), lists.count.tolist(), strict=True):
            seen[start : start + count] = True
    assert not seen.all(), "every key is visited, choose another seed"
    k[:, ~seen], v[:, ~seen] = torch.nan, torch.nan
    out, lse = host.forward(q, k, v, plan, 0.3, True)
    assert not out.isnan().any()
    assert not lse.isnan().any()


@pytest.mark.parametrize("scale", [0.0, -0.5, 5.0])
def test_scales(scale):
    check(random_plan(8, length_q=40, length_k=40, block_q=32, block_k=16), scale=scale)


# Neighborhoods, as the planner makes them ------------------------------------------------------------


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


def test_long_tiles_start_first():
    layout = TokenLayout.joint(text=20, grids=[(24, 24)], text_first=False)
    shape = BlockShape(block_q=32, block_k=16, padded=True)
    plan = plan_attention(layout, Neighborhood(window=6), shape=shape).blocks
    ready = prepare(plan, 16)
    assert ready.heavy == 1
    assert int(plan.q_start[ready.order[0, 0]]) == 24 * 24
    assert sorted(ready.order[0].tolist()) == list(range(plan.tiles))
    assert prepare(BlockPlan.from_tensors(plan.to_tensors(), plan.scalars()), 16) is ready


@pytest.mark.parametrize("kind", ["intervals", "bits"])
def test_entries_in_parts(kind, monkeypatch):
    """GPUs with few registers or little shared memory multiply half an entry at a time."""
    whole = host._tuning

    def half(qk, pv, BM, BN, BD):
        return whole(qk, pv, BM=BM, BN=BN, BD=BD) | {"BN": BN // 2}

    monkeypatch.setattr(host, "_tuning", half)
    check(random_plan(13, length_q=70, length_k=150, block_q=32, block_k=64, kind=kind, tables=2))


# Memory layouts ----------------------------------------------------------------------------------


def test_strided_inputs():
    plan = random_plan(9, length_q=40, length_k=40, block_q=32, block_k=16).to(DEVICE)
    fused = torch.randn(2, 40, 3, 2, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    q, k, v = fused.unbind(2)  # slices of a fused projection
    heads_first = v.transpose(1, 2).contiguous().transpose(1, 2)
    dim_first = k.movedim(3, 1).contiguous().movedim(1, 3)
    assert dim_first.stride(-1) != 1
    check_attention(host.forward, q, dim_first, heads_first, plan, 0.3)


def test_result_is_deterministic():
    plan = random_plan(10, length_q=40, length_k=60, block_q=32, block_k=16).to(DEVICE)
    q, k, v = tensors(plan)
    runs = [host.forward(q, k, v, plan, 0.3, True) for _ in range(2)]
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


# Refusals ----------------------------------------------------------------------------------------


def test_unsupported_lists_every_reason():
    plan = random_plan(11, length_q=8, length_k=8, block_q=512, block_k=16)
    q = torch.empty(1, 8, 1, 320, dtype=torch.float64)
    reasons = host.unsupported(q, q.half(), q, plan)
    assert len(reasons) >= 4
    assert any("float64" in r for r in reasons)
    assert any("320" in r for r in reasons)
    assert any("512 queries" in r for r in reasons)


@pytest.mark.parametrize("arch", [0, 80, 86, 89, 90, 100, 120])
def test_shapes_of_the_planner_fit_fp32_too(arch):
    """A plan is made for a precision and not for a dtype."""
    for dim in (32, 64, 128):
        for shape in tiles._triton_shapes(("cuda" if arch else "cpu", arch), dim, "model"):
            assert max(shape.block_q, shape.block_k) <= 128
            assert 7 * shape.block_q * dim <= shared_memory(arch)


def test_supported():
    plan = random_plan(12, length_q=8, length_k=8, block_q=16, block_k=16).to(DEVICE)
    assert host.unsupported(*tensors(plan), plan) == []


# Sweeps ------------------------------------------------------------------------------------------


def _sweep(data):
    pick = lambda *values: data.draw(st.sampled_from(values))
    variants = pick(1, 1, 2)
    plan = random_plan(
        data.draw(st.integers(0, 10**6)),
        length_q=data.draw(st.integers(1, 40)),
        length_k=data.draw(st.integers(1, 40)),
        block_q=pick(16, 20, 32),
        block_k=pick(16, 24, 32),
        kind=pick("intervals", "bits"),
        axes=pick(1, 2, 4),
        tables=pick(1, 2),
        variants=variants,
        ragged=pick(True, False),
        full=pick(0.0, 0.4, 1.0),
    )
    check(plan, heads=variants, dim=pick(16, 24), dtype=pick(torch.float32, torch.float16))


@given(data=st.data())
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_sweep(data):
    _sweep(data)


@pytest.mark.skipif(DEVICE == "cuda", reason="every draw would be compiled")
@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
def test_long_sweep(data):
    _sweep(data)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: too large for the interpreter")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [32, 64, 96, 128])
def test_real_sizes(dtype, dim):
    """The planner's own blocks, pipelined loops, odd grids with text."""
    layout = TokenLayout.joint(text=77, grids=[(5, 21, 26)])
    spec = Neighborhood(window=(3, 9, 11), stride=(1, 2, 1))
    plan = plan_attention(layout, spec, impl="triton", head_dim=dim, device=DEVICE).blocks
    check(plan, batch=2, heads=2, dim=dim, dtype=dtype, scale=dim**-0.5)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: 64-bit addresses take 5 GB")
def test_addresses_beyond_32_bits():
    """A batch entry that starts 2**31 elements into its tensor."""
    plan = compress(torch.ones(100, 100, dtype=torch.bool)).to(DEVICE)
    store = torch.empty(2**31 + 2**20, dtype=torch.bfloat16, device=DEVICE)
    q = store.as_strided((2, 100, 1, 64), (2**31, 64, 64, 1))
    q.copy_(torch.randn(2, 100, 1, 64))
    out, _ = host.forward(q, q, q, plan, 0.125, False)
    mask = torch.ones(1, 1, 100, 100, dtype=torch.bool, device=DEVICE)
    exact = dense_attention(*[q.double()] * 3, mask, 0.125, accumulate=torch.float64)[0]
    torch.testing.assert_close(out.double(), exact, atol=2e-2, rtol=0)
