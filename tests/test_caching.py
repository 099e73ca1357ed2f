"""Step caches of diffusers (`enable_cache`) and recipes together: each alone, both, in either order, and undone."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)

from visionfuse import Order
from visionfuse.patching import get
from visionfuse.sites import denoisers
from visionfuse.testing_pipelines import flux_pipeline, run, wan_pipeline

STEPS = 8
MOVES = {
    flux_pipeline: {"order": Order(kind="tiled", tile=(4, 6), subtile=(2, 3))},
    wan_pipeline: {"order": Order(kind="tiled", tile=(2, 2, 3))},
}
GNA = {"density": 0.3, "stride": 2, "dense_steps": 3}


def first_block(pipe):
    return FirstBlockCacheConfig(threshold=0.5)


# In bfloat16, as it keeps its factors by default, a last bit of a token would show.
TAYLOR = {
    "cache_interval": 2,
    "disable_cache_before_step": 2,
    "max_order": 1,
    "taylor_factors_dtype": torch.float32,
}


def taylor(pipe):
    """Whole steps; the usual mode knows the attention of FLUX but not of Wan."""
    return TaylorSeerCacheConfig(**TAYLOR, use_lite_mode=True)


def taylor_layers(pipe):
    return TaylorSeerCacheConfig(**TAYLOR)


def pyramid(pipe):
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 2000),
        current_timestep_callback=lambda: pipe.current_timestep,
    )


CASES = [
    (flux_pipeline, first_block),
    (flux_pipeline, taylor),
    (flux_pipeline, taylor_layers),
    (flux_pipeline, pyramid),
    (wan_pipeline, first_block),
    (wan_pipeline, taylor),
    (wan_pipeline, pyramid),
]


def computed(pipe) -> list[int]:
    """A counter of the queries that the last layer computed."""
    *_, last = next(denoisers(pipe)).site.layers(pipe.transformer)
    count = [0]
    last.to_q.register_forward_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    return count


@pytest.mark.parametrize(("build", "cache"), CASES)
def test_order_of_tokens_and_of_calls_do_not_matter(build, cache):
    """A cache keeps residuals of one step for the next, so both steps must have their tokens in one order."""
    pipe = build()
    stock = run(pipe, steps=STEPS)
    pipe.enable_visionfuse("gna", **GNA, order="row")
    count = computed(pipe)
    run(pipe, steps=STEPS)
    uncached, count[0] = count[0], 0
    pipe.transformer.enable_cache(cache(pipe))
    in_rows = run(pipe, steps=STEPS)
    assert 0 < count[0] < uncached, "the cache skipped nothing, so that this tests nothing"
    pipe.enable_visionfuse("gna", **GNA, **MOVES[build])
    moved = run(pipe, steps=STEPS)
    torch.testing.assert_close(moved, in_rows, rtol=0, atol=1e-4 * float(in_rows.abs().max()))
    assert get(pipe).ran["transformer"].calls["plan"] > 0
    pipe.disable_visionfuse()
    pipe.transformer.disable_cache()
    assert torch.equal(run(pipe, steps=STEPS), stock)
    # The other way round: first the cache, then the recipe.
    pipe.transformer.enable_cache(cache(pipe))
    pipe.enable_visionfuse("gna", **GNA, **MOVES[build])
    assert torch.equal(run(pipe, steps=STEPS), moved)
    pipe.transformer.disable_cache()
    pipe.disable_visionfuse()
    assert torch.equal(run(pipe, steps=STEPS), stock)


@pytest.mark.slow  # the cache breaks every block into several graphs
@pytest.mark.parametrize("build", [flux_pipeline, wan_pipeline])
def test_a_cache_and_compiled_blocks(build):
    torch._dynamo.reset()
    pipe = build()
    pipe.transformer.enable_cache(first_block(pipe))
    pipe.enable_visionfuse("gna", **GNA, **MOVES[build])
    expected = run(pipe, steps=STEPS)
    pipe.enable_visionfuse("gna", **GNA, **MOVES[build], compile={"backend": "eager"})
    result = run(pipe, steps=STEPS)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    assert not get(pipe).compiled["transformer"].notes
