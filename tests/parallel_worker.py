"""What tests/test_parallel.py runs: torchrun --nproc-per-node 2 tests/parallel_worker.py, or 4."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import gather_object
from diffusers import ContextParallelConfig

from visionfuse import Order, report
from visionfuse.patching import get
from visionfuse.testing_pipelines import flux_pipeline, run, wan_pipeline

FLUX = {"order": Order(kind="tiled", tile=(4, 6), subtile=(2, 3))}
WAN = {"order": Order(kind="tiled", tile=(2, 2, 3))}
GNA = {"density": 0.3, "stride": 2, "dense_steps": 1}
CASES = [
    (flux_pipeline, "gna", {**GNA, **FLUX}),
    (flux_pipeline, "gna", {**GNA, **FLUX, "precision": "int8_fp8"}),
    (flux_pipeline, "gna", {**GNA, **FLUX, "fuse": True}),
    (wan_pipeline, "gna", {**GNA, **WAN}),
    (wan_pipeline, "gna", {**GNA, **WAN, "fuse": True}),
    (wan_pipeline, "sage", {}),
    (wan_pipeline, "sta", {"tile": (3, 2, 2), "dense_steps": 1}),  # windows by head
]
HEADS = ((1, 1, 3), (1, 2, 1), (1, 2, 3), (1, 1, 1))


def close(name: str, got: torch.Tensor, expected: torch.Tensor, share: float = 1e-4) -> None:
    worst = float((got - expected).abs().max() / expected.abs().max())
    assert worst < share, f"{name}: {worst}"
    print(f"{name}: {worst:.1e}", flush=True)


def ulysses() -> None:
    """All processes compute what one does, and the plan is followed."""
    parts = dist.get_world_size()
    for build in (flux_pipeline, wan_pipeline):
        cases = [case[1:] for case in CASES if case[0] is build]
        cases = [
            (recipe, options | {"heads": HEADS[:parts]} if recipe == "sta" else options)
            for recipe, options in cases
        ]
        pipe = build(num_attention_heads=parts)
        expected = [None] * (len(cases) + 1)
        if dist.get_rank() == 0:
            for index, (recipe, options) in enumerate(cases):
                pipe.enable_visionfuse(recipe, **options)
                expected[index] = run(pipe, steps=2)
            pipe.disable_visionfuse()
            expected[-1] = run(pipe, steps=2)
        dist.broadcast_object_list(expected)
        *expected, stock = expected
        pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=parts))
        close("stock", run(pipe, steps=2), stock)
        for (recipe, options), alone in zip(cases, expected, strict=True):
            pipe.enable_visionfuse(recipe, **options)
            # A last bit that differs before rounding to 8 bits is a whole code after it.
            share = 5e-3 if "precision" in options or recipe == "sage" else 1e-4
            if recipe != "sage":
                assert float((alone - stock).abs().max() / stock.abs().max()) > 2 * share
            close(f"{build.__name__} {recipe} {options}", run(pipe, steps=2), alone, share)
            ran = get(pipe).ran["transformer"]
            assert ran.calls["plan"] > 0, report(pipe)
            assert not ran.notes, ran.notes
        if build is wan_pipeline:
            pipe.enable_visionfuse(recipe, **options, compile={"backend": "eager"})
            close("compiled", run(pipe, steps=2), expected[-1], 5e-3)
        pipe.disable_visionfuse()
        close("stock again", run(pipe, steps=2), stock)


def ring() -> None:
    """Ring attention follows dense recipes; with others it runs the model's own, and says why."""
    for build in (flux_pipeline, wan_pipeline):
        pipe = build()
        stock = run(pipe, steps=2)
        pipe.enable_visionfuse("sage")
        alone = run(pipe, steps=2)
        pipe.transformer.enable_parallelism(config=ContextParallelConfig(ring_degree=2))
        close(f"{build.__name__} ring", run(pipe, steps=2), alone, 5e-3)
        ran = get(pipe).ran["transformer"]
        assert ran.calls["plan"] > 2, report(pipe)
        assert not ran.notes, ran.notes
    pipe.enable_visionfuse("sage", compile={"backend": "eager"})
    close("compiled ring", run(pipe, steps=2), alone, 5e-3)
    pipe.enable_visionfuse("gna", **GNA, **WAN)
    try:
        result = run(pipe, steps=2)
    except ValueError as error:  # PyTorch's attention on a CPU has no ring in diffusers
        print(f"ring: {error}", flush=True)
    else:
        close("ring", result, stock)
    assert any("ring attention" in note for note in get(pipe).ran["transformer"].notes)


def many_prompts() -> None:
    """Prompts over processes, as assets/docs/several-gpus.md does it: every result once, in order."""
    pipe = flux_pipeline()
    prompts = ["a", "b", "c"]
    pipe.enable_visionfuse("gna", density=0.3, dense_steps=0)
    with PartialState(cpu=True).split_between_processes(prompts) as own:
        found = [run(pipe, prompt=prompt, steps=1) for prompt in own]
    found = gather_object(found)
    expected = [run(pipe, prompt=prompt, steps=1) for prompt in prompts]
    for prompt, got, alone in zip(prompts, found, expected, strict=True):
        close(f"prompt {prompt}", got, alone)
    assert len(own) < len(prompts)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.accelerator.device_count = lambda: 1  # diffusers divides by it, and it is 0 on a CPU
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    with torch.no_grad():
        ulysses()
        if dist.get_world_size() == 2:
            ring()
            many_prompts()
    dist.destroy_process_group()
    print("all well", flush=True)
