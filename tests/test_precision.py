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
    BlockBias,
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
    assert ("saves no time" in precision.caveat) == name.startswith("int4")


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
        (lambda: Precision(qk="int8", q_scale="cell"), "q_scale='cell'"),
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
    if format == "fp16":
        return x.half().double()
    out = x.clone()
    for g in sorted(set(group)):
        own = torch.tensor([n for n, other in enumerate(group) if other == g])
        top = x[own].abs().max().clamp(min=2.0**-100)
        codes = x[own] * (LIMITS[format] / top)
        codes = codes.to(torch.float8_e4m3fn).double() if format == "fp8" else codes.round()
        out[own] = codes * (top / LIMITS[format])
    return out


# Which tokens share a scale, written out as facts of SageAttention2's code and paper: of query or key n.
Q_GROUPS = {
    "tensor": lambda n: 0,
    "block": lambda n: n // 128,
    "warp": lambda n: n // 16,
    "thread": lambda n: (n // 16, n % 8),  # rows i and i + 8 of a slab of 16
    "token": lambda n: n,
    "block_sm80": lambda n: n // 128,
    "warp_sm80": lambda n: n // 32,
    "thread_sm80": lambda n: (n // 32, n % 8),  # rows i, i + 8, i + 16 and i + 24 of 32
}
K_GROUPS = {
    "tensor": lambda n: 0,
    "block": lambda n: n // 128,
    "warp": lambda n: n // 128,
    "thread": lambda n: (n // 128, n % 8 // 2),  # 8 j + 2 g and 8 j + 2 g + 1, 32 of a block of 128
    "token": lambda n: n,
    "block_sm80": lambda n: n // 64,
    "warp_sm80": lambda n: n // 64,
    "thread_sm80": lambda n: (n // 64, n % 8 // 2),  # 16 of a block of 64
}


def weights(scores, pv):
    """(weights as they are multiplied, what they add up to), of scores [S_q, S_k] in float64."""
    p = (scores - scores.amax(-1, keepdim=True).nan_to_num(neginf=0.0)).exp()
    if pv == "fp8":
        p = (p * 2**8.807).to(torch.float8_e4m3fn).double() / 2**8.807
        return p, p.sum(-1, keepdim=True)
    return p.half().double() if pv == "fp16" else p, p.sum(-1, keepdim=True)


def oracle(q, k, v, plan, scale, precision):
    """Head by head, from the definition of a `Precision`. out (B, S, H, D), lse (B, H, S) in float64."""
    batch, _, heads, _ = q.shape
    mask = plan_mask(plan, batch, heads)
    place = list(range(plan.length_k))
    width = max(16, 2 ** math.ceil(math.log2(plan.block_k)))
    runs = {(int(s), int(n)) for entries in (plan.full, plan.partial)
            for s, n in zip(entries.start, entries.count, strict=True)}  # fmt: skip
    if not all(start % width == 0 for start, _ in runs):
        for slot, (start, count) in enumerate(sorted(runs)):
            place[start : start + count] = range(slot * width, slot * width + count)
    tile = torch.full((plan.length_q,), -1)
    for i, (start, count) in enumerate(
        zip(plan.q_start.tolist(), plan.q_count.tolist(), strict=True)
    ):
        tile[start : start + count] = i
    q_group = [Q_GROUPS[precision.q_scale](n) for n in range(plan.length_q)]
    k_place = range(plan.length_k) if precision.k_scale == "token" else place
    k_group = [K_GROUPS[precision.k_scale](n) for n in k_place]
    out, lse = torch.zeros(q.shape).double(), torch.zeros(batch, heads, plan.length_q).double()
    for b, h in product(range(batch), range(heads)):
        kv = h // (heads // k.shape[2])
        qh, kh, vh = q[b, :, h].double(), k[b, :, kv].double(), v[b, :, kv].double()
        k_mean = kh.mean(0) if precision.smooth_k else torch.zeros_like(kh[0])
        q_mean = torch.zeros_like(qh)
        if precision.smooth_q:
            for i in tile[tile >= 0].unique():
                q_mean[tile == i] = qh[tile == i].mean(0).to(q.dtype).double()
        smooth = kh - k_mean
        low_q = (qh - q_mean).to(q.dtype).double()
        low_v = (vh - vh.mean(0)).to(v.dtype).double() if precision.smooth_v else vh
        scores = rounded(low_q, precision.qk, q_group) @ rounded(smooth, precision.qk, k_group).T
        scores = scale * (scores + q_mean @ smooth.T)
        values = rounded(low_v.T, precision.pv, list(range(vh.shape[1]))).T
        if precision.smooth_v:
            values = values + (vh - low_v).mean(0)
        scores = scores.masked_fill(~mask[b, h], -math.inf)
        p, total = weights(scores, precision.pv)
        out[b, :, h] = p @ values / total.masked_fill(total == 0, 1.0)
        top = scores.amax(-1)
        lse[b, h] = top + total[:, 0].log() + scale * (qh @ k_mean)
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
         "int8_fp16+smooth_v", "fp8+smooth_q+q_block",
         *(f"int4+q_{name}+k_{name}" for name in SCALES if name != "token"), "int8+k_token"]  # fmt: skip


@pytest.mark.parametrize("impl", PORTABLE)
@pytest.mark.parametrize("precision", LOSSY + FLAGS)
def test_emulation_equals_the_oracle(impl, precision):
    plan = small_plan()
    q, k, v = inputs(plan)
    out, lse = block_sparse_attention(
        q, k, v, plan, impl=impl, precision=precision, return_lse=True
    )
    expected, expected_lse = oracle(q, k, v, plan, 0.25, Precision.parse(precision))
    # A weight in a million lies on the other side of a step of e4m3 in float32, and where means of queries
    # were summed in another order; one step moves an output by less.
    tolerance = 5e-3 if impl == "blocks" else 5e-5 if "smooth_q" in precision else 2e-6
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
        torch.testing.assert_close(g.double(), e, atol=5e-5, rtol=0)
    blocks = block_sparse_attention(q, k, v, plan, impl="blocks", precision=precision)
    torch.testing.assert_close(blocks.double(), expected[0], atol=5e-3, rtol=0)


def test_flex_refuses_what_it_cannot_round():
    plan = small_plan()
    q, k, v = inputs(plan)
    with pytest.raises(UnsupportedError, match="emulated by 'reference' and 'blocks'"):
        block_sparse_attention(q, k, v, plan, impl="flex", precision="int8_fp8")


@pytest.mark.parametrize("precision", ["int8_fp8", "int4+smooth_q"])
def test_a_bias_is_added_to_rounded_scores(precision):
    plan = small_plan()
    q, k, v = inputs(plan)
    rows = torch.randn(1, 4, plan.tiles, plan.length_k, generator=torch.Generator().manual_seed(3))
    bias = BlockBias(torch.where(rows > 0, rows, -1e9))  # hides half of the keys of every tile
    mask = plan.dense_mask()[None, None].expand(1, 4, -1, -1).clone()
    for tile, (start, count) in enumerate(zip(plan.q_start, plan.q_count, strict=True)):
        mask[:, :, start : start + count] &= rows[:, :, tile, None] > 0
    exact = block_sparse_attention(q, k, v, plan, impl="reference", bias=bias)
    got = block_sparse_attention(q, k, v, plan, impl="reference", precision=precision, bias=bias)
    seen = mask.any(-1).transpose(1, 2)[..., None]
    difference = ((got - exact) * seen).abs().sum() / (exact * seen).abs().sum()
    assert difference < (0.05 if precision == "int8_fp8" else 0.3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", PORTABLE)
def test_half_precision_is_rounded_once_more(impl, dtype):
    plan = small_plan()
    q, k, v = inputs(plan, dtype=dtype)
    out = block_sparse_attention(q, k, v, plan, impl=impl, precision="int8_fp8")
    expected, _ = oracle(q, k, v, plan, 0.25, Precision.parse("int8_fp8"))
    assert out.dtype == dtype
    budget = torch.finfo(dtype).eps * expected.abs().max() + 5e-3
    assert (out.double() - expected).abs().max() <= budget


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
        (q, k, v, plan.to_tensors(), plan.scalars(), [], 0.25, impl, True, "int8_fp8+smooth_v", None, None),
    )  # fmt: skip


def test_gradients_go_straight_through():
    plan = small_plan()
    q, k, v = (x.requires_grad_() for x in inputs(plan))
    out = block_sparse_attention(q, k, v, plan, precision="fp8")
    exact = block_sparse_attention(q, k, v, plan)
    assert (out - exact).abs().max() > 1e-3
    up = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    for a, b in zip(
        torch.autograd.grad(out, (q, k, v), up),
        torch.autograd.grad(exact, (q, k, v), up),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_kernels_say_what_they_do_not_do():
    plan = small_plan()
    q, k, v = inputs(plan, dtype=torch.float64)
    for impl in ("triton", "gluon_sm90"):
        reasons = unsupported_reasons(impl, q, k, v, plan, "int8_fp8+q_thread+k_block_sm80")
        text = " ".join(reasons)
        if "does not import" not in text:
            for word in ("q_scale='thread'", "k_scale='block_sm80'", "float64"):
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
