"""The simulator: the GNA paper's bounds, exact counts, and times that were measured."""

import csv
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visionfuse import cost_model
from visionfuse.kernels.order import Order
from visionfuse.kernels.plan import Neighborhood, TokenLayout, plan_attention, tiles
from visionfuse.kernels.plan.neighborhood import neighborhood_mask
from visionfuse.kernels.plan.tile_counts import cuts
from visionfuse.kernels.plan.tiles import BlockShape, Entry, Table
from visionfuse.simulate import Setting, box_tiles, dense_ms, simulate
from visionfuse.simulate.gpus import CUDNN, GPUS, H200, MEASURED, PEAK, find_gpu, portable_clocks
from visionfuse.simulate.measured import predictions, read
from visionfuse.simulate.search import Wanted, search, steps

BENCH = Path(__file__).resolve().parents[1] / "assets" / "bench"
WAN = (21, 45, 80)


# -- tiles ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stride", "bound"),
    [
        ((1, 1, 1), 3.27),
        ((1, 1, 8), 5.45),
        ((1, 8, 8), 9.09),
        ((2, 8, 8), 10.0),
        ((16, 8, 8), 11.11),
    ],
)
def test_the_papers_bounds_for_hunyuan(stride, bound):
    """arXiv 2504.16922, appendix B.1: 18x24x24 of 30x48x80, tiles of 4x8x8 queries and 2x8x8 keys."""
    rule = Neighborhood(window=(18, 24, 24), stride=stride).resolve((30, 48, 80))
    found = box_tiles(rule, (4, 8, 8), (2, 8, 8))
    assert found.bound == pytest.approx(bound, abs=0.005)
    assert found.full + found.partial == found.visited
    if stride == (16, 8, 8):
        assert found.partial == 0  # the paper's perfectly block-sparse case


@st.composite
def rules(draw):
    grid = draw(st.sampled_from([(23,), (7, 10), (3, 4, 6)]))
    window = tuple(draw(st.integers(1, n)) for n in grid)
    stride = tuple(draw(st.integers(1, w)) for w in window)
    causal = tuple(draw(st.booleans()) for _ in grid)
    return Neighborhood(window=window, stride=stride, causal=causal), grid


def tile_index(coords, grid, tile):
    index = torch.zeros_like(coords[0])
    for x, n, t in zip(coords, grid, tile, strict=True):
        index = index * -(-n // t) + x // t
    return index


@given(rules(), st.data())
@settings(deadline=None)
def test_tiles_are_those_of_the_mask(case, data):
    """Counted pair by pair: a tile is visited if one pair of it is visible, full if all are."""
    spec, grid = case
    rule = spec.resolve(grid)
    q_tile, kv_tile = (tuple(data.draw(st.integers(1, n)) for n in grid) for _ in range(2))
    found = box_tiles(rule, q_tile, kv_tile)
    coords = torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij")).flatten(1)
    q_of, k_of = (tile_index(coords, grid, tile) for tile in (q_tile, kv_tile))
    shape = (int(q_of.max()) + 1, int(k_of.max()) + 1)
    where = (q_of[:, None] * shape[1] + k_of).flatten()
    seen = torch.bincount(where, weights=neighborhood_mask(rule).flatten().double(),
                          minlength=prod(shape))  # fmt: skip
    size = torch.bincount(where, minlength=prod(shape))
    assert found.visited == int((seen > 0).sum())
    assert found.full == int((seen == size).sum())
    assert found.most == int((seen > 0).view(shape).sum(1).max())
    assert (found.tiles, found.keys) == shape


@given(rules(), st.sampled_from([(8, 8), (24, 16), (16, 24)]), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=40)
def test_counts_are_those_of_the_lists(case, block, random):
    """Boxes exactly. Columns too, but for the end of a column, which counts as visited and masked."""
    spec, grid = case
    shape = BlockShape(block_q=block[0], block_k=block[1], padded=True)
    rule = spec.resolve(grid)
    if rule.is_dense:
        return
    found = list(cuts(rule, shape))
    for cut, counts in random.sample(found, min(6, len(found))):
        order = Order(kind="tiled", tile=cut.tile, subtile=cut.subtile)
        made = plan_attention(TokenLayout.joint(grids=[grid]), spec, order=order, shape=shape)
        plan = made.blocks
        line = torch.arange(prod(grid)) if made.permutation is None else made.permutation
        assert torch.equal(plan.dense_mask(), neighborhood_mask(rule)[line][:, line])
        entries = plan.full.start.numel() + plan.partial.start.numel()
        full = plan.full.start.numel()
        assert counts.tiles == plan.tiles
        if cut.subtile is not None:
            short = int((plan.full.count < shape.block_k).sum())
            assert (counts.entries, counts.full, counts.short) == (entries, full, short)
        else:
            assert counts.entries >= entries
            assert counts.full <= full


@pytest.mark.parametrize(
    ("grid", "window", "stride"),
    [(WAN, (12, 24, 24), (4, 8, 8)), (WAN, (12, 24, 24), 1), ((96, 64), 24, (12, 8))],
)
def test_columns_of_real_grids_are_counted_within_a_thousandth(grid, window, stride):
    spec = Neighborhood(window=window, stride=stride)
    shape = BlockShape(block_q=192, block_k=128, padded=True)
    wanted = (grid[0], 8, 8) if len(grid) == 3 else (grid[0], 8)
    (counts,) = [n for cut, n in cuts(spec.resolve(grid), shape) if cut == (wanted, None)]
    plan = plan_attention(
        TokenLayout.joint(grids=[grid]), spec, order=Order(kind="tiled", tile=wanted), shape=shape
    ).blocks
    assert counts.tiles == plan.tiles
    assert counts.entries == pytest.approx(
        plan.full.start.numel() + plan.partial.start.numel(), rel=1e-3
    )
    assert counts.full == pytest.approx(plan.full.start.numel(), rel=1e-3)


def test_columns_fill_192_rows_where_boxes_cannot():
    """3x8x8 queries hold no box of 128 keys; a column 8x8 wide is cut for both."""
    setting = Setting(grid=WAN, heads=12)
    found = simulate(Neighborhood(window=(12, 24, 24), stride=(4, 8, 8)), setting)
    assert (found.order.tile, found.order.subtile) == ((21, 8, 8), None)
    assert found.tile_count.q_tile == (3, 8, 8)
    assert found.tile_count.kv_tile == (2, 8, 8)


def test_busiest_worker():
    costs = torch.tensor([1.0, 1, 1, 1, 1, 9])
    assert cost_model.busiest(costs, 2) == 9  # the long one first, the rest beside it
    assert cost_model.busiest(costs, 1) == 14
    assert cost_model.busiest(torch.ones(10), 4) == 3


# -- times ------------------------------------------------------------------------------------------


def test_predicts_the_engines_times_within_a_tenth():
    """All kernels of the Hopper engine that were timed, with a fit to the others and with the constants in use."""
    found = [
        one for one in predictions(read(BENCH / "engine.csv"), find_gpu("H200")) if one.row.plan
    ]
    engine = [one for one in found if one.row.impl == "gluon_sm90"]
    assert len({(one.row.case, one.row.precision) for one in engine}) >= 20
    for one in engine:
        assert abs(one.error) < 0.1, one.row
    # Left out, two rows take a cost with them: no other has tiles in parts, or as many short blocks.
    left_out = sorted(abs(one.error_left_out) for one in engine if one.error_left_out is not None)
    assert left_out[-3] < 0.1
    checked = [one for one in engine if one.error_left_out is not None]
    assert len(checked) >= 20
    windows = {one.row.case for one in checked if one.row.plan.partial.start.numel()}
    assert len(windows) >= 4


def test_rows_are_rebuilt_as_they_ran():
    """The density that a row says is that of the plan that is built again from its note."""
    with (BENCH / "engine.csv").open(newline="", encoding="utf-8") as file:
        said = {
            (r["case"], r["ms"]): float(r["density"]) for r in csv.DictReader(file) if r["density"]
        }
    for row in read(BENCH / "engine.csv"):
        if row.plan is not None and row.plan.visible:
            assert row.plan.density == pytest.approx(said[row.case, f"{row.ms:.4g}"], rel=1e-3)


def test_dense_work_is_the_work_of_a_dense_plan():
    setting = Setting(grid=(40, 40), heads=3)
    everything = simulate(Neighborhood(window=None, density=1.0), setting)
    # Of the short block at the end dense_ms counts the keys, and not what makes it dearer.
    assert everything.ms == pytest.approx(dense_ms(setting), rel=0.03)
    assert everything.flop_bound == 1


def test_more_clock_less_time_and_text_costs():
    spec = Neighborhood(window=24, stride=8)
    slow = simulate(spec, Setting(grid=(64, 64), mhz=1000))
    fast = simulate(spec, Setting(grid=(64, 64), mhz=2000))
    assert slow.ms == pytest.approx(2 * fast.ms)
    with_text = simulate(spec, Setting(grid=(64, 64), text=512, mhz=2000))
    assert with_text.ms > fast.ms
    assert with_text.tokens == 64 * 64 + 512


# -- GPUs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["H200", "h200", "NVIDIA H200", "nvidia-h200"])
def test_finds_a_measured_gpu(name):
    assert find_gpu(name).name == H200.name


def test_says_which_gpus_are_known():
    with pytest.raises(
        ValueError,
        match=r"Nothing is known of the GPU 'H100 PCIe'\. Known: NVIDIA H200, NVIDIA H100",
    ):
        find_gpu("H100 PCIe")  # fewer multiprocessors, half the power
    with pytest.raises(ValueError, match="The speed of triton in precision 'fp8' at head dim 128"):
        H200.rate("triton", "fp8", 128)


def test_an_h100_computes_as_an_h200_does():
    gpu = find_gpu("H100")
    assert "not measured" in gpu.basis
    setting, spec = Setting(grid=(64, 64), precision="fp8"), Neighborhood(window=32, stride=8)
    assert simulate(spec, replace(setting, gpu=gpu)) == simulate(spec, setting)


@pytest.mark.parametrize(
    ("name", "tflops", "dense"),
    [("A100", 312, 233), ("L40S", 362, 307), ("RTX 4090", 165.2, 151), ("B200", 2250, 975)],
)
def test_other_gpus_are_derived_from_their_published_peak(name, tflops, dense):
    """Dense attention stays below the peak, and below what one exponential a pair allows: 16 an SM and clock.
    dense: what simulate.md says of long calls at head dim 128."""
    gpu = find_gpu(name)
    assert "not measured" in gpu.basis
    assert gpu.impl == "triton"
    for head_dim in (64, 128):
        setting = Setting(grid=(128, 128), head_dim=head_dim, impl=gpu.impl, gpu=gpu)
        pairs = 24 * 128**4 / (dense_ms(setting) * 1e-3)
        assert tflops / 4 < pairs * 4 * head_dim / 1e12 < 0.95 * tflops
        assert pairs < 16 * gpu.sms * gpu.mhz * 1e6
    assert pairs * 512 / 1e12 == pytest.approx(
        dense, rel=0.03
    )  # the end of the last round is in it


def test_what_is_derived_starts_from_what_was_measured():
    assert [gpu.name for gpu in GPUS if gpu.basis == MEASURED] == [H200.name]
    for head_dim in (64, 128):
        fastest = max(shape.speed for shape in H200.shapes("triton", "model", head_dim))
        own = 1 / (H200.rate("triton", "model", head_dim) * fastest)
        assert portable_clocks(head_dim, PEAK) == pytest.approx(own)
        products, rest = 4 * head_dim / PEAK, portable_clocks(0, PEAK)
        assert products < own - rest < 1.2 * products
    assert 1 / 16 < rest < 2 / 16


def test_a_tuned_table_brings_its_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TORCH_HOME", raising=False)
    tiles.forget_tables()
    shape = BlockShape(block_q=64, block_k=64, padded=True, tile=1000)
    entry = Entry(
        impl="triton", precision="model", head_dim=128, shapes=(shape,), pairs_per_ms=1e8, mhz=2000.0
    )  # fmt: skip
    from visionfuse.tune import write

    write(Table(gpu="NVIDIA L40S", entries=(entry,), sms=142, capability=89),
          tiles.user_folder() / "nvidia-l40s.json")  # fmt: skip
    try:
        gpu = find_gpu("NVIDIA L40S")
        setting = Setting(grid=(64, 64), impl="triton", gpu=gpu)
        found = simulate(Neighborhood(window=32, stride=8), setting)
        assert found.cudnn_ms is None
        assert gpu.basis == MEASURED  # no longer derived
        assert (gpu.sms, gpu.mhz, setting.shapes) == (142, 2000, (shape,))
        assert dense_ms(setting) == pytest.approx(24 * 4096**2 / 1e8, rel=0.05)
    finally:
        tiles.forget_tables()


# -- search -----------------------------------------------------------------------------------------


def test_search_keeps_its_promises():
    wanted = Wanted(density=0.2, tolerance=0.1)
    setting = Setting(grid=(48, 64), heads=8)
    done = []
    found = search(wanted, setting, count=4, advance=done.append)
    assert len(done) <= steps(4)
    assert [one.ms for one in found] == sorted(one.ms for one in found)
    for one in found:
        assert 0.2 - 1e-6 <= one.density <= 0.22 + 1e-6
        for n, w, s in zip(setting.grid, one.window, one.stride, strict=True):
            assert w == n or 2 * s <= w
            assert w >= 0.6 * n * 0.2**0.5


def test_search_beats_the_papers_choice_of_strides():
    """A few hundred thousand choices in seconds; none slower than 16x8x8 at the window of the paper."""
    setting = Setting(grid=(30, 48, 80))
    paper = simulate(Neighborhood(window=(18, 24, 24), stride=(16, 8, 8)), setting)
    best = search(Wanted(density=0.09), setting, count=2)[0]
    assert best.ms <= paper.ms


@pytest.mark.parametrize(
    ("options", "words"),
    [({"density": 1.5}, "between 0 and 1"), ({"density": 0.1, "stride_share": 0}, "stride_share")],
)
def test_search_says_what_is_wrong(options, words):
    with pytest.raises(ValueError, match=words):
        Wanted(**options)


def test_a_density_that_no_window_has():
    with pytest.raises(ValueError, match="No window on"):
        search(replace(Wanted(density=0.37), tolerance=1e-4), Setting(grid=(5, 5)))


def test_only_implementations_with_whole_blocks_are_simulated():
    assert (CUDNN, "model", 128) in H200.rates
    with pytest.raises(ValueError, match="blocks in precision"):
        simulate(Neighborhood(window=4), Setting(grid=(8, 8), impl="blocks"))
