"""`visionfuse bench attention`: what would run, what is refused, and what the CSV keeps."""

import csv
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from visionfuse import cli
from visionfuse.bench import attention as benchmark
from visionfuse.bench import peers
from visionfuse.bench.cases import BASELINE, Case, cpu_shapes, gpu_shapes
from visionfuse.bench.table import Row, update_csv
from visionfuse.kernels.plan import Dense, Neighborhood, TokenLayout, neighborhood_mask

CPU, GPU = torch.device("cpu"), torch.device("cuda")
TINY, TEXT = cpu_shapes()["tiny"]


def run(*arguments):
    result = CliRunner().invoke(
        cli.app, ["bench", "attention", *map(str, arguments)], env={"COLUMNS": "220"}
    )
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def settings(**options):
    return benchmark.Settings(device=CPU, repeats=2, **options)


# -- cases ------------------------------------------------------------------------------------------


def test_shapes_are_those_of_the_models():
    shapes = gpu_shapes()
    lengths = {name: cases[0].layout.length for name, cases in shapes.items()}
    assert lengths == {
        "flux-1k": 4608, "flux-2k": 16896, "flux-4k": 66048, "wan-480p": 32760, "wan-720p": 75600,
        "hunyuan": 115456, "vit": 197, "tiny": 576,
    }  # fmt: skip
    everything = [case for cases in shapes.values() for case in cases]
    assert len({case.name for case in everything}) == len(everything)
    for case in everything:
        assert case.impls[0] == BASELINE
        assert 0 < case.density <= 1  # and the window fits the grid
        assert (case.density == 1) == isinstance(case.spec, Dense)
    assert {case.head_dim for case in shapes["vit"]} == {64}


@pytest.mark.parametrize("text", [0, 5])
def test_density_is_that_of_the_mask(text):
    spec = Neighborhood(window=(5, 3), stride=(2, 1), dilation=(1, 2))
    case = replace(TINY, layout=TokenLayout.joint(text=text, grids=[(9, 8)]), spec=spec)
    visible = neighborhood_mask(spec.resolve((9, 8))).sum() + case.layout.length**2 - 72**2
    assert case.density == pytest.approx(float(visible) / case.layout.length**2)
    assert case.flops == pytest.approx(4 * 64 * 2 * float(visible))


def test_a_default_run_on_a_gpu_is_expected_to_stay_near_its_limit():
    plan = benchmark.Settings(device=GPU)
    cases = benchmark.choose_cases(GPU, [])
    work = sum(line.runs * line.ms for case in cases for line in benchmark.expect(case, plan))
    assert work < 40e3  # ms of measurement; the rest is compilation and checks


# -- the gate ---------------------------------------------------------------------------------------


def test_measures_and_names_the_error():
    case = replace(
        TINY, layout=TokenLayout.joint(grids=[(48, 64)]), spec=Neighborhood(window=16, stride=16)
    )
    rows = {row.impl: row for row in benchmark.measure(case, settings(), suite="x")}
    assert set(rows) == {"dense", "blocks", "blocks with order"}
    for row in rows.values():
        assert row.ms
        assert row.rel_l1
        assert row.rel_l1 < 1e-6
        assert row.cosine == pytest.approx(1)
    dense, blocks = rows["dense"], rows["blocks"]
    assert dense.speedup is None
    assert dense.density == 1
    assert dense.ms
    assert blocks.ms
    assert blocks.speedup == pytest.approx(dense.ms / blocks.ms)
    assert blocks.density == pytest.approx(case.density)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_natten_agrees():
    pytest.importorskip("natten")
    rows = {
        row.impl: row for row in benchmark.measure(TINY, settings(impls=("natten",)), suite="x")
    }
    assert rows["natten"].ms
    assert rows["natten"].rel_l1 == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("spoil", "note"),
    [
        (lambda out: out * 1.01, "REFUSED: relative L1 error 0.01"),
        (lambda out: out * torch.nan, "REFUSED"),
        (lambda out: out.nonexistent, "FAILED: AttributeError"),
    ],
    ids=["wrong", "nan", "raises"],
)
def test_a_wrong_result_gets_no_time(monkeypatch, tmp_path, spoil, note):
    right = peers.PEERS[BASELINE]

    def make(case, q, k, v):
        call = right.make(case, q, k, v)
        return lambda: spoil(call())

    monkeypatch.setitem(peers.PEERS, "flash", replace(right, make=make))
    result = run("--shapes", "tiny", "--impl", "flash", "--device", "cpu", "--repeats", 1,
                 "--csv", tmp_path / "x.csv")  # fmt: skip
    assert result.exit_code == 1
    for row in read(tmp_path / "x.csv"):
        if row["impl"] == "flash":
            assert row["note"].startswith(note)
            assert not row["ms"]
        else:
            assert float(row["ms"]) > 0


def test_the_check_follows_the_rule_and_not_the_plan():
    """Keys outside the window change the exact result."""
    q, k, v = torch.randn(3, 1, 592, 2, 64, generator=torch.Generator().manual_seed(0))
    with_window = Case(
        name="x", layout=TEXT.layout, spec=TINY.spec, heads=2, head_dim=64, impls=(BASELINE,)
    )
    dense = peers.PEERS[BASELINE].make(with_window, q, k, v)()
    assert benchmark.errors(dense, q, k, v, with_window)[0] > 0.1
    assert benchmark.errors(dense, q, k, v, with_window, sees_all=True)[0] < 1e-6
    assert benchmark.errors(dense, q, k, v, TEXT)[0] < 1e-6


# -- the command ------------------------------------------------------------------------------------


def test_rows_are_kept_case_by_case(tmp_path, monkeypatch):
    path = tmp_path / "new" / "x.csv"
    arguments = ("--shapes", "tiny", "--device", "cpu", "--repeats", 1, "--csv", path)
    real, measured = benchmark.measure, []

    def interrupted(case, settings, *, suite):
        if measured:
            raise KeyboardInterrupt
        measured.append(case)
        return real(case, settings, suite=suite)

    with monkeypatch.context() as patch:
        patch.setattr(benchmark, "measure", interrupted)
        with pytest.raises(SystemExit):
            cli.app(["bench", "attention", *map(str, arguments)], standalone_mode=True)
    assert {row["case"] for row in read(path)} == {TINY.name}

    result = run(*arguments, "--commit", "abc1234")
    assert result.exit_code == 0, result.output
    rows = read(path)
    assert [row["impl"] for row in rows if row["case"] == TINY.name] == [
        "dense", "blocks"
    ]  # fmt: skip
    assert {row["commit"] for row in rows} == {"abc1234"}
    assert {row["case"] for row in rows} == {TINY.name, TEXT.name}


def test_other_rows_of_a_csv_stay(tmp_path):
    path = tmp_path / "x.csv"
    update_csv(
        [Row(suite="s", case="a", impl="i", ms=1.0), Row(suite="s", case="b", impl="i")], path
    )
    update_csv([Row(suite="s", case="a", impl="j", ms=2.0)], path)
    assert [(r["case"], r["impl"], r["ms"]) for r in read(path)] == [
        ("b", "i", ""),
        ("a", "j", "2"),
    ]
    path.write_text("other,columns\n1,2\n")
    with pytest.raises(ValueError, match="other columns"):
        update_csv([Row(suite="s", case="a", impl="j")], path)
    assert path.read_text() == "other,columns\n1,2\n"


def test_dry_run_of_a_gpu_needs_none(tmp_path):
    out = tmp_path / "x.csv"
    result = run("--device", "cuda", "--dry-run", "--flex", "--csv", out)
    assert result.exit_code == 0, result.output
    for shown in ("FLUX 4K, window 80, stride 16", "1x115456x24x128", "gluon_sm90", "flex",
                  "--seconds 540"):  # fmt: skip
        assert shown in result.output
    assert not out.exists()


def test_cases_that_time_does_not_allow_are_named():
    result = run("--shapes", "tiny", "--device", "cpu", "--seconds", 0)
    assert result.exit_code == 0
    assert result.output.count("left out") == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shapes", "tiny,huge"], ["'huge'", "grid-128"]),
        (["--impl", "fast"], ["'fast'", "natten", "gluon_sm90"]),
        (["--device", "tpu"], ["'tpu'"]),
        (["--shapes", "tiny", "--impl", "efficient", "--repeats", "1"], ["efficient", "needs a GPU"]),
    ],
    ids=lambda a: "_".join(a)[:30],
)  # fmt: skip
def test_says_what_is_wrong(arguments, words):
    result = run("--device", "cpu", *arguments)
    assert result.exit_code == 2, result.output
    message = " ".join(result.stderr.split())
    for word in words:
        assert word in message
