"""torch.compile with fullgraph=True: every way to compile, one extra graph for the plan, exact undo."""

from __future__ import annotations

import pytest
import torch

from visionfuse import Order
from visionfuse.testing_pipelines import (
    TEXT_WIDTH,
    Graphs,
    flux_pipeline,
    ip_adapter_weights,
    run,
    wan_pipeline,
)

# Orders that really move tokens at this size, and a schedule with both phases.
RECIPES = {
    "flux": {"order": Order(kind="tiled", tile=(4, 6), subtile=(2, 3))},
    "wan": {"order": Order(kind="tiled", tile=(2, 2, 3))},
}
PLAN = {"density": 0.3, "stride": 2, "dense_steps": 2}
BUILD = {"flux": flux_pipeline, "wan": wan_pipeline}
OTHER = {"flux": {"width": 64}, "wan": {"width": 128}}


def whole(pipe, **options):
    pipe.transformer = torch.compile(pipe.transformer, **options)


def inner(pipe, **options):
    pipe.transformer.compile(**options)


def forward(pipe, **options):
    pipe.transformer.forward = torch.compile(pipe.transformer.forward, **options)


def regional(pipe, **options):
    pipe.transformer.compile_repeated_blocks(**options)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * float(b.abs().max()))


SLOW = pytest.mark.slow
# Graphs of the stock model, more once enabled, and more for another resolution. Wan's rotary tables
# are computed inside the model, so that its dense steps have a graph of their own.
CASES = [
    pytest.param("flux", whole, (1, 1, 2), id="flux-whole"),
    pytest.param("flux", inner, (1, 1, 2), id="flux-inner", marks=SLOW),
    pytest.param("flux", forward, (1, 1, 2), id="flux-forward", marks=SLOW),
    pytest.param("flux", regional, None, id="flux-regional", marks=SLOW),
    pytest.param("wan", whole, (1, 2, 2), id="wan-whole", marks=SLOW),
    pytest.param("wan", inner, (1, 2, 2), id="wan-inner"),
    pytest.param("wan", regional, (1, 1, 2), id="wan-regional"),
]


@pytest.mark.parametrize("enabled_first", [False, True], ids=["compile_first", "enable_first"])
@pytest.mark.parametrize(("family", "how", "graphs"), CASES)
def test_compiled_equals_eager(family, how, graphs, enabled_first, request):
    if enabled_first and request.node.get_closest_marker("slow") is None and how is not regional:
        pytest.skip("the order of calls is tested with regional compilation, which is quick")
    pipe, counter = BUILD[family](), Graphs()
    recipe = {**PLAN, **RECIPES[family]}
    stock = run(pipe, steps=4)
    pipe.enable_visionfuse("gna", **recipe)
    expected, other = run(pipe, steps=4), run(pipe, steps=4, **OTHER[family])
    counts = []
    if not enabled_first:
        pipe.disable_visionfuse()
        how(pipe, backend=counter, fullgraph=True)
        close(run(pipe, steps=4), stock)
        counts.append(counter.new())
        pipe.enable_visionfuse("gna", **recipe)
    else:
        how(pipe, backend=counter, fullgraph=True)
    close(run(pipe, steps=4), expected)
    counts.append(counter.new())
    close(run(pipe, steps=4, **OTHER[family]), other)
    counts.append(counter.new())
    close(run(pipe, steps=4), expected)
    assert counter.new() == 0, "a graph that was there already was compiled again"
    pipe.disable_visionfuse()
    close(run(pipe, steps=4), stock)
    if not enabled_first:
        assert counter.new() == 0
        if graphs is not None:
            assert tuple(counts) == graphs


@pytest.mark.parametrize(
    ("family", "how"),
    [
        pytest.param("wan", regional, id="wan-regional"),
        pytest.param("flux", whole, id="flux-whole", marks=SLOW),
        pytest.param("wan", inner, id="wan-inner", marks=SLOW),
    ],
)
def test_inductor(family, how):
    pipe = BUILD[family]()
    slow = how is not regional
    pipe.enable_visionfuse("gna", **{**PLAN, "dense_steps": 1 if slow else 0}, **RECIPES[family])
    sizes = [{}, OTHER[family], {}] if slow else [{}, {}]
    expected = [run(pipe, steps=2, **size) for size in sizes]
    how(pipe, fullgraph=True)
    for size, result in zip(sizes, expected, strict=True):
        close(run(pipe, steps=2, **size), result)


def test_compiled_with_ip_adapter():
    """Its second attention is noted while a graph is traced, without a graph for every note."""
    pipe, counter = flux_pipeline(), Graphs()
    pipe.transformer._load_ip_adapter_weights([ip_adapter_weights(pipe.transformer)])
    image = torch.linspace(-1, 1, TEXT_WIDTH).reshape(1, 1, -1)
    call = {
        "ip_adapter_image_embeds": [image],
        "negative_ip_adapter_image_embeds": [torch.zeros_like(image)],
    }
    pipe.enable_visionfuse("gna", **PLAN, **RECIPES["flux"])
    expected = run(pipe, steps=4, **call)
    pipe.transformer.compile_repeated_blocks(backend=counter, fullgraph=True)
    close(run(pipe, steps=4, **call), expected)
    assert counter.new() <= 5
    close(run(pipe, steps=4, **call), expected)
    assert counter.new() == 0


@SLOW
def test_compiled_with_group_offload_and_lora():
    from peft import LoraConfig

    pipe = flux_pipeline()
    torch.manual_seed(7)
    pipe.transformer.add_adapter(
        LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    )
    pipe.enable_visionfuse("gna", **PLAN, **RECIPES["flux"])
    expected = run(pipe, steps=4)
    pipe.transformer.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    )
    pipe.transformer.compile_repeated_blocks(backend="eager")
    close(run(pipe, steps=4), expected)
