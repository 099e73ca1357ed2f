"""Our neighborhoods are NATTEN's: same results as its own FlexAttention backend, random cases."""

import pytest
import torch

from visionfuse.kernels.attention.api import block_sparse_attention
from visionfuse.kernels.plan.layout import TokenLayout
from visionfuse.kernels.plan.neighborhood import Neighborhood, neighborhood_mask
from visionfuse.kernels.plan.planner import BlockShape, plan_attention
from visionfuse.neighborhood import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
    neighborhood_attention,
)
from visionfuse.testing import dense_attention

natten = pytest.importorskip(
    "natten", reason="NATTEN is an optional peer: pip install --no-build-isolation natten"
)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

HEADS, DIM = 2, 16
SHAPE = BlockShape(block_q=32, block_k=16, padded=True)


def random_case(seed: int, rank: int) -> tuple[tuple[int, ...], Neighborhood]:
    """A grid and parameters that NATTEN accepts: 2 <= window, window * dilation <= length, stride <= window."""
    g = torch.Generator().manual_seed(seed)
    pick = lambda low, high: int(torch.randint(low, high + 1, (), generator=g))
    largest = {1: 60, 2: 14, 3: 8}[rank]
    grid, window, stride, dilation, causal = [], [], [], [], []
    for _ in range(rank):
        n = pick(4, largest)
        w = pick(2, n)
        grid.append(n)
        window.append(w)
        stride.append(pick(1, w))
        dilation.append(pick(1, n // w))
        causal.append(pick(0, 2) == 0)
    spec = Neighborhood(
        window=tuple(window), stride=tuple(stride), dilation=tuple(dilation), causal=tuple(causal)
    )
    return tuple(grid), spec


def natten_attention(q, k, v, grid, spec: Neighborhood):
    attend = {1: natten.na1d, 2: natten.na2d, 3: natten.na3d}[len(grid)]
    q, k, v = (x.unflatten(1, grid) for x in (q, k, v))
    out = attend(
        q, k, v, kernel_size=spec.window, stride=spec.stride, dilation=spec.dilation,
        is_causal=spec.causal, backend="flex-fna",
    )  # fmt: skip
    return out.flatten(1, len(grid))


def compare(seed: int, rank: int, impls: tuple[str, ...]):
    grid, spec = random_case(seed, rank)
    layout = TokenLayout.joint(grids=[grid])
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, layout.length, HEADS, DIM, generator=g) for _ in range(3))
    theirs = natten_attention(q, k, v, grid, spec)
    # The rule, pair by pair.
    mask = neighborhood_mask(spec.resolve(grid)).expand(1, HEADS, -1, -1)
    exact, _ = dense_attention(
        q.double(), k.double(), v.double(), mask, DIM**-0.5, accumulate=torch.float64
    )
    torch.testing.assert_close(theirs.double(), exact, atol=5e-6, rtol=0, msg=f"{grid}, {spec}")
    # The rule, planned, in the planner's order.
    plan = plan_attention(layout, spec, shape=SHAPE)
    q, k, v = (x if plan.permutation is None else x[:, plan.permutation] for x in (q, k, v))
    for impl in impls:
        ours = block_sparse_attention(q, k, v, plan.blocks, impl=impl)
        ours = ours if plan.inverse is None else ours[:, plan.inverse]
        torch.testing.assert_close(ours, theirs, atol=5e-6, rtol=0, msg=f"{impl}: {grid}, {spec}")


# With seed 4 some axis is causal and one dilated, in every rank.
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("seed", [0, 3, 4])
def test_natten_agrees(seed, rank):
    compare(seed, rank, ("blocks", "flex", "reference"))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_natten_agrees_on_many(rank):
    for seed in range(100, 180):
        compare(seed, rank, ("blocks",))


# The public function and the modules ---------------------------------------------------------------------


def compare_functions(seed: int, rank: int):
    """Output and lse of na1d, na2d and na3d, with grouped heads and additional keys and values.

    Gradients have another oracle, in test_neighborhood.py: NATTEN has none on a CPU.
    """
    grid, spec = random_case(seed, rank)
    if rank == 1 and spec.window == grid and spec.causal == (True,):
        return  # NATTEN hands it to a dense backend, which has no causal mask on a CPU
    g = torch.Generator().manual_seed(seed)
    draw = lambda heads, *shape: torch.randn(2, *shape, heads, DIM, generator=g)
    q, k, v = draw(2 * HEADS, *grid), draw(HEADS, *grid), draw(HEADS, *grid)
    extra = (draw(HEADS, 3), draw(HEADS, 3)) if seed % 2 else None
    attend = {1: natten.na1d, 2: natten.na2d, 3: natten.na3d}[rank]
    arguments = (spec.window, spec.stride, spec.dilation, spec.causal)
    more = {} if extra is None else {"additional_keys": extra[0], "additional_values": extra[1]}
    theirs = attend(
        q, k, v, *arguments, return_lse=True, backend="flex-fna",
        attention_kwargs={"backend": "flex-fmha"}, **more,
    )  # fmt: skip
    ours = neighborhood_attention(q, k, v, *arguments, extra_kv=extra, return_lse=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0, msg=f"{grid}, {spec}")


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_functions_agree(rank):
    for seed in (1, 4):
        compare_functions(seed, rank)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_functions_agree_on_many(rank):
    for seed in range(1000, 1200):
        compare_functions(seed, rank)


@torch.no_grad()
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_modules_are_interchangeable(rank):
    """State dicts and results, with positional arguments."""
    torch.manual_seed(0)
    modules = (NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D)
    names = ("NeighborhoodAttention1D", "NeighborhoodAttention2D", "NeighborhoodAttention3D")
    arguments = (32, 2, 3, 2, 2, True, True, 0.3)
    theirs = getattr(natten, names[rank - 1])(*arguments)
    ours = modules[rank - 1](*arguments)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, *(8, 7, 6)[:rank], 32)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=0)
