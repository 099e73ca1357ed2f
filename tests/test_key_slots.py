"""Key slots: every key once, the same pairs as before, and the whole way to a kernel that reads codes."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visionfuse.kernels.attention import (
    block_sparse_attention,
    dispatch,
    key_slots,
    quantized,
)
from visionfuse.kernels.attention.precision import Precision
from visionfuse.kernels.attention.prologue import PrologueSpec, dequantized
from visionfuse.kernels.order import Order
from visionfuse.kernels.plan import (
    BlockShape,
    Dense,
    Neighborhood,
    TokenLayout,
    compress,
    plan_attention,
)
from visionfuse.testing import plan_mask, random_plan

WIDTH = 128


def in_own_order(plan, slots):
    """The visible pairs of the slot plan with its columns back where the keys were: bool [V, Sq, Sk]."""
    masks = torch.stack([slots.plan.dense_mask(v) for v in range(plan.variants)])
    if slots.order is None:
        return masks
    real = slots.order >= 0
    assert not masks[..., ~real].any(), "padding is visible"
    out = torch.zeros(plan.variants, plan.length_q, plan.length_k, dtype=torch.bool)
    index = slots.order[real].long().expand(plan.variants, plan.length_q, -1)
    return out.int().scatter_add_(2, index, masks[..., real].int())


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_planned_keys_stand_once_and_show_the_same_pairs(data):
    rank = data.draw(st.integers(1, 3))
    grid = tuple(data.draw(st.integers(1, 7)) for _ in range(rank))
    window = tuple(data.draw(st.integers(1, n)) for n in grid)
    text = data.draw(st.integers(0, 5))
    block_k = data.draw(st.sampled_from([3, 8, 16, 20]))
    plan = plan_attention(
        TokenLayout.joint(text=text, grids=[grid]),
        data.draw(st.sampled_from([Neighborhood(window=window), Dense()])),
        shape=BlockShape(block_q=8, block_k=block_k, padded=True),
    ).blocks
    slots = key_slots.key_slots(plan, key_slots.slot_width(block_k))
    width = key_slots.slot_width(block_k)
    for entries in (slots.plan.full, slots.plan.partial):
        assert not (entries.start % width).any()
    if slots.order is not None:
        assert slots.plan.length_k == slots.order.numel()
        assert slots.order[slots.order >= 0].sort().values.tolist() == list(range(plan.length_k))
    masks = torch.stack([plan.dense_mask(v) for v in range(plan.variants)])
    assert torch.equal(in_own_order(plan, slots), masks.int() if slots.order is not None else masks)


@given(
    st.integers(0, 10**6), st.sampled_from(["intervals", "bits"]), st.booleans(), st.integers(1, 3)
)
@settings(max_examples=30, deadline=None)
def test_arbitrary_plans_show_the_same_pairs(seed, kind, ragged, variants):
    """Runs of different rows overlap at will: each has a slot of its own, and a key several places."""
    plan = random_plan(
        seed, length_q=40, length_k=50, block_q=8, block_k=12, kind=kind, ragged=ragged,
        variants=variants, tables=2,
    )  # fmt: skip
    slots = key_slots.key_slots(plan, 16)
    masks = torch.stack([plan.dense_mask(v) for v in range(variants)])
    assert torch.equal(in_own_order(plan, slots).bool(), masks)


def test_aligned_runs_stay_where_they_are():
    plan = plan_attention(
        TokenLayout.joint(grids=[(1000,)]), Dense(), order=Order(kind="row"), impl="gluon_sm90"
    ).blocks
    slots = key_slots.key_slots(plan, WIDTH)
    assert slots.order is None
    assert slots.plan is plan


def tiled():
    """Entries of up to 72 keys, so that slots have the same width everywhere."""
    return plan_attention(
        TokenLayout.joint(text=7, grids=[(10, 21)]),
        Neighborhood(window=(5, 9)),
        order=Order(kind="tiled", tile=(8, 9)),
        shape=BlockShape(block_q=72, block_k=72, padded=True),
    ).blocks


def test_found_once_for_a_plan_and_forgotten_with_it():
    plan = tiled()
    key_slots._cache.clear()
    again = type(plan).from_tensors(plan.to_tensors(), plan.scalars())  # as a custom op makes it
    first = key_slots.key_slots(plan, WIDTH)
    assert key_slots.key_slots(again, WIDTH) is first
    assert key_slots.key_slots(plan, 2 * WIDTH) is not first
    same_lists = type(plan).from_tensors(
        [t.clone() if i in (1, 5) else t for i, t in enumerate(plan.to_tensors())], plan.scalars()
    )
    assert key_slots.key_slots(same_lists, WIDTH) is not None
    assert len(key_slots._cache) == 1
    own = plan_of_its_own()
    key_slots.key_slots(own, WIDTH)
    assert len(key_slots._cache) == 2
    del own
    gc.collect()
    assert len(key_slots._cache) == 1


def plan_of_its_own():
    return random_plan(8, length_q=60, length_k=70, block_q=16, block_k=12)


def test_other_caches_know_the_slot_plan_as_another():
    plan = tiled()
    moved = key_slots.key_slots(plan, WIDTH).plan
    assert moved.q_start is not plan.q_start
    for ours, theirs in ((plan.full, moved.full), (plan.partial, moved.partial)):
        assert ours.offset is not theirs.offset
        assert ours.start is not theirs.start
    q, k, v = torch.randn(3, 1, plan.length_q, 2, 16)
    before = block_sparse_attention(q, k, v, plan, impl="blocks")
    block_sparse_attention(q, k, v, plan, impl="blocks", precision="fp8")
    assert torch.equal(block_sparse_attention(q, k, v, plan, impl="blocks"), before)


def test_plans_that_do_not_fit_are_refused(monkeypatch):
    plan = tiled()
    assert "at most 16 keys, got 72" in key_slots.unsupported(plan, 16)[0]
    monkeypatch.setattr(key_slots, "ALWAYS_FITS", 0)
    monkeypatch.setattr(key_slots, "MOST_GROWTH", 6)
    assert not key_slots.unsupported(tiled(), WIDTH)
    crumbs = random_plan(0, length_q=64, length_k=64, block_q=4, block_k=4)
    assert "different runs of keys" in key_slots.unsupported(crumbs, WIDTH)[0]


# -- the whole way, with a kernel in plain torch, and with Triton's in its interpreter ----------------


def stand_in(layout):
    """What a kernel for rounded operands does, from its operands alone: dense and in float64."""

    def forward(x, plan, scale, return_lse, bias=None):
        assert scale > 0
        spec = PrologueSpec(
            qk="int8" if x.q.dtype == torch.int8 else "fp8",
            k_rows=1 if x.k_scale.shape[2] == x.k.shape[1] else WIDTH,
            v="same" if x.v_scale is None else "fp8", v_layout="tokens" if x.v_scale is None else layout,
        )  # fmt: skip
        q, k, v = (y.double().transpose(1, 2) for y in dequantized(x, spec))
        k, v = (y.repeat_interleave(q.shape[1] // y.shape[1], 1) for y in (k, v))
        scores = q @ k.mT * scale
        if bias is not None:
            for tile, (first, count) in enumerate(zip(plan.q_start, plan.q_count, strict=True)):
                scores[:, :, first : first + count] += bias.rows[:, :, tile, None]
        scores = scores.masked_fill(~plan_mask(plan, *q.shape[:2]), -torch.inf)
        top = scores.amax(-1, keepdim=True)
        p = (scores - top.masked_fill(top == -torch.inf, 0.0)).exp()
        if x.v_scale is not None:
            p = (p * 2**8.807).to(torch.float8_e4m3fn).double() / 2**8.807
        total = p.sum(-1, keepdim=True)
        out = p @ v / total.masked_fill(total == 0, 1.0)
        return out.transpose(1, 2).bfloat16(), (top + total.log())[..., 0].float()

    def unsupported(x, plan):
        return (
            ["it is asked about a plan that starts anywhere"]
            if (plan.full.start % WIDTH).any()
            else []
        )

    return SimpleNamespace(
        forward=forward, unsupported=unsupported, QUANTIZED_V_LAYOUT=layout, __name__="stand_in"
    )  # fmt: skip


modules = {}


class Native(quantized.Native):
    def load(self):
        return modules[self.module]


def stand_in_for_triton(monkeypatch, module):
    monkeypatch.setitem(modules, module.__name__, module)
    native = Native(module.__name__, "forward", "unsupported", width=WIDTH)
    monkeypatch.setitem(quantized.NATIVE, "triton", native)


@pytest.fixture(params=["channels16", "channels"])
def kernel(request, monkeypatch):
    """`triton` on a machine where it can run, with operands of the prologue in Triton's interpreter."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("Triton is not interpreted; tests/test_precision_gpu.py runs the kernels")
    module = stand_in(request.param)
    stand_in_for_triton(monkeypatch, module)
    quantized._answers.clear()
    yield "triton"
    quantized._answers.clear()


def assert_same(got, want, precision):
    """out and lse of a kernel that writes bf16 and of the emulation in float64: bf16 is off by 0.002. A number
    in between two codes may fall to either side in fp32 and fp64, of 4 bits a long way."""
    coarse = precision.startswith("int4")
    difference = (got[0] - want[0]).abs().sum() / want[0].abs().sum()
    assert difference < (0.03 if coarse else 0.005)
    torch.testing.assert_close(got[1], want[1], atol=0.15 if coarse else 0.02, rtol=0)


@pytest.mark.parametrize("kernel", ["channels16"], indirect=True)
def test_the_largest_float16_survives_a_kernel_that_writes_bfloat16(kernel):
    plan = tiled()
    q, k, v = torch.randn(3, 1, plan.length_q, 2, 32).half()
    v[:] = 65504.0
    out = block_sparse_attention(q, k, v, plan, impl=kernel, precision="int8_fp8")
    assert out.isfinite().all()


@pytest.mark.parametrize(
    ("kernel", "precision", "dtype"),
    [
        ("channels16", "fp8", torch.float16),
        ("channels", "int8_fp8", torch.float16),
        ("channels16", "int8", torch.float32),
        ("channels16", "int8_fp8+smooth_v-smooth_k", torch.float16),
        ("channels16", "int4_fp8+q_warp+k_warp", torch.float16),
        ("channels16", "fp8_model+k_token", torch.float16),
        ("channels16", "int8_fp16+q_block", torch.float32),
        ("channels16", "int8_fp8+smooth_q", torch.float16),
        ("channels16", "int4+smooth_q-smooth_k", torch.float16),
    ],
    indirect=["kernel"],
)
def test_kernels_get_what_the_emulation_shows(kernel, precision, dtype):
    plan = tiled()
    g = torch.Generator().manual_seed(0)
    q = torch.randn(1, plan.length_q, 4, 32, generator=g).to(dtype)
    k, v = torch.randn(2, 1, plan.length_k, 2, 32, generator=g).to(dtype)
    k[..., 0] += 5
    q[..., 1] += 5
    v[..., 1] -= 4
    if "fp16" in precision:
        v[..., 2] *= 1e6  # past the end of float16
    got = block_sparse_attention(q, k, v, plan, impl=kernel, precision=precision, return_lse=True)
    want = block_sparse_attention(
        q, k, v, plan, impl="reference", precision=precision, return_lse=True
    )
    assert got[0].dtype == dtype
    assert not got[0].isnan().any()
    assert_same(got, want, precision)
    if "smooth_v" not in precision:
        alone = block_sparse_attention(q, k, v, plan, impl=kernel, precision=precision)
        assert torch.equal(alone, got[0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/test_precision_gpu.py runs it there")
@pytest.mark.parametrize(
    "precision", ["fp8_model", "int8+k_token", "int8_fp16+q_warp_sm80", "int8+smooth_q"]
)
def test_triton_in_its_interpreter(precision):
    """Of weights in 16 bits: the interpreter loses the carry where it rounds to FP8 (Triton 3.6)."""
    pytest.importorskip("triton")
    plan = tiled()
    q, k, v = torch.randn(3, 1, plan.length_q, 2, 16).half()
    k[..., 0] += 5
    got, want = (
        block_sparse_attention(q, k, v, plan, impl=impl, precision=precision, return_lse=True)
        for impl in ("triton", "reference")
    )
    assert got[0].dtype == torch.float16
    torch.testing.assert_close(got[0], want[0], atol=1e-2, rtol=0)
    torch.testing.assert_close(got[1], want[1], atol=5e-3, rtol=0)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_that_are_not_positive(kernel, scale):
    plan = tiled()
    q, k, v = torch.randn(3, 1, plan.length_q, 2, 16)
    got, want = (
        block_sparse_attention(
            q, k, v, plan, impl=impl, scale=scale, precision="int8_fp8", return_lse=True
        )
        for impl in (kernel, "reference")
    )
    assert_same(got, want, "int8_fp8")


def test_rows_without_keys_stay_zero_when_values_are_smoothed(kernel):
    mask = torch.rand(140, 150) < 0.5
    mask[::7] = False
    plan = compress(mask, block_q=64, block_k=64)
    q, k, v = (torch.randn(1, n, 2, 16) for n in (140, 150, 150))
    out = block_sparse_attention(q, k, v, plan, impl=kernel, precision="int8_fp8+smooth_v")
    assert not out[:, ::7].any()
    assert plan_mask(plan, 1, 1).any()


def test_reasons_of_all_three_parts_are_given(kernel, monkeypatch):
    plan = tiled()
    q, k, v = torch.randn(3, 1, plan.length_q, 2, 16)
    precision = Precision.parse("fp8")
    assert dispatch.unsupported_reasons(kernel, q, k, v, plan, precision) == []
    module = stand_in("channels16")
    stand_in_for_triton(monkeypatch, module)
    quantized._answers.clear()
    module.unsupported = lambda x, plan: [f"head dim {x.q.shape[-1]}", f"dtype {x.q.dtype}"]
    reasons = dispatch.unsupported_reasons(kernel, q, k, v, plan, precision)
    assert reasons == ["head dim 16", "dtype torch.float8_e4m3fn"]
    del module.forward
    quantized._answers.clear()
    assert "no forward for rounded operands" in " ".join(
        dispatch.unsupported_reasons(kernel, q, k, v, plan, precision)
    )
