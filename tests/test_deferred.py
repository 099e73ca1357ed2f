"""fuse=: norms and rotary embedding in the pass that rounds. Equal to the model's own, and left to it where they must be."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import library, nn
from torch.utils._python_dispatch import TorchDispatchMode

from visionfuse import Precision, report, routing
from visionfuse.choice import Choice
from visionfuse.deferred import Deferrals
from visionfuse.kernels.attention import block_sparse_attention
from visionfuse.kernels.attention.projected import Prelude, projected_attention
from visionfuse.kernels.attention.prologue import PrologueSpec, reference
from visionfuse.kernels.attention.prologue.kernel import INTERPRETED
from visionfuse.kernels.plan import Dense, TileWindow, TokenLayout, plan_attention
from visionfuse.patching import get
from visionfuse.session import Way
from visionfuse.sites import denoisers
from visionfuse.testing import assert_within_budget
from visionfuse.testing_families import TINY
from visionfuse.testing_pipelines import Graphs, flux_pipeline, run, wan_pipeline

GNA = {"density": 0.3, "dense_steps": 0, "min_steps": 0}
RECIPES = {"gna": GNA, "sage": {}, "sta": {"density": 0.3, "precision": "fp8_tile", **GNA}}
FAMILIES = {"hunyuan_video": 4, "hunyuan_video_15": 2, "qwen_image": 2, "flux2": 4}


class Calls(TorchDispatchMode):
    """Counts attention calls of which norms and rotary embedding are a part, and all others of ours."""

    def __init__(self):
        super().__init__()
        self.fused = self.others = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.fused += func is torch.ops.visionfuse.projected_attention.default
        self.others += func is torch.ops.visionfuse.block_sparse_attention.default
        return func(*args, **(kwargs or {}))


# -- the same numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", ["flux", "wan"])
def test_a_run_is_the_same(family, recipe):
    pipe = {"flux": flux_pipeline, "wan": wan_pipeline}[family]()
    stock = run(pipe, steps=2)
    pipe.enable_visionfuse(recipe, **RECIPES[recipe], fuse=False)
    with Calls() as apart:
        expected = run(pipe, steps=2)
    pipe.enable_visionfuse(recipe, **RECIPES[recipe], fuse=True)
    with Calls() as calls:
        out = run(pipe, steps=2)
    assert (apart.fused, calls.others) == (0, 0)
    assert calls.fused == apart.others > 0
    # In float32 both round the same numbers, but for those that lie at an edge.
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5 if recipe == "gna" else 1e-2)
    pipe.disable_visionfuse()
    assert torch.equal(run(pipe, steps=2), stock)


@pytest.mark.parametrize("family", FAMILIES)
def test_of_other_families(family):
    tiny = TINY[family]()
    tiny.pipe.enable_visionfuse("gna", **GNA, fuse=False)
    expected = tiny.run()
    tiny.pipe.enable_visionfuse("gna", **GNA, fuse=True)
    with Calls() as calls:
        out = tiny.run()
    assert calls.fused > 0
    assert calls.others == 0
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("precision", ["model", "int8_fp8", "fp8_tile"])
def test_within_the_budget_of_rounding(precision, across):
    """bfloat16 against norm, rotation and attention in float64; the model's own rounds after norm and rotation."""
    torch.manual_seed(0)
    layout = TokenLayout.joint(text=6, grids=[(6, 8)])
    plan = plan_attention(layout, Dense(), head_dim=32, impl="blocks", precision=precision).blocks
    q, k, v = torch.randn(3, 2, layout.length, 2, 32).bfloat16()
    weights = [1 + 0.2 * torch.randn(64 if across else 32) for _ in range(2)]
    angle = torch.randn(layout.length, 16).repeat_interleave(2, 1)
    prelude = Prelude(*weights, angle.cos(), angle.sin())
    exact = reference(q.double(), k.double(), v.double(), PrologueSpec(), **prelude.options)
    truth = block_sparse_attention(exact.q, exact.k, v.double(), plan, impl="reference")
    rounded = (exact.q.bfloat16(), exact.k.bfloat16(), v)
    low = block_sparse_attention(*rounded, plan, precision=precision)
    out = projected_attention(q, k, v, plan, prelude, precision=precision)
    assert out.dtype == torch.bfloat16
    assert_within_budget(out, truth, low)


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU: test_on_a_gpu")
@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("precision", ["int8_fp8", "fp8+q_warp", "fp8_tile", "int8_fp8+smooth_q"])
def test_kernels_round_what_they_normed(precision, across):
    """In float32, in Triton's interpreter: the same codes as of what was normed and rotated before."""
    torch.manual_seed(0)
    layout = TokenLayout.joint(text=6, grids=[(6, 8)])
    plan = plan_attention(layout, Dense(), head_dim=32, impl="triton", precision=precision).blocks
    q, k, v = torch.randn(3, 1, layout.length, 2, 32)
    weights = [1 + 0.2 * torch.randn(64 if across else 32) for _ in range(2)]
    angle = torch.randn(layout.length, 16).repeat_interleave(2, 1)
    prelude = Prelude(*weights, angle.cos(), angle.sin(), eps=1e-3)
    how: dict = {"impl": "triton", "precision": precision}
    expected = block_sparse_attention(*prelude.applied(q, k, v), v, plan, **how)
    out = projected_attention(q, k, v, plan, prelude, **how)
    assert float((out - expected).abs().mean() / expected.abs().mean()) < 2e-3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("precision", ["model", "int8_fp8", "fp8_tile"])
def test_on_a_gpu(precision, across):
    """Against float64, within twice the error of norms and rotation in bfloat16 before; and in a CUDA graph."""
    torch.manual_seed(0)
    layout = TokenLayout.joint(text=64, grids=[(24, 24)])
    plan = plan_attention(layout, Dense(), head_dim=128, precision=precision, device="cuda").blocks
    q, k, v = torch.randn(3, 2, layout.length, 4, 128, device="cuda").bfloat16()
    weights = [1 + 0.2 * torch.randn(512 if across else 128, device="cuda") for _ in range(2)]
    angle = torch.randn(layout.length, 64, device="cuda").repeat_interleave(2, 1)
    prelude = Prelude(*weights, angle.cos(), angle.sin())
    exact = reference(q.double(), k.double(), v.double(), PrologueSpec(), **prelude.options)
    truth = block_sparse_attention(exact.q, exact.k, v.double(), plan, impl="reference")
    rounded = (exact.q.bfloat16(), exact.k.bfloat16(), v)
    low = block_sparse_attention(*rounded, plan, precision=precision)
    call = lambda: projected_attention(q, k, v, plan, prelude, precision=precision)
    out = call()
    assert_within_budget(out, truth, low)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = call()
    graph.replay()
    assert torch.equal(again, out)


def test_shapes_strides_and_scale():
    torch.manual_seed(0)
    layout = TokenLayout.joint(grids=[(4, 4)])
    plan = plan_attention(layout, TileWindow(window=(3, 3)), head_dim=16, impl="blocks").blocks
    wide = torch.randn(1, 16, 3, 2, 16)  # q, k, v of one product
    q, k, v = wide.unbind(2)
    angle = torch.randn(1, 16, 1, 16)
    prelude = Prelude(None, None, angle.cos(), angle.sin())
    q1, k1 = prelude.applied(q, k, v)
    expected = block_sparse_attention(q1, k1, v, plan, scale=0.5)
    torch.testing.assert_close(projected_attention(q, k, v, plan, prelude, scale=0.5), expected)
    library.opcheck(
        torch.ops.visionfuse.projected_attention.default,
        (q, k, v, plan.to_tensors(), plan.scalars(), 0.5, "auto", "model", *prelude),
        test_utils=("test_schema", "test_faketensor"),
    )


# -- compiled -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "classes"), [("flux", 2), ("wan", 1)])
def test_one_graph_and_no_break(family, classes):
    pipe = {"flux": flux_pipeline, "wan": wan_pipeline}[family]()
    pipe.enable_visionfuse("gna", **GNA, fuse=True)
    expected, graphs = run(pipe, steps=2), Graphs()
    torch._dynamo.reset()
    options = {"backend": graphs, "fullgraph": True}
    pipe.enable_visionfuse("gna", **GNA, fuse=True, compile=options)
    torch.testing.assert_close(run(pipe, steps=2), expected, rtol=0, atol=1e-5)
    assert graphs.count == classes
    torch._dynamo.reset()


# -- left to the model --------------------------------------------------------------------------------


def refused(pipe, change=lambda pipe: None):
    """A run with fuse=True against one without; returns how often calls were fused, and the report's lines."""
    change(pipe)
    pipe.enable_visionfuse("gna", **GNA, fuse=False)
    expected = run(pipe, steps=1)
    pipe.enable_visionfuse("gna", **GNA, fuse=True)
    with Calls() as calls:
        out = run(pipe, steps=1)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    return calls, get(pipe).ran["transformer"].deferrals.lines(), str(report(pipe))


def test_on_a_cpu_nothing_is_fused_unasked():
    pipe = flux_pipeline()
    pipe.enable_visionfuse("sage")
    with Calls() as calls:
        run(pipe, steps=1)
    assert calls.fused == 0
    assert "fused" not in str(report(pipe))


def test_unasked_where_a_kernel_rounds_and_it_pays():
    def deferral(pipe, precision="fp8", impl="gluon_sm90"):
        denoiser = next(denoisers(pipe))
        layers = denoiser.site.layers(denoiser.model)
        found = Deferrals.of(denoiser.site, denoiser.model, layers, None)
        way = Way(Choice(impl, [], Precision.parse(precision)))
        return found.get(layers[0].processor, way)

    with torch.no_grad():
        for pipe, compiled in ((flux_pipeline(), True), (wan_pipeline(), False)):
            assert deferral(pipe) is not None
            assert deferral(pipe, precision="model") is None
            assert deferral(pipe, impl="blocks") is None
            pipe.transformer.compile_repeated_blocks(backend="eager")
            assert (deferral(pipe) is not None) == compiled, (
                "norms over all heads are as fast compiled"
            )
    assert deferral(flux_pipeline()) is None, "with gradients"


class Adapted(nn.Module):
    """A norm with an adapter around it, as PEFT wraps layers."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.base_layer, self.change = norm, nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return self.base_layer(x) * self.change


def test_an_adapter_on_a_norm():
    def adapt(pipe):
        attn = pipe.transformer.single_transformer_blocks[0].attn
        attn.norm_k = Adapted(attn.norm_k)

    calls, lines, text = refused(flux_pipeline(), adapt)
    assert calls.others == 1
    assert calls.fused == 3
    assert lines[1] == "norm_k is no plain RMSNorm but Adapted, of an adapter perhaps (1x)"
    assert lines[1] in text


def test_a_hook_on_a_norm():
    def double(pipe):
        norm = pipe.transformer.get_submodule("blocks.0.attn1.norm_q")
        norm.register_forward_hook(lambda m, x, out: 2 * out)

    calls, lines, _ = refused(wan_pipeline(), double)
    assert calls.others == calls.fused > 0
    assert "norm_q has hooks" in lines[1]


def test_weights_that_come_when_a_layer_is_called():
    """Sequential offloading: accelerate's hooks on every module, whose weights are on no device meanwhile."""
    pipe = wan_pipeline()
    pipe.transformer = cpu_offload(pipe.transformer, torch.device("cpu"))
    assert pipe.transformer.get_parameter("blocks.0.attn1.norm_q.weight").is_meta
    calls, lines, _ = refused(pipe)
    assert calls.fused == 0
    assert "norm_q has hooks" in lines[1]


class Renamed(FluxAttnProcessor):
    """Somebody else's, of which we know nothing but that it calls the dispatcher."""


def test_an_unknown_processor():
    def change(pipe):
        pipe.transformer.single_transformer_blocks[1].attn.set_processor(Renamed())

    calls, lines, _ = refused(flux_pipeline(), change)
    assert calls.others == 1
    assert calls.fused == 3
    assert "Renamed norms and rotates queries and keys itself (1x)" in lines[1]


def test_families_without_such_norms_are_not_mentioned():
    tiny = TINY["stable_diffusion"]()
    tiny.pipe.enable_visionfuse("sage", fuse=True)
    with Calls() as calls:
        tiny.run()
    assert calls.fused == 0
    assert "fused" not in str(report(tiny.pipe))


def test_a_shared_processor_is_fused_in_all_of_its_layers_or_in_none():
    def change(pipe):
        shared = FluxAttnProcessor()
        for block in pipe.transformer.single_transformer_blocks:
            block.attn.set_processor(shared)
        attn = pipe.transformer.single_transformer_blocks[1].attn
        attn.norm_q = Adapted(attn.norm_q)

    calls, lines, _ = refused(flux_pipeline(), change)
    assert calls.fused == calls.others == 2
    assert "in 2 processors" in lines[0]


def test_calls_that_follow_no_plan_are_normed_and_rotated(monkeypatch):
    """Between other tokens than the plan's: the model's own attention runs, of what the model would have given it."""
    pipe = flux_pipeline()
    stock = run(pipe, steps=1)
    pipe.enable_visionfuse("gna", **GNA, fuse=True)
    monkeypatch.setattr(routing, "_fitting", lambda *_: None)
    torch.testing.assert_close(run(pipe, steps=1), stock, rtol=0, atol=1e-5)
    assert report(pipe).denoisers[0].notes
