"""report(): long recipes are counted, and what ran as in the stock model is said."""

import re

import pytest
import torch

from visionfuse import report, routing
from visionfuse.kernels.plan import Neighborhood
from visionfuse.recipe import Recipe, Variant
from visionfuse.schedule import Phase, Schedule
from visionfuse.testing_pipelines import flux_pipeline, run, wan_pipeline


def test_a_long_recipe_is_counted_unless_asked():
    ways = tuple(
        Variant(name=f"way {i}", plan=Neighborhood(density=0.2 + 0.1 * i)) for i in range(8)
    )
    phases = [Phase(until=(i + 1) / 8, variant=way.name) for i, way in enumerate(ways)]
    recipe = Recipe(name="long", variants=ways, schedule=Schedule(phases=phases, min_steps=0))
    pipe = wan_pipeline()
    pipe.enable_visionfuse(recipe)
    run(pipe, steps=8)
    short, whole = str(report(pipe)), str(report(pipe, verbose=True))
    assert "way 7" not in short
    assert "8 phases" in short
    assert re.search(r"variants +8 in the model's own format: \d+\.\d% to \d+\.\d% of the", short)
    for way in ways:
        assert whole.count(way.name) >= 2  # its phase, and what it is
    assert short.count("not chosen") == whole.count("not chosen") > 0  # once, for all share it


@pytest.mark.parametrize("build", [flux_pipeline, wan_pipeline])
def test_attention_without_memory_is_the_models_own(build, monkeypatch):
    pipe = build()
    stock, left = run(pipe, steps=2), [3]
    attend = routing.block_sparse_attention

    def little_memory(*args, **options):
        left[0] -= 1
        if left[0] < 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")
        return attend(*args, **options)

    pipe.enable_visionfuse("gna", density=0.3, dense_steps=0, min_steps=0)
    sparse = run(pipe, steps=2)
    monkeypatch.setattr(routing, "block_sparse_attention", little_memory)
    with pytest.warns(UserWarning, match="own attention runs: CUDA out of memory"):
        mixed = run(pipe, steps=2)
    assert "out of memory" in str(report(pipe))
    left[0] = 0
    torch.testing.assert_close(run(pipe, steps=2), stock, atol=1e-5, rtol=1e-4)
    assert not torch.equal(mixed, sparse)
    assert not torch.equal(mixed, stock)
