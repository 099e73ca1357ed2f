"""`visionfuse simulate`: what it prints, writes, draws and refuses."""

import csv
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from visionfuse import cli

ENGINE = Path(__file__).resolve().parents[1] / "assets" / "bench" / "engine.csv"
HUNYUAN = ("--grid", "30x48x80", "--window", "18x24x24")


def run(*arguments, columns="80"):
    result = CliRunner().invoke(
        cli.app, ["simulate", *map(str, arguments)], env={"COLUMNS": columns}
    )
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_a_neighbourhood_in_words_and_in_json():
    words = run("--grid", "64x64", "--window", "24x24", "--stride", 8, "--text", 512)
    assert words.exit_code == 0
    found = json.loads(
        run("--grid", "64x64", "--window", "24x24", "--stride", 8, "--text", 512, "--json").stdout
    )
    assert found["tokens"] == 64 * 64 + 512
    assert found["full"] + found["partial"] == found["visited"]
    assert found["speedup"] == pytest.approx(found["dense_ms"] / found["ms"])
    assert f"{found['ms']:.3g} ms on NVIDIA H200" in words.stdout
    assert f"{found['visited']:,} tiles" in words.stdout


def test_another_gpu_says_that_it_was_not_measured():
    words = run("--grid", "64x64", "--window", "24x24", "--gpu", "rtx 4090").stdout
    assert "derived, not measured" in words
    assert "triton" in words  # what runs there, unasked
    found = json.loads(
        run("--grid", "64x64", "--window", "24x24", "--gpu", "A100", "--json").stdout
    )
    assert found["gpu"] == "NVIDIA A100-SXM4-80GB"
    assert "not measured" in found["speed"]
    refused = run("--grid", "64x64", "--window", "24x24", "--gpu", "A100", "--impl", "gluon_sm90")
    assert refused.exit_code == 2
    assert "triton model at head dim 128" in refused.stderr


def test_tiles_of_ones_own_give_the_papers_bound():
    found = run(*HUNYUAN, "--stride", "1x8x8", "--q-tile", "4x8x8", "--kv-tile", "2x8x8")
    assert "9.09x" in found.stdout


def test_search_fits_80_columns_and_writes_a_csv(tmp_path):
    out = tmp_path / "found.csv"
    result = run("--grid", "48x48", "--density", 0.25, "--search", "--count", 3, "--csv", out)
    assert result.exit_code == 0, result.output
    assert "…" not in result.stdout  # rich's mark of a cell that was cut off
    with out.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3
    assert all(row["window"] in result.stdout for row in rows)


def test_pictures(tmp_path):
    plot = tmp_path / "measured.png"
    assert run("--measured", ENGINE, "--plot", plot).exit_code == 0
    assert plot.stat().st_size > 10_000
    plot = tmp_path / "search.svg"
    result = run("--grid", "32x32", "--density", 0.3, "--search", "--count", 1, "--plot", plot)
    assert result.exit_code == 0
    assert "<svg" in plot.read_text()


def test_measured_rows():
    rows = json.loads(run("--measured", ENGINE, "--json").stdout)
    assert {"gluon_sm90", "triton", "cudnn"} == {row["impl"] for row in rows}
    assert all(row["predicted_ms"] > 0 for row in rows)


@pytest.mark.parametrize(
    "arguments",
    [
        (*HUNYUAN, "--stride", 1),
        ("--grid", "48x48", "--density", 0.25, "--search"),
        ("--measured", ENGINE),
    ],
    ids=["one", "search", "measured"],
)
def test_dry_run_writes_nothing(arguments, tmp_path):
    out = tmp_path / "x.csv"
    result = run(*arguments, "--csv", out, "--dry-run")
    assert result.exit_code == 0
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--grid is needed"),
        (("--grid", "64x64"), "either window"),
        (("--grid", "8x8", "--window", 9), "does not fit"),
        ((*HUNYUAN, "--gpu", "GTX 970"), "Nothing is known of the GPU 'GTX 970'"),
        ((*HUNYUAN, "--impl", "blocks"), "The speed of blocks"),
        ((*HUNYUAN, "--q-tile", "4x8x8"), "both --q-tile and --kv-tile"),
        ((*HUNYUAN, "--q-tile", "8x8", "--kv-tile", "8x8"), "other axes"),
        ((*HUNYUAN, "--search", "--density", 0.1), "give --density, and none of these"),
        ((*HUNYUAN, "--plot", "x.png"), "--search or --measured"),
        (("--grid", "64x64", "--density", 0.1, "--search", "--plot", "x.txt"), ".png"),
        (("--measured", "nowhere.csv"), "nowhere.csv"),
    ],
    ids=lambda x: "_".join(map(str, x)) if isinstance(x, tuple) else "",
)
def test_says_what_is_wrong(arguments, words):
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert words in " ".join(result.stderr.split())
    assert "Traceback" not in result.output
