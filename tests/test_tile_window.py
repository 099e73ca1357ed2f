"""Tile windows: plans show what the rule says, in whole blocks, on any grid; and what the papers say of theirs."""

from itertools import product
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visionfuse.kernels.attention import block_sparse_attention
from visionfuse.kernels.order import Order
from visionfuse.kernels.plan import (
    BlockShape,
    Neighborhood,
    TileWindow,
    TokenLayout,
    neighborhood_mask,
    plan_attention,
)
from visionfuse.kernels.plan.keys import hide_keys
from visionfuse.kernels.plan.tile_window import default_tile, window_cost

CANVASES = {
    "HunyuanVideo": (30, 48, 80),
    "Step-Video": (36, 48, 48),
    "Wan, 69 frames": (18, 48, 80),
}
WAN_720P, WAN_480P = (21, 45, 80), (21, 30, 52)


def brute_force(grid, tile, window):
    """The rule pair by pair, bool [S, S] in row-major order."""
    coordinates = list(product(*map(range, grid)))
    mask = torch.zeros(len(coordinates), len(coordinates), dtype=torch.bool)
    for i, query in enumerate(coordinates):
        for j, key in enumerate(coordinates):
            mask[i, j] = all(
                0 <= y // t - min(max(x // t - k // 2, 0), -(-n // t) - k) < k
                for x, y, n, t, k in zip(query, key, grid, tile, window, strict=True)
            )
    return mask


@st.composite
def grids(draw):
    grid = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple))
    tile = tuple(draw(st.integers(1, n)) for n in grid)
    return grid, tile


def window_of(draw, grid, tile):
    return tuple(draw(st.integers(1, -(-n // t))) for n, t in zip(grid, tile, strict=True))


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_a_plan_shows_what_the_rule_says_in_whole_blocks(data):
    grid, tile = data.draw(grids())
    windows = [window_of(data.draw, grid, tile) for _ in range(data.draw(st.integers(1, 3)))]
    heads = tuple(data.draw(st.sampled_from(windows)) for _ in range(3))
    text, text_first = data.draw(st.integers(0, 3)), data.draw(st.booleans())
    layout = TokenLayout.joint(text=text, grids=[grid], text_first=text_first)
    shape = BlockShape(block_q=data.draw(st.sampled_from([4, 8])), block_k=4, padded=True)
    plan = plan_attention(layout, TileWindow(heads=heads, tile=tile), shape=shape)
    moved = torch.arange(layout.length) if plan.permutation is None else plan.permutation
    first = text if text_first else 0
    own = slice(first, first + prod(grid))
    shown = 0
    for head, window in enumerate(heads):
        expected = torch.ones(layout.length, layout.length, dtype=torch.bool)
        expected[own, own] = brute_force(grid, tile, window)
        variant = 0 if plan.blocks.variant is None else int(plan.blocks.variant[0, head])
        assert torch.equal(plan.blocks.dense_mask(variant), expected[moved][:, moved])
        shown += int(expected.sum())
    assert plan.blocks.partial.start.numel() == 0
    assert plan.blocks.visited_density == pytest.approx(shown / len(heads) / layout.length**2)
    if any(not TileWindow(window=window, tile=tile).resolve(grid).is_dense for window in heads):
        assert plan.tile == tile


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_the_planner_counts_what_plans_hold(data):
    grid, tile = data.draw(grids())
    spec = TileWindow(window=window_of(data.draw, grid, tile), tile=tile)
    text = data.draw(st.integers(0, 5))
    shape = BlockShape(block_q=8, block_k=4, padded=True, entry=3, tile=5, gather=0.5)
    plan = plan_attention(
        TokenLayout.joint(text=text, grids=[grid]), spec, order=Order(tile=tile), shape=shape
    ).blocks
    own = plan.q_start >= text
    entries = plan.full.offset.diff()
    keys = torch.zeros(plan.tiles).index_add_(0, plan.full.rows, plan.full.count.float())
    expected = (entries * (shape.block_q * shape.block_k + 3) + 5)[own].sum()
    expected = float(expected + 0.5 * keys[own].sum())
    assert window_cost(spec.resolve(grid), shape, others=text) == expected


@pytest.mark.parametrize(
    ("grid", "tile", "window"), [((4, 6, 6), (2, 3, 2), (1, 1, 3)), ((6, 8), (2, 2), (3, 3)), ((12,), (3,), (3,))]
)  # fmt: skip
def test_where_tiles_divide_the_grid_it_is_a_neighborhood_that_moves_by_tiles(grid, tile, window):
    tokens = tuple(k * t for k, t in zip(window, tile, strict=True))
    same = Neighborhood(window=tokens, stride=tile).resolve(grid)
    found = TileWindow(window=window, tile=tile).resolve(grid)
    assert torch.equal(neighborhood_mask(found), neighborhood_mask(same))


@pytest.mark.parametrize(
    ("grid", "window", "sparsity"),
    [  # STA's tables: windows 18x24x24 and 30x40x40 of HunyuanVideo's canvas
        (CANVASES["HunyuanVideo"], (3, 3, 3), 0.91),
        (CANVASES["HunyuanVideo"], (5, 5, 5), 0.5833),
        (CANVASES["HunyuanVideo"], (5, 6, 10), 0.0),
        (CANVASES["Step-Video"], (3, 3, 3), 0.875),
        (CANVASES["Wan, 69 frames"], (3, 3, 3), 0.85),
    ],
)
def test_densities_of_the_paper(grid, window, sparsity):
    found = TileWindow(window=window, tile=(6, 8, 8)).resolve(grid)
    assert 1 - found.density == pytest.approx(sparsity, abs=1e-4)
    assert found.window == tuple(6 * k if a == 0 else 8 * k for a, k in enumerate(window))


@pytest.mark.parametrize("grid", CANVASES.values(), ids=CANVASES)
def test_the_tile_of_the_paper_is_found(grid):
    assert default_tile(grid) == (6, 8, 8)


@pytest.mark.parametrize("grid", [WAN_720P, WAN_480P, (31, 22, 40), *CANVASES.values(), (128, 128)])
@pytest.mark.parametrize("density", [0.09, 0.3, 0.5])
def test_a_density_is_met_and_no_axis_is_cut_off(grid, density):
    found = TileWindow(density=density).resolve(grid)
    assert density / 1.25 <= found.density <= density * 1.25
    tiles = [-(-n // t) for n, t in zip(grid, found.tile, strict=True)]
    assert all(k >= min(2, m) for k, m in zip(found.tiles, tiles, strict=True))
    assert TileWindow(density=1).resolve(grid).is_dense


@pytest.mark.parametrize("grid", [WAN_720P, WAN_480P])
def test_grids_that_tiles_do_not_divide_lose_little(grid):
    """Work of the Hopper kernel's blocks over the visible pairs: the paper's tile loses a tenth and more."""
    shape = BlockShape(block_q=192, block_k=128, padded=True)
    ours, papers = TileWindow(density=0.09), TileWindow(density=0.09, tile=(6, 8, 8))
    loss = [window_cost(x.resolve(grid), shape) / x.resolve(grid).visible for x in (ours, papers)]
    assert loss[0] < 1.06
    assert loss[1] > 1.1


def test_windows_larger_than_the_grid_take_the_whole_axis():
    """As on the canvases of the paper, whose 6x6x1 has more rows of tiles than a smaller grid."""
    found = TileWindow(window=(6, 6, 1), tile=(6, 8, 8)).resolve(WAN_720P)
    assert found.tiles == (4, 6, 1)
    assert TileWindow(window=(None, None, 1), tile=(6, 8, 8)).resolve(WAN_720P) == found
    assert TileWindow(window=2, tile=64).resolve((8, 16)).is_dense


def test_heads_have_windows_of_their_own():
    spec = TileWindow(heads=((1, 1, 3), (3, 1, 1)), tile=(2, 2, 2))
    grid = (6, 4, 6)
    plan = plan_attention(TokenLayout.joint(text=5, grids=[grid]), spec)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 5 + prod(grid), 2, 16, generator=generator) for _ in range(3))
    moved = [x[:, plan.permutation] for x in (q, k, v)]
    out = block_sparse_attention(*moved, plan.blocks, impl="blocks")[:, plan.inverse]
    for head, window in enumerate(spec.heads):
        mask = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool)
        mask[5:, 5:] = brute_force(grid, spec.tile, window)
        expected = torch.nn.functional.scaled_dot_product_attention(
            *(x[:, :, head] for x in (q, k, v)), mask
        )
        torch.testing.assert_close(out[:, :, head], expected)


def test_padding_is_hidden_from_heads_with_windows_of_their_own():
    spec = TileWindow(heads=((1, 1), (2, 3)), tile=(2, 2))
    layout = TokenLayout.joint(text=6, grids=[(4, 6)], text_first=False)
    plan = plan_attention(layout, spec).blocks
    valid = (28, 24)  # of 30 keys, by batch entry
    hidden = hide_keys(plan, tuple(((0, n),) for n in valid))
    assert hidden.variant is not None
    assert hidden.variant.shape == (2, 2)
    total = 0
    for entry, head in product(range(2), range(2)):
        expected = plan.dense_mask(head)
        expected[:, valid[entry] :] = False
        assert torch.equal(hidden.dense_mask(int(hidden.variant[entry, head])), expected)
        total += int(expected.sum())
    assert hidden.visible == total


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "needs one of window"),
        ({"window": 3, "density": 0.5}, "needs one of window"),
        ({"density": 1.5}, "density must lie in"),
        ({"window": (0, 1)}, "at least 1"),
        ({"window": 3, "tile": (2.5, 1)}, "whole numbers"),
    ],
)
def test_wrong_values(options, said):
    with pytest.raises(ValueError, match=said):
        TileWindow(**options)


def test_values_that_do_not_fit_a_grid():
    with pytest.raises(ValueError, match="3 values, but the grid"):
        TileWindow(window=(1, 2, 3), tile=4).resolve((8, 8))
    with pytest.raises(ValueError, match="2 values, but the grid"):
        TileWindow(window=3, tile=(4, 4)).resolve((8, 8, 8))
    with pytest.raises(ValueError, match="1 to 3 axes"):
        TileWindow(window=3).resolve((2, 2, 2, 2))
