"""`visionfuse bench engine`, `neighborhood` and `sage`: what is measured, what is refused, and the table of what is asked."""

import csv
from dataclasses import replace

import pytest
import torch
import typer
from typer.testing import CliRunner

from visionfuse.bench import bars, engine_cases, gradients, neighborhood_cases, runner, sage_cases
from visionfuse.bench.accuracy import sampled_errors
from visionfuse.bench.block_lists import all_keys, band_of, block_list, list_visible
from visionfuse.bench.clocks import Samples, sampled_clocks
from visionfuse.bench.command import engine as command
from visionfuse.bench.readme import fill_tables
from visionfuse.bench.table import Row, update_csv
from visionfuse.bench.timing import time_in_turns

CPU, GPU = torch.device("cpu"), torch.device("cuda")
ENGINE = engine_cases.ENGINE
TINY, WINDOW = engine_cases.TINY
SUITES = {suite.name: suite for suite in (ENGINE, neighborhood_cases.NEIGHBORHOOD, sage_cases.SAGE)}


def run(*arguments):
    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


# -- what is asked ----------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES)
def test_every_bar_is_measured_by_some_work(suite):
    """A bar whose row no work makes would always read "not measured"."""
    asked = bars.BARS[suite.name]
    for bar in asked:
        if bar.group:
            assert bar.group in suite.more
            continue
        (work,) = [work for work in suite.works if work.name == bar.case]
        for recipe in bar.recipes:
            assert recipe in (work.portable if bar.impl == "triton" else work.recipes)
    keys = [bar.key for bar in asked]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES)
def test_a_dry_run_says_what_is_asked(suite):
    said = [
        line for work in runner.choose_works(suite, GPU, []) for line in runner.expect(suite, work)
    ]
    for bar in bars.BARS[suite.name]:
        assert any(bar.asked in line for line in said), bar.key


def test_limits_are_of_bars():
    assert set(bars.LIMITS) <= {bar.key for each in bars.BARS.values() for bar in each}


def test_bars_of_the_prologue_name_its_cases(monkeypatch):
    from visionfuse.bench import prologue

    made = []
    monkeypatch.setattr(
        prologue, "measure",
        lambda case, suite, **options: made.append(case) or [Row(suite=suite, case=case.name, impl="prologue")],
    )  # fmt: skip
    rows = engine_cases.prologue_rows(CPU, 0.1)
    asked = {bar.case for bar in bars.BARS["engine"] if bar.group == "prologue"}
    assert asked == {row.case for row in rows}


def test_table_of_bars(tmp_path):
    met, missed, masked, absent = (
        next(bar for bar in bars.BARS["engine"] if bar.key == key)
        for key in ("16896 bf16", "75648 fp8", "flux bf16", "d64 fp8")
    )
    prologue = next(bar for bar in bars.BARS["engine"] if bar.impl == "prologue")

    def row(bar, speedup, recipe=None, note=""):
        return Row(suite="engine", case=bar.case, impl=bar.impl, recipe=recipe or bar.recipes[0],
                   ms=1.0 if speedup else None, speedup=speedup, rel_l1=0.00223, note=note)  # fmt: skip

    rows = [
        row(met, 1.1), row(missed, 1.599), row(masked, 0.85), row(absent, None, note="a reason"),
        row(prologue, 0.9, "bf16"), row(prologue, 0.7, "int8"),
    ]  # fmt: skip
    update_csv(rows, tmp_path / "engine.csv", commit="x")
    text = fill_tables("<!-- bars: engine -->\nold\n<!-- /bars -->", tmp_path)
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines()}
    missing, reached = text.split("<details>")
    assert "| 1.1x | at least 1.1x | 0.0022 |" in lines[met.work]
    assert "| 1.599x | at least 1.6x | 0.0022 | softmax" in lines[missed.work]
    assert "| 85.0% | at least 85.0% | 0.0022 |" in lines[masked.work]
    assert "|  | at least 1.37x |  | a reason |" in lines[absent.work]
    worst = f"{prologue.work} (int8)"  # the worst of its recipes
    assert "| 70.0% | at least 75.0% |" in lines[worst]
    assert "not measured" in lines[bars.BARS["engine"][0].work]
    assert all(work in reached for work in (met.work, masked.work))
    assert all(work in missing for work in (missed.work, absent.work, worst))
    assert f"Reached: 2 of {len(bars.BARS['engine'])} lines" in text
    assert fill_tables(text, tmp_path) == text


# -- lists and errors -------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [all_keys, band_of(0.3)])
@pytest.mark.parametrize("length", [1000, 384])
def test_lists_show_what_their_rule_says(keys, length):
    plan = block_list(length, length, 192, keys)
    assert torch.equal(plan.dense_mask(), list_visible(length, 192, keys)(torch.arange(length)))
    assert plan.q_count.sum() == length


def test_errors_are_those_of_the_sampled_queries():
    q, k, v = torch.randn(3, 2, 200, 3, 16, generator=torch.Generator().manual_seed(0))
    out = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    out = out.transpose(1, 2).clone()
    assert sampled_errors(out, q, k, v)[0] < 1e-6
    out[-1, -1, 0] += 100  # the last query is always among them
    assert sampled_errors(out, q, k, v)[0] > 0.1
    assert sampled_errors(out, q, k, v, lambda rows: torch.ones(len(rows), 200).bool())[0] > 0.1


# -- measuring --------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", list(SUITES.values())[1:], ids=list(SUITES)[1:])
def test_other_suites_run_without_a_gpu(suite):
    for work in runner.choose_works(suite, CPU, []):
        rows = runner.measure(suite, work, CPU, 0.0)
        assert rows[0].impl == "dense"
        assert len(rows) == 1 + len(work.recipes)
        for row in rows:
            assert row.ms, row.note
            assert row.suite == suite.name
            assert row.rel_l1 is not None
            assert row.rel_l1 < (0.08 if "8" in row.recipe else 1e-5)


def test_errors_of_precisions(monkeypatch):
    monkeypatch.setattr(sage_cases, "PRECISIONS", ("int8_fp8", "int8_fp8+smooth_q"))
    plain, smooth = sage_cases.errors(CPU, 256, 1, 50)
    assert smooth.rel_l1
    assert plain.rel_l1
    assert smooth.rel_l1 < 0.8 * plain.rel_l1
    bar = next(bar for bar in bars.BARS["sage"] if bar.case == plain.case and bar.of)
    rows = [{"case": "errors, normal numbers", "recipe": "int8_fp8+smooth_q", "rel_l1": "0.04"}]
    value = bar.value({"rel_l1": "0.042", "speedup": ""}, rows)
    assert value == pytest.approx(1.05)
    assert bar.reached(value)
    assert not bar.reached(1.2)


def test_gradients_are_compared_with_the_rule():
    """A part of the row: the error of the gradient, of a plan in another order."""
    cases = (gradients._case("dense", (1, 40), 1, 16, gradients.Dense()),
             gradients._case("window", (12, 12), 1, 16, gradients.Neighborhood(window=5)))  # fmt: skip
    rows = gradients.gradient_rows(CPU, 0.0, cases)
    assert [row.impl for row in rows] == ["dense", "visionfuse", "visionfuse"]
    assert all((row.rel_l1 or 1) < 0.02 and row.speedup for row in rows if row.impl == "visionfuse")


def test_measures_beside_the_baseline():
    rows = {row.impl: row for row in runner.measure(ENGINE, TINY, CPU, 0.01)}
    dense, blocks = rows["dense"], rows["blocks"]
    assert dense.ms
    assert dense.speedup is None
    assert blocks.baseline == "dense"
    assert blocks.speedup == pytest.approx(dense.ms / blocks.ms)
    assert blocks.rel_l1
    assert blocks.rel_l1 < 1e-5
    assert blocks.tflops_visited == pytest.approx(4e-9 * 64 * 2 * 640**2 / blocks.ms)


@pytest.mark.parametrize("share", ["visible", "tiles"])
def test_a_window_is_compared_with_whole_blocks(share):
    rows = {
        (row.impl, row.recipe): row
        for row in runner.measure(ENGINE, replace(WINDOW, share=share), CPU, 0.0)
    }
    for recipe in WINDOW.recipes:
        lists, masked = rows["whole blocks", recipe], rows["blocks", recipe]
        assert masked.baseline == f"whole blocks, {recipe}"
        assert masked.density == pytest.approx(64 / 576, rel=0.01)
        assert masked.speedup
        assert lists.speedup is None
    rounded = rows["blocks", "int8_fp8, all in"].rel_l1
    assert rounded
    assert rounded > 1e-3
    assert "masked" in rows["blocks", "fp32"].note


def test_a_wrong_result_gets_no_time():
    real = ENGINE.make

    def spoiled(*arguments):
        for candidate in real(*arguments):
            if candidate.impl == "blocks":
                candidate = replace(candidate, call=lambda call=candidate.call: call() * 1.01)
            yield candidate

    suite = replace(ENGINE, make=spoiled)
    rows = {row.impl: row for row in runner.measure(suite, TINY, CPU, 0.0)}
    assert rows["dense"].ms
    assert rows["blocks"].ms is None
    assert rows["blocks"].note.startswith("REFUSED")
    assert runner.went_wrong(rows["blocks"])


def test_a_broken_line_costs_no_other_its_rows(monkeypatch):
    real = runner.measure

    def broken(suite, work, *arguments):
        if work is TINY:
            raise RuntimeError("out of memory")
        return real(suite, work, *arguments)

    monkeypatch.setattr(runner, "measure", broken)
    first, second = runner.run(ENGINE, [TINY, WINDOW], CPU, seconds=0.0)
    assert first[0].note == "FAILED: RuntimeError: out of memory"
    assert all(row.ms for row in second)


def test_a_lost_device_costs_one_line(monkeypatch, tmp_path):
    """The rest is measured by a new process."""
    monkeypatch.setattr(runner, "_is_lost", lambda device: True)
    monkeypatch.setattr(runner, "measure", lambda suite, work, *_: work.missing)
    path = tmp_path / "engine.csv"
    result = run("--device", "cpu", "--csv", path, "--seconds", 0)
    assert result.exit_code == 1
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["case"]: bool(row["ms"]) for row in rows} == {TINY.name: False, WINDOW.name: True}


def test_a_baseline_between_runs_before_each_of_the_others():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in ("base", "a", "b")}
    times = time_in_turns(calls, device="cpu", seconds=0.0, least=2, most=2, between="base")
    assert order[6:] == ["base", "a", "base", "b"] * 2  # after a warm-up and a first run of each
    assert set(times) == {"base", "a", "b"}


def test_clocks():
    with sampled_clocks(CPU) as samples:
        pass
    assert str(samples) == ""
    assert str(Samples([(1900.0, 600.0), (1700.0, 700.0), (1800.0, 650.0)])) == "SM 1800 MHz, 650 W"


# -- the command ------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would run the whole suite")
def test_command_writes_rows_line_by_line(tmp_path):
    path = tmp_path / "engine.csv"
    result = run("--csv", path, "--seconds", 0, "--commit", "abc")
    assert result.exit_code == 0, result.output
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["case"] for row in rows} == {TINY.name, WINDOW.name}
    assert {row["suite"] for row in rows} == {"engine"}
    assert {row["commit"] for row in rows} == {"abc"}
    assert run("--csv", path, "--seconds", 0, "--only", "tiny").exit_code == 0
    with path.open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(rows)


def test_dry_run_says_what_is_asked():
    result = run("--device", "cuda", "--dry-run")
    assert result.exit_code == 0, result.output
    for words in ("75,600 tokens", "int8_fp8, all in, at least 1.5x", "triton bf16, at least 0.85",
                  "prologue"):  # fmt: skip
        assert words in result.output
    lines = run("--device", "cuda", "--dry-run", "--only", "band,d64").output.splitlines()
    assert [line.partition(":")[0] for line in lines if not line.startswith(" ")] == ["d64", "band"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "huge"], ["'huge'", "tiny"]),
        (["--device", "tpu"], ["tpu"]),
    ],
    ids=lambda a: "_".join(a),
)
def test_says_what_is_wrong(arguments, words):
    if torch.cuda.is_available():
        words = [word for word in words if word != "tiny"]
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    for word in words:
        assert word in result.stderr
