"""The table of density against fidelity and PSNR: the shipped model draws a few small pictures."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image

from visionfuse.bench.readme import fill_tables
from visionfuse.kernels.plan import Neighborhood, TokenLayout, plan_attention
from visionfuse.pipelines.eval_fidelity import COLUMNS, Variant, main, summary
from visionfuse.shapes import held_out_scenes

ROOT = Path(__file__).resolve().parents[1]
MODEL = str(ROOT / "assets" / "flux-micro")
TEXT, STEPS, SEED = 32, 3, 5
SIDES = {128: 2, 160: 3}  # pixels, batch
HALF = "gna density=0.5 stride=4 dense_steps=1"
SOME_LAYERS = "gna window=8x8 stride=4 dense_steps=2 dense_layers=2"
VARIANTS = (HALF, SOME_LAYERS, "auto", "gna")
ARGUMENTS = (
    MODEL, "--side", *map(str, SIDES), "--batch", *map(str, SIDES.values()), "--captions", "3",
    "--steps", str(STEPS), "--text-length", str(TEXT), "--seed", str(SEED), "--device", "cpu",
    "--dtype", "float32",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What one process wrote: fidelity.csv, all.json and sheets/."""
    folder = tmp_path_factory.mktemp("fidelity")
    main(
        [*ARGUMENTS, "--variants", *VARIANTS, "stock", "--csv", str(folder / "fidelity.csv"),
         "--json", str(folder / "all.json"), "--sheets", str(folder / "sheets"), "--note", "a, b"]
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def rows(folder) -> dict[tuple[int, str], dict[str, str]]:
    with (folder / "fidelity.csv").open(newline="") as file:
        listed = list(csv.DictReader(file))
    found = {(int(row["size"]), f"{row['recipe']} {row['options']}".strip()): row for row in listed}
    assert list(found) == [(side, run) for side in SIDES for run in ("stock", *VARIANTS)]
    assert len(found) == len(listed)  # stock once a side, although it was asked for too
    return found


def pictures(folder: Path, side: int, run: str) -> np.ndarray:
    """The three pictures of a run, from its sheet."""
    with Image.open(folder / "sheets" / f"{side}-{re.sub(r'[ =]', '-', run)}.png") as sheet:
        pixels = np.asarray(sheet)
    return np.stack([pixels[:, i * side : (i + 1) * side] for i in range(3)])


def refused(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stop:
        main([*map(str, arguments)])
    assert stop.value.code == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("side", SIDES)
def test_psnr_is_that_of_the_pictures(folder, rows, side):
    stock = pictures(folder, side, "stock").astype(float)
    for run in (HALF, SOME_LAYERS):
        mse = ((pictures(folder, side, run) - stock) ** 2).mean(axis=(1, 2, 3))
        each = 10 * np.log10(255**2 / mse)
        assert float(rows[side, run]["psnr"]) == pytest.approx(each.mean(), rel=1e-3)
        assert float(rows[side, run]["psnr_p10"]) == pytest.approx(each.min(), rel=1e-3)
        assert 3 < each.min() < 60  # something was left out, and not everything


@pytest.mark.parametrize("side", SIDES)
def test_density_is_that_of_the_plan_in_the_sparse_steps(rows, side):
    layout = TokenLayout.joint(text=TEXT, grids=[(side // 8, side // 8)])
    half = plan_attention(layout, Neighborhood(density=0.5, stride=4)).blocks.density
    window = plan_attention(layout, Neighborhood(window=8, stride=4)).blocks.density
    row = rows[side, HALF]
    assert float(row["density"]) == pytest.approx(half, rel=1e-3)
    assert (row["density_asked"], row["sparse_steps"], row["steps"]) == ("0.5", "2", "3")
    row = rows[side, SOME_LAYERS]  # 2 of the 8 layers stay dense
    assert float(row["density"]) == pytest.approx((2 + 6 * window) / 8, rel=1e-3)
    assert (row["density_asked"], row["sparse_steps"]) == ("", "1")


@pytest.mark.parametrize("run", ["auto", "gna"])
def test_without_a_sparse_step_the_pictures_are_those_of_stock(folder, rows, run):
    for side in SIDES:
        row = rows[side, run]
        assert (row["density"], row["sparse_steps"], row["psnr"]) == ("", "0", "inf")
        assert np.array_equal(pictures(folder, side, run), pictures(folder, side, "stock"))


def test_stock_is_the_stock_pipeline_and_noise_follows_the_caption(folder, rows):
    pipe = FluxPipeline.from_pretrained(MODEL, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    last = held_out_scenes(3, seed=SEED)[2].text
    image = pipe(last, height=128, width=128, num_inference_steps=STEPS, max_sequence_length=TEXT,
                 generator=torch.Generator().manual_seed(SEED + 2)).images[0]  # fmt: skip
    drawn = pictures(folder, 128, "stock")[2].astype(int)
    assert np.abs(drawn - np.asarray(image)).max() <= 1
    for side, batch in SIDES.items():
        row = rows[side, "stock"]
        assert (row["psnr"], row["density"], row["batch"]) == ("", "", str(batch))


def test_rows_name_what_they_were_measured_with(rows):
    for row in rows.values():
        assert (row["suite"], row["case"], row["captions"]) == ("fidelity", "flux-micro", "3")
        assert (row["seed"], row["dtype"], row["note"]) == (str(SEED), "float32", "a, b")
        assert row["gpu"].startswith("CPU")
        assert row["torch"] == torch.__version__
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", row["date"])
        assert 0 <= float(row["right"]) <= 1
        assert float(row["seconds_per_picture"]) > 0


def test_json_has_every_verdict(folder, rows):
    runs = json.loads((folder / "all.json").read_text())
    assert len(runs) == len(rows)
    for run, row in zip(runs, rows.values(), strict=True):
        verdicts = run["verdicts"]
        right = sum(verdict["right"] for verdict in verdicts) / len(verdicts)
        assert right == pytest.approx(float(row["right"]), rel=1e-3)
        assert all(verdict["right"] == (not verdict["reason"]) for verdict in verdicts)
        values = [verdict["psnr"] for verdict in verdicts if "psnr" in verdict]
        if row["psnr"] in ("", "inf"):
            assert values == ([] if row["recipe"] == "stock" else [None] * 3)
        else:
            assert np.mean(values) == pytest.approx(float(row["psnr"]), abs=0.02)


def test_readme_shows_what_was_measured(folder, rows):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    marker = re.search(r"<!-- table: fidelity .*? -->\n", readme)
    assert marker
    table = fill_tables(f"{marker[0]}<!-- /table -->", folder).splitlines()[1:-1]
    assert len(table) == 2 + len(rows)
    cells = [cell.strip() for cell in table[3].split("|")]
    row = rows[128, HALF]
    for shown in ("128", "gna", row["options"], "50%", f"{float(row['density']):.0%}", "2", "3",
                  row["psnr"], row["psnr_p10"]):  # fmt: skip
        assert shown in cells


def test_rows_are_appended(folder, capsys):
    path = folder / "fidelity.csv"
    before = path.read_text()
    main([MODEL, "--side", "128", "--captions", "1", "--steps", "1", "--csv", str(path)])
    assert path.read_text().startswith(before)
    added = path.read_text()[len(before) :].splitlines()
    assert len(added) == 1
    assert "stock" in capsys.readouterr().out
    path.write_text(before)


def test_a_csv_with_other_columns_is_refused_and_kept(tmp_path, capsys):
    path = tmp_path / "old.csv"
    path.write_text("suite,case\n")
    message = refused(capsys, *ARGUMENTS, "--csv", path)
    assert "other columns: suite, case" in message
    assert ", ".join(COLUMNS) in message
    assert path.read_text() == "suite,case\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--variants", "gnu"], ["'gnu'", "'gna'"]),
        (["--variants", "density=0.5"], ["'density=0.5'", "'gna density=0.5 stride=8'"]),
        (["--variants", "gna density"], ["'gna density'", "'gna density=0.5 stride=8'"]),
        (["--variants", ""], ["''", "recipe"]),
        (["--variants", "stock density=0.5"], ["'stock' alone"]),
        (["--variants", "gna densities=0.5"], ["'densities'", "'density'"]),
        (["--variants", "gna density=1.5"], ["density", "1.5"]),
        (["--variants", "gna window=24"], ["window=24", "(16, 16)"]),
        (["--variants", "gna impl=fast"], ["'fast'", "blocks"]),
        (["--variants", "missing.json"], ["missing.json"]),
        (["--side", "130", "--batch", "2"], ["130", "multiple of 8"]),
        (["--captions", "0"], ["--captions", "'0'"]),
        (["--batch", "1", "2", "3"], ["--batch", "3 numbers", "2 sides"]),
        (["--device", "nowhere"], ["'nowhere'"]),
    ],
    ids=lambda a: "_".join(a)[:40],
)
def test_says_what_is_wrong_before_it_draws(capsys, arguments, words):
    message = refused(capsys, *ARGUMENTS, *arguments)
    assert "Traceback" not in message
    for word in words:
        assert word in message


def test_says_what_is_wrong_with_a_model(capsys, tmp_path):
    assert "model_index.json" in refused(capsys, tmp_path)


def test_variant_is_a_recipe_and_its_options():
    assert Variant.parse(" gna  density=0.5   stride=8x4 ") == ("gna", "density=0.5 stride=8x4")
    assert str(Variant.parse("stock")) == "stock"


def test_summary_leaves_equal_pictures_out_of_the_mean():
    infinite = float("inf")
    assert summary([]) == (None, None)
    assert summary([infinite, infinite]) == (infinite, infinite)
    assert summary([30.0, infinite, 20.0]) == (25.0, 20.0)
    assert summary([float(v) for v in range(100)]) == (49.5, 9.0)
