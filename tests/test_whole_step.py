"""enable_visionfuse(compile=, linear=): few graphs, 8-bit layers where they fit, clear fallbacks, exact undoing."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from visionfuse import compiled, linears, report
from visionfuse.linears import Linears, errors_on
from visionfuse.patching import get
from visionfuse.sites import denoisers
from visionfuse.testing_families import TINY
from visionfuse.testing_pipelines import Graphs, flux_pipeline, run, wan_pipeline

GNA = {"density": 0.3, "stride": 2, "dense_steps": 4}
BUILD = {"flux": flux_pipeline, "wan": wan_pipeline}
WIDTHS = {"flux": (48, 64), "wan": (96, 128)}


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def state(pipe) -> dict:
    """Everything about the modules of a denoiser that enabling could change."""
    model = pipe.transformer
    return {
        "attributes": {name: set(vars(m)) for name, m in model.named_modules()},
        "classes": {name: type(m) for name, m in model.named_modules()},
        "parameters": {name: id(p) for name, p in model.named_parameters()},
        "values": {name: (p.dtype, p.device, p.requires_grad) for name, p in model.named_parameters()},
        "compiled": [m._compiled_call_impl for m in model.modules()],
    }  # fmt: skip


# -- compile ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "classes"), [pytest.param("flux", 2, marks=pytest.mark.slow), ("wan", 1)]
)
def test_a_handful_of_graphs(family, classes):
    """28 steps in two phases: 2 graphs a class of blocks; 4 with a second size; none for what was there."""
    pipe, graphs = BUILD[family](), Graphs()
    stock, before = run(pipe, steps=2), state(pipe)
    first, second = ({"width": w} for w in WIDTHS[family])
    pipe.enable_visionfuse("gna", **GNA)
    expected = run(pipe, steps=28, **first)
    pipe.enable_visionfuse("gna", **GNA, compile={"backend": graphs, "fullgraph": True})
    out = run(pipe, steps=28, **first)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    assert graphs.count == 2 * classes
    run(pipe, steps=6, **second)
    assert graphs.count == 4 * classes
    for size in (first, second):
        run(pipe, steps=6, **size)
    assert graphs.count == 4 * classes
    lines = get(pipe).compiled["transformer"].lines()
    assert len(lines) == 1
    assert "each class once" in lines[0]
    pipe.disable_visionfuse()
    assert state(pipe) == before
    assert torch.equal(run(pipe, steps=2), stock)


def test_views_and_batches_of_one_need_no_graph_of_their_own():
    whole = torch.randn(1, 6, 4)
    with torch.no_grad():
        part = whole[:, 2:]
        plain = compiled._plain(part)
    assert plain.stride() == (16, 4, 1) != part.stride()
    assert plain._base is None
    assert plain.data_ptr() == part.data_ptr()
    for kept in (whole[..., 1:], torch.randn(2, 2, requires_grad=True), None, "text"):
        assert compiled._plain(kept) is kept


def failing(graph, inputs):
    raise RuntimeError("no such instruction")


def out_of_memory(graph, inputs):
    def run(*args):
        raise torch.OutOfMemoryError("a graph needs more")

    return run


@pytest.mark.parametrize(
    ("backend", "reason"), [(failing, "no such instruction"), (out_of_memory, "a graph needs more")]
)
def test_a_block_that_fails_runs_eagerly_and_loses_nothing(backend, reason):
    pipe = wan_pipeline()
    pipe.enable_visionfuse("gna", **GNA)
    expected = run(pipe, steps=6)
    pipe.enable_visionfuse("gna", **GNA, compile={"backend": backend})
    with pytest.warns(UserWarning, match=reason):
        result = run(pipe, steps=6)
    assert torch.equal(result, expected)
    assert any(reason in line for line in get(pipe).compiled["transformer"].lines())
    pipe.disable_visionfuse()
    assert all(m._compiled_call_impl is None for m in pipe.transformer.modules())


def test_what_its_owner_compiled_stays_so():
    pipe, graphs = wan_pipeline(), Graphs()
    pipe.transformer.compile_repeated_blocks(backend=graphs)
    mine = [m._compiled_call_impl for m in pipe.transformer.modules()]
    pipe.enable_visionfuse(compile=True)
    assert "compiled already" in get(pipe).compiled["transformer"].lines()[0]
    pipe.disable_visionfuse()
    assert [m._compiled_call_impl for m in pipe.transformer.modules()] == mine


def test_a_model_without_repeated_blocks_stays_eager():
    pipe = TINY["cogvideox_2b"]().pipe
    pipe.enable_visionfuse(compile=True)
    assert "no repeated blocks" in get(pipe).compiled["transformer"].lines()[0]


def test_a_pipeline_without_a_known_denoiser_is_refused():
    pipe = wan_pipeline()
    pipe.transformer = torch.nn.Linear(2, 2)
    for asked in ({"compile": True}, {"linear": "int8"}):
        with pytest.raises(ValueError, match="knows no denoiser"):
            pipe.enable_visionfuse(**asked)


# -- linear layers ------------------------------------------------------------------------------------

INT8 = Linears(format="int8", least_width=16, skip=())


def test_int8_layers_and_exactly_back():
    pytest.importorskip("torchao")
    pipe = flux_pipeline()
    stock, before = run(pipe), state(pipe)
    values = {name: p.detach().clone() for name, p in pipe.transformer.named_parameters()}
    pipe.enable_visionfuse(linear=INT8)
    made = get(pipe).rounded["transformer"]
    assert len(made.layers) == len(linears.candidates(next(denoisers(pipe)), INT8)) > 20
    error = float((run(pipe) - stock).abs().sum() / stock.abs().sum())
    assert 0 < error < 0.05
    # A GPU would hold codes only: the parameters themselves wait on the CPU.
    layer = pipe.transformer.transformer_blocks[0].ff.net[2]
    assert type(layer.weight).__name__ == "Int8Tensor"
    assert made.layers["transformer_blocks.0.ff.net.2"].weight.device.type == "cpu"
    pipe.enable_visionfuse("sage", linear=INT8)  # another recipe; the layers stay as they are
    assert get(pipe).rounded["transformer"] is made
    pipe.enable_visionfuse("sage", linear=replace(INT8, least_width=17))
    again = get(pipe).rounded["transformer"]  # rounded from the parameters themselves
    assert again is not made
    assert again.errors == made.errors
    assert not made.layers
    pipe.disable_visionfuse()
    assert state(pipe) == before
    assert all(torch.equal(p, values[n]) for n, p in pipe.transformer.named_parameters())
    assert torch.equal(run(pipe), stock)


def test_modulations_embeddings_and_last_layers_are_left_alone():
    found = linears.candidates(next(denoisers(flux_pipeline())), INT8)
    assert "single_transformer_blocks.1.proj_out" in found
    assert "transformer_blocks.0.attn.add_k_proj" in found
    for name in ("proj_out", "x_embedder", "context_embedder", "norm_out.linear",
                 "transformer_blocks.0.norm1.linear", "single_transformer_blocks.0.norm.linear"):  # fmt: skip
        assert name not in found


@pytest.mark.parametrize(
    ("choice", "kept"),
    [
        ({"skip": linears.TEXT_ONLY}, lambda name: "add" not in name and "context" not in name),
        ({"only": ("*.ff.*",)}, lambda name: ".ff." in name),
        (
            {"skip": ("*.to_?", "single*")},
            lambda name: name[-4:-1] != "to_" and "single" not in name,
        ),
        ({"least_width": 33}, lambda name: False),
    ],
)
def test_layers_by_choice(choice, kept):
    denoiser = next(denoisers(flux_pipeline()))
    everything = linears.candidates(denoiser, INT8)
    chosen = linears.candidates(
        denoiser, Linears(**{"format": "int8", "least_width": 16, **choice})
    )
    assert list(chosen) == [name for name in everything if kept(name)]


def test_layers_by_error_budget():
    pytest.importorskip("torchao")
    pipe = flux_pipeline()
    pipe.enable_visionfuse(linear=INT8)
    made = get(pipe).rounded["transformer"]
    errors = errors_on(made, lambda: run(pipe, steps=1))
    assert errors.keys() == made.layers.keys()
    assert all(0 < error < 0.1 for error in errors.values())
    budget = sorted(errors.values())[len(errors) // 2]
    pipe.enable_visionfuse(linear=INT8.within(errors, budget))
    left = get(pipe).rounded["transformer"].layers
    assert set(left) == {name for name, error in errors.items() if error <= budget}
    assert 0 < len(left) < len(errors)


def test_compiled_int8_layers_share_their_graphs():
    pytest.importorskip("torchao")
    pipe, graphs = wan_pipeline(attention_head_dim=16), Graphs()
    pipe.enable_visionfuse("gna", **GNA, linear=INT8)
    expected = run(pipe, steps=6)
    pipe.enable_visionfuse(
        "gna", **GNA, linear=INT8, compile={"backend": graphs, "fullgraph": True}
    )
    torch.testing.assert_close(run(pipe, steps=6), expected, rtol=0, atol=1e-5)
    assert graphs.count == 2


@pytest.mark.parametrize("way", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_copies_keep_what_is_needed_to_undo(way):
    pytest.importorskip("torchao")
    pipe = wan_pipeline(attention_head_dim=16)
    stock = run(pipe)
    pipe.enable_visionfuse(linear=INT8, compile={"backend": "eager"})
    rounded, twin = run(pipe), way(pipe)
    assert torch.equal(run(twin), rounded)
    twin.disable_visionfuse()
    assert torch.equal(run(twin), stock)
    assert torch.equal(run(pipe), rounded)


@pytest.mark.parametrize(
    ("linear", "change", "reason"),
    [
        ("fp8", None, "NVIDIA GPU from sm_89"),
        ("int8", None, "1024 or wider"),
        (replace(INT8, least_width=20), "odd", "no multiple of 16"),
        (replace(INT8, tolerance=1e-4), None, "above the tolerance"),
        (INT8, "group offload", "group offloading"),
        (INT8, "meta", "sequential offload"),
    ],
)
def test_what_cannot_be_rounded_stays_and_says_why(linear, change, reason):
    pytest.importorskip("torchao")
    pipe = wan_pipeline(
        **({"attention_head_dim": 12} if change == "odd" else {"attention_head_dim": 16})
    )
    if change == "group offload":
        cpu = torch.device("cpu")
        pipe.transformer.enable_group_offload(
            onload_device=cpu, offload_type="block_level", num_blocks_per_group=1
        )
    if change == "meta":
        pipe.transformer.to("meta")
    pipe.enable_visionfuse(linear=linear)
    made = get(pipe).rounded["transformer"]
    assert not made.layers
    assert any(reason in line for line in made.lines()), made.lines()


def test_memory_that_runs_out_stops_the_rounding_and_keeps_the_rest(monkeypatch):
    pytest.importorskip("torchao")
    pipe, calls = flux_pipeline(), []
    stock = run(pipe)
    config = linears._config

    def exhausted(format):
        calls.append(format)
        if len(calls) > 5:
            raise torch.OutOfMemoryError("no more")
        return config(format)

    monkeypatch.setattr(linears, "_config", exhausted)
    pipe.enable_visionfuse(linear=INT8)
    made = get(pipe).rounded["transformer"]
    assert len(made.layers) == 5
    assert any("out of memory" in line for line in made.lines())
    assert not torch.equal(run(pipe), stock)
    pipe.disable_visionfuse()
    assert torch.equal(run(pipe), stock)


def test_without_torchao_nothing_changes(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    pipe = wan_pipeline()
    stock = run(pipe)
    pipe.enable_visionfuse(linear="int8")
    assert "pip install torchao" in get(pipe).rounded["transformer"].lines()[0]
    assert torch.equal(run(pipe), stock)


@pytest.mark.parametrize("wrong", ["fp4", 3])
def test_wrong_formats_change_nothing(wrong):
    pipe = wan_pipeline()
    with pytest.raises(ValueError, match="linear must be"):
        pipe.enable_visionfuse(linear=wrong)
    assert get(pipe) is None
    with pytest.raises(TypeError, match="tuple of patterns"):
        Linears(only="*.ff")


def test_lora_stays_on_top_of_rounded_layers():
    pytest.importorskip("torchao")
    from peft import LoraConfig

    pipe = wan_pipeline(attention_head_dim=16)
    torch.manual_seed(7)
    pipe.transformer.add_adapter(
        LoraConfig(r=4, target_modules=["to_q", "to_k"], init_lora_weights=False)
    )
    stock = run(pipe)
    pipe.enable_visionfuse(linear=INT8)
    assert "blocks.0.attn1.to_q.base_layer" in get(pipe).rounded["transformer"].layers
    error = float((run(pipe) - stock).abs().sum() / stock.abs().sum())
    assert 0 < error < 0.05
    pipe.disable_visionfuse()
    assert torch.equal(run(pipe), stock)


def test_the_report_names_both():
    pytest.importorskip("torchao")
    pipe = wan_pipeline(attention_head_dim=16)
    for recipe, options in (("auto", {}), ("gna", GNA)):
        pipe.enable_visionfuse(recipe, **options, linear=INT8, compile=True)
        said = str(report(pipe))
        assert "transformer, linear layers: 20 layers in int8" in said
        assert "transformer, compiled: 2 WanTransformerBlock, each class once" in said
    pipe.disable_visionfuse()
    assert not report(pipe).changes


def test_model_offload():
    pytest.importorskip("torchao")
    pipe = wan_pipeline(attention_head_dim=16)
    pipe.enable_visionfuse(linear=INT8)
    expected = run(pipe)
    pipe.disable_visionfuse()
    stock = run(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    pipe.enable_visionfuse(linear=INT8)
    assert torch.equal(run(pipe), expected)
    pipe.disable_visionfuse()
    assert torch.equal(run(pipe), stock)


def test_another_recipe_keeps_the_graphs():
    pipe, graphs = wan_pipeline(), Graphs()
    wishes = {"compile": {"backend": graphs, "fullgraph": True}}
    pipe.enable_visionfuse("gna", **GNA, **wishes)
    run(pipe, steps=6)
    assert graphs.count == 2
    pipe.enable_visionfuse("gna", **{**GNA, "density": 0.5}, **wishes)
    run(pipe, steps=6)
    assert graphs.count == 3  # of the new plan; the dense steps have theirs
    pipe.enable_visionfuse("gna", **GNA)
    assert all(m._compiled_call_impl is None for m in pipe.transformer.modules())


def test_a_layer_that_fails_in_a_run_gets_its_own_weights_back():
    """As where cuBLAS takes a product for the tokens that were tried and not for those of the run."""
    pytest.importorskip("torchao")
    pipe = wan_pipeline(attention_head_dim=16)
    stock = run(pipe)
    pipe.enable_visionfuse(linear=INT8, compile={"backend": "eager"})
    made = get(pipe).rounded["transformer"]
    count = len(made.layers)
    inside = [name for name in made.layers if name.startswith("blocks.1.")]
    for name in inside:
        made.layers[name].module.weight = torch.nn.Parameter(torch.zeros(3, 3))
    with pytest.warns(UserWarning, match="failed and runs eagerly"):
        result = run(pipe)
    assert 0 < float((result - stock).abs().sum() / stock.abs().sum()) < 0.05
    assert len(made.layers) == count - len(inside)
    assert any("failed in a run" in line for line in made.lines())
    pipe.disable_visionfuse()
    assert torch.equal(run(pipe), stock)
    # What fails in the stock model, too, is no secret.
    pipe.transformer.blocks[0].ffn.net[2].weight = torch.nn.Parameter(torch.zeros(3, 3))
    pipe.enable_visionfuse(compile={"backend": "eager"})
    with pytest.warns(UserWarning, match="runs eagerly"), pytest.raises(RuntimeError):
        run(pipe)


def test_gelu_by_a_sigmoid_is_the_same_function():
    def backend(module, inputs):
        compiled.short_gelu(module.graph)
        module.recompile()
        functions.extend(node.target for node in module.graph.nodes)
        return module.forward

    functions: list = []
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    for approximate, changed in (("tanh", True), ("none", False)):
        functions.clear()
        gelu = torch.nn.GELU(approximate=approximate)
        made = torch.compile(gelu, backend=backend)
        torch.testing.assert_close(made(x), gelu(x), rtol=0, atol=1e-14)
        assert made(x.bfloat16()).dtype == torch.bfloat16
        assert torch.equal(made(torch.tensor([-1e4, 1e4, 1e30])), torch.tensor([0.0, 1e4, 1e30]))
        assert (torch.rsqrt in functions) == changed


@pytest.mark.slow  # compiles with inductor
def test_compiled_code_survives_processes(tmp_path):
    program = (
        "from torch._dynamo.utils import counters\n"
        "from visionfuse.testing_pipelines import run, wan_pipeline\n"
        "pipe = wan_pipeline()\n"
        "pipe.enable_visionfuse(compile=True)\n"
        "run(pipe, steps=2)\n"
        "kinds = ('hit', 'miss', 'bypass')\n"
        "print('counted', *(counters['aot_autograd'][f'autograd_cache_{kind}'] for kind in kinds))\n"
    )
    made = []
    for _ in range(2):
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)  # fmt: skip
        made.append(ran.stdout.split("counted ")[1].split())
    assert made == [["0", "1", "0"], ["1", "0", "0"]]
