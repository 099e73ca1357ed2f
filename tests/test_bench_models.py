"""The benchmarks of KANs and of whole models: their rows, on tiny cases."""

from __future__ import annotations

import csv

import pytest
import torch
from torch import nn

from visionfuse.bench import medvit, rational
from visionfuse.bench.models import inference, measure_models, training

CPU = torch.device("cpu")


def rows(main, path, monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["bench", "--device", "cpu", "--csv", str(path), *arguments])
    main()
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_of_the_activation(tmp_path, monkeypatch):
    found = rows(rational.main, tmp_path / "rational.csv", monkeypatch)
    assert [(r["impl"], r["direction"]) for r in found] == [
        ("copy", "forward"), ("visionfuse", "forward"), ("copy", "backward"), ("visionfuse", "backward")
    ]  # fmt: skip
    assert {r["suite"] for r in found} == {"rational"}
    assert float(found[1]["rel_l1"]) < 1e-6
    assert "coefficient gradients off by" in found[3]["note"]


def test_rows_of_the_kan_layer(tmp_path, monkeypatch):
    found = rows(medvit.main, tmp_path / "medvit.csv", monkeypatch, "--layer", "--models")
    assert [r["impl"] for r in found] == ["formula", "visionfuse"] * 2
    assert found[1]["baseline"] == "formula"
    assert float(found[1]["rel_l1"]) < 8e-3


@pytest.mark.parametrize("prepare", [training, inference])
def test_rows_of_whole_models(prepare):
    def build():
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 1000))

    found = measure_models(
        "tiny", {"one": build, "two": build}, prepare, batch=2, side=8, suite="s", device=CPU, seconds=0.0
    )  # fmt: skip
    assert [(r.impl, r.baseline) for r in found] == [("one", ""), ("two", "one")]
    assert found[1].speedup == pytest.approx(found[0].ms / found[1].ms)
    assert found[0].direction == ("both" if prepare is training else "forward")


def test_the_three_ways_of_medvit_agree(monkeypatch):
    """`compare` passes, and stops a benchmark of a model that computes something else."""
    import timm

    create = timm.create_model
    tiny = {"depths": (1, 1, 3, 1), "dims": (32, 128, 128, 128), "stem_chs": (8, 8, 16)}
    monkeypatch.setattr(timm, "create_model", lambda name, **o: create(name, **tiny, **o))
    medvit.compare("medvit_tiny", CPU)
    monkeypatch.setitem(medvit.MOST_ERROR, "float32", 0.0)
    with pytest.raises(RuntimeError, match="differs from the formula"):
        medvit.compare("medvit_tiny", CPU)
