"""Plans with an order of queries and one of keys: they show what the rule shows, and visit what was counted."""

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
    neighborhood_mask,
    plan_attention,
    plan_blocks,
)
from visionfuse.kernels.plan.build import KeyCells, plan_two_orders
from visionfuse.kernels.plan.halo import best_halo, is_row_major, plan_neighborhood

# As Triton's kernel multiplies on all GPUs; see `kernels/plan/tiles.py`.
SHAPE = BlockShape(block_q=64, block_k=64, padded=True, partial=0.35, ragged=0.1, tile=2048)


def spec_of(draw, grid, dilation):
    window, stride, causal = [], [], []
    for n, d in zip(grid, dilation, strict=True):
        window.append(draw(st.integers(1, n // d)))
        stride.append(draw(st.integers(1, window[-1])))
        causal.append(draw(st.booleans()))
    return Neighborhood(
        window=tuple(window), stride=tuple(stride), dilation=dilation, causal=tuple(causal)
    )


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_two_orders_show_what_the_rule_shows(data):
    draw = data.draw
    grid = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple))
    dilation = tuple(draw(st.integers(1, min(n, 3))) for n in grid)
    rules = []
    for _ in range(draw(st.integers(1, 3))):
        rules.append(spec_of(draw, grid, dilation))
    if draw(st.booleans()):
        rules.append(Dense())
    if draw(st.booleans()):
        rules.append(spec_of(draw, grid, (1,) * len(grid)))
    extra, attends = draw(st.integers(0, 3)), draw(st.booleans())
    others = (Segment("text", (extra,), keys_only=not attends),) if extra else ()
    layout = TokenLayout((Segment("grid", grid), *others))
    side = st.integers(1, 5)
    cells = KeyCells(
        tuple(draw(side) for _ in grid),
        tuple(draw(st.integers(0, 3)) for _ in grid),
        draw(st.integers(0, len(grid) - 1)),
    )
    order = Order(kind="tiled", tile=tuple(draw(side) for _ in grid))
    block_q, block_k = draw(st.sampled_from([8, 32])), draw(st.sampled_from([4, 16]))
    by_head = tuple(draw(st.sampled_from(rules)) for _ in range(4))
    found = plan_two_orders(
        layout, by_head, order=order, cells=cells, block_q=block_q, block_k=block_k
    )
    plan, length = found.blocks, layout.length
    queries, keys = (torch.arange(length) if x is None else x for x in (found.queries, found.keys))
    seen = {}
    for head, rule in enumerate(by_head):
        mask = torch.ones(length, length, dtype=torch.bool)
        if isinstance(rule, Neighborhood):
            mask[: prod(grid), : prod(grid)] = neighborhood_mask(rule.resolve(grid))
        shown = plan.dense_mask(0 if plan.variant is None else int(plan.variant[0, head]))
        expected = mask[queries[: layout.queries]][:, keys]
        assert torch.equal(shown, expected)
        seen[rule] = int(expected.sum())
    assert plan.visible == sum(seen.values())
    assert int(plan.full.count.max() if plan.full.count.numel() else 1) <= block_k
    assert plan.variants == len(set(by_head))


def test_keys_only_segments_end_a_layout():
    with pytest.raises(ValueError, match="must end"):
        TokenLayout((Segment("text", (3,), keys_only=True), Segment("grid", (4, 4))))
    layout = TokenLayout((Segment("grid", (4, 4)), Segment("text", (3,), keys_only=True)))
    assert (layout.queries, layout.length) == (16, 19)
    plan = plan_blocks(layout, Dense(), order=Order(kind="row"), block_q=8, block_k=8).blocks
    assert (plan.length_q, plan.length_k, plan.density) == (16, 19, 1.0)


# Grid, window, and the least share of the multiplied pairs that count: with keys in the order and the tiles of
# the queries, and with cells of their own. 49 of 196 keys, a quarter, is the most for 64 queries and 7x7.
TINY = [
    ((56, 56), 7, 0.10, 0.20),  # ViT, NAT
    ((24, 34, 60), 11, 0.39, 0.48),  # LTX-2's video decoder, and the next two
    ((24, 34, 60), (3, 7, 7), 0.10, 0.23),
    ((24, 34, 60), (3, 5, 5), 0.05, 0.18),
]


def useful_share(plan, block: int = 64 * 64) -> float:
    entries = plan.full.start.numel() + plan.partial.start.numel()
    return plan.visible / (entries * block)


@pytest.mark.parametrize(("grid", "window", "together", "apart"), TINY)
def test_cells_of_keys_raise_the_share_that_counts(grid, window, together, apart):
    layout, spec = TokenLayout.joint(grids=[grid]), Neighborhood(window=window)
    halo = best_halo(spec.resolve(grid), SHAPE)
    plan = plan_two_orders(layout, spec, order=Order(kind="tiled", tile=halo.tile), cells=halo.cells,
                           block_q=64, block_k=64).blocks  # fmt: skip
    assert useful_share(plan) > apart
    same = plan_attention(layout, spec, shape=SHAPE).blocks
    assert together < useful_share(same) < 0.85 * useful_share(plan)
    # The count was that of the lists.
    entries = plan.full.start.numel() + plan.partial.start.numel()
    least = entries * 64 * 64 + SHAPE.tile * plan.tiles
    assert least <= halo.cost <= least + SHAPE.partial * entries * 64 * 64 + 1


@pytest.mark.parametrize(
    ("grid", "window", "moved"),
    [
        ((4096,), 101, False),  # a line is in order
        ((14, 14), 7, False),  # four rows of queries see whole rows of keys
        ((28, 28), 7, False),
        ((24, 34, 60), 11, True),  # large windows are worth the move
        ((64, 64), 32, True),
    ],
)
def test_tokens_move_only_where_it_pays(grid, window, moved):
    spec = Neighborhood(window=window)
    plan = plan_neighborhood(TokenLayout.joint(grids=[grid]), spec, (SHAPE,), torch.device("cpu"))
    assert (plan.queries is not None) is moved


@pytest.mark.parametrize(
    ("tile", "along", "expected"),
    [
        ((1, 1, 4), 2, True), ((1, 5, 7), 1, True), ((1, 5, 7), 2, True), ((1, 2, 7), 1, True),
        ((1, 1, 7), 0, False), ((2, 1, 7), 2, False), ((3, 5, 7), 0, True), ((1, 2, 4), 2, False),
    ],
)  # fmt: skip
def test_what_stays_in_place(tile, along, expected):
    grid = (3, 5, 7)
    spec = Neighborhood(window=3).resolve(grid)
    cells = KeyCells(tile, (0, 0, 0), along)
    line = cells.order(grid, None, None).permutation
    assert torch.equal(line, torch.arange(105)) is expected
    assert is_row_major(spec, tile, along) is expected


@pytest.mark.parametrize(
    ("grid", "dilation"), [((56, 56), 8), ((28, 28), 4), ((14, 14), 2), ((8, 24, 24), (1, 3, 3))]
)
def test_orders_of_dilated_grids_bring_classes_together(grid, dilation):
    """A class is a small grid of its own, and no visited block reaches beyond it."""
    spec = Neighborhood(window=3, dilation=dilation)
    plan = plan_neighborhood(TokenLayout.joint(grids=[grid]), spec, (SHAPE,), torch.device("cpu"))
    classes = prod(spec.resolve(grid).dilation)
    assert plan.blocks.visited_density <= 1.0 / classes + 1e-9
    assert plan.blocks.density / plan.blocks.visited_density > 0.15
