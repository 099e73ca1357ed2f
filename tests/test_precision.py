"""Precisions: the value itself, and emulated attention against an oracle that rounds pair by pair in float64."""

from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError
from itertools import product

import pytest
import torch
from torch import library

from visionfuse.kernels.attention import (
    Precision,
    UnsupportedError,
    block_sparse_attention,
    select_implementation,
    unsupported_reasons,
)
from visionfuse.kernels.attention.precision import NAMES, PV_FORMATS, QK_FORMATS, SCALES
from visionfuse.kernels.order import Order
from visionfuse.kernels.plan import (
    BlockShape,
    Dense,
    Neighborhood,
    TokenLayout,
    compress,
    plan_attention,
)
from visionfuse.testing import plan_mask, random_plan

PORTABLE = ["reference", "blocks"]
LOSSY = [name for name in NAMES if name != "model"]


# -- the value --------------------------------------------------------------------------------------


def every_precision():
    for qk, pv, *flags in product(
        QK_FORMATS, PV_FORMATS, (True, False), (True, False), (True, False), SCALES, SCALES
    ):
        names = ("smooth_k", "smooth_q", "smooth_v", "q_scale", "k_scale")
        try:
            yield Precision(qk=qk, pv=pv, **dict(zip(names, flags, strict=True)))
        except ValueError:
            assert "model" in (qk, pv)


def test_short_names_and_json_round_trip():
    found = set(every_precision())
    assert len(found) == len(set(map(str, found))) > 100
    for precision in found:
        assert Precision.parse(str(precision)) == precision
        assert Precision.parse(precision) is precision
        assert Precision.from_dict(json.loads(json.dumps(precision.to_dict()))) == precision
        assert hash(Precision.from_dict(precision.to_dict())) == hash(precision)


@pytest.mark.parametrize("name", NAMES)
def test_names(name):
    precision = Precision.parse(name)
    assert str(precision) == precision.name == name
    assert precision.is_model == (name == "model")
    assert precision.smooth_k == (precision.qk != "model")


def test_older_json_loads():
    assert Precision.from_dict({"qk": "model", "pv": "model"}) == Precision()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Precision.parse("fp3"), "'fp3'.*'int8_fp8'"),
        (lambda: Precision.parse("int8+magic"), "'magic'.*smooth_q"),
        (lambda: Precision.parse("int8-q_block"), "'-q_block'"),
        (lambda: Precision(qk="int2"), "qk='int2'"),
        (lambda: Precision(pv="int8"), "pv='int8'"),
        (lambda: Precision(qk="int8", q_scale="tile"), "q_scale='tile'"),
        (lambda: Precision(pv="fp8", smooth_k=True), "smooth_k.*qk='model'"),
        (lambda: Precision(qk="fp8", smooth_v=True), "smooth_v.*pv='model'"),
        (lambda: Precision(qk="fp8", smooth_q="yes"), "True or False"),
        (lambda: Precision.from_dict({"qv": "fp8"}), "no 'qv'"),
    ],
)
def test_wrong_values_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_frozen_and_keyword_only():
    with pytest.raises(FrozenInstanceError):
        Precision().qk = "fp8"
    with pytest.raises(TypeError):
        Precision("fp8")


# -- emulation --------------------------------------------------------------------------------------

LIMITS = {"int8": 127.0, "fp8": 448.0, "int4": 7.0}


def rounded(x, format, group):
    """x [S, D] through the codes of `format`; tokens of one group share a scale. In float64."""
    if format == "model":
        return x
    out = x.clone()
    for g in group.unique():
        top = x[group == g].abs().max().clamp(min=2.0**-100)
        codes = x[group == g] * (LIMITS[format] / top)
        codes = codes.to(torch.float8_e4m3fn).double() if format == "fp8" else codes.round()
        out[group == g] = codes * (top / LIMITS[format])
    return out


def oracle(q, k, v, plan, scale, precision):
    """Head by head, from the definition of a `Precision`. out (B, S, H, D), lse (B, H, S) in float64."""
    batch, _, heads, _ = q.shape
    mask = plan_mask(plan, batch, heads)
    run = torch.zeros(plan.length_k, dtype=torch.long)
    width = max(16, 2 ** math.ceil(math.log2(plan.block_k)))
    runs = {(int(s), int(n)) for entries in (plan.full, plan.partial)
            for s, n in zip(entries.start, entries.count, strict=True)}  # fmt: skip
    in_place = all(start % width == 0 for start, _ in runs)
    for slot, (start, count) in enumerate(sorted(runs)):
        for j in range(count):
            run[start + j] = (start + j if in_place else slot * width + j) // 128
    tile = torch.full((plan.length_q,), -1)
    for i, (start, count) in enumerate(
        zip(plan.q_start.tolist(), plan.q_count.tolist(), strict=True)
    ):
        tile[start : start + count] = i
    q_group = torch.arange(plan.length_q) // (128 if precision.q_scale == "block" else 1)
    k_group = run if precision.k_scale == "block" else torch.arange(plan.length_k)
    out, lse = torch.zeros(q.shape).double(), torch.zeros(batch, heads, plan.length_q).double()
    for b, h in product(range(batch), range(heads)):
        kv = h // (heads // k.shape[2])
        qh, kh, vh = q[b, :, h].double(), k[b, :, kv].double(), v[b, :, kv].double()
        k_mean = kh.mean(0) if precision.smooth_k else torch.zeros_like(kh[0])
        v_mean = vh.mean(0) if precision.smooth_v else torch.zeros_like(vh[0])
        q_mean = torch.zeros_like(qh)
        if precision.smooth_q:
            for i in tile[tile >= 0].unique():
                q_mean[tile == i] = qh[tile == i].mean(0)
        smooth = kh - k_mean
        scores = (
            rounded(qh - q_mean, precision.qk, q_group) @ rounded(smooth, precision.qk, k_group).T
        )
        scores = scale * (scores + q_mean @ smooth.T)
        values = rounded((vh - v_mean).T, precision.pv, torch.arange(vh.shape[1])).T + v_mean
        scores = scores.masked_fill(~mask[b, h], -math.inf)
        out[b, :, h] = scores.softmax(-1).nan_to_num(0.0) @ values
        lse[b, h] = scores.logsumexp(-1) + scale * (qh @ k_mean)
    return out, lse


def small_plan(grid=(9, 14), text=5, window=(5, 7), tile=(4, 5), block_k=8):
    layout = TokenLayout.joint(text=text, grids=[grid])
    return plan_attention(
        layout,
        Neighborhood(window=window),
        order=Order(kind="tiled", tile=tile),
        shape=BlockShape(block_q=20, block_k=block_k, padded=True),
    ).blocks


PLANS = {
    "ragged grid and text": small_plan,
    "dense, trivial slots": lambda: plan_attention(
        TokenLayout.joint(grids=[(300,)]),
        Dense(),
        order=Order(kind="row"),
        shape=BlockShape(block_q=64, block_k=64, padded=True),
    ).blocks,
    "entries of 200": lambda: plan_attention(
        TokenLayout.joint(text=7, grids=[(450,)]),
        Dense(),
        order=Order(kind="row"),
        shape=BlockShape(block_q=64, block_k=200, padded=True),
    ).blocks,
    "intervals, variants": lambda: random_plan(
        3, length_q=70, length_k=90, block_q=16, block_k=8, variants=4, axes=3, tables=2, ragged=False
    ),
    "bits": lambda: compress(
        torch.rand(60, 50, generator=torch.Generator().manual_seed(1)) < 0.4, block_q=16, block_k=16
    ),
}  # fmt: skip


def inputs(plan, *, batch=1, heads=4, kv_heads=2, dim=16, dtype=torch.float32, seed=0):
    """Keys and values with channels that stand out and means far from 0, as those of real models."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, plan.length_q, heads, dim, generator=g)
    k, v = torch.randn(2, batch, plan.length_k, kv_heads, dim, generator=g)
    k[..., 0] += 6.0
    q[..., 1] += 2.0
    v[..., 2] -= 3.0
    return [x.to(dtype) for x in (q, k, v)]


FLAGS = ["fp8-smooth_k", "int8_fp8-smooth_k", "int8_fp8+smooth_q", "int4_fp8+smooth_q+smooth_v",
         "int8+q_block+k_row", "fp8+smooth_q+q_block"]  # fmt: skip


@pytest.mark.parametrize("impl", PORTABLE)
@pytest.mark.parametrize("precision", LOSSY + FLAGS)
def test_emulation_equals_the_oracle(impl, precision):
    plan = small_plan()
    q, k, v = inputs(plan)
    out, lse = block_sparse_attention(
        q, k, v, plan, impl=impl, precision=precision, return_lse=True
    )
    expected, expected_lse = oracle(q, k, v, plan, 0.25, Precision.parse(precision))
    # In float32 an element in a million lies on the other side of a step; one step moves an output by less.
    tolerance = 2e-6 if impl == "reference" else 2e-3
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=0)
    torch.testing.assert_close(lse.double(), expected_lse, atol=10 * tolerance, rtol=0)
    exact = block_sparse_attention(q, k, v, plan, impl=impl)
    assert (out - exact).abs().max() > 1e-4, "nothing was rounded"


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("precision", ["int8_fp8", "fp8+smooth_q"])
def test_any_plan(name, precision):
    plan = PLANS[name]()
    q, k, v = inputs(plan, batch=2)
    expected = oracle(q, k, v, plan, 0.25, Precision.parse(precision))
    got = block_sparse_attention(
        q, k, v, plan, impl="reference", precision=precision, return_lse=True
    )
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g.double(), e, atol=3e-6, rtol=0)
    blocks = block_sparse_attention(q, k, v, plan, impl="blocks", precision=precision)
    torch.testing.assert_close(blocks.double(), expected[0], atol=2e-3, rtol=0)


def test_flex_rounds_as_well():
    plan = small_plan()
    q, k, v = inputs(plan)
    for precision in ("int8_fp8", "fp8+smooth_q"):
        flex, blocks = (
            block_sparse_attention(q, k, v, plan, impl=impl, precision=precision, return_lse=True)
            for impl in ("flex", "blocks")
        )
        for a, b in zip(flex, blocks, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", PORTABLE)
def test_half_precision_is_rounded_once_more(impl, dtype):
    plan = small_plan()
    q, k, v = inputs(plan, dtype=dtype)
    out = block_sparse_attention(q, k, v, plan, impl=impl, precision="int8_fp8")
    expected, _ = oracle(q, k, v, plan, 0.25, Precision.parse("int8_fp8"))
    assert out.dtype == dtype
    budget = torch.finfo(dtype).eps * expected.abs().max() + 2e-3
    assert (out.double() - expected).abs().max() <= budget


def error(precision, *, dim=64, **changes):
    plan = small_plan(grid=(24, 40), tile=(8, 16), window=(9, 15), block_k=128)
    q, k, v = inputs(plan, dim=dim, **changes)
    exact = block_sparse_attention(q, k, v, plan, impl="reference")
    out = block_sparse_attention(q, k, v, plan, impl="reference", precision=precision)
    return float((out - exact).abs().sum() / exact.abs().sum())


def test_smoothing_pays_where_channels_stand_out():
    assert error("int8") < 0.6 * error("int8-smooth_k")
    assert error("fp8") < error("fp8-smooth_k")
    assert error("int4+smooth_q") < error("int4") < error("int4-smooth_k")
    assert error("model_fp8+smooth_v") < error("model_fp8")
    assert error("int8") < error("int4")
    assert error("int8_fp8") < 0.05


def test_log_sum_exp_is_that_of_the_keys_that_were_given():
    plan = small_plan()
    q, k, v = inputs(plan)
    _, exact = block_sparse_attention(q, k, v, plan, impl="reference", return_lse=True)
    for precision in ("int8_fp8", "int8_fp8-smooth_k", "int4+smooth_q"):
        for impl in PORTABLE:
            _, lse = block_sparse_attention(
                q, k, v, plan, impl=impl, precision=precision, return_lse=True
            )
            assert lse.dtype == torch.float32
            assert (lse - exact).abs().max() < (0.4 if "int4" in precision else 0.1)


@pytest.mark.parametrize(
    "precision", [*LOSSY, "int8_fp8+smooth_q+smooth_v", "fp8-smooth_k+q_block"]
)
@pytest.mark.parametrize("impl", PORTABLE)
def test_zeros_and_constants_stay_what_they_are(impl, precision):
    """Scales of nothing: zero channels, rows and heads, and keys that smoothing leaves zero."""
    plan = small_plan()
    q, k, v = inputs(plan)
    q[:, 3], k[:, 4], v[..., 5] = 0.0, 0.0, 0.0
    k[:, :, 1] = 2.5
    v[:, :, 1] = 0.0
    out, lse = block_sparse_attention(
        q, k, v, plan, impl=impl, precision=precision, return_lse=True
    )
    assert out.isfinite().all()
    assert lse.isfinite().all()
    assert not out[..., 5].any() or "smooth_v" in precision
    assert not out[:, :, 2:].any()  # the heads of the second key head


@pytest.mark.parametrize("impl", PORTABLE)
def test_rows_that_see_nothing_stay_zero(impl):
    mask = torch.rand(40, 48, generator=torch.Generator().manual_seed(0)) < 0.3
    mask[:20:3] = False
    plan = compress(mask, block_q=16, block_k=16)
    q, k, v = inputs(plan)
    out, lse = block_sparse_attention(
        q, k, v, plan, impl=impl, precision="int8_fp8+smooth_v", return_lse=True
    )
    assert not out[:, :20:3].any()
    assert (lse[:, :, :20:3] == -torch.inf).all()
    assert out.isfinite().all()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("which", range(3))
def test_what_is_not_finite_is_refused(which, value):
    plan = small_plan()
    tensors = inputs(plan)
    tensors[which][0, 3, 1, 2] = value
    with pytest.raises(ValueError, match=r"NaN or infinities.*'fp8'"):
        block_sparse_attention(*tensors, plan, precision="fp8")


def test_strided_inputs():
    plan = small_plan()
    q, k, v = torch.randn(2, plan.length_q, 3, 4, 16).unbind(2)
    out = block_sparse_attention(q, k, v, plan, precision="fp8")
    again = block_sparse_attention(*(x.contiguous() for x in (q, k, v)), plan, precision="fp8")
    assert torch.equal(out, again)
    assert out.is_contiguous()


# -- the op -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["auto", "blocks"])
def test_compiles_without_graph_breaks(impl):
    plan = small_plan()
    q, k, v = inputs(plan)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def layer(q, k, v):
        return block_sparse_attention(q * 1.0, k, v, plan, impl=impl, precision="int8_fp8") + 0.0

    eager = block_sparse_attention(q, k, v, plan, precision="int8_fp8")
    torch.testing.assert_close(layer(q, k, v), eager)


@pytest.mark.parametrize("impl", PORTABLE)
def test_op_passes_opcheck(impl):
    plan = small_plan()
    q, k, v = inputs(plan, dtype=torch.bfloat16)
    library.opcheck(
        torch.ops.visionfuse.block_sparse_attention.default,
        (q, k, v, plan.to_tensors(), plan.scalars(), 0.25, impl, True, "int8_fp8+smooth_v"),
    )


def test_nothing_trains_through_rounding():
    plan = small_plan()
    q, k, v = (x.requires_grad_() for x in inputs(plan))
    for impl in ("auto", "blocks", "triton"):
        with pytest.raises(UnsupportedError, match="no backward"):
            block_sparse_attention(q, k, v, plan, impl=impl, precision="fp8")
    with torch.no_grad():
        assert not block_sparse_attention(q, k, v, plan, precision="fp8").requires_grad


def test_kernels_say_what_they_do_not_do():
    plan = small_plan()
    q, k, v = inputs(plan, dtype=torch.float64)
    for impl in ("triton", "gluon_sm90"):
        reasons = unsupported_reasons(impl, q, k, v, plan, "int8_fp8+smooth_q+q_block+k_row")
        text = " ".join(reasons)
        if "does not import" not in text:
            for word in ("smoothing of queries", "blocks of queries", "float64"):
                assert word in text
    with pytest.raises(UnsupportedError, match=r"gluon_sm90.*precision='fp8'"):
        block_sparse_attention(q, k, v, plan, impl="gluon_sm90", precision="fp8")


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_auto_emulates_without_a_gpu():
    name, reasons = select_implementation("cpu", torch.float32, 64, "fp8")
    assert name == "blocks"
    assert reasons
    plan = small_plan()
    q, k, v = inputs(plan)
    auto = block_sparse_attention(q, k, v, plan, precision=Precision.parse("fp8"))
    assert torch.equal(auto, block_sparse_attention(q, k, v, plan, impl="blocks", precision="fp8"))
    with pytest.raises(ValueError, match="Unknown precision 'fp7'"):
        block_sparse_attention(q, k, v, plan, precision="fp7")
