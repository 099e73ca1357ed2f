"""pipelines/vit.py: pictures, training that goes on with equal losses, evaluation, times, help."""

from __future__ import annotations

import csv

import pytest
import torch
from accelerate.state import AcceleratorState

from visionfuse.pipelines import vit
from visionfuse.pipelines.vit import CLASSES, Check, Pictures
from visionfuse.shapes import accuracy, score

MODELS = ("kat_tiny_patch16_224", "vit_tiny_patch16_224")
TINY = ("--model-kwargs", "depth=1", "embed_dim=32", "num_heads=2", "drop_path_rate=0.2")


@pytest.fixture
def run(monkeypatch, tmp_path):
    def call(*arguments, out="a"):
        AcceleratorState._reset_state(reset_partial_state=True)  # a run is a process of its own
        more = ["--out", str(tmp_path / out)] if arguments[0] != "time" else []
        monkeypatch.setattr("sys.argv", ["vit.py", *arguments, *more, "--device", "cpu"])
        vit.main()
        path = tmp_path / out / "curves.csv"
        return list(csv.DictReader(path.open())) if path.exists() else []

    return call


def test_pictures_are_of_their_class():
    """Read back from the pixels; equal seeds draw equal pictures."""
    pictures = Pictures(128, torch.device("cpu"))
    images, labels = pictures.batch(24, seed=3)
    assert torch.equal(images, pictures.batch(24, seed=3)[0])
    assert not torch.equal(images, pictures.batch(24, seed=4)[0])
    assert images.shape == (24, 3, 128, 128)
    assert images.min() >= -1
    assert images.max() <= 1
    assert accuracy(score(images / 2 + 0.5, [CLASSES[i].text for i in labels])) > 0.95
    assert len(set(pictures.batch(1000, seed=0)[1].tolist())) == len(CLASSES) == 48


def test_training_goes_on_with_equal_losses(run, tmp_path, capsys):
    settings = ("--side", "32", "--batch", "8", "--steps", "6", "--every", "2", "--pictures", "16")
    train = ("train", *MODELS, "--seeds", "0", "1", *settings, *TINY)
    whole = run(*train, out="whole")
    run(*train, "--stop-at", "4", out="parts")
    parts = run(*train, "--resume", out="parts")
    assert len(whole) == 2 * 2 * 3
    for a, b in zip(whole, parts, strict=True):
        assert {**a, "images_per_s": ""} == {**b, "images_per_s": ""}
    assert len({row["loss"] for row in whole}) == len(whole)
    assert "Held-out pictures" in capsys.readouterr().out
    assert (tmp_path / "parts" / "curves.png").stat().st_size > 10_000
    run("evaluate", "--pictures", "32", out="parts")
    assert "32 pictures" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="was trained with another batch"):
        run(*train, "--batch", "4", "--resume", out="parts")


def test_it_learns_what_it_is_shown(run):
    """Better than chance after a few steps of a small network."""
    settings = (
        "--side",
        "32",
        "--batch",
        "32",
        "--steps",
        "40",
        "--every",
        "20",
        "--pictures",
        "8",
    )
    first, last = run("train", "test_resnet", "--lr", "1e-2", *settings)
    assert float(last["loss"]) < float(first["loss"]) - 0.1


def test_dry_run_of_every_command(run, capsys, tmp_path):
    rows = run("train", MODELS[0], "medvit_tiny", "--dry-run", "--mixed-precision", "bf16")
    assert [row["step"] for row in rows] == ["2", "4"] * 2
    path = tmp_path / "rows.csv"
    run("time", MODELS[0], "--dry-run", "--csv", str(path))
    assert "training" in capsys.readouterr().out
    assert [row["direction"] for row in csv.DictReader(path.open())] == ["forward", "both"]
    with pytest.raises(SystemExit, match="no runs"):
        run("evaluate", out="nothing")


def test_bands_have_all_seeds(tmp_path):
    checks = [
        Check(model=m, seed=s, step=n, loss=1.0, accuracy=0.1 * s, images_per_s=5)
        for m in "ab"
        for s in (0, 1)
        for n in (1, 2)
    ]
    assert [len(c) for c in vit.by_model(checks)["a"].values()] == [2, 2]
    vit.plot(checks, tmp_path / "x.png")
    vit.show(checks)


def test_help_names_the_commands(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["vit.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        vit.main()
    shown = capsys.readouterr().out
    assert all(f"\n    {name}" in shown for name in ("train", "evaluate", "time"))
