"""Block lists say exactly what the rule says, for every order, tile and grid."""

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visionfuse.kernels.order import Order
from visionfuse.kernels.plan import (
    BlockShape,
    Dense,
    Neighborhood,
    Segment,
    TokenLayout,
    compress,
    neighborhood_mask,
    plan_attention,
)
from visionfuse.kernels.plan.planner import block_shapes, tile_costs


def rule_mask(layout: TokenLayout, spec) -> torch.Tensor:
    """Pair by pair in the model's order: grids see their neighborhood, everything else sees all."""
    mask = torch.ones(layout.length, layout.length, dtype=torch.bool)
    for part, start in zip(layout.segments, layout.offsets, strict=False):
        if part.kind == "grid" and isinstance(spec, Neighborhood):
            own = slice(start, start + part.length)
            mask[own, own] = neighborhood_mask(spec.resolve(part.shape))
    return mask


def in_plan_order(mask, plan):
    return mask if plan.permutation is None else mask[plan.permutation][:, plan.permutation]


@st.composite
def neighborhoods(draw, max_side=(40, 13, 7)):
    rank = draw(st.integers(1, 3))
    grid, window, stride, dilation, causal = [], [], [], [], []
    for _ in range(rank):
        n = draw(st.integers(1, max_side[rank - 1]))
        d = draw(st.integers(1, min(n, 3)))
        w = draw(st.integers(1, n // d))
        grid.append(n)
        dilation.append(d)
        window.append(w)
        stride.append(draw(st.integers(1, w)))
        causal.append(draw(st.booleans()))
    spec = Neighborhood(
        window=tuple(window), stride=tuple(stride), dilation=tuple(dilation), causal=tuple(causal)
    )
    return tuple(grid), spec


@given(
    neighborhoods(),
    st.sampled_from(["auto", "row", "tiled", "hilbert"]),
    st.integers(0, 5),
    st.booleans(),
    st.data(),
)
@settings(max_examples=150, deadline=None)
def test_lists_equal_the_rule(case, kind, text, text_first, data):
    grid, spec = case
    tile = None
    if kind == "tiled":
        tile = data.draw(st.tuples(*[st.integers(1, 6) for _ in grid]))
    layout = TokenLayout.joint(text=text, grids=[grid], text_first=text_first)
    shape = BlockShape(
        block_q=data.draw(st.sampled_from([5, 8, 32])),
        block_k=data.draw(st.sampled_from([3, 8, 16])),
        padded=data.draw(st.booleans()),
    )
    plan = plan_attention(layout, spec, order=Order(kind=kind, tile=tile), shape=shape)
    expected = in_plan_order(rule_mask(layout, spec), plan)
    assert torch.equal(plan.blocks.dense_mask(), expected)
    assert plan.blocks.visible == int(expected.sum())
    check_lists(plan.blocks)


def check_lists(plan):
    """Tiles cover the queries once; no entry is longer than a block, out of range, or listed twice."""
    covered = torch.zeros(plan.length_q, dtype=torch.long)
    for start, count in zip(plan.q_start.tolist(), plan.q_count.tolist(), strict=True):
        assert 1 <= count <= plan.block_q
        covered[start : start + count] += 1
    assert (covered == 1).all()
    full, partial = plan.full.offset.tolist(), plan.partial.offset.tolist()
    for row in range(plan.variants * plan.tiles):
        seen = torch.zeros(plan.length_k, dtype=torch.long)
        for entries, offset in ((plan.full, full), (plan.partial, partial)):
            for e in range(offset[row], offset[row + 1]):
                start, count = int(entries.start[e]), int(entries.count[e])
                assert 1 <= count <= plan.block_k
                assert start + count <= plan.length_k
                seen[start : start + count] += 1
        assert seen.max() <= 1


def test_several_grids_see_each_other_whole():
    layout = TokenLayout.joint(text=3, grids=[(6, 8), (4, 5)])
    spec = Neighborhood(window=3)
    shape = BlockShape(block_q=8, block_k=8, padded=True)
    plan = plan_attention(layout, spec, order=Order(kind="tiled", tile=(3, 2)), shape=shape)
    assert torch.equal(plan.blocks.dense_mask(), in_plan_order(rule_mask(layout, spec), plan))
    moved = plan.permutation
    assert torch.equal(moved[:3], torch.arange(3))
    assert moved[3:51].min() == 3
    assert moved[3:51].max() == 50


@pytest.mark.parametrize(
    ("grid", "window", "stride"),
    [((21, 45, 80), (12, 24, 24), 1), ((21, 30, 52), (12, 16, 16), (4, 8, 8)), ((64, 64), 32, 1)],
)
@pytest.mark.parametrize("impl", ["triton", "blocks"])
def test_counted_work_is_the_work_of_the_plan(grid, window, stride, impl):
    """The planner's separable counts agree with the lists that are then built."""
    spec = Neighborhood(window=window, stride=stride)
    shape = block_shapes(impl, 128)[0]
    only_pairs = BlockShape(block_q=shape.block_q, block_k=shape.block_k, padded=False)
    cost, tile, subtile = min(tile_costs(spec.resolve(grid), only_pairs))
    plan = plan_attention(
        TokenLayout.joint(grids=[grid]),
        spec,
        order=Order(kind="tiled", tile=tile, subtile=subtile),
        shape=only_pairs,
    )
    assert cost == pytest.approx(plan.blocks.visited_density * prod(grid) ** 2)


def test_planner_leaves_no_ragged_tiles_on_wan_grids():
    """21x45x80 = 7x9x10 tiles of 3x5x8: 94% of every 128-row tile is real; 4x4x8 would waste a fifth."""
    plan = plan_attention(
        TokenLayout.joint(grids=[(21, 45, 80)]), Neighborhood(window=(12, 24, 24)), impl="triton"
    )
    assert 75600 / (plan.blocks.tiles * plan.blocks.block_q) > 0.9


def test_dense_plan_is_all_full():
    plan = plan_attention(TokenLayout.joint(text=5, grids=[(6, 7)]), Dense()).blocks
    assert plan.density == plan.visited_density == plan.full_share == 1.0
    assert plan.mask is None


def test_plans_are_cached_and_follow_the_device():
    layout, spec = TokenLayout.joint(grids=[(8, 8)]), Neighborhood(window=5)
    assert plan_attention(layout, spec) is plan_attention(layout, spec)
    moved = plan_attention(layout, spec).blocks.to("cpu")
    assert torch.equal(moved.dense_mask(), plan_attention(layout, spec).blocks.dense_mask())


@given(st.integers(1, 40), st.integers(1, 70), st.data())
@settings(max_examples=60, deadline=None)
def test_compress_keeps_every_bit(sq, sk, data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    lead = data.draw(st.sampled_from([(), (3,), (2, 3), (2, 1), (1, 1)]))
    mask = torch.rand(*lead, sq, sk, generator=generator) < data.draw(st.sampled_from([0.02, 0.7]))
    if data.draw(st.booleans()):
        mask[..., : sq // 2, :] = True
    plan = compress(mask, block_q=8, block_k=data.draw(st.sampled_from([7, 32, 40])))
    flat = mask.reshape(-1, sq, sk)
    for variant in range(plan.variants):
        assert torch.equal(plan.dense_mask(variant), flat[variant])
    assert plan.visible == int(mask.sum())
    check_lists(plan)


def test_compress_keeps_a_shared_mask_once():
    mask = (torch.rand(20, 20) < 0.5).expand(2, 4, 20, 20)
    assert compress(mask).variants == 1


def test_density_follows_the_grid():
    for grid in [(64, 64), (128, 96), (21, 30, 52)]:
        spec = Neighborhood(density=0.3, stride=4).resolve(grid)
        assert spec.density == pytest.approx(0.3, rel=0.1)
        assert all(w % 4 == 0 or w == n for w, n in zip(spec.window, grid, strict=True))


@settings(deadline=None)  # how long a search takes depends on what else runs
@given(
    density=st.floats(0.1, 1.0),
    grid=st.sampled_from(
        [(64, 64), (32, 32), (256, 256), (45, 80), (21, 30, 52), (16, 45, 80), (500,)]
    ),
    dilation=st.sampled_from([1, 2]),
)
def test_density_is_met_within_a_quarter(density, grid, dilation):
    spec = Neighborhood(density=density, stride=None, dilation=dilation).resolve(grid)
    reachable = min(density, prod(n // dilation / n for n in grid))
    assert spec.density == pytest.approx(reachable, rel=0.26)
    for window, stride, n in zip(spec.window, spec.stride, grid, strict=True):
        assert window % stride == 0 or window == n // dilation


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"window": 9}, "does not fit on axis 0"),
        ({"window": (4, 4, 4)}, "has 3 values"),
        ({"window": 4, "stride": 5}, "stride is larger"),
        ({"window": 4, "dilation": 3}, "does not fit"),
        ({"window": 0}, "at least 1"),
    ],
)
def test_windows_that_do_not_fit_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        Neighborhood(**spec).resolve((8, 8))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({}, "either window"),
        ({"window": 3, "density": 0.5}, "either"),
        ({"density": 0.0}, "lie in"),
    ],
)
def test_neighborhood_needs_one_of_window_and_density(spec, message):
    with pytest.raises(ValueError, match=message):
        Neighborhood(**spec)


def test_segments_are_checked():
    with pytest.raises(ValueError, match="at least one token"):
        Segment("grid", (4, 0))
    with pytest.raises(ValueError, match="one axis"):
        Segment("text", (4, 4))


def test_compress_refuses_additive_masks():
    with pytest.raises(ValueError, match="bool mask"):
        compress(torch.zeros(4, 4))
