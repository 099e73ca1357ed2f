"""Scales by tile: one for every 3-D tile of queries and of keys, whatever its shape and its place."""

from __future__ import annotations

from math import prod

import pytest
import torch

from visionfuse.kernels.attention import block_sparse_attention, quantize, quantized
from visionfuse.kernels.attention.precision import MODEL, Precision
from visionfuse.kernels.order.curves import grid_coordinates
from visionfuse.kernels.plan import BlockShape, TileWindow, TokenLayout, plan_attention
from visionfuse.testing import poisoned_memory, random_plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BY_TILE = Precision.parse("fp8_tile")
GRID, TILE, TEXT = (3, 5, 6), (2, 3, 4), 7  # short tiles at the end of every axis
LAYOUT = TokenLayout.joint(text=TEXT, grids=[GRID])
# The parts of queries and keys that share a scale on an H200 (192 queries, 128 keys of a block) and here.
SHAPES = [BlockShape(block_q=32, block_k=32, padded=True), BlockShape(block_q=16, block_k=8, padded=True)]  # fmt: skip
SPEC = TileWindow(window=(2, 1, 1), tile=TILE)


def made(shape, spec=SPEC):
    return plan_attention(LAYOUT, spec, shape=shape)


def inputs(plan, *, heads=2, dim=16, dtype=torch.float64):
    """In the order of the plan. Every tile has a size of its own, so that a scale of another would show."""
    g = torch.Generator().manual_seed(0)
    tile = sum(
        x // t * 7**a for a, (x, t) in enumerate(zip(grid_coordinates(GRID), TILE, strict=True))
    )
    size = torch.cat([torch.ones(TEXT), 2.0 ** (tile % 9 - 4)]).to(dtype)
    q, k, v = (torch.randn(1, LAYOUT.length, heads, dim, generator=g).to(dtype) for _ in range(3))
    return tuple(
        x[:, plan.permutation]
        for x in (q * size[:, None, None] / 4, k * size[:, None, None] / 4, v)
    )


def tile_of_tokens(plan, block):
    """The tile of every token, in the order of the plan, pieces of `block` tokens of those larger."""
    tile = torch.zeros(LAYOUT.length, dtype=torch.long)
    for x, n, t in zip(grid_coordinates(GRID), GRID, TILE, strict=True):
        tile[TEXT:] = tile[TEXT:] * -(-n // t) + x // t
    tile[TEXT:] += 1
    tile = tile[plan.permutation]
    piece, seen = torch.zeros_like(tile), {}
    for i, own in enumerate(tile.tolist()):
        piece[i] = seen.get(own, 0) // block
        seen[own] = seen.get(own, 0) + 1
    return tile * 1000 + piece


def rounded_by_tile(x, owner):
    """e4m3 with one scale for every tile and head."""
    out = torch.empty_like(x)
    for tile in owner.unique():
        own = x[:, owner == tile]
        scale = own.abs().amax((1, 3), keepdim=True).clamp(min=2.0**-100) / 448
        out[:, owner == tile] = (own / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale
    return out


def expected(plan, shape, q, k, v):
    """From the paper's formulas, dense and in float64, from coordinates and not from the plan's lists."""
    q, k = (
        rounded_by_tile(x, tile_of_tokens(plan, block))
        for x, block in ((q, shape.block_q), (k - k.mean(1, keepdim=True), shape.block_k))
    )
    scale = v.abs().amax(1, keepdim=True) / 448
    v = (v / scale).to(torch.float8_e4m3fn).to(v.dtype) * scale
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    scores.masked_fill_(~plan.blocks.dense_mask(), -torch.inf)
    p = (scores - scores.amax(-1, keepdim=True)).exp()
    top = 2.0**8.807
    p = (p * top).to(torch.float8_e4m3fn).to(p.dtype) / top
    return torch.einsum("bhqk,bkhd->bqhd", p / p.sum(-1, keepdim=True), v)


def test_names():
    assert Precision(qk="fp8", pv="fp8", q_scale="tile", k_scale="tile") == BY_TILE
    assert str(BY_TILE) == "fp8_tile"
    assert BY_TILE.name == "fp8"  # what tables of kernels know
    for text in ("fp8_tile-smooth_k+smooth_q", "int8_fp8_tile", "fp8+q_tile", "fp8_tile+k_token", "int8+k_tile"):  # fmt: skip
        precision = Precision.parse(text)
        assert Precision.parse(str(precision)) == precision
        assert Precision.from_dict(precision.to_dict()) == precision
    with pytest.raises(ValueError, match="rounded queries"):
        Precision.parse("model_tile")


@pytest.mark.parametrize("shape", SHAPES, ids=["whole tiles", "pieces of tiles"])
def test_equals_the_formula_and_differs_from_other_scales(shape):
    plan = made(shape)
    q, k, v = inputs(plan)
    exact = expected(plan, shape, q, k, v)
    out = block_sparse_attention(q, k, v, plan.blocks, impl="reference", precision=BY_TILE)
    torch.testing.assert_close(out, exact, rtol=1e-9, atol=1e-9)
    for other in ("fp8", "fp8+q_tile", "fp8+q_tensor+k_tile", "fp8+q_block+k_block"):
        found = block_sparse_attention(q, k, v, plan.blocks, impl="reference", precision=other)
        assert (found - exact).abs().max() > 1e-3, other


@pytest.mark.parametrize(
    ("precision", "shape"),
    [("fp8_tile", SHAPES[0]), ("int8_fp8_tile", SHAPES[1]), ("int8+q_tile", SHAPES[0])],
    ids=["fp8_tile", "int8_fp8_tile, pieces of tiles", "int8+q_tile"],
)
def test_the_kernels_multiply_what_the_emulation_does(shape, precision):
    """Through the prologue, the kernel of the queries, slots of keys and the portable kernel."""
    precision = Precision.parse(precision)
    plan = made(shape).blocks
    q, k, v = inputs(made(shape), dtype=torch.float32)
    q, k, v, plan = (x.to(DEVICE) for x in (q, k, v, plan))
    reasons = quantized.unsupported("triton", q, k, v, plan, precision)
    assert not [reason for reason in reasons if "emulated only" in reason]
    with poisoned_memory():
        out, lse = quantized.forward("triton", q, k, v, plan, 0.25, True, precision)
    exact, exact_lse = (
        block_sparse_attention(
            *(x.double() for x in (q, k, v)), plan, scale=0.25, impl="reference",
            precision=precision, return_lse=True,
        )
    )  # fmt: skip
    model = block_sparse_attention(*(x.double() for x in (q, k, v)), plan, scale=0.25,
                                   impl="reference", precision=MODEL)  # fmt: skip
    error = (out.double() - exact).abs().mean()
    assert error < 0.5 * (exact - model).abs().mean()  # the interpreter rounds some weights wrongly
    assert (lse - exact_lse).abs().max() < 1 / 16


@pytest.mark.parametrize(("format", "dim"), [("fp8", 24), ("int8", 16)])
def test_codes_of_queries_by_tile(format, dim):
    """Bit for bit but for a code here and there, where a scale was rounded to fp32; on plans with gaps."""
    pytest.importorskip("triton")
    from visionfuse.kernels.attention import query_tiles

    plan = random_plan(3, length_q=130, length_k=40, block_q=48, block_k=16, ragged=True).to(DEVICE)
    g = torch.Generator().manual_seed(1)
    q = torch.randn(2, 3, 130, dim, generator=g).to(DEVICE).transpose(1, 2) * 10
    with poisoned_memory():
        codes, scale = query_tiles.round_tiles(q, plan, format)
    right_codes, right_scale = quantize.quantized_tiles(q, format, plan)
    covered = torch.zeros(130, dtype=torch.bool, device=DEVICE)
    for start, count in zip(plan.q_start.tolist(), plan.q_count.tolist(), strict=True):
        covered[start : start + count] = True
    assert covered.any()
    torch.testing.assert_close(scale[..., covered], right_scale[..., covered], rtol=1e-6, atol=0)
    same = codes[:, covered].float() == right_codes[:, covered].float()
    assert same.float().mean() > 0.999


def test_scales_are_those_of_the_tiles():
    plan = made(SHAPES[0])
    q, _, _ = inputs(plan)
    _, scale = quantize.quantized_tiles(q, "fp8", plan.blocks)
    owner = tile_of_tokens(plan, SHAPES[0].block_q)
    tiles = [own for own in owner.unique().tolist() if own >= 1000]
    assert len(tiles) == prod(-(-n // t) for n, t in zip(GRID, TILE, strict=True))
    for tile in tiles:
        top = q[0, owner == tile].abs().amax((0, 2)) / 448
        torch.testing.assert_close(scale[0][:, owner == tile], top[:, None].expand(-1, int((owner == tile).sum())))  # fmt: skip
