"""Calibration of tiny pipelines, image and video: what is measured, resumed, chosen and shown."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from visionfuse import Neighborhood, Precision, Recipe
from visionfuse.calibrate import command, compare, show
from visionfuse.calibrate import run as calibration
from visionfuse.calibrate.command import check_call, parse_candidates
from visionfuse.calibrate.journal import Journal
from visionfuse.calibrate.measure import MeasuringSession, block_classes, psnr
from visionfuse.calibrate.run import Calibration, Task
from visionfuse.calibrate.times import PROLOGUE_MS, candidate_ms, setting_of, stock_ms
from visionfuse.context import ACTIVE
from visionfuse.kernels.plan import TokenLayout
from visionfuse.recipe import Variant
from visionfuse.schedule import STOCK
from visionfuse.sites import denoisers
from visionfuse.testing_pipelines import explicit_mask, flux_pipeline, run, wan_pipeline

BUILD = {"flux": flux_pipeline, "wan": wan_pipeline}
CALL = {
    "flux": {"height": 32, "width": 48, "max_sequence_length": 48},
    "wan": {"height": 64, "width": 96, "num_frames": 9, "max_sequence_length": 16},
}
CANDIDATES = (
    Variant(name="half", plan=Neighborhood(density=0.5, stride=2)),
    Variant(name="int8", precision=Precision.parse("int8_fp8")),
)


@pytest.fixture(scope="module", params=list(BUILD))
def family(request):
    return request.param


@pytest.fixture(scope="module")
def pipe(family):
    return BUILD[family]()


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def task(family, **changes):
    values = {
        "candidates": CANDIDATES, "prompts": ("a red cube",), "held_out": ("a blue ball",),
        "call": CALL[family], "steps": 2, "phases": 2,
    }  # fmt: skip
    return Task(**values | changes)


@pytest.fixture(autouse=True)
def plausible_times(monkeypatch):
    """At these sizes nothing is faster than stock: times in which it is, so that there is something to choose."""
    monkeypatch.setattr(calibration, "stock_ms", lambda setting: 4.0)
    of = {"half": 2.0, "int8": 3.0}
    monkeypatch.setattr(calibration, "candidate_ms", lambda candidate, *_: of[candidate.name])


def calibrated(pipe, family, folder, budget=30.0, *, resume=False, tell=None, **changes):
    what = task(family, **changes)
    journal = Journal(folder, what.to_dict(), resume=resume)
    return Calibration(pipe, what, journal, *([tell] if tell else [])).run(budget)


def test_candidates_are_measured_beside_a_stock_run(pipe, family):
    """Errors are those of attention with an explicit mask on the very q, k and v of the stock run."""
    call = {**CALL[family], "steps": 2}
    expected = run(pipe, **call)
    session = MeasuringSession(pipe, CANDIDATES, 2)
    seen = {}

    def keep(original):
        def see(layer, step, layout, qkv, own, scale, candidates):
            order = session.routings[0].lead.permutation
            seen[layer, step] = qkv, own, layout, order
            original(layer, step, layout, qkv, own, scale, candidates)

        return see

    session.see = keep(session.see)
    with session:
        got = run(pipe, **call)
    assert torch.equal(got, expected), "the run itself is stock"
    assert ACTIVE.probe is None
    errors = session.errors
    layers = len(denoisers_layers(pipe))
    assert errors.rel_l1.shape == (2, layers, 2)
    assert (errors.calls == (1 if family == "flux" else 2)).all(), (
        "Wan runs both branches of a step"
    )
    (q, k, v), own, layout, order = seen[0, 1]
    grid = layout.segments[-1].shape
    mask = explicit_mask(CANDIDATES[0].plan, text=layout.length - np.prod(grid), grids=[grid])
    if order is not None:
        mask = mask[order][:, order]
    if family == "flux":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        masked = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)
        error = float((masked - own).abs().sum() / own.abs().sum())
        assert errors.rel_l1[0, 0, 1] == pytest.approx(error, rel=1e-4)
        cosine = torch.nn.functional.cosine_similarity(masked.flatten(), own.flatten(), 0)
        assert errors.cosine[0, 0, 1] == pytest.approx(float(cosine), abs=1e-5)


def denoisers_layers(pipe):
    found = next(iter(denoisers(pipe)))
    return found.site.layers(found.model)


def test_a_part_of_steps_and_heads(pipe, family):
    session = MeasuringSession(pipe, CANDIDATES, 3, every=2, heads=1)
    with session:
        run(pipe, **CALL[family], steps=3)
    assert (session.errors.calls[:, :, 1] == 0).all()
    assert (session.errors.calls[:, :, ::2] > 0).all()


def test_times_are_taken_beside_it(pipe, family):
    """As on a GPU, with a clock that this machine has."""
    session = MeasuringSession(pipe, CANDIDATES, 2, timed=frozenset({1}), batch=2)
    with session:
        run(pipe, **CALL[family], steps=2)
    assert list(session.times) == [1]
    assert set(session.times[1]) == {STOCK, "half", "int8"}
    assert all(ms > 0 for ms in session.times[1].values())


def test_a_whole_calibration(pipe, family, tmp_path):
    before = run(pipe, **CALL[family])
    told = []
    found = calibrated(
        pipe, family, tmp_path / "c", tell=lambda job, done, of: told.append((done, of))
    )
    assert torch.equal(run(pipe, **CALL[family]), before), "the pipeline is as it was"
    assert found.chosen.psnr >= found.budget
    assert found.ms <= found.stock_ms
    assert len(found.held_out) == 1
    assert found.recipe == Recipe.from_dict(found.recipe.to_dict())
    for part, names in zip(found.parts, found.chosen.selection.variants, strict=True):
        assert len(set(names)) <= 2
        assert part.names == (STOCK, "half", "int8")
    fractions = [done / of for done, of in told]
    assert fractions == sorted(fractions)
    assert fractions[-1] <= 1
    # What the phases say is what was chosen.
    spans = found.recipe.schedule.spans(20)
    for part, names in zip(found.parts, found.chosen.selection.variants, strict=True):
        span = next(s for s in spans if s.start <= part.steps[0] * 10 < s.end)
        by_layer = found.recipe.schedule.by_layer(span, len(denoisers_layers(pipe)))
        assert [by_layer[i] for i in part.layers] == [part.names[v] for v in names]


def test_a_looser_budget_is_faster_and_needs_no_new_measurement(
    pipe, family, tmp_path, monkeypatch
):
    strict = calibrated(pipe, family, tmp_path / "c", 110.0)
    monkeypatch.setattr(Calibration, "measure", None)
    loose = calibrated(pipe, family, tmp_path / "c", 5.0, resume=True)
    assert loose.ms < strict.ms
    assert loose.chosen.psnr >= 5.0
    assert strict.chosen.psnr >= 110.0
    assert loose.ms == loose.stock_ms / 2, "everything the fastest"


def test_an_interrupt_loses_nothing(pipe, family, tmp_path, monkeypatch):
    """Stopped in every run once, and gone on with: the same result, and no finished run is done again."""
    expected = calibrated(pipe, family, tmp_path / "whole")
    draws = Calibration.draw
    started, finished, stopped = [], [], set()

    def draw(self, prompt, number, job):
        key = (prompt, json.dumps(vars(self.pipe).get("_visionfuse") and
                                  self.pipe._visionfuse.recipe.to_dict()))  # fmt: skip
        started.append(key)
        out = draws(self, prompt, number, job)
        if key not in stopped:
            stopped.add(key)
            raise KeyboardInterrupt
        finished.append(key)
        return out

    monkeypatch.setattr(Calibration, "draw", draw)
    for _ in range(60):
        try:
            found = calibrated(pipe, family, tmp_path / "parts", resume=True)
            break
        except KeyboardInterrupt:
            continue
    assert len(finished) == len(set(finished)), "a run that had ended was done again"
    assert len(started) == 2 * len(finished)
    assert found.recipe == expected.recipe
    assert found.tries == expected.tries
    assert found.held_out == expected.held_out
    np.testing.assert_array_equal(found.errors.rel_l1, expected.errors.rel_l1)


def test_a_journal_of_something_else(pipe, family, tmp_path):
    settings = task(family).to_dict()
    Journal(tmp_path / "refused", settings, resume=False)
    assert not (tmp_path / "refused").exists(), "what never ran left a folder"
    Journal(tmp_path, settings, resume=False).do("a", lambda: 1)
    with pytest.raises(ValueError, match="--resume goes on"):
        Journal(tmp_path, settings, resume=False)
    with pytest.raises(ValueError, match="other settings: seed, steps"):
        Journal(tmp_path, task(family, steps=3, seed=1).to_dict(), resume=True)
    assert Journal(tmp_path, settings, resume=True).do("a", lambda: 2) == 1


def test_classes_of_blocks(pipe, family):
    found = block_classes(pipe.transformer, denoisers_layers(pipe))
    expected = {
        "flux": ("FluxTransformerBlock",) * 2 + ("FluxSingleTransformerBlock",) * 2,
        "wan": ("WanTransformerBlock",) * 2,
    }
    assert found == expected[family]


def test_summary_and_picture(pipe, family, tmp_path):
    found = calibrated(pipe, family, tmp_path / "c", 20.0)
    rows = show.rows(found)
    assert len(rows) == len(found.parts)
    assert {row[0] for row in rows} == {"0-0", "1-1"}
    text = "\n".join(show.lines(found, "some GPU"))
    assert "some GPU" in text
    assert f"{found.stock_ms / found.ms:.2f}x" in text
    show.plot(found, [c.name for c in CANDIDATES], tmp_path / "errors.png")
    assert (tmp_path / "errors.png").stat().st_size > 10_000


def test_a_candidate_without_a_speed_is_left_out(pipe, family, tmp_path, monkeypatch):
    def only_half(candidate, *_):
        if candidate.name != "half":
            raise ValueError("not measured")
        return 1.0

    monkeypatch.setattr(calibration, "candidate_ms", only_half)
    found = calibrated(pipe, family, tmp_path / "c", 10.0)
    assert found.left_out == {"int8": "not measured"}
    assert all(part.names == (STOCK, "half") for part in found.parts)


def test_compared_with_each_candidate_alone(pipe, family, tmp_path):
    what = task(family)
    whole = Calibration(pipe, what, Journal(tmp_path / "c", what.to_dict(), resume=False))
    found = whole.run(40.0, "mine")
    rows = compare.compare(whole, found, "tiny", "made up")
    assert [row.recipe for row in rows] == [STOCK, "mine", "half", "int8"]
    assert [row.speedup for row in rows[2:]] == [2.0, pytest.approx(4 / 3)]
    for row, candidate in zip(rows[2:], CANDIDATES, strict=True):
        pipe.enable_visionfuse(compare.alone(candidate))
        out = whole.draw(what.held_out[0], 1000, "again")
        pipe.disable_visionfuse()
        assert row.psnr == pytest.approx(psnr(out, whole.journal.tensor("held-out-0")))
    path = tmp_path / "rows.csv"
    compare.write([replace(rows[0], case="other")], path)
    for _ in range(2):
        compare.write(rows, path)
    with path.open(newline="") as file:
        assert [row["recipe"] for row in csv.DictReader(file)] == [
            STOCK,
            STOCK,
            "mine",
            "half",
            "int8",
        ]
    assert compare.table(rows).row_count == 4


def test_a_pipeline_without_a_site(tmp_path):
    class Other:
        components = {}  # noqa: RUF012

    with pytest.raises(ValueError, match="Other has no denoiser"):
        Calibration(Other(), task("flux"), Journal(tmp_path, {}, resume=False))


# -- times ------------------------------------------------------------------------------------------


def test_predicted_times_follow_work_and_formats():
    layout = TokenLayout.joint(text=512, grids=[(128, 128)])
    setting = setting_of(layout, batch=1, heads=24, head_dim=128)
    dense = Variant(name="fp8", precision=Precision.parse("fp8"))
    int8 = replace(dense, precision=Precision.parse("int8_fp8"))
    int4 = replace(dense, precision=Precision.parse("int4_fp8"))
    half = Variant(name="half", plan=Neighborhood(density=0.5, stride=None))
    both = replace(half, precision=Precision.parse("fp8"))
    ms = {v: candidate_ms(v, layout, setting) for v in (dense, int8, int4, half, both)}
    stock = stock_ms(setting)
    assert ms[both] < ms[half] < stock
    assert ms[both] < ms[dense] < ms[int8] < stock
    assert ms[int4] == ms[int8], "multiplied as INT8 on Hopper"
    # Measured, all in: 5.094, 3.739 and 3.886 ms (assets/bench/engine.csv).
    assert stock == pytest.approx(5.094, rel=0.12)
    assert ms[dense] == pytest.approx(3.739, rel=0.12)
    assert ms[int8] == pytest.approx(3.886, rel=0.12)
    with pytest.raises(ValueError, match=r"int8. at head dim 128 is not known"):
        candidate_ms(replace(dense, precision=Precision.parse("int8")), layout, setting)


def test_the_prologue_is_the_one_that_was_measured():
    from pathlib import Path

    path = Path(__file__).resolve().parents[1] / "assets" / "bench" / "engine.csv"
    with path.open(newline="", encoding="utf-8") as file:
        row = next(
            row for row in csv.DictReader(file)
            if "16896 tokens, 24 heads of 128" in row["case"] and row["impl"] == "prologue"
            and row["recipe"] == "int8, smooth K, fp8 V, ordered"
        )  # fmt: skip
    assert pytest.approx(float(row["ms"]), rel=0.05) == PROLOGUE_MS * 16_896 * 24 * 128


def test_psnr():
    a = torch.zeros(3, 4, 4)
    assert psnr(a, a) == float("inf")
    assert psnr(a, a + 0.1) == pytest.approx(20, abs=1e-4)


# -- the command --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gnaa", "Did you mean 'gna'"),
        ("gna windw=3", "no option 'windw'"),
        ("sage,auto", "'auto' is the model's own attention"),
        ("gna density", "key=value"),
    ],
)
def test_wrong_candidates(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_candidates(text)


def test_default_candidates_have_a_speed():
    layout = TokenLayout.joint(text=512, grids=[(64, 64)])
    setting = setting_of(layout, batch=1, heads=24, head_dim=128)
    found = parse_candidates(command.CANDIDATES)
    assert len(found) == len({c.name for c in found}) >= 5
    assert all(candidate_ms(candidate, layout, setting) > 0 for candidate in found)


def invoke(*arguments: str):
    import typer

    app = typer.Typer()
    app.command()(command.calibrate)
    return CliRunner().invoke(app, list(arguments))


def test_dry_run_says_what_would_run(tmp_path):
    out = str(tmp_path / "r.json")
    said = invoke(
        "--dry-run", "--out", out, "--steps", "7", "--candidates", "sage, gna density=0.2"
    )
    assert said.exit_code == 0, said.output
    assert "Runs of 7 steps (height 256" in said.output
    assert "Candidate: gna density=0.2" in said.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--out", "r.txt"), "must name a .json file"),
        (("--candidates", "gnaa"), "Did you mean"),
        (("some/model",), "Give --prompts"),
        (("--prompts", "none.txt"), "none.txt"),
        (("--linear", "int4"), "linear must be"),
        (("--budget", "-5"), "budget"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    said = invoke(*arguments, "--dry-run")
    assert said.exit_code == 2
    assert message in said.output


def test_too_few_prompts(tmp_path):
    (tmp_path / "p.txt").write_text("one\n\n two \n")
    with pytest.raises(ValueError, match="has 2 prompts"):
        command.read_prompts(tmp_path / "p.txt", 3, 0, False)
    assert command.read_prompts(tmp_path / "p.txt", 2, 0, False) == ("one", "two")


def test_calls_that_a_pipeline_cannot_make_are_refused():
    pipe = flux_pipeline()
    pipe.vae_scale_factor = 8  # of a whole FLUX; this one's VAE keeps every pixel
    check_call(pipe, {"height": 64})
    with pytest.raises(ValueError, match="FluxPipeline takes no frames"):
        check_call(pipe, {"frames": 5})
    with pytest.raises(ValueError, match="height=33 is no multiple of"):
        check_call(pipe, {"height": 33})
