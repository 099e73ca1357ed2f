"""Tiles: tables override defaults and are checked; the tuner measures real plans and writes such a table."""

import json
from dataclasses import replace

import pytest
import torch
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from visionfuse import cost_model, tune
from visionfuse.kernels.order import Order
from visionfuse.kernels.plan import Neighborhood, TokenLayout, plan_attention, tiles
from visionfuse.kernels.plan.tiles import BlockShape, Entry, Table

SHAPE = BlockShape(block_q=32, block_k=16, padded=False, partial=0.5, launch=(("num_warps", 4),))
CPU = torch.device("cpu")


def table(**changes):
    entry = Entry(impl="blocks", precision="model", head_dim=64, shapes=(SHAPE,))
    return Table(gpu="cpu", entries=(replace(entry, **changes),), date="2026-01-01")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The user's folder, empty, and the command that writes into it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TORCH_HOME", raising=False)
    tiles.forget_tables()
    yield tmp_path / "torch" / "visionfuse"
    tiles.forget_tables()


def run(*arguments):
    app = typer.Typer()
    app.command()(tune.tune)
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


# -- tables -----------------------------------------------------------------------------------------


def test_tables_survive_json():
    assert Table.from_dict(json.loads(json.dumps(table().to_dict()))) == table()


def test_the_users_table_comes_before_the_packaged_one_and_the_defaults(
    cache, tmp_path, monkeypatch
):
    default = tiles.block_shapes("blocks", 64)
    assert tiles.user_folder() == cache
    monkeypatch.setattr(tiles, "PACKAGED", tmp_path / "packaged")
    packaged = replace(SHAPE, block_q=64)
    tune.write(table(shapes=(packaged,)), tiles.PACKAGED / "cpu.json")
    assert tiles.block_shapes("blocks", 64) == (packaged,)
    tune.write(table(), cache / "cpu.json")
    assert tiles.block_shapes("blocks", 64) == (SHAPE,)
    assert tiles.block_shapes("blocks", 48) == (SHAPE,)  # 48 channels run padded to 64
    assert tiles.block_shapes("blocks", 128) == default
    assert tiles.block_shapes("blocks", 64, precision="fp8") == default
    assert tiles.launch_options("blocks", 64, 32, 16) == {"num_warps": 4}
    assert tiles.launch_options("blocks", 64, 32, 32) == {}
    plan = plan_attention(TokenLayout.joint(grids=[(12, 12)]), Neighborhood(window=4))
    assert (plan.blocks.block_q, plan.blocks.block_k) == (32, 16)


def test_a_trial_comes_first_and_leaves_nothing(cache):
    before = tiles.block_shapes("blocks", 64)
    with tiles.using(table()):
        assert tiles.block_shapes("blocks", 64) == (SHAPE,)
    assert tiles.block_shapes("blocks", 64) == before


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda d: d | {"version": 2}, "version 1, not 2"),
        (lambda d: {k: v for k, v in d.items() if k != "entries"}, "KeyError"),
        (lambda d: d | {"entries": [d["entries"][0] | {"shapes": []}]}, "no shapes"),
        (lambda d: d | {"entries": [d["entries"][0] | {"impl": "triton"}], "gpu": "x"}, ""),
    ],
    ids=["version", "entries", "shapes", "fine"],
)
def test_a_broken_table_is_left_out_with_a_warning(cache, spoil, words):
    default = tiles.block_shapes("blocks", 64)
    cache.mkdir(parents=True)
    (cache / "cpu.json").write_text(json.dumps(spoil(table().to_dict())))
    tiles.forget_tables()
    if not words:
        assert tiles.block_shapes("triton", 64) == (SHAPE,)
        return
    with pytest.warns(UserWarning, match=words):
        assert tiles.block_shapes("blocks", 64) == default
    with pytest.raises(ValueError, match="visionfuse tune"):
        tiles.read_table(cache / "cpu.json")


@pytest.mark.parametrize(
    ("impl", "sides"), [("gluon_sm90", (256, 128)), ("gluon_sm90", (96, 128)), ("triton", (64, 40))]
)
def test_shapes_that_cannot_run_are_refused(impl, sides):
    shape = replace(SHAPE, block_q=sides[0], block_k=sides[1])
    with pytest.raises(ValueError, match=f"{impl} takes blocks"):
        Entry.from_dict(table(impl=impl, shapes=(shape,)).entries[0].to_dict())


def test_packaged_tables_are_valid_and_of_their_gpu():
    for path in tiles.PACKAGED.glob("*.json"):
        found = tiles.read_table(path)
        assert path.name == tiles.file_name(found.gpu)
        assert all((found.date, found.torch, found.entries))


# -- the fit ----------------------------------------------------------------------------------------


@given(
    st.booleans(),
    *(st.floats(0, 2) for _ in range(2)),
    *(st.floats(0, 200) for _ in range(2)),
    st.floats(1e3, 1e5),
)
def test_fit_finds_the_costs_it_was_made_of(padded, partial, ragged, gather, entry, tile):
    """Times of nine independent plans, made from costs, give these back, whatever was believed."""
    true = BlockShape(
        block_q=128, block_k=64, padded=padded, partial=partial, tile=tile,
        ragged=ragged if padded else 0.0, gather=0.0 if padded else gather,
        entry=0.0 if padded else entry,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    names = cost_model.PADDED if padded else cost_model.UNPADDED
    typical = {"pairs": 1e6, "partial": 5e5, "ragged": 5e5, "gather": 1e4, "entry": 5e3, "tile": 50}
    samples = []
    for share in torch.rand(9, len(names) + 1, generator=generator).tolist():
        counts = {
            name: (0.1 + x) * typical[name]
            for name, x in zip(("pairs", *names), share, strict=True)
        }
        pairs = counts["pairs"] + sum(getattr(true, n) * counts[n] for n in names)
        samples.append((counts, pairs / 2e6))
    blank = BlockShape(block_q=128, block_k=64, padded=padded)
    found, speed, error = cost_model.fit(samples, blank, true)
    assert speed == pytest.approx(2e6, rel=1e-3)
    assert error < 0.03  # costs are kept in two digits, the error is that of the fit before
    for name in names:
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=0.06, abs=1e-6)


def test_noise_keeps_what_was_believed():
    counts = {"pairs": 1.0, "partial": 0.0, "gather": 0.0, "entry": 0.0, "tile": 0.0}
    samples = [(counts | {"pairs": p, "partial": p / 2}, t) for p, t in [(1e6, 9.0), (9e6, 1.0)]]
    prior = replace(SHAPE, partial=0.3)
    found, speed, error = cost_model.fit(samples, SHAPE, prior)
    assert speed > 0
    assert error > 0.5
    assert found.partial >= 0


@pytest.mark.parametrize("short", [True, False])
@given(
    st.sampled_from([64, 128, 192, 256]),
    st.sampled_from([(48, 64), (96, 128), (500,), (16, 24, 32)]),
)
def test_tiles_fit_blocks(short, volume, grid):
    from math import prod

    tile = tune.tile_of(volume, grid, short=short)
    assert prod(tile) <= volume
    assert short or prod(tile) == volume
    subtile = tune.largest_box(volume // 2, tile)
    assert prod(subtile) <= volume // 2
    assert all(t % s == 0 for t, s in zip(tile, subtile, strict=True))


def test_clock_is_that_of_work_not_of_waiting():
    assert (
        tune.clock_at_work([(1980, 120), (1700, 690), (1650, 700), (1980, 110), (1680, 650)])
        == 1680
    )
    assert tune.clock_at_work([]) == 0


@pytest.mark.parametrize("grid", [(96, 128), (36, 48, 64)])
def test_blocks_of_192_and_128_are_tuned_in_columns(grid):
    """Whole entries with windows of whole strides, as no box of 128 keys fits into one of 192 queries."""
    shape = BlockShape(block_q=192, block_k=128, padded=True)
    tile, subtile, unit = tune.cut_of(shape, grid, short=False)
    assert (tile[0], subtile) == (grid[0], None)
    spec = Neighborhood(window=tuple(3 * n for n in unit), stride=unit)
    order = Order(kind="tiled", tile=tile)
    plan = plan_attention(TokenLayout.joint(grids=[grid]), spec, order=order, shape=shape).blocks
    whole = plan.full.count == 128
    assert whole.double().mean() > 0.9
    assert plan.partial.start.numel() < 0.1 * plan.full.start.numel()


# -- the command ------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="tunes the CPU, which a GPU comes before")
def test_tunes_this_machine(cache, tmp_path):
    """For real, on a small grid: what it writes, the planner takes."""
    result = run("--seconds", 60, "--grid", "32x32")
    assert result.exit_code == 0, result.output
    (entry,) = tiles.read_table(cache / "cpu.json").entries
    assert (entry.impl, entry.precision, entry.head_dim) == ("blocks", "model", 64)
    assert {(s.block_q, s.block_k) for s in entry.shapes} == set(tune.SHAPES["blocks"])
    assert entry.shapes[0].speed == 1 >= entry.shapes[-1].speed > 0
    assert tiles.block_shapes("blocks", 64) == entry.shapes
    for shown in ("256x128", "(5000)", "cpu.json"):  # found, before, and where it went
        assert shown in result.output

    other = tmp_path / "other.json"  # entries of other implementations stay
    tune.write(table(impl="triton"), other)
    result = run("--seconds", 60, "--grid", "16x16", "--out", other)
    assert result.exit_code == 0, result.output
    assert {e.impl for e in tiles.read_table(other).entries} == {"blocks", "triton"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="tunes the CPU, which a GPU comes before")
def test_what_time_does_not_allow_is_said_and_nothing_written(cache):
    result = run("--seconds", 0.1, "--grid", "64x64")
    assert result.exit_code == 2
    assert "left out, --seconds is used up" in result.output
    assert not cache.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="tunes the CPU, which a GPU comes before")
def test_dry_run_writes_nothing(cache):
    result = run("--dry-run")
    assert result.exit_code == 0
    assert "blocks, fp32, head dim 64: 3 variants" in result.output
    assert not cache.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--impl", "fast"], ["fast", "Choose from"]),
        (["--out", "x.txt"], ["x.txt", ".json"]),
        (["--grid", "axb"], ["axb", "64x64"]),
    ],
    ids=lambda a: "_".join(a),
)
def test_says_what_is_wrong(cache, arguments, words):
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    for word in words:
        assert word in " ".join(result.stderr.split())
