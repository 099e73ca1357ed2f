"""The Hopper kernel in 16 bits, where there is a Hopper GPU, and the host's side of it anywhere."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from visionfuse.kernels.order import Order
from visionfuse.kernels.plan import (
    Dense,
    Neighborhood,
    TokenLayout,
    plan_attention,
)
from visionfuse.kernels.plan.block_plan import BitMask
from visionfuse.testing import check_attention, group_plan, random_plan

hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="needs a Hopper GPU",
)


def check(
    plan,
    *,
    batch=1,
    heads=2,
    kv_heads=None,
    dim=128,
    dtype=torch.bfloat16,
    scale=None,
    biased=False,
):
    from visionfuse.kernels.attention import BlockBias, gluon_sm90

    plan = plan.to("cuda")
    g = torch.Generator("cuda").manual_seed(0)
    q = torch.randn(batch, plan.length_q, heads, dim, generator=g, device="cuda", dtype=dtype)
    k, v = (
        torch.randn(
            batch, plan.length_k, kv_heads or heads, dim, generator=g, device="cuda", dtype=dtype
        )
        for _ in range(2)
    )
    assert not gluon_sm90.unsupported(q, k, v, plan)
    bias = None
    if biased:
        rows = torch.randn(batch, heads, plan.tiles, plan.length_k, generator=g, device="cuda")
        bias = BlockBias(3 * rows)
    check_attention(gluon_sm90.forward, q, k, v, plan, scale or dim**-0.5, bias)


def planned(grid, text=0, **spec):
    rule = Neighborhood(**spec) if spec else Dense()
    layout = TokenLayout.joint(text=text, grids=[grid])
    return plan_attention(layout, rule, impl="gluon_sm90", head_dim=128).blocks


# A kernel takes seconds to compile: every length has both head dims and both dtypes, not all four combinations.
@hopper
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("length", "flip"), [(128, 0), (384, 1), (1000, 0), (1, 1)])
def test_dense(length, flip, dim):
    dtype = (torch.bfloat16, torch.float16)[(dim == 128) ^ flip]
    check(planned((length,)), dim=dim, dtype=dtype, batch=2)


@hopper
@pytest.mark.parametrize(
    ("grid", "text", "dim", "spec"),
    [
        ((64, 48), 77, 64, {"window": (24, 16), "stride": 8}),
        ((37, 29), 5, 128, {"window": 9}),
        ((9, 20, 22), 0, 64, {"window": (4, 8, 8)}),
        (
            (9, 20, 22),
            3,
            128,
            {"window": (3, 8, 8), "stride": (1, 4, 4), "causal": (True, False, False)},
        ),
        ((2000,), 0, 64, {"window": 300, "dilation": 3}),
    ],
    ids=str,
)
def test_neighborhoods(grid, text, dim, spec):
    check(planned(grid, text, **spec), dim=dim)


@hopper
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("ragged", [False, True])
def test_random_lists(seed, ragged):
    plan = random_plan(
        seed, length_q=700, length_k=900, block_q=192 if seed % 3 else 128, block_k=128, ragged=ragged,
        axes=1 + seed % 3, tables=1 + seed % 2,
    )  # fmt: skip
    check(plan, batch=2, heads=4, kv_heads=2, dim=64 if seed % 2 else 128)


@hopper
@pytest.mark.parametrize("block_k", [128, 48])
@pytest.mark.parametrize("block_q", [192, 100])
def test_bits(block_q, block_k):
    check(
        random_plan(
            block_q, length_q=500, length_k=600, block_q=block_q, block_k=block_k, kind="bits"
        )
    )


@hopper
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("bounded", [False, True])
def test_consumers_pass_by_what_they_do_not_see(mixed, dim, bounded, monkeypatch):
    from visionfuse.kernels.attention.gluon_sm90 import score_bound

    monkeypatch.setattr(score_bound, "pays", lambda plan: bounded)
    for seed in range(3):
        check(group_plan(seed, mixed), dim=dim, heads=4, kv_heads=2)


@hopper
@pytest.mark.parametrize("dim", [8, 36, 40, 72, 80, 96, 160, 256])
def test_head_dims(dim):
    plan = random_plan(
        1, length_q=300, length_k=400, block_q=192 if dim <= 128 else 128, block_k=128
    )
    check(plan, batch=2, heads=2, kv_heads=1, dim=dim)


@hopper
def test_variants_of_heads():
    plan = random_plan(6, length_q=300, length_k=300, block_q=192, block_k=128, variants=4)
    for shape in ((2, 1), (1, 2), (2, 2)):
        variant = torch.arange(shape[0] * shape[1], dtype=torch.int32).view(shape) * 3 % 4
        check(replace(plan, variant=variant), batch=2, heads=2, kv_heads=1)


@hopper
def test_reads_fused_projections_and_repeats_exactly():
    from visionfuse.kernels.attention import gluon_sm90

    plan = planned((40, 40), 16, window=16, stride=4).to("cuda")
    qkv = torch.randn(2, plan.length_q, 3, 4, 128, device="cuda", dtype=torch.bfloat16)
    q, k, v = qkv.unbind(2)
    first = gluon_sm90.forward(q, k, v, plan, 0.1, False)[0]
    again = gluon_sm90.forward(*(x.contiguous() for x in (q, k, v)), plan, 0.1, False)[0]
    assert torch.equal(first, again)


@hopper
def test_captured_in_a_graph_on_a_side_stream():
    from visionfuse.kernels.attention import block_sparse_attention

    plan = planned((48, 48), 16, window=16, stride=8).to("cuda")
    q, k, v = torch.randn(3, 1, plan.length_q, 4, 128, device="cuda", dtype=torch.bfloat16)
    expected = block_sparse_attention(q, k, v, plan, impl="gluon_sm90")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = block_sparse_attention(q, k, v, plan, impl="gluon_sm90")
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


@hopper
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("kind", ["intervals", "bits"])
@pytest.mark.parametrize(
    "length_k", [896, 901]
)  # rows of 901 numbers are copied: TMA wants 16 bytes
def test_a_row_added_to_the_scores_of_a_tile(dim, kind, length_k):
    plan = random_plan(
        2, length_q=700, length_k=length_k, block_q=128 if dim > 128 else 192, block_k=128, kind=kind,
        ragged=False,
    )  # fmt: skip
    check(plan, batch=2, heads=4, kv_heads=2, dim=dim, biased=True)


@hopper
def test_rows_are_read_from_multiples_of_four():
    plan = random_plan(2, length_q=300, length_k=400, block_q=192, block_k=128)
    with pytest.raises(ValueError, match="multiples of 4"):
        check(plan, biased=True)


# Without a GPU -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bits", "intervals"])
@pytest.mark.parametrize("block_k", [128, 64, 48])
def test_bits_of_any_mask(kind, block_k):
    pytest.importorskip("triton")
    from visionfuse.kernels.attention.gluon_sm90.mask import (
        COLUMNS,
        EMPTY,
        KIND_SHIFT,
        MIXED,
        WHOLE,
        masks_of,
    )

    plan = random_plan(
        3, length_q=700, length_k=900, block_q=192, block_k=block_k, kind=kind, axes=3, tables=2,
        variants=2,
    )  # fmt: skip
    masks, column = masks_of(plan), torch.arange(COLUMNS)
    bits = masks.bits[masks.entries & (1 << KIND_SHIFT) - 1]
    thread, bit = column // 2 % 4, column // 8 * 2 + column % 2
    seen = (bits[..., thread] >> bit) & 1 == 1
    for group in range(3):
        kind = masks.entries >> (KIND_SHIFT + 2 * group) & 3
        rows = seen[:, 64 * group : 64 * group + 64].flatten(1)
        expected = torch.where(rows.all(1), WHOLE, torch.where(rows.any(1), MIXED, EMPTY))
        assert torch.equal(kind, expected.int())
    offset = plan.partial.offset.tolist()
    for row, (first, last) in enumerate(pairwise(offset)):
        if first == last:
            continue
        tile = row % plan.tiles
        expected = plan.partial_mask(slice(first, last), tile)
        got = seen[first:last, : int(plan.q_count[tile])]
        assert torch.equal(got[..., :block_k], expected)
        assert not got[..., block_k:].any()


def test_equal_masks_are_kept_once():
    pytest.importorskip("triton")
    from visionfuse.kernels.attention.gluon_sm90.mask import masks_of

    plan = plan_attention(
        TokenLayout.joint(grids=[(12, 24, 32)]), Neighborhood(window=(4, 8, 8)),
        order=Order(kind="tiled", tile=(4, 6, 8)), impl="gluon_sm90", head_dim=128,
    ).blocks  # fmt: skip
    bits, mask, *_ = masks_of(plan)
    assert bits.shape[0] == mask.unique().numel() == bits.unique(dim=0).shape[0] < mask.numel() / 4


@pytest.mark.parametrize("mixed", [False, True])
def test_masks_know_what_a_consumer_passes_by(mixed):
    pytest.importorskip("triton")
    from visionfuse.kernels.attention.gluon_sm90.mask import masks_of

    assert masks_of(group_plan(0, mixed))[2:] == (True, mixed)


@pytest.mark.parametrize(("batch", "heads", "programs"), [(1, 1, 4), (2, 3, 7), (3, 2, 500)])
def test_every_tile_is_dealt_once(batch, heads, programs):
    pytest.importorskip("triton")
    from visionfuse.kernels.attention.gluon_sm90.work import _items, deal

    plan = random_plan(4, length_q=900, length_k=900, block_q=64, block_k=64, variants=heads)
    offset, items, *_ = deal(plan, batch, heads, programs)
    assert (offset[0], offset[-1], offset.diff().min() >= 0) == (0, items.numel(), True)
    bh = torch.arange(batch * heads)[:, None]
    expected = (bh * plan.variants + bh % heads) * plan.tiles + torch.arange(plan.tiles)
    assert torch.equal(items.sort().values, expected.flatten().int())
    all_items, cost, _ = _items(plan, batch, heads)
    cost_of = dict(zip(all_items.tolist(), cost.tolist(), strict=True))
    loads = [sum(cost_of[i] for i in items[a:b].tolist()) for a, b in pairwise(offset.tolist())]
    assert max(loads) <= sum(loads) / programs + max(cost_of.values())


def test_what_consumers_pass_by_costs_nothing():
    pytest.importorskip("triton")
    from visionfuse.kernels.attention.gluon_sm90.work import _TILE_OVERHEAD, _items

    plan = group_plan(0, mixed=False)
    assert isinstance(plan.mask, BitMask)
    seen = plan.mask.bits.unflatten(1, (3, 64)).any(-1).any(-1).double().mean(1)  # [entries]
    entries = plan.full.offset.diff().double().index_add(0, plan.partial.rows, seen)
    consumers = -(-plan.q_count // 64)
    assert (
        consumers.unique().numel() > 1
    )  # of three, those of a short tile take more than their share
    torch.testing.assert_close(
        _items(plan, 1, 1)[1], entries * (consumers + 1) / 4 + _TILE_OVERHEAD
    )
