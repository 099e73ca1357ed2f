"""Every command of README and of the pages is one, and runs: as it is written, made small by arguments behind it.

Models that are named on the Hub stand under their names as folders where the commands run, so that those need no
change: the small FLUX of the repository, and Wan with random weights. What only a GPU can do says here what it would.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.metadata import metadata
from pathlib import Path

import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from visionfuse import cli, recipes

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted(ROOT.glob("assets/docs/*.md")), *sorted(ROOT.glob("assets/*/README.md")),
]  # fmt: skip
BASH = re.compile(r"```bash\n(.*?)```", re.DOTALL)
# In the text: with a word behind the command, or else it is only its name.
QUOTED = re.compile(r"`((?:visionfuse|python) [^`\s]+ [^`]+|make [^`]+)`")
HUB = re.compile(r"[\w.-]+/[\w.-]+")  # owner/name, where no such folder is here
# Commands that end by themselves in a moment; others are asked what they would do, where they can say.
QUICK = ("info", "plan")


def commands() -> list[tuple[str, str]]:
    """(page, command) of every line in a bash block, without comments and with its continuation lines, and of what
    the text quotes."""
    found = set()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = [
            line for block in BASH.findall(text) for line in block.replace("\\\n", " ").splitlines()
        ]
        quoted = [line for line in QUOTED.findall(text) if "..." not in line]
        name = (
            page.name
            if page.parent.name in (ROOT.name, "docs")
            else f"{page.parent.name}/{page.name}"
        )
        for line in lines + quoted:
            if words := shlex.split(line, comments=True):
                found.add((name, shlex.join(words)))
    return sorted(found)


COMMANDS = commands()


def test_there_are_commands():
    assert len(COMMANDS) > 40
    assert {page for page, _ in COMMANDS} >= {"README.md", "index.md", "app.md", "troubleshoot.md"}


# -- they are commands --------------------------------------------------------------------------------


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=lambda text: text[:60])
def test_commands(page, command):
    program, *words = shlex.split(command)
    check = {"visionfuse": _visionfuse, "make": _make, "python": _script, "pip": _pip}.get(program)
    assert check, f"{page}: nothing here knows how to check {command!r}"
    check(words)


def _visionfuse(words: list[str]) -> None:
    found, rest = typer.main.get_command(cli.app), list(words)
    while hasattr(found, "commands"):
        found = found.commands[rest.pop(0)]
    if "--help" in rest:
        return
    found.make_context(found.name, list(rest))  # raises for what is no option, or a wrong value
    options = {option for parameter in found.params for option in parameter.opts}
    if any(HUB.fullmatch(word) and not (ROOT / word).exists() for word in rest):
        return
    if "--dry-run" in options:
        words = [*words, "--dry-run"]
    elif found.name not in QUICK:
        return
    if "--recipe" in rest and rest[rest.index("--recipe") + 1].endswith(".json"):
        return
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 0, result.output


def _make(words: list[str]) -> None:
    _lines_of(words[0])


def _lines_of(target: str) -> list[str]:
    """The commands of a target of the Makefile, as they would run."""
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.replace("\\\n", " ").splitlines()


def _script(words: list[str]) -> None:
    """The script is there and has these options."""
    if words[0] == "-m":
        assert (ROOT / (words[1].replace(".", "/") + ".py")).is_file()
        return
    source = (ROOT / words[0]).read_text(encoding="utf-8")
    for word in words[1:]:
        if word.startswith("--"):
            named = word.removeprefix("--").replace("-", "_")
            assert word in source or re.search(rf"\b{named}: ", source), f"{words[0]} has no {word}"


def _pip(words: list[str]) -> None:
    extras = metadata("visionfuse").get_all("Provides-Extra") or []
    for asked in re.findall(r"visionfuse\[([\w,]+)\]|\.\[([\w,]+)\]", " ".join(words)):
        assert set("".join(asked).split(",")) <= set(extras)


# -- they run -----------------------------------------------------------------------------------------

IMAGE = "--height 128 --width 128 --max-sequence-length 64"
VIDEO = "--height 64 --width 64 --frames 9"
SHAPES = "--side 32 --device cpu"
TINY_KAT = "--model-kwargs depth=1 embed_dim=32 num_heads=2"
# Commands that begin so -> what comes behind them; the first that fits. Of options given twice the second counts.
SMALL = {
    "visionfuse info": "",
    "visionfuse plan": "",
    "visionfuse simulate": "",
    "visionfuse tune --help": "",
    "visionfuse tune": "--seconds 20 --impl blocks --grid 8x8 --out tuned.json",
    "visionfuse bench": "--dry-run",
    "visionfuse demo": "--port PORT",
    "visionfuse generate assets/wan": f"{VIDEO} --steps 2 --device cpu",
    "visionfuse generate": f"{IMAGE} --steps 3 --device cpu",
    "visionfuse calibrate ./my-wan --prompts prompts.txt --by-head": f"{VIDEO} --steps 4 --measure 1 --held-out 0 --phases 2 --by-head 0.6",
    "visionfuse calibrate ./my-wan": f"{VIDEO} --steps 4 --measure 1 --held-out 0 --phases 2",
    "visionfuse calibrate": f"{IMAGE} --steps 4 --measure 1 --held-out 0 --phases 2",
    "visionfuse profile wan": "--size 64x64x5 --layers 1 --device cpu",
    "visionfuse profile vit": "--batch 1 --layers 1 --device cpu",
    "visionfuse profile": "--size 64x64 --layers 1 --device cpu",
    "python -m visionfuse.bench.readme": "--check",
    "python pipelines/export_kernels.py": "",
    "python pipelines/eval_fidelity.py": "--dry-run",
    "python pipelines/eval_video.py": f"{SHAPES} --captions 1 --seeds 0 --steps 2 --batch 1",
    "python pipelines/scale_dit_fidelity.py": "--side 256 --captions 1 --ways enlarged 'scale_dit, low band' --batch 1 --device cpu",
    "python pipelines/train_scale_dit.py": "--size 64x64 --steps 1 --batch 1 --accumulate 1 --text-length 24 --device cpu",
    "python pipelines/train_wan_micro.py": f"{SHAPES} --dry-run --batch 2 --videos 4 --steps 1 --check-captions 1",
    "python pipelines/train_wan.py": "--height 32 --width 32 --videos 2 --held-out 2 --batch 1 --minutes 0.01 --device cpu",
    "python pipelines/vit.py train": f"--seeds 0 --side 32 --batch 2 --steps 2 --device cpu {TINY_KAT}",
    "python pipelines/vit.py time": "--batch 1 --device cpu",
    "python pipelines/wan.py --benchmark": "--model wan2.1-1.3b --size 64x64 --frames 5 --layers 1 --device cpu",
    "python pipelines/wan.py --dry-run": "--height 256 --width 256 --frames 33",
    "python pipelines/wan.py": f"{VIDEO} --steps 2 --max-sequence-length 16 --device cpu",
}  # fmt: skip
# A smaller model where a size does not make one small: a layer of FLUX.1-dev has 340 million weights.
INSTEAD = {"profile flux.1-dev": "profile black-forest-labs/FLUX.1-dev"}
# What `make` does beside its installation is run by these tests.
MAKE = {
    "demo": "test_stranger.py::test_make_demo",
    "demo-app": "test_stranger.py::test_the_app",
    "docs": "test_docs.py::test_every_page_is_there",
    "test": "test_docs_commands.py::test_the_tests_are_found",
    "test-all": "test_docs_commands.py::test_the_tests_are_found",
    "test-timm": "test_run_timm_tests.py::test_our_models_are_registered_and_theirs_left_out",
    "test-gpu": "test_run_on_gpu.py::test_runs_a_file_and_keeps_a_log",
    "bench-cpu": "test_docs_commands.py::test_make_bench_cpu",
}


@pytest.fixture(scope="module")
def furnished(tmp_path_factory):
    """A folder with all that the commands name."""
    from diffusers import WanImageToVideoPipeline

    from visionfuse.pipelines import wan_micro
    from visionfuse.testing_pipelines import wan_pipeline

    here = tmp_path_factory.mktemp("workplace")
    for name in ("assets", "pipelines", "tests"):
        (here / name).symlink_to(ROOT / name)
    for name in ("FLUX.1-dev", "FLUX.1-schnell"):
        (here / "black-forest-labs").mkdir(exist_ok=True)
        (here / "black-forest-labs" / name).symlink_to(ROOT / "assets" / "flux-micro")
    for name in ("my-wan", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"):
        wan_pipeline().save_pretrained(here / name)
    wan_pipeline(
        WanImageToVideoPipeline, extra={"image_encoder": None, "image_processor": None}, in_channels=36,
    ).save_pretrained(here / "Wan-AI" / "Wan2.1-I2V-14B-480P-Diffusers")  # fmt: skip
    torch.manual_seed(0)
    micro = wan_micro.build(width=64, layers=2, vae_width=8)
    wan_micro.save(micro, here / "runs" / "wan-micro" / "model")
    (here / "prompts.txt").write_text("a red circle\na blue star\n")
    recipes.build("gna", density=0.5).save(here / "flux-2k.json")
    (here / "photos").mkdir()
    for file in ("street.png", "photos/street.png"):
        Image.new("RGB", (96, 64), (120, 80, 40)).save(here / file)
    (here / "photos" / "street.txt").write_text("a street")
    return here


@pytest.fixture
def workplace(furnished, tmp_path):
    """A copy for one command, whose results are in nobody's way."""
    return shutil.copytree(furnished, tmp_path / "workplace", symlinks=True)


def run(command: str, here: Path) -> str:
    """As in a shell whose `python` and `visionfuse` are those of this environment."""
    program, *words = shlex.split(command)
    start = (
        [sys.executable, "-m", "visionfuse.cli"] if program == "visionfuse" else [sys.executable]
    )
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run(
        [*start, *words], cwd=here, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def more_for(command: str) -> str | None:
    """What makes it small; None where nothing here knows."""
    return next((more for start, more in SMALL.items() if command.startswith(start)), None)


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=lambda text: text[:60])
def test_a_test_runs_it(page, command):
    """Which of them do is told here; that they run takes minutes."""
    program, *words = shlex.split(command)
    known = {"make": words[0] in MAKE, "pip": True}.get(program, more_for(command) is not None)
    assert known, f"{page}: nothing here knows how to run {command!r}: see SMALL and MAKE"


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", sorted({command for _, command in COMMANDS}), ids=lambda text: text[:70]
)
def test_they_run(command, workplace):
    if command.startswith("pip "):
        pytest.skip("installations are what tests/test_packaging.py is about")
    if command.startswith("make "):
        assert command.split()[1] in MAKE
        return
    for name, smaller in INSTEAD.items():
        command = command.replace(name, smaller)
    more = more_for(command)
    if command.startswith("visionfuse demo"):
        _served(command, workplace)
        return
    if "--resume" in command:
        run(f"{command.replace(' --resume', '')} {more}", workplace)
    run(f"{command} {more}", workplace)


def _served(command: str, here: Path) -> None:
    """The app starts, answers, and ends when it is told to."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    words = [sys.executable, "-m", "visionfuse.cli", *shlex.split(command)[1:], "--port", str(port)]
    with (here / "log").open("w") as log:
        process = subprocess.Popen(words, cwd=here, stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(900):
            if "Open http" in (here / "log").read_text():
                break
            assert process.poll() is None, (here / "log").read_text()
            time.sleep(0.2)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=20) as page:
            assert b"visionfuse" in page.read()
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.slow
def test_make_bench_cpu(workplace):
    lines = [
        line
        for line in _lines_of("bench-cpu")
        if "visionfuse" in line and "pip install" not in line
    ]
    bench, tables = (line for line in lines if line.startswith(".venv/bin/"))
    words = bench.replace("assets/bench", str(workplace)).removeprefix(".venv/bin/")
    run(f"{words} --shapes tiny --repeats 1", workplace)
    run(tables.removeprefix(".venv/bin/") + " --check", workplace)


@pytest.mark.slow
def test_the_tests_are_found():
    """What `make test` and `make test-all` run, without running it: this is one of them."""
    found = [sys.executable, "-m", "pytest", "--collect-only", "-q"]
    done = subprocess.run(found, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


# -- examples in Python -------------------------------------------------------------------------------

EXAMPLE = re.compile(r"(?<!<!-- run -->\n)```python\n(.*?)```", re.DOTALL)
# What is not for one process on a CPU -> the test that runs it.
ELSEWHERE = {
    "push_to_hub": "test_hub.py::test_cards_push_and_load",
    "gradio_client": "test_demo_server.py::test_explore",
    "init_process_group": "test_parallel.py::test_two_processes_compute_what_one_does",
    "PartialState": "test_parallel.py::test_two_processes_compute_what_one_does",
    "random_weights": "test_benchmark.py::test_rows_of_a_run",
    "compile=True": "test_whole_step.py::test_compiled_int8_layers_share_their_graphs",
    "linear=": "test_whole_step.py::test_layers_by_error_budget",
}
# What an example says -> the same, small.
SMALLER = {
    '"cuda"': '"cpu"', ".cuda().bfloat16()": "", "torch.bfloat16": "torch.float32", "pretrained=True": "pretrained=False",
    "height=2048, width=2048": "height=64, width=64, num_inference_steps=2, max_sequence_length=64",
    "height=4096, width=4096": "height=256, width=256, max_sequence_length=64",
    "height=512, width=512, num_inference_steps=20": "height=64, width=64, num_inference_steps=2",
    "vit_large_patch16_dinov3": "vit_small_patch16_dinov3", "img_size=1024": "img_size=384",
}  # fmt: skip
# Names that an example takes from the text around it.
GIVEN = {
    "sage_attention(q": "q, k, v = torch.randn(3, 1, 2, 64, 32)",
    "neighborhood_attention(q": "q, k, v = torch.randn(3, 1, 18, 24, 24, 1, 8)",
    "rational(x": "x, numerator, denominator, weight = (torch.randn(*n) for n in ((5, 64), (1, 6), (8, 4), (32, 512)))",
    'enable_visionfuse("fps")': "pipe = WanPipeline.from_pretrained('my-wan')",
    "enable_cache": "pipe = FluxPipeline.from_pretrained('assets/flux-micro')",
    "SITES[": "from visionfuse.kernels.plan import TokenLayout\nfrom visionfuse.sites import SITES, Site\n"
              "from visionfuse.sites.order import patch_grid",
}  # fmt: skip
BEFORE = """
import torch, visionfuse
from diffusers import FluxPipeline, WanPipeline
pipe = FluxPipeline.from_pretrained("assets/flux-micro")
"""


def examples() -> dict[str, list[str]]:
    """Of every page those that tests/test_readme.py does not run, and that run on a CPU."""
    found = {}
    for page in PAGES:
        blocks = EXAMPLE.findall(page.read_text(encoding="utf-8"))
        if own := [block for block in blocks if not any(words in block for words in ELSEWHERE)]:
            found[f"{page.parent.name}/{page.name}"] = own
    return found


@pytest.mark.slow
@pytest.mark.parametrize("page", examples())
def test_examples_run(page, workplace):
    code = [BEFORE]
    for block in examples()[page]:
        code += [given for words, given in GIVEN.items() if words in block]
        for large, small in SMALLER.items():
            block = block.replace(large, small)
        code.append(block)
    (workplace / "example.py").write_text("\n".join(code))
    run("python example.py", workplace)


def test_what_runs_elsewhere_is_there():
    for place in {*ELSEWHERE.values(), *MAKE.values()}:
        file, _, name = place.partition("::")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), place
