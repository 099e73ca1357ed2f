"""The FlexAttention implementation against the exact result: eager on a CPU, compiled on a GPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visionfuse.kernels.attention import flex
from visionfuse.kernels.plan.block_plan import BlockPlan
from visionfuse.kernels.plan.compress import compress
from visionfuse.kernels.plan.layout import TokenLayout
from visionfuse.kernels.plan.neighborhood import Neighborhood
from visionfuse.kernels.plan.planner import BlockShape, plan_attention
from visionfuse.testing import check_attention, plan_mask, random_plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def tensors(plan, *, batch=1, heads=1, kv_heads=None, dim=16, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    keys = (batch, plan.length_k, kv_heads or heads, dim)
    shapes = ((batch, plan.length_q, heads, dim), keys, keys)
    return tuple(torch.randn(s, generator=g).to(DEVICE, dtype) for s in shapes)


def check(plan, **options):
    plan = plan.to(DEVICE)
    check_attention(flex.forward, *tensors(plan, **options), plan, 0.3)


@pytest.mark.parametrize("kind", ["intervals", "bits"])
@pytest.mark.parametrize("variants", [1, 2])
def test_random_lists(kind, variants):
    plan = random_plan(
        1, length_q=301, length_k=270, block_q=48, block_k=40, kind=kind, tables=2,
        variants=variants,
    )  # fmt: skip
    check(plan, batch=2, heads=2, kv_heads=1)


def test_rows_and_heads_without_keys():
    mask = torch.rand(2, 2, 37, 45, generator=torch.Generator().manual_seed(0)) < 0.2
    mask[1, 0, 5] = False
    mask[0, 1] = False
    check(compress(mask, block_q=16, block_k=32), batch=2, heads=2)


def test_video_with_text():
    layout = TokenLayout.joint(text=11, grids=[(3, 8, 10)])
    spec = Neighborhood(window=(2, 3, 4), stride=(1, 2, 1), dilation=(1, 1, 2))
    shape = BlockShape(block_q=64, block_k=32, padded=True)
    check(plan_attention(layout, spec, shape=shape).blocks, heads=2)


def test_full_blocks_are_found():
    """Whole blocks of a dense plan carry no mask; those over the end do, they would read past it."""
    plan = compress(torch.ones(300, 256, dtype=torch.bool), block_q=128, block_k=64).to(DEVICE)
    mask = flex.block_mask(plan, 1, 1)
    assert mask.full_kv_num_blocks.flatten().tolist() == [2, 2, 0]
    assert mask.kv_num_blocks.flatten().tolist() == [0, 0, 2]


def test_block_mask_is_cached_by_the_tensors():
    plan = random_plan(2, length_q=40, length_k=40, block_q=16, block_k=16).to(DEVICE)
    mask = flex.block_mask(plan, 1, 2)
    again = BlockPlan.from_tensors(plan.to_tensors(), plan.scalars())
    assert flex.block_mask(again, 1, 2) is mask
    assert flex.block_mask(again, 1, 1) is not mask


def test_mask_mod_is_the_dense_mask():
    plan = random_plan(3, length_q=50, length_k=60, block_q=16, block_k=16, variants=2, axes=3)
    mod = flex.block_mask(plan, 1, 2).mask_mod
    q, k = torch.arange(50)[:, None], torch.arange(60)[None]
    for head in range(2):
        seen = mod(torch.tensor(0), torch.tensor(head), q, k)
        assert torch.equal(seen, plan_mask(plan, 1, 2)[0, head])


def test_unsupported():
    plan = compress(torch.ones(4, 4, dtype=torch.bool))
    q = torch.empty(1, 4, 1, 16, dtype=torch.float8_e4m3fn)
    assert any("float8" in reason for reason in flex.unsupported(q, q, q, plan))
    q = torch.empty(1, 4, 1, 16)
    assert flex.unsupported(q, q, q, plan) == []


@pytest.mark.skipif(DEVICE == "cuda", reason="every draw would be compiled")
@given(data=st.data())
@settings(max_examples=10, deadline=None, derandomize=True)
def test_sweep(data):
    pick = lambda *values: data.draw(st.sampled_from(values))
    plan = random_plan(
        data.draw(st.integers(0, 10**6)), length_q=data.draw(st.integers(1, 300)),
        length_k=data.draw(st.integers(1, 300)), block_q=pick(16, 60, 128), block_k=pick(16, 64),
        kind=pick("intervals", "bits"), full=pick(0.0, 0.4, 1.0), ragged=pick(True, False),
    )  # fmt: skip
    check(plan)
