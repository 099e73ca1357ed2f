"""Local attention of Scale-DiT: lists say what the rule says, and cost what the published code costs."""

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visionfuse.kernels.attention import block_sparse_attention
from visionfuse.kernels.order import Order, hilbert_path, order_grid
from visionfuse.kernels.plan import BlockShape, Segment, TokenLayout
from visionfuse.kernels.plan.local import Local, local_bounds, local_mask, local_pairs, relations
from visionfuse.kernels.plan.local_lists import plan_local
from visionfuse.kernels.plan.tiles import block_shapes

WINDOWS = Order(kind="tiled", tile=(16, 16))
SQUARES = Order(kind="tiled", tile=(16, 16), subtile=(8, 8))
HILBERT = Order(kind="hilbert", tile=(16, 16))


def layout_of(grid, coarse=None, text=512, keys_only=False) -> TokenLayout:
    words = (Segment("text", (text,)),) if text else ()
    small = (Segment("guidance", coarse, keys_only=keys_only),) if coarse else ()
    return TokenLayout((*words, Segment("grid", grid), *small))


def rule(layout: TokenLayout, spec: Local) -> torch.Tensor:
    """The rules of the paper and of its code, pair by pair, as a loop."""
    image = next(s.shape for s in layout.segments if s.kind == "grid")
    small = next((s.shape for s in layout.segments if s.kind == "guidance"), image)
    side = spec.window if isinstance(spec.window, tuple) else (spec.window,) * 2
    window = [max(1, round(w * m / n)) for w, m, n in zip(side, small, image, strict=True)]
    tokens = [
        (s.kind, divmod(i, s.shape[1]) if len(s.shape) == 2 else (0, 0))
        for s in layout.segments
        for i in range(s.length)
    ]
    per_row = -(-small[1] // window[1])

    def guided(at, of):
        mine = [x * m // n // w for x, m, n, w in zip(at, small, image, window, strict=True)]
        theirs = [x // w for x, w in zip(of, window, strict=True)]
        if spec.guidance == "linear":
            numbers = [y * per_row + x for y, x in (mine, theirs)]
            return abs(numbers[0] - numbers[1]) <= 1
        return all(abs(a - b) <= 1 for a, b in zip(mine, theirs, strict=True))

    def sees(query, key):
        (what, at), (kind, of) = query, key
        near = [abs(a - b) for a, b in zip(at, of, strict=True)]
        if what == "guidance":
            return kind == what and all(d <= w // 2 for d, w in zip(near, window, strict=True))
        if kind == "guidance":
            return what == "grid" and guided(at, of)
        return "text" in (what, kind) or all(d <= w // 2 for d, w in zip(near, side, strict=True))

    return torch.tensor([[sees(q, k) for k in tokens] for q in tokens[: layout.queries]])


@st.composite
def cases(draw):
    scale = draw(st.sampled_from([2, 3, 4]))
    coarse = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    grid = tuple(n * scale - draw(st.integers(0, min(scale - 1, n * scale - 1))) for n in coarse)
    layout = layout_of(
        grid,
        draw(st.sampled_from([None, coarse])),
        text=draw(st.integers(0, 5)),
        keys_only=draw(st.booleans()),
    )
    window = draw(st.one_of(st.integers(2, 9), st.tuples(st.integers(2, 6), st.integers(2, 6))))
    guidance = draw(st.sampled_from(["windows", "linear"]))
    kind = draw(st.sampled_from(["auto", "row", "tiled", "hilbert"]))
    tile = draw(st.one_of(st.none(), st.tuples(st.integers(1, 6), st.integers(1, 6))))
    order = Order(kind=kind, tile=None if kind in ("auto", "row") else tile)
    shape = BlockShape(
        block_q=draw(st.sampled_from([4, 7, 16])),
        block_k=draw(st.sampled_from([3, 8, 16])),
        padded=draw(st.booleans()),
    )
    return layout, window, guidance, order, shape


def in_model_order(plan, mask: torch.Tensor, queries: int) -> torch.Tensor:
    if plan.permutation is None:
        return mask
    inverse = plan.permutation.argsort()
    return mask[inverse[:queries]][:, inverse]


@given(cases())
@settings(max_examples=60, deadline=None)
def test_the_rule_itself(case):
    layout, window, guidance, order, shape = case
    spec = Local(window=window, guidance=guidance, block=None)
    wanted = rule(layout, spec)
    assert torch.equal(local_mask(layout, spec), wanted)
    plan = plan_local(layout, spec, order, (shape,))
    assert torch.equal(in_model_order(plan, plan.blocks.dense_mask(), layout.queries), wanted)
    assert plan.blocks.visible == local_pairs(layout, spec) == int(wanted.sum())


@given(cases(), st.tuples(st.integers(1, 9), st.integers(1, 9)))
@settings(max_examples=60, deadline=None)
def test_blocks_with_a_visible_pair_are_kept_whole_on_every_tile(case, block):
    layout, window, guidance, order, shape = case
    spec = Local(window=window, guidance=guidance, block=block)
    wanted = local_mask(layout, spec)
    first = plan_local(layout, spec, order, (BlockShape(block_q=64, block_k=64, padded=True),))
    plan = plan_local(layout, spec, order, (shape,))
    kept = plan.blocks.dense_mask()
    assert plan.blocks.partial.start.numel() == 0
    assert torch.equal(kept, first.blocks.dense_mask())
    assert (in_model_order(plan, kept, layout.queries) >= wanted).all()
    assert plan.blocks.visible == int(kept.sum())
    assert block != (1, 1) or torch.equal(kept, in_order(plan, wanted, layout.queries))


def in_order(plan, mask, queries):
    if plan.permutation is None:
        return mask
    return mask[plan.permutation[:queries]][:, plan.permutation]


@given(cases(), st.tuples(st.integers(1, 9), st.integers(1, 9)))
@settings(max_examples=30, deadline=None)
def test_kept_blocks_are_those_of_the_line(case, block):
    """Of the line in windows longer than a block: in every block of it all pairs are kept, or none."""
    layout, window, guidance, _, shape = case
    grid = next(s.shape for s in layout.segments if s.kind == "grid")
    spec = Local(window=window, guidance=guidance, block=block)
    order = Order(kind="tiled", tile=grid)
    plan = plan_local(layout, spec, order, (shape,))
    wanted = in_order(plan, local_mask(layout, spec), layout.queries)
    kept = plan.blocks.dense_mask()
    for i, j in ((i, j) for i in range(len(layout.segments)) for j in range(len(layout.segments))):
        rows = range(layout.offsets[i], min(layout.offsets[i + 1], layout.queries), block[0])
        for q in rows:
            for k in range(layout.offsets[j], layout.offsets[j + 1], block[1]):
                q1, k1 = min(q + block[0], layout.offsets[i + 1]), min(k + block[1], layout.offsets[j + 1])  # fmt: skip
                assert (kept[q:q1, k:k1] == wanted[q:q1, k:k1].any()).all()


# Blocks of the published mask by image size: N = 512 + S^2 + (S / 4)^2 tokens; blocks of (128, 64), (64, 128) and
# (64, 64), and percent of all pairs; then with 8x8 squares inside the windows.
PUBLISHED = {
    64: ((1034, 35.80), (36.77,), (33.35,)),
    128: ((4336, 11.06), (11.38,), (10.22,)),
    256: ((17912, 2.982), (3.067,), (2.737,)),
    384: ((40768, 1.352), (1.390,), (1.238,)),
    512: ((72904, 0.767), (0.789,), (0.702,)),
}
SQUARED = {256: (2.513, 2.597, 2.270)}


@pytest.mark.parametrize(
    "side", [64, 128, 256, *(pytest.param(side, marks=pytest.mark.slow) for side in (384, 512))]
)
def test_the_published_density(side):
    layout = layout_of((side, side), (side // 4, side // 4))
    for block, published in zip([(128, 64), (64, 128), (64, 64)], PUBLISHED[side], strict=True):
        shape = BlockShape(block_q=block[0], block_k=block[1], padded=True)
        spec = Local(block=block, guidance="linear")
        blocks = plan_local(layout, spec, WINDOWS, (shape,)).blocks
        *count, percent = published
        last_digit = 0.01 if side < 256 else 0.001
        assert 100 * blocks.visited_density == pytest.approx(percent, abs=last_digit)
        assert not count or blocks.full.start.numel() == count[0]
        squares = plan_local(layout, spec, SQUARES, (shape,)).blocks
        assert squares.visited_density < 0.95 * blocks.visited_density
        if side in SQUARED:
            at = [(128, 64), (64, 128), (64, 64)].index(block)
            assert round(100 * squares.visited_density, 3) == SQUARED[side][at]


@pytest.mark.slow
def test_the_published_count_of_a_wide_image():
    """8192x16384 pixels, whose count of blocks the notebook of the public code prints."""
    shape = BlockShape(block_q=128, block_k=64, padded=True)
    spec = Local(guidance="linear")
    blocks = plan_local(layout_of((512, 1024), (128, 256)), spec, WINDOWS, (shape,)).blocks
    assert blocks.full.start.numel() == 146728
    assert blocks.visited_density == pytest.approx(146728 / 37949472, rel=1e-6)


@pytest.mark.parametrize("size", [(4096, 2304), (3008, 1984)])
def test_images_of_any_ratio(size):
    """Of some queries of an image of so many pixels: keys are in one entry or none, and all of the rule are."""
    grid = tuple(side // 16 for side in size)
    layout = layout_of(grid, tuple(side // 64 for side in size))
    shape = BlockShape(block_q=192, block_k=128, padded=True)
    for spec, order in ((Local(), Order()), (Local(guidance="linear"), WINDOWS)):
        permutation, blocks = plan_local(layout, spec, order, (shape,))[1:]
        lo, hi, coord = local_bounds(layout, spec)
        for query in torch.linspace(512, layout.length - 1, 40).long().tolist():
            place = int((permutation == query).nonzero())
            tile = int((blocks.q_start <= place).sum()) - 1
            seen = torch.zeros(layout.length, dtype=torch.long)
            for e in range(*blocks.full.offset[tile : tile + 2].tolist()):
                start, count = int(blocks.full.start[e]), int(blocks.full.count[e])
                seen[permutation[start : start + count]] += 1
            assert int(seen.max()) == 1
            mine = next(i for i, end in enumerate(layout.offsets[1:]) if query < end)
            for i, j, table in relations(layout):
                keys = slice(layout.offsets[j], layout.offsets[j + 1])
                if i == mine and table is None:
                    assert seen[keys].all()
                elif i == mine:
                    near = (lo[table][:, query, None] <= coord[:, keys]).all(0)
                    near &= (coord[:, keys] < hi[table][:, query, None]).all(0)
                    assert near.any()
                    assert seen[keys][near].all()


def test_hilbert_order_keeps_what_squares_keep():
    layout = layout_of((64, 64), (16, 16), text=128)
    shape = BlockShape(block_q=128, block_k=64, padded=True)
    counts = {
        order.kind: plan_local(layout, Local(), order, (shape,)).blocks.visited_density
        for order in (SQUARES, HILBERT)
    }
    assert counts["hilbert"] == counts["tiled"]


def test_columns_visit_least():
    """Blocks of 16x8 queries see exactly 32x24 keys, in three runs of two whole entries of 128."""
    layout = layout_of((128, 128), (32, 32))
    shape = BlockShape(block_q=128, block_k=128, padded=True)
    columns, windows = (
        plan_local(layout, Local(), order, (shape,)) for order in (Order(), WINDOWS)
    )
    assert columns.order.tile == (128, 8)
    assert columns.blocks.visited_density < 0.9 * windows.blocks.visited_density
    entries = columns.blocks.full.offset.diff()
    inner = (columns.blocks.q_start - 512) // 1024 % 16 == 8  # a column in the middle
    assert int(entries[inner & (columns.blocks.q_start < 512 + 128**2)].max()) <= 4 + 6 + 4
    whole = (columns.blocks.full.count == 128).float().mean()
    assert whole > 0.8


def test_numbered_windows_are_one_entry():
    """Windows of the guidance that follow one another by number do so in memory: one run of 48 tokens."""
    layout = layout_of((128, 128), (32, 32))
    shape = BlockShape(block_q=128, block_k=128, padded=True)
    blocks = plan_local(layout, Local(guidance="linear"), Order(), (shape,)).blocks
    image = ((blocks.q_start >= 512) & (blocks.q_start < layout.offsets[2]))[blocks.full.rows]
    of_guidance = image & (blocks.full.start >= layout.offsets[2])
    assert int(of_guidance.sum()) == 128**2 // 128


@pytest.mark.parametrize("side", [128, 256])
def test_text_does_not_hold_a_launch_up(side):
    """Its tiles see everything, 40 times as much as others at 4096x4096: of 132 multiprocessors none works longer."""
    pytest.importorskip("triton")
    from visionfuse.kernels.attention.gluon_sm90 import work

    layout = layout_of((side, side), (side // 4, side // 4))
    blocks = plan_local(layout, Local(), Order(), block_shapes("gluon_sm90", 128)).blocks
    entries = blocks.full.offset.diff().long()
    assert int(entries.max()) > side / 12 * float(entries.double().median())
    dealt = work.deal(blocks, 1, 24, 132)
    parts = torch.ones(dealt.item.numel()) if dealt.part is None else dealt.part & 255
    load = (entries[dealt.item.long() % blocks.tiles] / parts + work._TILE_OVERHEAD).double()
    program = torch.repeat_interleave(torch.arange(132), dealt.offset.diff().long())
    loads = torch.zeros(132, dtype=torch.float64).index_add_(0, program, load)
    assert float(loads.max()) < 1.03 * float(loads.mean())


@pytest.mark.parametrize("impl", ["reference", "blocks", "flex"])
@pytest.mark.parametrize("spec", [Local(), Local(guidance="linear"), Local(block=None)])
def test_every_implementation_computes_it(impl, spec):
    if impl == "flex" and not torch.cuda.is_available():
        pytest.skip("flex compiles for minutes on a CPU")
    layout = layout_of((22, 13), (6, 4), text=7)
    shape = BlockShape(block_q=32, block_k=16, padded=True)
    plan = plan_local(layout, spec, Order(), (shape,))
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, layout.length, 2, 16, generator=generator, dtype=torch.float64)
    out = block_sparse_attention(q, k, v, plan.blocks, impl=impl)
    mask = plan.blocks.dense_mask()
    wanted = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask
    ).transpose(1, 2)
    torch.testing.assert_close(out, wanted)


def test_several_images_see_one_another():
    layout = TokenLayout((Segment("text", (3,)), Segment("grid", (6, 4)), Segment("grid", (5, 3))))
    mask = local_mask(layout, Local(window=2))
    assert mask[3:27, 27:].all()
    assert not mask[3:27, 3:27].all()


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ((Segment("text", (3,)),), "takes an image"),
        (
            (Segment("grid", (4, 4)), Segment("grid", (4, 4)), Segment("guidance", (2, 2))),
            "takes an",
        ),
        ((Segment("grid", (4, 4)), Segment("guidance", (2,))), "the same axes"),
    ],
)
def test_layouts_that_do_not_fit(segments, message):
    with pytest.raises(ValueError, match=message):
        plan_local(
            TokenLayout(segments),
            Local(),
            Order(),
            (BlockShape(block_q=8, block_k=8, padded=True),),
        )


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"window": 1}, "at least 2"),
        ({"block": (0, 4)}, "block is"),
        ({"guidance": "all"}, "guidance is"),
    ],
)
def test_bad_rules_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        Local(**bad)


@given(st.integers(1, 24), st.integers(1, 24))
@settings(max_examples=80, deadline=None)
def test_a_hilbert_path_through_any_rectangle(height, width):
    """Every cell once, each step to a neighbour; one diagonal step where the longer side is odd and the other even."""
    path = hilbert_path(height, width)
    assert torch.equal(path.sort().values, torch.arange(height * width))
    steps = torch.stack([path // width, path % width]).diff().abs()
    diagonal = steps.sum(0) > 1
    allowed = max(height, width) % 2 == 1 and min(height, width) % 2 == 0
    assert int(diagonal.sum()) <= allowed
    assert not steps.numel() or int(steps.max()) <= 1


def test_hilbert_windows_of_any_side():
    """Windows of 6x10, and those that the border cuts short, are walked by neighbours."""
    line = order_grid((15, 24), Order(kind="hilbert", tile=(6, 10)))
    for run in line.run_k.unique():
        cells = line.permutation[line.run_k == run]
        steps = torch.stack([cells // 24, cells % 24]).diff().abs()
        assert int((steps.sum(0) > 1).sum()) <= 1
    assert line.permutation.numel() == prod((15, 24))
