"""The training script end to end for a few steps, and the parts whose mistakes would not show there."""

import json
import math

import pytest
import torch

from visionfuse.pipelines import flux_micro_text, train_flux_micro
from visionfuse.pipelines.flux_micro import build
from visionfuse.pipelines.flux_micro_data import Data
from visionfuse.pipelines.flux_micro_text import NonceWords, answers
from visionfuse.pipelines.train_flux_micro import PLAN, Alignment, Phase, _phase
from visionfuse.shapes import arrange, pack, parse
from visionfuse.shapes.captions import COLORS, SHAPES

CAPTION = "a large red circle above a small blue square on a white background"


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    return build(width=64, double=1, single=2)


def test_stages_run_one_after_the_other_and_resume(tmp_path, monkeypatch, capsys):
    def run(stage, *more):
        arguments = [stage, "--out", str(tmp_path), "--device", "cpu", "--dry-run", *more]
        monkeypatch.setattr("sys.argv", ["train_flux_micro.py", *arguments])
        train_flux_micro.main()

    monkeypatch.setitem(train_flux_micro.train_text.__globals__, "BATCH", 16)  # takes most of it
    run("vae")
    run("text")
    assert "captions with new pairs" in capsys.readouterr().out
    run("flow", "--no-compile")
    run("flow", "--no-compile", "--resume")
    log = json.loads((tmp_path / "log.json").read_text())
    assert log["step"] == 6
    assert (tmp_path / "loss.png").stat().st_size > 1000
    assert not any("_name_or_path" in p.read_text() for p in tmp_path.glob("model/*/config.json"))


def test_rate_falls_in_every_phase(monkeypatch):
    monkeypatch.setattr(
        train_flux_micro,
        "PLAN",
        (Phase(minutes=1, sides={256: 1}, captions=1), Phase(minutes=2, sides={512: 1}, captions=0.5, rate=0.5)),
    )  # fmt: skip
    assert [round(_phase(s)[1], 3) for s in (0, 29, 45, 59.9)] == [1.0, 1.0, 0.5, 0.02]
    assert [round(_phase(s)[1], 3) for s in (60, 119, 150, 500)] == [0.5, 0.5, 0.25, 0.01]
    assert _phase(60)[0].sides == {512: 1}
    assert all(0 < phase.captions < 1 for phase in PLAN)


def test_labels_name_the_object_over_a_token(pipe):
    data = Data(pipe, scenes=8, seed=0, device="cpu")
    data.scenes = pack([parse(CAPTION)])
    generator = torch.Generator().manual_seed(0)
    layout = arrange(data.scenes, generator)
    shape, color = data.labels(torch.tensor([0]), layout, 256).view(2, 32, 32)
    for slot, (form, paint) in enumerate([("circle", "red"), ("square", "blue")]):
        column, row = (layout.center[0, slot] * 32).long().tolist()
        assert shape[row, column] == 1 + SHAPES.index(form)
        assert color[row, column] == 1 + list(COLORS).index(paint)
        inside = (shape == 1 + SHAPES.index(form)).sum() / 32**2
        assert inside == pytest.approx(4 * layout.radius[0, slot].item() ** 2, rel=0.25)
    assert shape[0, 0] == color[0, 0] == 0


def test_alignment_weighs_objects_and_background_alike(pipe):
    align = Alignment(pipe.transformer)
    for head in align.heads:
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
    align.tokens = torch.randn(2, 16, 64)
    labels = torch.zeros(2, 2, 16, dtype=torch.long)
    labels[:, :, 3] = 5
    expected = 2 * (math.log(1 + len(SHAPES)) + math.log(1 + len(COLORS)))
    assert align(labels).item() == pytest.approx(expected, rel=1e-5)


def test_nonce_words_hide_what_they_replace(pipe, monkeypatch):
    monkeypatch.setattr(flux_micro_text, "NONCE", 1.0)
    torch.manual_seed(0)
    ids = pipe.tokenizer_2([CAPTION] * 64, return_tensors="pt").input_ids
    truth = answers(pack([parse(CAPTION)] * 64))
    new_ids, new_truth = NonceWords(pipe.tokenizer_2, "cpu").replace(ids, truth)
    changed = pipe.tokenizer_2.batch_decode(new_ids)
    for attribute, words in (("shape", ("circle", "square")), ("color", ("red", "blue"))):
        hidden = (new_truth[attribute] == -100).all(1)
        assert 0 < hidden.sum() < 64
        for text, gone in zip(changed, hidden.tolist(), strict=True):
            assert all((word in text) != gone for word in words), text
    assert torch.equal(truth["shape"], answers(pack([parse(CAPTION)] * 64))["shape"])
