"""The commands, on a tiny FLUX with random weights in a folder."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from time import perf_counter

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

import visionfuse
from visionfuse import cli
from visionfuse.kernels.attention import implementations
from visionfuse.pipelines import compare
from visionfuse.testing_pipelines import flux_pipeline, wan_pipeline

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--height", "32", "--width", "48", "--steps", "3", "--max-sequence-length", "48"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("flux")
    flux_pipeline().save_pretrained(folder)
    return str(folder)


def run(*arguments):
    """The result of a command; an unexpected exception is raised, not swallowed."""
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments], env={"COLUMNS": "200"})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refused(*arguments) -> str:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return " ".join(result.stderr.split())


# -- help and information ---------------------------------------------------------------------------


def test_help_is_quick_and_loads_no_torch():
    code = (
        "import sys; sys.argv = ['visionfuse', '--help']\n"
        "from visionfuse.cli import app\n"
        "try: app()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'triton', 'diffusers', 'numpy', 'PIL'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    start = perf_counter()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    seconds = perf_counter() - start
    assert done.returncode == 0, done.stderr
    assert "generate" in done.stdout
    assert seconds < 5  # 0.4 s on an idle machine; this bound is for a busy one


def commands(group=None, *names: str) -> list[str]:
    """Every command there is: 'generate', 'bench attention' ..."""
    found = group or typer.main.get_command(cli.app)
    if not hasattr(found, "commands"):
        return [" ".join(names)]
    return [
        each for name, inner in found.commands.items() for each in commands(inner, *names, name)
    ]


COMMANDS = commands()


def test_the_commands_are_found():
    assert {"generate", "info", "bench attention"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_in_one_form(command):
    """A sentence on the command, a word on every option, and no --no-... of a flag."""
    result = run(*command.split(), "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output
    parts = command.split()
    found = typer.main.get_command(cli.app)
    for part in parts:
        found = found.commands[part]
    assert found.help
    for option in found.params:
        assert getattr(option, "help", "") or option.param_type_name == "argument", option.name


def test_version():
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout == f"visionfuse {metadata.version('visionfuse')}\n"


def test_info():
    facts = json.loads(run("info", "--json").stdout)
    assert set(facts["attention"]) == set(implementations())
    assert facts["attention"]["blocks"] == {"runs": True, "reasons": []}
    for state in facts["attention"].values():
        assert state["runs"] == (not state["reasons"])
    for name, state in facts["precision"].items():
        assert state["impl"] in implementations()
        assert state["emulated"] == (name != "model" and state["impl"] == "blocks")
    assert facts["packages"]["torch"]
    assert facts["device"]["threads"] >= 1

    text = run("info").stdout
    assert facts["device"]["name"] in text
    assert facts["packages"]["diffusers"] in text


# -- plan -------------------------------------------------------------------------------------------


def test_plan_counts_what_the_mask_shows():
    facts = json.loads(
        run("plan", "--grid", "16x16", "--window", "8x8", "--stride", "4", "--text", "32", "--json")
        .stdout
    )  # fmt: skip
    # Each of 256 image queries sees 64 image keys and the text; the text sees everything.
    assert facts["density"] == pytest.approx((256 * (64 + 32) + 32 * 288) / 288**2)
    assert facts["density"] <= facts["visited_density"] <= 1
    assert facts["tokens"] == 288
    assert "density" in run("plan", "--grid", "16x16", "--density", "0.3").stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--grid", "16x16", "--window", "32"], ["window=32", "(16, 16)"]),
        (["--grid", "16x16", "--window", "4", "--stride", "8"], ["stride=8", "window=4"]),
        (["--grid", "axb", "--window", "4"], ["--grid", "axb", "64x64"]),
        (["--grid", "1x2x3x4", "--window", "1"], ["--grid", "one to three"]),
        (["--grid", "16x16"], ["window", "density"]),
        (["--grid", "16x16", "--window", "4", "--impl", "fast"], ["'fast'", "blocks", "triton"]),
    ],
    ids=lambda a: "_".join(a)[:40],
)
def test_plan_says_what_is_wrong(arguments, words):
    message = refused("plan", *arguments)
    for word in words:
        assert word in message


# -- generate ---------------------------------------------------------------------------------------


def test_compare_writes_picture_and_figures(model, tmp_path):
    out = tmp_path / "new" / "picture.png"
    result = run("generate", model, "a red cube", *SMALL, "--compare", "--window", "8x8",
                 "--stride", "4x4", "--dense-start", "0.34", "--out", out)  # fmt: skip
    assert result.exit_code == 0, result.output
    facts = json.loads(out.with_suffix(".json").read_text())
    assert facts["speedup"] == pytest.approx(facts["stock_s"] / facts["visionfuse_s"], rel=0.02)
    assert facts["options"] == {"window": [8, 8], "stride": [4, 4], "dense_start": 0.34}
    assert 0 < facts["density"] < 0.5
    assert (facts["steps"], facts["planned_steps"]) == (3, 2)
    assert facts["difference"]["largest"] > 0  # something was left out
    for shown in (f"{facts['speedup']:.2f}x", f"{facts['density']:.1%}", "PSNR", out.name):
        assert shown in result.output
    with Image.open(out) as picture:
        assert picture.width > 3 * 48  # stock, visionfuse, difference


def test_compare_of_the_exact_recipe_shows_no_difference(model, tmp_path):
    out = tmp_path / "same.png"
    result = run("generate", model, "a red cube", *SMALL, "--compare", "--recipe", "auto",
                 "--out", out)  # fmt: skip
    assert result.exit_code == 0, result.output
    facts = json.loads(out.with_suffix(".json").read_text())
    assert facts["difference"]["largest"] == 0
    assert facts["difference"]["psnr"] is None
    assert facts["density"] is None


def test_generate_is_the_image_of_the_pipeline(model, tmp_path):
    from diffusers import FluxPipeline

    out = tmp_path / "one.png"
    result = run("generate", model, "a red cube", *SMALL, "--recipe", "auto", "--seed", "3",
                 "--dtype", "float32", "--device", "cpu", "--out", out)  # fmt: skip
    assert result.exit_code == 0, result.output

    pipe = FluxPipeline.from_pretrained(model)
    expected = pipe("a red cube", height=32, width=48, num_inference_steps=3,
                    max_sequence_length=48, generator=torch.Generator().manual_seed(3)).images[0]  # fmt: skip
    with Image.open(out) as image:
        assert np.array_equal(np.asarray(image), np.asarray(expected))


def test_a_saved_recipe_runs(model, tmp_path):
    file = tmp_path / "recipe.json"
    plan = visionfuse.Neighborhood(window=8, stride=4)
    visionfuse.Recipe(name="mine", plan=plan, schedule=visionfuse.Schedule(min_steps=0)).save(file)
    out = tmp_path / "one.png"
    result = run("generate", model, "a red cube", *SMALL, "--recipe", file, "--out", out)
    assert result.exit_code == 0, result.output
    assert "mine" in result.output
    assert out.exists()


def test_dry_run_reads_and_writes_nothing(model, tmp_path):
    out = tmp_path / "one.png"
    result = run("generate", model, "a red cube", *SMALL, "--dry-run", "--window", "8", "--impl", "blocks",
                 "--dense-start", "0.34", "--out", out)  # fmt: skip
    assert result.exit_code == 0, result.output
    for shown in ("16x24", "432", "density", "plan", "dense", "blocks"):
        assert shown in result.output
    assert not out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_precisions_are_emulated_without_a_gpu(model, tmp_path):
    for arguments, name in [
        (["--recipe", "sage"], "int8_fp8+k_thread"),
        (["--recipe", "auto", "--precision", "fp8+smooth_v"], "fp8+smooth_v"),
        (["--window", "8", "--precision", "int8"], "int8"),
    ]:
        shown = run("generate", model, "a red cube", *SMALL, "--dry-run", *arguments).output
        assert f"{name}, emulated" in shown
    out = tmp_path / "one.png"
    result = run("generate", model, "a red cube", *SMALL, "--recipe", "sage", "--out", out)
    assert result.exit_code == 0, result.output
    assert "int8_fp8+k_thread, emulated" in result.output
    assert out.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--recipe", "gnu"], ["'gnu'", "'gna'", "auto"]),
        (["--option", "windows=8"], ["'windows'", "'window'"]),
        (["--option", "window"], ["key=value", "'window'"]),
        (["--option", "window=8", "--window", "8"], ["window", "twice"]),
        (["--window", "32x32"], ["window=32", "(16, 24)"]),
        (["--window", "8x8x8"], ["(8, 8, 8)", "3 values"]),
        (["--density", "1.5"], ["density", "1.5"]),
        (["--dense-start", "2"], ["dense_start", "2.0"]),
        (["--impl", "fast"], ["'fast'", "blocks"]),
        (["--dtype", "int8"], ["'int8'", "float32"]),
        (["--device", "nowhere"], ["'nowhere'"]),
        (["--height", "33"], ["height=33", "multiple"]),
        (["--precision", "fp9"], ["'fp9'", "'int8_fp8'"]),
        (["--recipe", "sage", "--precision", "fp8"], ["no option 'precision'", "qk"]),
        (["--out", "picture.txt"], ["--out", ".png", "picture.txt"]),
        (["--recipe", "missing.json"], ["missing.json"]),
    ],
    ids=lambda a: "_".join(a)[:40],
)
def test_generate_says_what_is_wrong(model, arguments, words):
    message = refused("generate", model, "a red cube", *SMALL, *arguments)
    for word in words:
        assert word in message


def test_generate_says_what_is_wrong_with_a_model(tmp_path):
    assert "model_index.json" in refused("generate", tmp_path)
    assert "no folder" in refused("generate", "./not/there")
    (tmp_path / "model_index.json").write_text('{"_class_name": "AudioLDMPipeline"}')
    assert "AudioLDMPipeline" in refused("generate", tmp_path)


def test_a_model_of_videos_makes_one(model, tmp_path):
    wan_pipeline().save_pretrained(tmp_path / "wan")
    small = ("--height", 64, "--width", 64, "--frames", 5, "--max-sequence-length", 16)
    asked = (
        "generate",
        tmp_path / "wan",
        "a red cube",
        *small,
        "--dense-start",
        0,
        "--density",
        0.5,
    )
    out = tmp_path / "clip.mp4"
    assert "2x4x4 = 32" in run(*asked, "--out", out, "--dry-run").stdout
    assert not out.exists()
    said = run(*asked, "--out", out, "--steps", 2, "--compare")
    assert said.exit_code == 0, said.output
    assert "follow the plan" in said.stdout
    assert "PSNR" in said.stdout
    assert b"ftyp" in out.read_bytes()[:16]
    assert ".mp4" in refused(*asked, "--out", tmp_path / "clip.png")
    assert "--frames is for videos" in refused(
        "generate", model, "a red cube", *SMALL, "--frames", 5
    )


def test_script_form_takes_the_same_options(model):
    done = subprocess.run(
        [sys.executable, "pipelines/flux.py", model, "a red cube", *SMALL, "--window", "8", "--dry-run"],
        cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "16x24" in done.stdout


# -- parsing and comparing --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("32x32", (32, 32)), ("-x16x16", (None, 16, 16)), ("8", 8), ("0.5", 0.5), ("1e-2", 0.01),
        ("true", True), ("None", None), ("tiled", "tiled"), ("matrix", "matrix"),
    ],
)  # fmt: skip
def test_parse_value(text, value):
    assert cli.parse_value(text) == value
    assert type(cli.parse_value(text)) is type(value)


def test_difference_of_known_images():
    black, grey = (Image.new("RGB", (32, 16), (level,) * 3) for level in (0, 10))
    change = compare.difference(black, grey)
    assert change.psnr == pytest.approx(20 * np.log10(255 / 10))
    assert (change.mean, change.largest) == (10, 10)
    assert change.ssim < 0.1
    same = compare.difference(grey, grey)
    assert same.psnr == float("inf")
    assert same.ssim == pytest.approx(1)
    assert np.asarray(compare.amplified_difference(black, grey, 4)).max() == 40
    with pytest.raises(ValueError, match=r"\(32, 16\) and \(16, 32\)"):
        compare.difference(black, black.rotate(90, expand=True))


@pytest.mark.parametrize("width", [48, 512])
def test_side_by_side_shows_every_panel(width):
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    panels = [("a title " * 9, "a line " * 20, Image.new("RGB", (width, width), c)) for c in colors]
    sheet = compare.side_by_side(panels, "a footer " * 60)
    found = {color: count for count, color in sheet.getcolors(1 << 20)}
    for color in colors:
        assert found[color] >= width * width
