"""Pipelines in another precision: little changes, the report says what ran how, and off means off."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import visionfuse
from visionfuse import Order, Precision, Recipe, choice, recipes, session
from visionfuse.choice import Choice, choose
from visionfuse.testing_pipelines import flux_pipeline, run, wan_pipeline

BUILD = {"flux": flux_pipeline, "wan": wan_pipeline}
ORDERS = {
    "flux": Order(kind="tiled", tile=(4, 6), subtile=(2, 3)),
    "wan": Order(kind="tiled", tile=(2, 2, 3)),
}
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")


@pytest.fixture(scope="module", params=list(BUILD))
def family(request):
    return request.param


@pytest.fixture(scope="module")
def pipe(family):
    return BUILD[family]()


@pytest.fixture(autouse=True)
def _disabled(pipe):
    yield
    pipe.disable_visionfuse()


@pytest.fixture(scope="module")
def stock(pipe):
    return run(pipe)


def change(a, b):
    return float((a - b).abs().mean() / b.abs().mean())


@pytest.mark.parametrize(
    ("options", "most"),
    [({}, 0.05), ({"qk": "fp8"}, 0.08), ({"qk": "int4"}, 0.4), ({"pv": "model"}, 0.02)],
    ids=["int8_fp8", "fp8", "int4", "int8"],
)
def test_sage_changes_little_and_leaves_no_trace(pipe, stock, options, most):
    pipe.enable_visionfuse("sage", **options)
    assert 0 < change(run(pipe), stock) < most
    found = visionfuse.report(pipe).denoisers[0]
    assert found.calls["plan"] > 0 == found.calls["dense"]
    assert "emulated" in found.precision
    assert found.density == 1.0
    assert f"{found.precision.split(',')[0]}" in str(visionfuse.report(pipe))
    pipe.disable_visionfuse()
    assert torch.equal(run(pipe), stock)


def test_the_report_says_what_int4_is_good_for(pipe):
    pipe.enable_visionfuse("sage", qk="int4")
    run(pipe, steps=1)
    assert "saves no time" in str(visionfuse.report(pipe))
    pipe.enable_visionfuse("sage")
    assert "saves no time" not in str(visionfuse.report(pipe))


def test_a_lost_picture_is_an_error(pipe):
    """What kernels of a GPU make of an infinity, made by the last layer here: emulation refuses it before."""
    last = pipe.transformer.proj_out.bias
    pipe.enable_visionfuse("sage")
    with torch.no_grad():
        kept = last[0].item()
        last[0] = torch.inf
        try:
            with pytest.raises(ValueError, match="NaN or infinities"):
                run(pipe, steps=2)
            with pytest.raises(FloatingPointError, match="disable_visionfuse"):
                run(pipe, steps=1)
            pipe.enable_visionfuse("dense")
            run(pipe, steps=1)
        finally:
            last[0] = kept
    pipe.enable_visionfuse("sage")
    assert run(pipe).isfinite().all()


def test_more_bits_are_closer(pipe, stock):
    changes = []
    for name in ("int8", "int8_fp8", "fp8", "int4_fp8+smooth_q"):
        pipe.enable_visionfuse("dense", precision=name)
        changes.append(change(run(pipe), stock))
    assert changes == sorted(changes)


@pytest.mark.parametrize("recipe", ["auto", "dense"])
def test_dense_recipes_take_a_precision(pipe, stock, recipe):
    pipe.enable_visionfuse(recipe, precision="fp8")
    got = run(pipe)
    assert 0 < change(got, stock) < 0.08
    pipe.enable_visionfuse("sage", qk="fp8")
    assert torch.equal(run(pipe), got)
    assert "in fp8" in visionfuse.report(pipe).summary


def test_implementations_round_alike(pipe):
    pipe.enable_visionfuse("sage", qk="int4", smooth_q=True)
    blocks = run(pipe)
    pipe.enable_visionfuse("sage", qk="int4", smooth_q=True, impl="reference")
    assert change(run(pipe), blocks) < 0.01


def test_gna_rounds_the_steps_of_its_plan(pipe, family, stock):
    options = {"density": 0.3, "stride": 2, "order": ORDERS[family]}
    pipe.enable_visionfuse("gna", **options, dense_steps=2)
    plain = run(pipe)
    pipe.enable_visionfuse("gna", **options, dense_steps=2, precision="fp8")
    rounded = run(pipe)
    assert 0 < change(rounded, plain) < 0.08
    found = visionfuse.report(pipe).denoisers[0]
    assert found.calls["dense"] == 2 * found.calls["plan"]
    pipe.enable_visionfuse("gna", **options, dense_steps=3, precision="fp8")
    assert torch.equal(run(pipe), stock), "dense steps are the model's own attention"


def test_a_window_of_the_whole_grid_still_rounds(pipe, family, stock):
    window = {"flux": (16, 24), "wan": (3, 4, 6)}[family]
    pipe.enable_visionfuse("gna", window=window, dense_steps=0, precision="fp8")
    assert 0 < change(run(pipe), stock) < 0.08
    pipe.enable_visionfuse("gna", window=window, dense_steps=0)
    assert torch.equal(run(pipe), stock)


def test_copies_pickles_and_files_keep_the_precision(pipe, tmp_path):
    recipe = recipes.build("gna", density=0.4, dense_steps=0, precision="int8_fp8+smooth_v")
    recipe.save(tmp_path / "recipe.json")
    assert Recipe.load(tmp_path / "recipe.json") == recipe
    pipe.enable_visionfuse(Recipe.load(tmp_path / "recipe.json"))
    expected = run(pipe)
    for twin in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert torch.equal(run(twin), expected)
        twin.disable_visionfuse()


@no_gpu
def test_a_named_kernel_that_cannot_is_refused_at_once(pipe):
    with pytest.raises(
        ValueError, match=r"(?s)gluon_sm90.*precision='int8_fp8\+k_thread'.*cannot run here"
    ):
        pipe.enable_visionfuse("sage", impl="gluon_sm90")
    assert "_visionfuse" not in vars(pipe)


def test_compiles_into_one_graph(pipe, family):
    recipe = {"density": 0.3, "stride": 2, "order": ORDERS[family], "dense_steps": 1}
    pipe.enable_visionfuse("gna", **recipe, precision="int8_fp8")
    expected = run(pipe)
    plain, before = pipe.transformer, torch._dynamo.config.error_on_recompile
    torch._dynamo.reset()
    pipe.transformer = torch.compile(plain, fullgraph=True, backend="eager")
    try:
        torch.testing.assert_close(run(pipe), expected, rtol=0, atol=2e-2)
        torch._dynamo.config.error_on_recompile = True
        run(pipe)
    finally:
        pipe.transformer = plain
        torch._dynamo.config.error_on_recompile = before
        torch._dynamo.reset()


# -- what runs where --------------------------------------------------------------------------------

GPU, CPU = torch.device("cuda"), torch.device("cpu")
FP8 = Precision.parse("fp8")


@pytest.fixture
def machine(monkeypatch):
    """A GPU with kernels for some precisions, that pass or fail their self-check."""

    def set_up(kernels: dict[str, str], failed: str = ""):
        monkeypatch.setattr(
            choice,
            "select_implementation",
            lambda device, dtype, dim, precision="model": (
                (kernels[str(precision)], []) if str(precision) in kernels
                else ("blocks", [f"gluon_sm90: no {precision}"])
            ),
        )  # fmt: skip
        monkeypatch.setattr(choice, "failed_check", lambda *_: failed)
        return lambda device: choose.__wrapped__("auto", device, torch.bfloat16, 128, FP8)

    return set_up


def test_a_kernel_is_taken_where_there_is_one(machine):
    found = machine({"fp8": "gluon_sm90", "model": "gluon_sm90"})(GPU)
    assert (found.impl, found.precision, found.precision_reasons) == ("gluon_sm90", FP8, [])


def test_a_gpu_without_a_kernel_keeps_the_models_precision_and_says_why(machine):
    found = machine({"model": "triton"})(GPU)
    assert (found.impl, found.precision) == ("triton", Precision())
    assert found.precision_reasons == ["gluon_sm90: no fp8"]


def test_a_kernel_that_fails_its_check_is_not_used(machine):
    found = machine({"fp8": "gluon_sm90", "model": "triton"}, "it failed its self-check")(GPU)
    assert (found.impl, found.precision) == ("triton", Precision())
    assert found.precision_reasons == ["gluon_sm90: it failed its self-check"]


def test_a_cpu_emulates(machine):
    found = machine({"model": "blocks"})(CPU)
    assert (found.impl, found.precision) == ("blocks", FP8)


def test_the_report_says_why_a_precision_was_refused(pipe, stock, monkeypatch):
    refused = Choice("blocks", [], Precision(), ["gluon_sm90: no fp8"])
    monkeypatch.setattr(session, "choose", lambda *_: refused)
    pipe.enable_visionfuse("dense", precision="fp8")
    assert torch.equal(run(pipe), stock)
    found = visionfuse.report(pipe)
    assert found.denoisers[0].precision == "the model's own"
    assert "gluon_sm90: no fp8" in str(found)
    # A faster exact kernel may still be taken then.
    monkeypatch.setattr(session, "faster_kernel", lambda *_: ("reference", ""))
    pipe.enable_visionfuse("auto", precision="fp8")
    assert change(run(pipe), stock) < 1e-4
    found = visionfuse.report(pipe).denoisers[0]
    assert (found.impl, found.precision) == ("reference", "the model's own")


def test_self_check_knows_rounding():
    from visionfuse.exact import failed_check

    for name in ("fp8", "int8_fp8", "int8", "int4_fp8", "model_fp8"):
        assert not failed_check("blocks", CPU, torch.float32, 64, Precision.parse(name))
    assert (
        "Hopper" in failed_check("gluon_sm90", CPU, torch.float32, 64, FP8)
        or torch.cuda.is_available()
    )
