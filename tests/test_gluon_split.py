"""Tiles of the Hopper kernel in parts: how many, dealt to whom, and put together."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from visionfuse.bench.block_lists import all_keys, block_list
from visionfuse.kernels.attention.gluon_sm90 import split as split
from visionfuse.kernels.attention.gluon_sm90 import work as work
from visionfuse.testing import check_attention

hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="needs a Hopper GPU",
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def in_parts(monkeypatch):
    monkeypatch.setattr(work, "MOST_PARTS", 8)


def parts_of(blocks: list[int], programs: int, whole: bool = True) -> list[int]:
    cost = torch.tensor(blocks) + work._TILE_OVERHEAD
    return work._parts(cost, torch.full_like(cost, whole, dtype=torch.bool), programs).tolist()


def test_the_last_round_of_flux_1k_is_filled(in_parts):
    parts = parts_of([36] * 24 * 24, 132)
    assert parts == [1] * 528 + [5] * 48


@pytest.mark.parametrize("items", [132, 24 * 88, 130, 12 * 394])
def test_full_rounds_stay_whole(items, in_parts):
    assert set(parts_of([62] * items, 132)) == {1}


def test_short_launches_stay_whole(in_parts):
    assert set(parts_of([8] * 6, 132)) == {1}


def test_text_that_sees_everything_does_not_hold_a_launch_up(in_parts):
    """One head of Scale-DiT at 4096 x 4096: three tiles of text visit all blocks, 366 tiles a few."""
    blocks = [548] * 3 + [30] * 366
    parts = parts_of(blocks, 132)
    assert parts[0] > 1
    assert set(parts[3:]) == {1}
    cost = torch.tensor(blocks) + work._TILE_OVERHEAD
    alone = work._schedule(cost, torch.ones_like(cost), 132)[1]
    assert work._schedule(cost, torch.tensor(parts), 132)[1] < 0.5 * alone


def test_what_has_masks_stays_whole(in_parts):
    assert set(parts_of([548] * 3 + [30] * 366, 132, whole=False)) == {1}


@given(
    st.integers(1, 5), st.integers(1, 40), st.integers(1, 3000), st.integers(1, 140), st.booleans()
)
def test_every_tile_is_dealt_once(heads, tiles, keys, programs, uneven):
    def first_tile_sees_all(tile: int, tiles: int, blocks: int) -> range:
        return range(1 if tile else blocks)

    plan = block_list(tiles * 192, keys, 192, first_tile_sees_all if uneven else all_keys)
    before, work.MOST_PARTS = work.MOST_PARTS, 8
    try:
        dealt = work.deal(plan, 2, heads, programs)
    finally:
        work.MOST_PARTS = before
    assert dealt.offset[0] == 0
    assert dealt.offset[-1] == dealt.item.numel()
    assert (dealt.offset.diff() >= 0).all()
    code = torch.ones_like(dealt.item) if dealt.part is None else dealt.part
    parts, part, slot = code & 255, code >> 8 & 255, code >> 16
    share = torch.zeros(2 * heads * tiles, dtype=torch.float64)
    share.index_add_(0, dealt.item.long(), 1 / parts.double())
    assert torch.allclose(share, torch.ones_like(share))
    assert (part < parts).all()
    if dealt.split is not None:
        some = parts > 1
        assert torch.equal(slot[some].sort().values, torch.arange(dealt.slots).int())
        first = {item: (begin, n) for item, begin, n in dealt.split.tolist()}
        for item, n, i, at in zip(
            *(x[some].tolist() for x in (dealt.item, parts, part, slot)), strict=True
        ):
            assert first[item] == (at - i, n)


def test_combine():
    """Of three, two and four parts, one of them without keys for some rows; rows past the end of the tile."""
    plan = block_list(400, 900, 192, all_keys).to(DEVICE)
    table = torch.tensor([[2, 0, 3], [5, 3, 2], [7, 5, 4]], dtype=torch.int32, device=DEVICE)
    dealt = work.Work(table, table, table, table, 9)  # tiles 2, 2, 1 of heads 0, 1, 2
    generator = torch.Generator(DEVICE).manual_seed(0)
    o, e = split.buffers(dealt, 192, 64)
    o.normal_(generator=generator)
    e.normal_(generator=generator).mul_(10)
    e[1, 3:9] = -torch.inf
    e[:3, 5] = -torch.inf
    out = torch.full((1, 400, 3, 64), torch.nan, device=DEVICE)
    lse = torch.full((1, 3, 400), torch.nan, device=DEVICE)
    split.combine(dealt, plan, (o, e), out, lse)
    for item, first, parts in table.tolist():
        head, tile = divmod(item, 3)
        rows = int(plan.q_count[tile])
        bits = e[first : first + parts, :rows].double() * math.log(2.0)
        weight = bits.softmax(0).nan_to_num(0.0)[..., None]
        expected = (weight * o[first : first + parts, :rows].double()).sum(0)
        at = slice(192 * tile, 192 * tile + rows)
        assert torch.allclose(out[0, at, head].double(), expected, atol=1e-5)
        assert torch.allclose(lse[0, head, at].double(), bits.logsumexp(0), atol=1e-4)
    assert out[0, :192].isnan().all()


@hopper
@pytest.mark.parametrize("parts", [2, 7])
@pytest.mark.parametrize(
    ("length_q", "length_k", "block_q"), [(768, 1024, 192), (700, 1000, 192), (400, 900, 128)]
)
def test_attention(length_q, length_k, block_q, parts, monkeypatch):
    from visionfuse.kernels.attention import gluon_sm90

    monkeypatch.setattr(work, "_parts", lambda cost, *_: torch.full_like(cost, parts))
    plan = block_list(length_q, length_k, block_q, all_keys).to("cuda")
    g = torch.Generator("cuda").manual_seed(0)
    q = torch.randn(2, length_q, 4, 128, generator=g, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, 2, length_k, 2, 128, generator=g, device="cuda", dtype=torch.bfloat16)
    assert work.deal(plan, 2, 4, 132).split is not None
    check_attention(gluon_sm90.forward, q, k, v, plan, 128**-0.5)


@hopper
@pytest.mark.parametrize("precision", ["fp8", "int8_fp8"])
def test_8bit(precision, monkeypatch):
    """Parts change the order of sums, and nothing else."""
    from visionfuse.kernels.attention import block_sparse_attention

    g = torch.Generator("cuda").manual_seed(0)
    q, k, v = torch.randn(3, 1, 1000, 4, 64, generator=g, device="cuda", dtype=torch.bfloat16)
    results = []
    for parts in (1, 3):
        monkeypatch.setattr(work, "_parts", lambda cost, *_, n=parts: torch.full_like(cost, n))
        plan = block_list(1000, 1000, 192, all_keys).to("cuda")
        results.append(
            block_sparse_attention(
                q, k, v, plan, precision=precision, impl="gluon_sm90", return_lse=True
            )
        )
    (whole, whole_lse), (parted, parted_lse) = results
    assert (whole - parted).float().abs().sum() < 0.05 * whole.float().abs().sum()
    assert (whole_lse - parted_lse).abs().max() < 0.02
