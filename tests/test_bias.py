"""Additive biases: one number for a relative position, or for a key and a block of queries."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from visionfuse.kernels.attention import (
    BlockBias,
    RelativeBias,
    UnsupportedError,
    block_sparse_attention,
    blocks,
    dispatch,
    flex,
    reference,
    triton,
    unsupported_reasons,
)
from visionfuse.kernels.order import Order
from visionfuse.kernels.plan import BlockShape, Neighborhood, TokenLayout, plan_attention
from visionfuse.testing import check_attention, random_bias, random_plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODULES = [blocks, flex, triton]
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def tensors(plan, *, batch=1, heads=1, kv_heads=None, dim=16, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    keys = (batch, plan.length_k, kv_heads or heads, dim)
    shapes = ((batch, plan.length_q, heads, dim), keys, keys)
    return [torch.randn(s, generator=g).to(DEVICE, dtype) for s in shapes]


def by_definition(q, k, v, window, table):
    """Neighborhood attention on a grid with relative biases, a query at a time: q, k, v (1, Y, X, H, D)."""
    out = torch.zeros_like(q)
    height, width = q.shape[1:3]
    for y in range(height):
        for x in range(width):
            y0 = min(max(y - window[0] // 2, 0), height - window[0])
            x0 = min(max(x - window[1] // 2, 0), width - window[1])
            near = slice(y0, y0 + window[0]), slice(x0, x0 + window[1])
            scores = torch.einsum("hd,ijhd->hij", q[0, y, x], k[(0, *near)]) / q.shape[-1] ** 0.5
            rows = y0 - y + window[0] - 1, x0 - x + window[1] - 1
            scores += table[:, rows[0] : rows[0] + window[0], rows[1] : rows[1] + window[1]]
            weights = scores.flatten(1).softmax(-1).view_as(scores)
            out[0, y, x] = torch.einsum("hij,ijhd->hd", weights, v[(0, *near)])
    return out


@pytest.mark.parametrize("impl", ["reference", "blocks", "flex", "triton"])
def test_neighborhood_with_relative_positions(impl):
    grid, window, heads = (7, 9), (3, 5), 2
    plan = plan_attention(
        TokenLayout.joint(grids=[grid]), Neighborhood(window=window),
        order=Order(kind="tiled", tile=(4, 4)), shape=BlockShape(block_q=16, block_k=16, padded=True),
        device=DEVICE,
    )  # fmt: skip
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, *grid, heads, 16, generator=g).to(DEVICE) for _ in range(3))
    table = torch.randn(heads, *(2 * w - 1 for w in window), generator=g).to(DEVICE)
    line = plan.permutation
    assert line is not None
    coord = torch.stack([line // grid[1], line % grid[1]])
    bias = RelativeBias.from_coordinates(table, coord, coord)
    expected = by_definition(*(x.double() for x in (q, k, v)), window, table.double())
    got = block_sparse_attention(
        *(x.flatten(1, 2)[:, line] for x in (q, k, v)), plan.blocks, impl=impl, bias=bias
    )
    torch.testing.assert_close(
        got.double(), expected.flatten(1, 2)[:, line], atol=3e-6, rtol=0, check_device=False
    )


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__.rpartition(".")[2])
@pytest.mark.parametrize("kind", ["relative", "block"])
@pytest.mark.parametrize("mask", ["intervals", "bits"])
def test_random_lists(module, kind, mask):
    plan = random_plan(
        1, length_q=40, length_k=50, block_q=32, block_k=32, kind=mask, variants=2, tables=2
    ).to(DEVICE)
    bias = random_bias(kind, plan, batch=2, heads=2)
    check_attention(module.forward, *tensors(plan, batch=2, heads=2, kv_heads=1), plan, 0.3, bias)


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__.rpartition(".")[2])
@pytest.mark.parametrize("kind", ["relative", "block"])
def test_shared_by_batch_and_heads(module, kind):
    plan = random_plan(2, length_q=30, length_k=40, block_q=32, block_k=32).to(DEVICE)
    bias = random_bias(kind, plan)
    check_attention(module.forward, *tensors(plan, batch=2, heads=2), plan, 0.3, bias)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("module", [blocks, triton], ids=["blocks", "triton"])
def test_sixteen_bits(module, dtype):
    plan = random_plan(3, length_q=50, length_k=70, block_q=32, block_k=16).to(DEVICE)
    rows = random_bias("block", plan).rows
    for bias in (
        random_bias("relative", plan, dtype=dtype),
        BlockBias(rows),
        BlockBias(30 * rows),  # rounded to q's dtype it would move scores by 0.1
    ):
        check_attention(module.forward, *tensors(plan, dtype=dtype), plan, 0.3, bias)


@pytest.mark.parametrize("scale", [0.0, -0.5])
@pytest.mark.parametrize("impl", ["blocks", "triton"])
def test_the_bias_is_not_scaled(impl, scale):
    plan = random_plan(4, length_q=40, length_k=40, block_q=32, block_k=16).to(DEVICE)
    bias = random_bias("relative", plan)
    check_attention(dispatch.implementation(impl).forward, *tensors(plan), plan, scale, bias)


def test_a_constant_moves_the_lse_only():
    plan = random_plan(5, length_q=40, length_k=40, block_q=32, block_k=16).to(DEVICE)
    q, k, v = tensors(plan)
    bias = BlockBias(torch.full((1, 1, plan.tiles, 40), 2.5, device=DEVICE))
    for module in (reference, *MODULES):
        out, lse = module.forward(q, k, v, plan, 0.3, True)
        moved, moved_lse = module.forward(q, k, v, plan, 0.3, True, bias)
        torch.testing.assert_close(moved, out, atol=1e-6, rtol=0)
        torch.testing.assert_close(moved_lse, lse + 2.5, atol=2e-6, rtol=0)


def test_compiles_without_graph_breaks():
    plan = random_plan(6, length_q=40, length_k=40, block_q=32, block_k=16)
    q, k, v = (x.cpu() for x in tensors(plan))
    for kind in ("relative", "block"):
        bias = random_bias(kind, plan)
        parts = [x.cpu() for x in bias.to_tensors()]

        @torch.compile(fullgraph=True, backend="aot_eager")
        def layer(q, k, v, parts, make=type(bias)):
            return (
                block_sparse_attention(q * 1.0, k, v, plan, impl="blocks", bias=make(*parts)) + 0.0
            )

        expected = reference.forward(q, k, v, plan, 0.25, False, type(bias)(*parts))[0]
        torch.testing.assert_close(layer(q, k, v, parts), expected, atol=2e-6, rtol=0)


def test_hopper_kernel_refuses():
    plan = random_plan(7, length_q=8, length_k=8, block_q=128, block_k=128).to(DEVICE)
    q, k, v = tensors(plan)
    bias = random_bias("relative", plan)
    assert any("Bias" in r for r in unsupported_reasons("gluon_sm90", q, k, v, plan, bias=bias))
    assert not any("Bias" in r for r in unsupported_reasons("gluon_sm90", q, k, v, plan))
    with pytest.raises(UnsupportedError, match="does not add a RelativeBias"):
        block_sparse_attention(q, k, v, plan, impl="gluon_sm90", bias=bias)


def test_bad_biases_are_refused():
    plan = random_plan(8, length_q=8, length_k=9, block_q=4, block_k=4).to(DEVICE)
    q, k, v = tensors(plan, heads=2)
    good = random_bias("relative", plan, heads=2)
    table, q_index, k_index = good.to_tensors()
    rows = random_bias("block", plan, heads=2).rows
    for bias, message in [
        (RelativeBias(table[:, None], q_index, k_index), r"H or 1, n"),
        (RelativeBias(table[[0, 1, 1]], q_index, k_index), r"H or 1, n"),
        (RelativeBias(table.int(), q_index, k_index), "floating"),
        (RelativeBias(table, k_index, q_index), "q_index must be"),
        (RelativeBias(table, q_index, k_index.long()), "k_index must be"),
        (BlockBias(rows[:, :, 1:]), "rows must be"),
        (BlockBias(rows.clone().requires_grad_()), "no gradient"),
    ]:
        with pytest.raises(ValueError, match=message):
            block_sparse_attention(q, k, v, plan, bias=bias)
    with pytest.raises(ValueError, match="odd size"):
        RelativeBias.from_coordinates(table, q_index[None], k_index[None])


@given(data=st.data())
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_sweep(data):
    pick = lambda *values: data.draw(st.sampled_from(values))
    variants = pick(1, 2)
    plan = random_plan(
        data.draw(st.integers(0, 10**6)), length_q=data.draw(st.integers(1, 40)),
        length_k=data.draw(st.integers(1, 40)), block_q=pick(16, 20), block_k=pick(16, 24),
        kind=pick("intervals", "bits"), variants=variants, full=pick(0.0, 0.4, 1.0),
    ).to(DEVICE)  # fmt: skip
    bias = random_bias(pick("relative", "block"), plan, heads=variants)
    module = pick(*MODULES[::2])
    check_attention(module.forward, *tensors(plan, heads=variants), plan, 0.3, bias)
