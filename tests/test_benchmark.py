"""pipelines/benchmark.py: variants of a pipeline in one run, their rows, and two runs compared."""

from __future__ import annotations

import csv

import pytest
import torch

from visionfuse.patching import get
from visionfuse.pipelines import benchmark as bench
from visionfuse.pipelines.benchmark import Case, benchmark, compare_csv, random_weights
from visionfuse.testing_pipelines import flux_pipeline, run, single_thread

CASE = Case(suite="test", name="tiny")
VARIANTS = {
    "stock": None,
    "gna": {"recipe": "gna", "density": 0.3, "dense_steps": 2},
    "wrong": {"recipe": "gna", "window": (3, 3, 3)},
    "dense": {"recipe": "dense", "impl": "blocks"},
}


def call(pipe, steps, **more):
    return run(pipe, steps=steps, **more)


@pytest.fixture
def pipe():
    return flux_pipeline()


def test_rows_of_a_run(pipe, tmp_path, capsys):
    stock = run(pipe, steps=4)
    path = tmp_path / "rows.csv"
    rows = benchmark(lambda: (pipe, call), VARIANTS, steps=4, case=CASE, csv=path)
    assert get(pipe) is None
    assert torch.equal(run(pipe, steps=4), stock)
    step = {row.impl: row for row in rows if row.case == "tiny, a step, median"}
    assert list(step) == list(VARIANTS)
    assert float(step["stock"].ms) > 0
    assert step["stock"].baseline == ""
    assert step["gna"].speedup == pytest.approx(step["stock"].ms / step["gna"].ms)
    assert 0 < float(step["gna"].rel_l1) < 1
    assert step["gna"].recipe == "gna"
    assert float(step["dense"].rel_l1) < 1e-5
    assert "window=(3, 3, 3)" in step["wrong"].note
    assert step["wrong"].ms is None
    whole = {row.impl: row.ms for row in rows if "a call of 4 steps" in row.case}
    assert whole["stock"] > step["stock"].ms
    assert "wrong" not in whole
    said = capsys.readouterr().out
    assert "window=(3, 3, 3)" in said
    with path.open(newline="") as file:
        assert [row["impl"] for row in csv.DictReader(file)] == [row.impl for row in rows]


def test_the_compiled_baseline_is_that_of_diffusers(pipe, monkeypatch):
    torch._dynamo.reset()
    made = []

    def counted(graph, inputs):
        made.append(graph)
        return graph.forward

    own = type(pipe.transformer).compile_repeated_blocks
    monkeypatch.setattr(
        type(pipe.transformer),
        "compile_repeated_blocks",
        lambda model: own(model, backend=counted),
    )
    variants = {"stock": None, "stock + compile": bench.compile_alone}
    rows = benchmark(lambda: (pipe, call), variants, steps=1, case=CASE)
    assert made
    assert float(rows[-1].rel_l1) < 1e-5
    assert all(m._compiled_call_impl is None for m in pipe.transformer.modules())
    assert not any("_compiled_call_impl" in vars(m) for m in pipe.transformer.modules())


def test_what_fell_back_is_said(pipe, capsys):
    rows = benchmark(
        lambda: (pipe, call), {"stock": None, "fp8": {"linear": "fp8"}}, steps=1, case=CASE
    )
    assert "sm_89" in capsys.readouterr().out or torch.cuda.is_available()
    assert (
        all("sm_89" in row.note for row in rows if row.impl == "fp8") or torch.cuda.is_available()
    )


def test_an_error_that_is_no_refusal_is_not_swallowed(pipe):
    def broken(pipe, steps, **more):
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        benchmark(lambda: (pipe, broken), VARIANTS, steps=1, case=CASE)
    assert get(pipe) is None


def test_errors():
    exact = torch.tensor([1.0, -2.0, 2.0])
    assert bench.errors(exact, exact) == (0.0, pytest.approx(1.0))
    assert bench.errors(exact * 1.1, exact) == (pytest.approx(0.1), pytest.approx(1.0))
    assert bench.errors(-exact, exact)[1] == pytest.approx(-1.0)


def test_the_last_third_is_where_a_schedule_runs():
    result = bench.Result(name="x", steps=[3.0, 3.0, 3.0, 3.0, 1.0, 1.0])
    assert (result.step, result.fastest) == (3.0, 1.0)


@pytest.mark.parametrize(
    ("model", "size"), [("assets/flux-micro", (64, 64)), ("wan2.1-1.3b", None)]
)
def test_random_weights_need_no_checkpoint(model, size, monkeypatch):
    if model.startswith("wan"):
        small = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "text_dim": 32}
        monkeypatch.setitem(bench.named(model).config, "num_layers", 1)
        for name, value in small.items():
            monkeypatch.setitem(bench.named(model).config, name, value)
        size = (64, 96, 9)
    pipe, ask = random_weights(model, size, device="cpu", dtype=torch.float32)
    with single_thread():
        first, again = ask(pipe, 1), ask(pipe, 1)
        pipe.enable_visionfuse("gna", density=0.3, dense_steps=0)
        sparse = ask(pipe, 1)
    assert torch.equal(first, again)
    assert not torch.equal(first, sparse)
    assert first.isfinite().all()


def test_random_weights_of_other_models():
    with pytest.raises(ValueError, match="vit_tiny"):
        random_weights("vit_tiny_patch16_224", device="cpu", dtype=torch.float32)


def write(path, **ms):
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["case", "impl", "ms"])
        rows.writerows([("step", impl, value) for impl, value in ms.items()])
    return path


def test_two_runs(tmp_path, capsys):
    base = write(tmp_path / "base.csv", stock=100.0, sage=50.0, gone=1.0, failed="")
    new = write(tmp_path / "new.csv", stock=101.0, sage=60.0, fresh=1.0, failed="")
    assert compare_csv(base, new) == [("step", "sage", 50.0, 60.0)]
    said = capsys.readouterr().out
    assert "1.200" in said
    assert "fresh" not in said
    assert compare_csv(base, new, worse=0.3) == []
    with pytest.raises(ValueError, match="no case"):
        compare_csv(base, write(tmp_path / "other.csv", fresh=1.0))


@pytest.mark.slow  # compiles four times
def test_wan_combined():
    from visionfuse.pipelines import wan_benchmark
    from visionfuse.recipes import build

    task = wan_benchmark.Task(
        model="wan2.1-1.3b", size=(32, 64), frames=5, layers=1, parts=("combined",),
        recipes=(build("sta", density=0.5, dense_steps=10),), device=torch.device("cpu"),
        dtype=torch.float32,
    )  # fmt: skip
    (rows,) = wan_benchmark.measure(task)
    words = " + compile + fp8 linears"
    names = ["stock", "stock + compile", f"sta{words}", f"sta{words}, mean of 50 steps"]
    assert [row.recipe for row in rows] == names
    assert "1 WanTransformerBlock, each class once" in rows[2].note
    assert "fp8 products need an NVIDIA GPU" in rows[2].note
    stock, _, fast, mean = (row.ms for row in rows)
    assert mean == pytest.approx(0.2 * stock + 0.8 * fast)
