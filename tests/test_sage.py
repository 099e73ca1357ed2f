"""`sage_attention`: every argument against dense attention in float64, and what it refuses."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import library

from visionfuse.kernels.attention import Precision, UnsupportedError
from visionfuse.sage import plans, sage_attention, sage_attention_varlen
from visionfuse.testing import dense_attention

# Relative L1 errors on normal numbers, see tests/test_sage_numerics.py.
MOST = {"int8_fp8": 0.045, "int8": 0.016, "int8_fp16": 0.016, "int4+smooth_q": 0.24, "model": 2e-6}


def inputs(batch=2, heads=4, kv_heads=2, length_q=50, length_k=70, dim=32, dtype=torch.float32):
    """(B, H, S, D), keys with a channel far from 0."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(batch, heads, length_q, dim, generator=g)
    k, v = torch.randn(2, batch, kv_heads, length_k, dim, generator=g)
    k[..., 0] += 5.0
    return [x.to(dtype) for x in (q, k, v)]


def exact(q, k, v, mask=None, scale=None):
    """out (B, H, S, D), lse (B, H, S) in float64; mask broadcasts to (B, H, S_q, S_k)."""
    shape = (*q.shape[:3], k.shape[2])
    seen = torch.ones(shape, dtype=torch.bool) if mask is None else mask.expand(shape)
    out, lse = dense_attention(
        *(x.double().transpose(1, 2) for x in (q, k, v)), seen,
        q.shape[-1] ** -0.5 if scale is None else scale, accumulate=torch.float64,
    )  # fmt: skip
    return out.transpose(1, 2), lse


def assert_near(out, want, precision="int8_fp8"):
    assert not out.isnan().any()
    error = float((out.double() - want).abs().sum() / want.abs().sum())
    assert error < MOST[precision], error
    if precision not in ("model", "int8"):
        assert error > MOST[precision] / 10, "nothing was rounded"


def triangle(length_q, length_k):
    return torch.ones(length_q, length_k, dtype=torch.bool).tril(length_k - length_q)


# -- arguments --------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", MOST)
@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_layouts_and_precisions(layout, precision):
    q, k, v = inputs()
    want, want_lse = exact(q, k, v)
    if layout == "NHD":
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        want = want.transpose(1, 2)
    out, lse = sage_attention(q, k, v, layout, False, None, True, precision=precision)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    assert_near(out, want, precision)
    assert lse.dtype == torch.float32
    # FP8 weights are summed as they are rounded, and 4 bits round scores.
    assert (lse - want_lse).abs().max() < {"int8": 0.01, "int8_fp16": 0.01, "model": 1e-5}.get(precision, 0.3)  # fmt: skip
    assert torch.equal(sage_attention(q, k, v, layout, precision=precision), out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [8, 40, 72, 96, 160, 256])
def test_head_sizes_and_half_precision(dtype, dim):
    q, k, v = inputs(batch=1, dim=dim, dtype=dtype)
    out = sage_attention(q, k, v)
    assert out.dtype == dtype
    assert_near(out, exact(q, k, v)[0])


@pytest.mark.parametrize("lengths", [(50, 70), (70, 50), (1, 300), (300, 1), (129, 129)])
def test_causal_is_right_aligned(lengths):
    q, k, v = inputs(length_q=lengths[0], length_k=lengths[1])
    out, lse = sage_attention(q, k, v, is_causal=True, return_lse=True)
    want, want_lse = exact(q, k, v, triangle(*lengths))
    assert_near(out, want) if min(lengths) > 1 else None
    blind = max(lengths[0] - lengths[1], 0)  # the first queries see nothing
    assert not out[:, :, :blind].any()
    assert (lse[:, :, :blind] == -torch.inf).all()
    assert (lse - want_lse)[:, :, blind:].abs().max() < 0.07


def test_scale_changes_the_softmax():
    q, k, v = inputs()
    assert_near(sage_attention(q, k, v, sm_scale=0.05), exact(q, k, v, scale=0.05)[0])
    assert torch.equal(sage_attention(q, k, v, scale=0.05), sage_attention(q, k, v, sm_scale=0.05))
    assert_near(sage_attention(q, k, v, sm_scale=-0.1), exact(q, k, v, scale=-0.1)[0])


def test_views_of_any_strides():
    q, k, v = inputs()
    want = sage_attention(q, k, v)
    packed = torch.cat([x.transpose(1, 2) for x in (q[:, :, :50], k[:, :, :50], v[:, :, :50])], 2)
    strided = [x.transpose(1, 2) for x in packed.split([4, 2, 2], 2)]
    assert torch.equal(sage_attention(*strided), sage_attention(q, k[:, :, :50], v[:, :, :50]))
    channels_first = [x.mT.contiguous().mT for x in (q, k, v)]
    assert torch.equal(sage_attention(*channels_first), want)
    one = k[:, :1].expand(-1, 2, -1, -1)
    assert_near(sage_attention(q, one, v), exact(q, one, v)[0])


# -- masks ------------------------------------------------------------------------------------------


def masks():
    g = torch.Generator().manual_seed(1)
    full = torch.rand(2, 4, 50, 70, generator=g) < 0.5
    full[1, :, 3] = False  # a query that sees nothing
    key = torch.arange(70)
    right = (key < torch.tensor([[30], [70]]))[:, None, None]
    return {
        "every pair": full,
        "by head": full[:1],
        "by batch": full[:, :1],
        "of all heads": full[0, 0],
        "of keys": full[0, 0, :1],
        "right padding": right,
        "left padding": (key >= torch.tensor([[40], [1]]))[:, None, None],
        "padding, written out": right.expand(-1, -1, 50, -1).contiguous(),
        "holes": (key % 7 > 2)[None, None, None],
        "nothing hidden": torch.ones(50, 70, dtype=torch.bool),
        "an entry without keys": (key < torch.tensor([[0], [33]]))[:, None, None],
    }


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", masks())
def test_boolean_masks(name, is_causal):
    q, k, v = inputs()
    mask = masks()[name]
    seen = mask & triangle(50, 70) if is_causal else mask
    want, want_lse = exact(q, k, v, seen)
    out, lse = sage_attention(q, k, v, attn_mask=mask, is_causal=is_causal, return_lse=True)
    assert_near(out, want)
    blind = ~seen.expand(2, 4, 50, 70).any(-1)
    assert not out[blind].any()
    assert torch.equal(lse == -torch.inf, blind)
    assert (lse - want_lse)[~blind].abs().max() < 0.07


@pytest.mark.parametrize("hidden", [-torch.inf, torch.finfo(torch.float32).min])
def test_float_masks_that_hide(hidden):
    q, k, v = inputs()
    seen = masks()["every pair"].clone()
    seen[1, :, 3, 5] = True
    added = torch.zeros(seen.shape).masked_fill(~seen, hidden)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = sage_attention(q, k, v, attn_mask=added)
    assert torch.equal(out, sage_attention(q, k, v, attn_mask=seen))


@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_float_masks_that_add_are_exact_and_say_so(layout):
    q, k, v = inputs()
    added = torch.randn(2, 1, 50, 70, generator=torch.Generator().manual_seed(2))
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=added, enable_gqa=True)
    if layout == "NHD":
        q, k, v, want = (x.transpose(1, 2) for x in (q, k, v, want))
    with pytest.warns(UserWarning, match="nothing is rounded"):
        out = sage_attention(q, k, v, layout, attn_mask=added)
    torch.testing.assert_close(out, want)
    with pytest.raises(ValueError, match="no lse"):
        sage_attention(q, k, v, layout, attn_mask=added, return_lse=True)


def test_numbers_added_to_all_keys_of_a_row_are_not_taken_for_a_mask():
    """The most negative number hides nothing in a row that has no other: softmax takes the mean there."""
    q, k, v = inputs()
    added = torch.zeros(50, 70)
    added[3] = torch.finfo(torch.float32).min
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=added, enable_gqa=True)
    with pytest.warns(UserWarning, match="nothing is rounded"):
        torch.testing.assert_close(sage_attention(q, k, v, attn_mask=added), want)


def test_a_mask_is_read_again_when_it_was_written_to_and_forgotten_with_its_tensor():
    q, k, v = inputs()
    mask = masks()["every pair"].clone()
    before = sage_attention(q, k, v, attn_mask=mask)
    held = len(plans._made)
    mask[:, :, :, 40:] = False
    after = sage_attention(q, k, v, attn_mask=mask)
    assert_near(after, exact(q, k, v, mask)[0])
    assert not torch.equal(before, after)
    del mask
    gc.collect()
    assert len(plans._made) < held


# -- packed sequences -------------------------------------------------------------------------------

LENGTHS = {"plain": ((20, 30), (25, 45)), "empty ones": ((20, 0, 30, 0), (30, 3, 37, 0)),
           "no keys": ((5, 45), (0, 70)), "one": ((50,), (70,))}  # fmt: skip


def cumulated(lengths):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", LENGTHS)
def test_packed_sequences(name, is_causal):
    lengths_q, lengths_k = LENGTHS[name]
    q, k, v = (x[0].transpose(0, 1) for x in inputs())
    for i, end in enumerate(cumulated(lengths_k)[:-1].tolist()):
        k[end:, :, 1] += 4.0 * i  # means differ
    parts = [
        triangle(a, b) if is_causal else torch.ones(a, b, dtype=torch.bool)
        for a, b in zip(lengths_q, lengths_k, strict=True)
    ]
    mask = torch.block_diag(*(p.int() for p in parts)).bool()
    heads_first = [x.transpose(0, 1)[None] for x in (q, k, v)]
    want, want_lse = exact(*heads_first, mask)
    out, lse = sage_attention_varlen(
        q, k, v, cumulated(lengths_q), cumulated(lengths_k), max(lengths_q), max(lengths_k),
        is_causal=is_causal, return_lse=True,
    )  # fmt: skip
    assert out.shape == q.shape
    assert_near(out, want[0].transpose(0, 1))
    blind = ~mask.any(-1)
    assert not out[blind].any()
    assert (lse == -torch.inf).equal(blind.expand(4, -1))
    assert (lse - want_lse[0])[:, ~blind].abs().max() < 0.07


def test_every_sequence_loses_its_own_mean():
    """sageattention takes one mean for all of them, which leaves the others with an offset."""
    q, k, v = (x[0].transpose(0, 1) for x in inputs(length_q=400, length_k=400, kv_heads=4))
    cu = cumulated((200, 200))
    k[200:, :, 1] += 60.0
    mask = torch.block_diag(torch.ones(200, 200), torch.ones(200, 200)).bool()
    want = exact(*(x.transpose(0, 1)[None] for x in (q, k, v)), mask)[0][0].transpose(0, 1)
    own = sage_attention_varlen(q, k, v, cu, cu, precision="int8")
    one = sage_attention(*(x[None] for x in (q, k, v)), "NHD", attn_mask=mask, precision="int8")[0]
    assert (own - want).abs().sum() < 0.5 * (one - want).abs().sum()


def test_lengths_are_read_again_when_another_tensor_has_them():
    q, k, v = (x[0].transpose(0, 1) for x in inputs(length_k=50))
    cu = cumulated((20, 30))
    first = sage_attention_varlen(q, k, v, cu, cu)
    assert torch.equal(sage_attention_varlen(q, k, v, cu, cu), first)
    cu[1] = 25
    assert not torch.equal(sage_attention_varlen(q, k, v, cu, cu), first)
    held = len(plans._made)
    del cu
    gc.collect()
    assert len(plans._made) == held - 1
    with pytest.raises(ValueError, match="50 queries and 49 keys, got 50 and 50"):
        sage_attention_varlen(q, k, v, cumulated((50,)), cumulated((49,)))


# -- gradients and graphs ---------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["plain", "causal", "mask", "varlen"])
def test_gradients_are_those_of_exact_attention(which):
    q, k, v = (x.requires_grad_() for x in inputs(batch=1))
    mask = {"causal": triangle(50, 70), "mask": masks()["by head"]}.get(which)
    if which == "varlen":
        cu_q, cu_k = cumulated((20, 30)), cumulated((30, 40))
        mask = torch.block_diag(torch.ones(20, 30), torch.ones(30, 40)).bool()
        out = sage_attention_varlen(*(x[0].transpose(0, 1) for x in (q, k, v)), cu_q, cu_k)
        out = out.transpose(0, 1)[None]
    else:
        out = sage_attention(
            q, k, v, is_causal=which == "causal", attn_mask=mask if which == "mask" else None
        )
    up = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    found = torch.autograd.grad(out, (q, k, v), up)
    for a, b in zip(found, torch.autograd.grad(want, (q, k, v), up), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_training_through_rounding_learns():
    """A projection behind rounded attention finds the values it should have."""
    q, k, v = inputs(batch=1)
    target = exact(q, k, v)[0].float()
    weight = torch.zeros(32, 32, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=0.05)
    losses = []
    for _ in range(60):
        loss = (sage_attention(q, k, v @ weight) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.02 * losses[0]


@pytest.mark.parametrize("which", ["plain", "mask", "float mask", "varlen"])
def test_compiles_without_graph_breaks(which):
    q, k, v = inputs(batch=1)
    seen = masks()["of all heads"]
    added = torch.zeros(50, 70).masked_fill(~seen, -torch.inf)
    cu_q, cu_k = cumulated((20, 30)), cumulated((30, 40))

    def layer(q, k, v):
        q = q * 1.0
        if which == "varlen":
            return sage_attention_varlen(*(x[0].transpose(0, 1) for x in (q, k, v)), cu_q, cu_k) + 0.0  # fmt: skip
        mask = {"mask": seen, "float mask": added}.get(which)
        return sage_attention(q, k, v, attn_mask=mask, is_causal=which == "plain") + 0.0

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), layer(q, k, v))
    q.requires_grad_()
    (a,), (b,) = (torch.autograd.grad(f(q, k, v).square().sum(), q) for f in (compiled, layer))
    torch.testing.assert_close(a, b)


def test_a_precision_may_be_a_value_and_a_plan_may_come_from_inference():
    q, k, v = inputs(batch=1)
    formats = Precision(qk="int8", smooth_q=True)
    with torch.inference_mode():
        mask = masks()["of all heads"] & True
        own = [x.clone() for x in (q, k, v)]
        first = sage_attention(*own, attn_mask=mask, is_causal=True, precision=formats)
        causal = sage_attention(*own, is_causal=True, precision=formats)
    layer = torch.compile(lambda *x: sage_attention(*x, is_causal=True, precision=formats),
                          fullgraph=True, backend="aot_eager")  # fmt: skip
    assert torch.equal(layer(q.requires_grad_(), k, v), causal)
    again = sage_attention(q.detach(), k, v, attn_mask=mask, is_causal=True, precision=formats)
    assert torch.equal(again, first)


def test_compiled_calls_take_other_lengths():
    layer = torch.compile(lambda *x: sage_attention(*x, is_causal=True), fullgraph=True,
                          dynamic=True, backend="aot_eager")  # fmt: skip
    for length in (40, 57):
        tensors = inputs(length_q=length, length_k=length + 3)
        torch.testing.assert_close(layer(*tensors), sage_attention(*tensors, is_causal=True))


def test_compiled_masks_that_add_are_refused():
    layer = torch.compile(lambda q, k, v, m: sage_attention(q, k, v, attn_mask=m), fullgraph=True,
                          backend="aot_eager")  # fmt: skip
    with pytest.raises(ValueError, match=r"not under torch\.compile"):
        layer(*inputs(), torch.randn(50, 70))


def test_op_passes_opcheck():
    q, k, v = (x.transpose(1, 2).requires_grad_() for x in inputs(batch=1))
    library.opcheck(
        torch.ops.visionfuse.sage_attention.default,
        (q, k, v, masks()["of all heads"], None, None, True, 0.25, True, "int8_fp8", "auto"),
    )


# -- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"smooth_k": False}, TypeError, "'smooth_k'.*-smooth_k"),
        ({"dropout_p": 0.1}, ValueError, r"no dropout.*0\.1"),
        ({"scale": 1.0, "sm_scale": 2.0}, ValueError, "one thing"),
        ({"tensor_layout": "BSHD"}, ValueError, "HND.*'BSHD'"),
        ({"attn_mask": torch.ones(50, 71, dtype=torch.bool)}, ValueError, r"broadcast.*\(50, 71\)"),
        ({"attn_mask": torch.ones(50, 70, dtype=torch.int32)}, ValueError, "bool or floating"),
        ({"precision": "int3"}, ValueError, "'int3'"),
        ({"impl": "magic"}, ValueError, "'magic'"),
        ({"impl": "gluon_sm90"}, UnsupportedError, "gluon_sm90"),
    ],
)
def test_nothing_is_dropped_silently(options, kind, message):
    with pytest.raises(kind, match=message):
        sage_attention(*inputs(), **options)


def test_wrong_shapes_are_refused():
    q, k, v = inputs()
    for tensors, message in (
        ((q, k, v[:, :, 1:]), "one shape"),
        ((q[:1], k, v), "B and D of q"),
        ((q[:, :3], k, v), "must divide"),
        ((q, k, v.double()), "share a floating dtype"),
        ((q[0], k[0], v[0]), "sage_attention_varlen"),
    ):
        with pytest.raises(ValueError, match=message):
            sage_attention(*tensors)
    with pytest.raises(ValueError, match="A mask goes into attn_mask="):
        sage_attention(q, k, v, torch.ones(50, 70, dtype=torch.bool))
    with pytest.raises(ValueError, match="3 dimensions"):
        sage_attention_varlen(q, k, v, cumulated((50,)), cumulated((70,)))
    q[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinities"):
        sage_attention(q, k, v)


def test_calls_for_scaled_dot_product_attention():
    q, k, v = inputs()
    mask = masks()["of all heads"]
    out = sage_attention(q, k, v, attn_mask=mask, dropout_p=0.0, is_causal=False, scale=None,
                         enable_gqa=True)  # fmt: skip
    assert_near(out, exact(q, k, v, mask)[0])


def test_empty_tensors():
    q, k, v = inputs()
    assert sage_attention(q[:, :, :0], k, v).shape == (2, 4, 0, 32)
    out, lse = sage_attention(q, k[:, :, :0], v[:, :, :0], return_lse=True)
    assert not out.any()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("packed", [False, True])
def test_check_raises_for_outputs_that_are_not_finite(packed):
    """With a precision that does not look at its inputs by itself."""
    q, k, v = torch.randn(3, 1, 2, 10, 16)

    def call(**options):
        if not packed:
            return sage_attention(q, k, v, precision="model", **options)
        ends = torch.tensor([0, 4, 10])
        lines = [x[0].transpose(0, 1) for x in (q, k, v)]
        return sage_attention_varlen(*lines, ends, ends, precision="model", **options)

    assert call(check=True).isfinite().all()
    v[0, 1, 3, 5] = torch.nan
    assert call().isnan().any()
    with pytest.raises(FloatingPointError, match="NaN or infinities"):
        call(check=True)
