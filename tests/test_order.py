"""Orders are permutations; Hilbert curves take unit steps; tiles stay together."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visionfuse.kernels.order import Order, hilbert_index, inverse_permutation, order_grid


@given(
    grid=st.lists(st.integers(1, 12), min_size=1, max_size=3).map(tuple),
    kind=st.sampled_from(["row", "tiled", "hilbert"]),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_order_is_a_permutation_with_non_decreasing_runs(grid, kind, data):
    side = st.integers(1, 5)
    tile = data.draw(st.tuples(*[side for _ in grid]))
    dilation = data.draw(st.tuples(*[st.integers(1, n) for n in grid]))
    line = order_grid(grid, Order(kind=kind, tile=tile), dilation=dilation)
    count = line.permutation.numel()
    assert torch.equal(line.permutation.sort().values, torch.arange(count))
    inverse = inverse_permutation(line.permutation)
    x = torch.randn(count)
    assert torch.equal(x[line.permutation][inverse], x)
    assert (line.run_q.diff() >= 0).all()
    assert (line.run_k.diff() >= 0).all()


@pytest.mark.parametrize(("axes", "bits"), [(2, 1), (2, 4), (2, 6), (3, 1), (3, 3)])
def test_hilbert_curve_visits_every_cell_by_unit_steps(axes, bits):
    side = 1 << bits
    cells = torch.cartesian_prod(*[torch.arange(side)] * axes).T
    distance = hilbert_index(cells, bits)
    assert torch.equal(distance.sort().values, torch.arange(side**axes))
    path = cells[:, distance.argsort()]
    assert (path.diff(dim=1).abs().sum(0) == 1).all()


def test_hilbert_windows_cut_into_quadrants():
    """64 consecutive tokens of a 16x16 window are an 8x8 square, so 64-wide blocks stay compact."""
    line = order_grid((32, 48), Order(kind="hilbert", tile=(16, 16)))
    for block in line.permutation.view(-1, 64):
        rows, columns = block // 48, block % 48
        assert rows.max() - rows.min() == 7
        assert columns.max() - columns.min() == 7


def test_tiles_nest():
    line = order_grid((12, 20), Order(kind="tiled", tile=(6, 10), subtile=(3, 5)))
    for block, size in ((60, (6, 10)), (15, (3, 5))):
        for run in line.permutation.view(-1, block):
            rows, columns = run // 20, run % 20
            extent = int(rows.max() - rows.min() + 1), int(columns.max() - columns.min() + 1)
            assert extent == size


def test_dilation_brings_residue_classes_together():
    line = order_grid((9,), Order(kind="row"), dilation=(3,))
    assert line.permutation.tolist() == [0, 3, 6, 1, 4, 7, 2, 5, 8]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"kind": "zigzag"}, "Unknown order"),
        ({"kind": "tiled", "tile": (4, 0)}, "must be positive"),
        ({"kind": "tiled", "tile": (4, 4), "subtile": (3, 4)}, "must divide"),
        ({"kind": "tiled", "subtile": (3, 4)}, "must divide"),
    ],
)
def test_bad_orders_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        Order(**bad)


def test_tile_must_fit_the_grid():
    with pytest.raises(ValueError, match="one size per axis"):
        order_grid((4, 4), Order(kind="tiled", tile=(2,)))
    with pytest.raises(ValueError, match="ask the planner"):
        order_grid((4, 4), Order())
