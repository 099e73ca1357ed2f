"""Recipe "auto" on a machine with a faster exact kernel. "blocks" plays it, so that this runs on a CPU."""

from __future__ import annotations

import pytest
import torch

import visionfuse
from visionfuse import exact, patching
from visionfuse.exact import predicted_gain, self_check
from visionfuse.testing_pipelines import Graphs, flux_pipeline, run


@pytest.fixture(scope="module")
def pipe():
    return flux_pipeline()


@pytest.fixture
def faster(pipe, monkeypatch):
    """What the pipeline draws by itself; afterwards a faster kernel exists from 256 tokens on."""
    stock = run(pipe)
    monkeypatch.setattr(patching, "has_faster_kernels", lambda: True)
    monkeypatch.setattr(exact, "KERNEL", "blocks")
    monkeypatch.setattr(exact, "GAINS", {pipe.transformer.config.attention_head_dim: {256: 1.2}})
    yield stock
    pipe.disable_visionfuse()


def test_auto_takes_the_faster_kernel_for_every_step(pipe, faster):
    pipe.enable_visionfuse()
    got = run(pipe)
    torch.testing.assert_close(got, faster, rtol=0, atol=1e-5 * float(faster.abs().max()))
    report = visionfuse.report(pipe).denoisers[0]
    assert (report.impl, report.density) == ("blocks", 1.0)
    assert report.calls == {"plan": 3, "dense": 0}
    assert report.order is not None
    assert report.order.kind == "row"


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("GAINS", {}, "no exact kernel is known to be faster"),
        ("TOLERANCE", -1.0, "failed its self-check"),
        ("KERNEL", "gluon_sm90", "gluon_sm90 would be 1.20x faster, but"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="gluon_sm90 may run here")
def test_auto_stays_with_the_models_own_attention(pipe, faster, monkeypatch, name, value, reason):
    monkeypatch.setattr(exact, name, value)
    pipe.enable_visionfuse()
    assert torch.equal(run(pipe), faster)
    report = visionfuse.report(pipe).denoisers[0]
    assert any(reason in note for note in report.notes), report.notes
    assert report.calls == {"plan": 0, "dense": 3}


def test_auto_survives_a_kernel_that_breaks(pipe, faster, monkeypatch):
    def breaks(*arguments, **options):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(exact, "block_sparse_attention", breaks)
    self_check.cache_clear()
    pipe.enable_visionfuse()
    assert torch.equal(run(pipe), faster)
    self_check.cache_clear()
    notes = visionfuse.report(pipe).denoisers[0].notes
    assert any("no such instruction" in note for note in notes)


def test_auto_respects_a_backend_that_the_user_chose(pipe, faster):
    pipe.transformer.set_attention_backend("_native_math")
    try:
        own = run(pipe)
        pipe.enable_visionfuse()
        assert torch.equal(run(pipe), own)
        notes = visionfuse.report(pipe).denoisers[0].notes
        assert any("_native_math" in note for note in notes)
    finally:
        pipe.transformer.set_attention_backend("native")  # diffusers makes the last one global
        pipe.transformer.reset_attention_backend()


def test_gains_hold_from_their_length_on(monkeypatch):
    monkeypatch.setattr(exact, "GAINS", {128: {1000: 1.05, 5000: 1.2}})
    assert [predicted_gain(128, n) for n in (999, 1000, 4999, 5000)] == [1.0, 1.05, 1.05, 1.2]
    assert predicted_gain(64, 10**6) == 1.0


def test_self_check_sees_a_wrong_kernel(monkeypatch):
    device = torch.device("cpu")
    assert self_check("reference", device, torch.float32, 32)[0] < 1e-5
    wrong = lambda q, k, v, plan, impl, precision: v
    monkeypatch.setattr(exact, "block_sparse_attention", wrong)
    assert self_check.__wrapped__("reference", device, torch.float32, 32)[0] > 0.5


def test_layers_that_stay_dense_take_the_faster_kernel_too(pipe, faster, monkeypatch):
    sparse = {"density": 0.4, "dense_steps": 1, "dense_layers": (0,)}
    with monkeypatch.context() as without:
        without.setattr(exact, "GAINS", {})
        pipe.enable_visionfuse("gna", **sparse)
        own = run(pipe)
        assert visionfuse.report(pipe).denoisers[0].dense == ""
        pipe.disable_visionfuse()
    pipe.enable_visionfuse("gna", **sparse)
    monkeypatch.setattr(exact, "KERNEL", "reference")  # of other bits
    got = run(pipe)
    assert not torch.equal(got, own)
    torch.testing.assert_close(got, own, rtol=0, atol=1e-5 * float(own.abs().max()))
    found = visionfuse.report(pipe)
    assert found.denoisers[0].dense == "reference"
    assert found.denoisers[0].calls == {"plan": 2, "dense": 1}
    assert "exact, in reference, which is faster here" in str(found)


@pytest.mark.parametrize("kept", ["a short run", "a dense run", "a named implementation"])
def test_what_stays_literally_stock(pipe, faster, kept):
    options = {"min_steps": 99} if kept == "a short run" else {"dense_steps": 3}
    if kept == "a named implementation":
        options = {"dense_layers": 99, "impl": "blocks"}
    pipe.enable_visionfuse("gna", density=0.4, **options)
    assert torch.equal(run(pipe), faster)
    assert visionfuse.report(pipe).denoisers[0].dense == ""


def test_compiled_blocks_need_no_more_graphs_for_it(pipe, faster):
    torch._dynamo.reset()
    graphs = Graphs()
    fresh = flux_pipeline()
    fresh.transformer.compile_repeated_blocks(backend=graphs, fullgraph=True)
    fresh.enable_visionfuse("gna", density=0.4, dense_steps=1)
    got = run(fresh)
    assert visionfuse.report(fresh).denoisers[0].dense == "blocks"
    # Of two classes of blocks one for dense steps and one for the plan, and one more for the strides that the
    # first of the single blocks sees, enabled or not.
    assert graphs.count == 5
    pipe.enable_visionfuse("gna", density=0.4, dense_steps=1)
    torch.testing.assert_close(got, run(pipe), rtol=0, atol=1e-4 * float(got.abs().max()))
    torch._dynamo.reset()
