"""The path of somebody who meets the project: a clone, `make demo`, the app, a recipe and a model of their own."""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    "--height",
    "128",
    "--width",
    "128",
    "--steps",
    "3",
    "--max-sequence-length",
    "64",
    "--device",
    "cpu",
]
SMALL_VIDEO = ["--height", "64", "--width", "64", "--frames", "5", "--steps", "2"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """What git would hand out, and the packages of this environment: an installation takes minutes and gigabytes."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True,
        text=True,
    )  # fmt: skip
    if listed.returncode:
        pytest.skip("this is no clone: git knows no files here")
    folder = tmp_path_factory.mktemp("stranger") / "visionfuse"
    for name in filter(None, listed.stdout.split("\0")):
        source, copy = ROOT / name, folder / name
        if source.is_symlink() or source.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy, follow_symlinks=False)
    return folder


def run(command: list, clone: Path) -> str:
    """In the clone, with the clone's own package. Returns what was said."""
    env = os.environ | {"PYTHONPATH": str(clone), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    done = subprocess.run(
        list(map(str, command)), cwd=clone, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def visionfuse(*words, clone: Path) -> str:
    return run([sys.executable, "-m", "visionfuse.cli", *words], clone)


def test_make_demo(clone):
    """What `make demo` runs after its installation, on a smaller picture."""
    said = subprocess.run(
        ["make", "-n", "demo"], cwd=clone, capture_output=True, text=True, check=True
    ).stdout
    commands = [
        shlex.split(line)[1:]
        for line in said.replace("\\\n", " ").splitlines()
        if "visionfuse generate" in line
    ]
    for words in commands:
        more = [*SMALL, "--repeats", "1"] if "demo.png" in words else SMALL_VIDEO
        said = visionfuse(*words, *more, clone=clone)
        assert ("speed-up" if "demo.png" in words else "Video: demo.mp4") in said
    assert Image.open(clone / "demo.png").width > 1000
    assert json.loads((clone / "demo.json").read_text())["recipe"] == "gna"
    assert (clone / "demo.mp4").is_file()


def save_a_recipe(clone) -> str:
    code = """
from visionfuse import Neighborhood, Recipe, Schedule
Recipe(name="mine", plan=Neighborhood(window=8, stride=4), schedule=Schedule(min_steps=0)).save("mine.json")
"""
    run([sys.executable, "-c", code], clone)
    return (clone / "mine.json").read_text()


def test_a_recipe_of_their_own(clone):
    save_a_recipe(clone)
    said = visionfuse(
        "generate",
        "assets/flux-micro",
        "a red circle",
        *SMALL,
        "--recipe",
        "mine.json",
        clone=clone,
    )
    assert "mine" in said
    assert "8 of 8 layers follow the plan" in said
    assert (clone / "out.png").is_file()


def test_a_model_of_their_own(clone):
    page = (clone / "assets" / "docs" / "add-a-model.md").read_text(encoding="utf-8")
    steps = re.findall(r"<!-- run -->\n```python\n(.*?)```", page, re.DOTALL)
    assert len(steps) == 3
    assert len(steps[1].splitlines()) < 60  # the site
    assert "2 of 2 layers follow the plan" in run([sys.executable, "-c", "\n".join(steps)], clone)


def test_the_app(clone, tmp_path):
    gradio_client = pytest.importorskip(
        "gradio_client", reason="the app needs Gradio: pip install visionfuse[demo]"
    )
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    env = os.environ | {"PYTHONPATH": str(clone)}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "visionfuse.cli", "demo", "--port", str(port)], cwd=clone, env=env, stdout=log,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        for _ in range(900):
            if "Open http" in (tmp_path / "log").read_text():
                break
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.2)
        client = gradio_client.Client(
            f"http://127.0.0.1:{port}",
            download_files=tmp_path,
            verbose=False,
            analytics_enabled=False,
        )
        mine = save_a_recipe(clone)
        _, _, said, *_ = client.predict(
            "flux-micro", "a red circle", 128, 3, 0, mine, api_name="/image_compare"
        )
        assert "In 3 of 3 steps" in said
    finally:
        process.terminate()
        process.wait(20)
