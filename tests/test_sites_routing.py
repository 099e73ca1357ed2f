"""Routing a processor changes what two names in its code mean, and nothing else; plans hide padded keys."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    CogVideoXAttnProcessor2_0,
)
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from hypothesis import given, settings
from hypothesis import strategies as st

from visionfuse import Dense, Neighborhood, Order, TokenLayout, plan_attention, routing
from visionfuse.context import ACTIVE, Routed
from visionfuse.kernels.plan.keys import hide_keys, key_ranges

TOKENS = 12
X = torch.randn(2, TOKENS, 32, generator=torch.Generator().manual_seed(0))


def half_plan(length=TOKENS):
    """Every query sees the first half of the keys, so that a routed call is told from a stock one."""
    plan = plan_attention(TokenLayout.joint(text=length, grids=[]), Dense()).blocks
    return hide_keys(plan, (((0, length // 2),),))


@pytest.fixture(autouse=True)
def _clear():
    ACTIVE.clear()
    yield
    ACTIVE.clear()


@pytest.fixture
def attention():
    torch.manual_seed(1)
    return Attention(query_dim=32, heads=2, dim_head=16, processor=AttnProcessor2_0()).eval()


def expected(attention):
    mask = torch.zeros(2, 1, TOKENS)
    mask[..., TOKENS // 2 :] = -torch.inf
    return attention(X, attention_mask=mask)


@torch.no_grad()
def test_routed_and_back(attention):
    stock, processor = attention(X), attention.processor
    wanted = expected(attention)
    undo = routing.route(processor)
    assert torch.equal(attention(X), stock), "without a running pipeline nothing changes"
    ACTIVE.variants = (Routed((half_plan(),)),)
    torch.testing.assert_close(attention(X), wanted)
    assert isinstance(processor, AttnProcessor2_0)
    assert attention.processor is processor
    undo()
    assert type(processor) is AttnProcessor2_0
    assert torch.equal(attention(X), stock)
    assert not ACTIVE.notes


@torch.no_grad()
def test_only_this_object_and_nothing_global(attention):
    other = copy.deepcopy(attention)
    stock, own = attention(X), F.scaled_dot_product_attention
    ACTIVE.variants = (Routed((half_plan(),)),)
    undo = routing.route(attention.processor)
    results = []
    thread = threading.Thread(target=lambda: results.append(other(X)))
    assert not torch.equal(attention(X), stock)
    thread.start()
    thread.join()
    assert torch.equal(results[0], stock)
    assert F.scaled_dot_product_attention is own
    undo()


@torch.no_grad()
def test_variants_and_none(attention):
    stock, wanted = attention(X), expected(attention)
    whole = plan_attention(TokenLayout.joint(text=TOKENS, grids=[]), Dense()).blocks
    ACTIVE.variants = (Routed((whole,)), Routed((half_plan(),)), None)
    for variant, result in ((0, stock), (1, wanted), (2, stock)):
        undo = routing.route(attention.processor, variant)
        torch.testing.assert_close(attention(X), result)
        undo()
    assert not ACTIVE.notes


@torch.no_grad()
def test_what_does_not_fit_runs_as_before_and_is_noted(attention):
    undo = routing.route(attention.processor)
    ACTIVE.variants = (Routed((half_plan(),)),)
    text, mask = torch.randn(2, 5, 32), torch.zeros(2, 1, TOKENS)
    got = attention(X, encoder_hidden_states=text), attention(X, attention_mask=mask)
    assert sorted(ACTIVE.notes) == [
        "an attention between other tokens than the plan's (IP-Adapter or cross attention)",
        "an attention mask was given",
    ]
    undo()
    assert torch.equal(got[0], attention(X, encoder_hidden_states=text))
    assert torch.equal(got[1], attention(X, attention_mask=mask))


@torch.no_grad()
def test_a_mask_that_the_plan_knows_is_left_to_it(attention):
    wanted = expected(attention)
    undo = routing.route(attention.processor)
    ACTIVE.variants, ACTIVE.masked = (Routed((half_plan(),)),), True
    torch.testing.assert_close(attention(X, attention_mask=torch.zeros(2, 1, TOKENS)), wanted)
    undo()


@torch.no_grad()
def test_a_probe_sees_the_models_own_attention(attention):
    seen, stock = [], attention(X)
    undo = routing.route(attention.processor)
    ACTIVE.probe = lambda *call: seen.append(call)
    assert torch.equal(attention(X), stock)
    undo()
    ((q, k, v, out, scale, masked),) = seen
    assert q.shape == k.shape == v.shape == out.shape == (2, TOKENS, 2, 16)
    own = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=scale)
    torch.testing.assert_close(out, own.transpose(1, 2))
    assert not masked


def test_a_shared_processor_is_routed_once(attention):
    first = routing.route(attention.processor)
    second = routing.route(attention.processor, 1)
    second()
    assert type(attention.processor) is not AttnProcessor2_0
    first()
    assert type(attention.processor) is AttnProcessor2_0


def test_copies_and_pickles_of_a_routed_processor_are_stock(attention):
    undo = routing.route(attention.processor)
    for twin in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        assert type(twin.processor) is AttnProcessor2_0
    undo()


@torch.no_grad()
def test_compiled_whole_and_guarded_by_class(attention):
    """A graph for each of stock, routed and another variant, and none when they come back."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(1)
        return graph.forward

    stock, wanted = attention(X), expected(attention)
    whole = plan_attention(TokenLayout.joint(text=TOKENS, grids=[]), Dense()).blocks
    ACTIVE.variants = (Routed((half_plan(),)), Routed((whole,)))
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend=backend)
    for count in ([1, 2, 3], [3, 3, 3]):
        torch.testing.assert_close(compiled(X), stock)
        seen = [len(graphs)]
        for variant, result in ((0, wanted), (1, stock)):
            undo = routing.route(attention.processor, variant)
            torch.testing.assert_close(compiled(X), result)
            seen.append(len(graphs))
            undo()
        assert seen == count
    torch._dynamo.reset()


def test_what_cannot_be_routed():
    assert not routing.refusal(AttnProcessor2_0())
    assert not routing.refusal(FluxAttnProcessor())
    assert "AttnProcessor does not call dispatch_attention_fn" in routing.refusal(AttnProcessor())

    class Derived(AttnProcessor2_0):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    assert "Derived does not call" in routing.refusal(Derived())
    assert "object does not call" in routing.refusal(object())


@torch.no_grad()
def test_relative_imports_and_dispatching_processors():
    torch.manual_seed(1)
    video = Attention(
        query_dim=32, heads=2, dim_head=16, qk_norm="layer_norm", processor=CogVideoXAttnProcessor2_0()
    ).eval()  # fmt: skip
    text, tables = torch.randn(2, 4, 32), (torch.randn(TOKENS, 16), torch.randn(TOKENS, 16))
    call = {"encoder_hidden_states": text, "image_rotary_emb": tables}
    flux = FluxAttention(query_dim=32, heads=2, dim_head=16).eval()
    for layer, arguments, length in ((video, call, TOKENS + 4), (flux, {}, TOKENS)):
        stock = layer(X, **arguments)
        undo = routing.route(layer.processor)
        plan = plan_attention(TokenLayout.joint(text=length, grids=[]), Dense()).blocks
        ACTIVE.variants = (Routed((plan,)),)
        torch.testing.assert_close(layer(X, **arguments), stock)
        ACTIVE.variants = (Routed((half_plan(length),)),)
        got = layer(X, **arguments)
        first = lambda x: x[0] if isinstance(x, tuple) else x
        assert not torch.allclose(first(got), first(stock))
        undo()


# -- plans that hide padding ------------------------------------------------------------------------


@given(
    st.integers(1, 70),
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=3),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_hidden_keys(text, runs, local):
    """Any pattern of valid text before a grid: what a query saw of it remains, and is counted."""
    masks = torch.zeros(len(runs), text, dtype=torch.bool)
    for row, lengths in zip(masks, runs, strict=True):
        for i, length in enumerate(lengths):
            row[7 * i : 7 * i + 2 * length] = True
    masks[0, 0] = False  # or there may be nothing to hide
    layout = TokenLayout.joint(text=text, grids=[(6, 9)])
    spec = Neighborhood(window=(3, 5)) if local else Dense()
    plan = plan_attention(layout, spec, order=Order(kind="row")).blocks
    grid = (text, text + 54)
    ranges = key_ranges(masks)
    assert ranges is not None
    hidden = hide_keys(plan, tuple((*row, grid) for row in ranges))
    seen = torch.cat([masks, torch.ones(len(runs), 54, dtype=torch.bool)], 1)
    assert hidden.variants == len(runs)
    total = 0
    for i, row in enumerate(seen):
        wanted = plan.dense_mask() & row
        assert torch.equal(hidden.dense_mask(i), wanted)
        total += int(wanted.sum())
    assert hidden.visible == total


def test_nothing_hidden_and_what_cannot_be():
    assert key_ranges(torch.ones(2, 5)) is None
    assert key_ranges(torch.tensor([[1, 0, 1, 1]])) == (((0, 1), (2, 4)),)
    layout = TokenLayout.joint(text=4, grids=[(6, 9)])
    plan = plan_attention(layout, Neighborhood(window=(3, 5)), order=Order(kind="row")).blocks
    with pytest.raises(ValueError, match="plan's own mask cuts"):
        hide_keys(plan, (((0, 30),),))
    with pytest.raises(ValueError, match="do not lie in a plan of 58 keys"):
        hide_keys(plan, (((0, 60),),))
    with pytest.raises(ValueError, match="all batch entries share"):
        hide_keys(hide_keys(plan, (((0, 2), (4, 58)), ((0, 3), (4, 58)))), (((0, 58),),))
