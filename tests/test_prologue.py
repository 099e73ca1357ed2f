"""The fused prologue against its float64 reference: in the interpreter here, on the GPU where there is one."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from visionfuse.kernels.attention import prologue as host
from visionfuse.kernels.attention.prologue import PrologueSpec, dequantized, prologue, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INT8 = PrologueSpec(qk="int8", k_rows=128, v="fp8", v_layout="channels16", smooth_k=True)
FP8 = PrologueSpec(qk="fp8", q_rows=4, k_rows=16, v="fp8", softmax_scale=0.3)
OF_HEAD = replace(FP8, k_rows=0)  # one scale for all keys of a head
SPECS = {"same": PrologueSpec(), "int8": INT8, "fp8": FP8, "head": OF_HEAD}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
# Largest relative rounding error. bf16: a whole ulp and not half in the interpreter, which truncates
# (Triton 3.6).
UNIT = {
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8 if DEVICE == "cuda" else 2.0**-7,
}
# fp32 arithmetic before it, relative to the largest number of a row: a sum of D squares in a tree, rsqrt to
# 2 ulp, a mean, and about ten roundings: less than 32 half ulps.
FP32 = 32 * 2.0**-24


def inputs(length=77, heads=4, kv_heads=2, dim=64, batch=2, dtype=torch.float32, seed=0):
    """q, k, v, and all options, random."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=g).to(DEVICE)

    q, k, v = (normal(batch, length, h, dim).to(dtype) for h in (heads, kv_heads, kv_heads))
    k = k + 3 * normal(kv_heads, dim).to(dtype)  # what smoothing is for
    angle = (10 * normal(length, dim // 2)).repeat_interleave(2, 1)
    return (q, k, v), {
        "norm_q": 1 + 0.2 * normal(dim),
        "norm_k": (1 + 0.2 * normal(dim)).to(dtype),
        "rotary": (angle.cos(), angle.sin()),
        "order": torch.randperm(length, generator=g).to(DEVICE),
    }


def exact(tensors, spec, **options):
    """What the operands stand for, in float64, and the reference operands."""
    doubles = [x.double() for x in tensors]
    plain = PrologueSpec(smooth_k=spec.smooth_k, eps=spec.eps)
    return reference(*doubles, plain, **options), reference(*doubles, spec, **options)


def check(tensors, spec, **options):
    """Values within the bound of one rounding, scales and means as in the reference."""
    got = prologue(*tensors, spec, **options)
    true, quantized = exact(tensors, spec, **options)
    dtype = tensors[0].dtype
    for name in ("q_scale", "k_scale", "v_scale", "k_mean"):
        x, y = getattr(got, name), getattr(quantized, name)
        assert (x is None) == (y is None), name
        if x is None:
            continue
        assert x.dtype == torch.float32
        if name == "k_mean":
            assert (x - y).abs().max() <= FP32 * exact_size(tensors, spec, options)
        else:
            assert (x > 0).all()
            # A mean is subtracted with the rounding of the numbers before it.
            slack = 2 * FP32 * (exact_size(tensors, spec, options) / true.k.abs().amax() + 1)
            torch.testing.assert_close(x.double(), y, rtol=float(slack), atol=0)
    size = exact_size(tensors, spec, options)
    values = dequantized(got, spec)
    for name, x, y in zip("qkv", values, true[:3], strict=True):
        code, expected = getattr(got, name), getattr(quantized, name)
        format = spec.v if name == "v" else spec.qk
        assert code.shape == expected.shape
        assert code.is_contiguous() or code is tensors[2]
        assert code.dtype == (dtype if format == "same" else host.FORMATS[format][0])
        error = (x.double() - y).abs()
        slack = 2 * FP32 * (y.abs().amax(-1, keepdim=True) + (size if spec.smooth_k else 0))
        if format == "same":
            bound = UNIT[dtype] * y.abs() + 2.0**-25 * (dtype == torch.float16)
        else:
            step = true_scale(quantized, name, spec, y)
            if format != "fp8":
                bound = 0.5 * step
                assert (code.int() - expected.int()).abs().max() <= 1
            else:  # 3 bits of mantissa, subnormal below 2**-6 with a step of 2**-9
                bound = torch.maximum(y.abs() * 2.0**-4, step * 2.0**-10)
                slack = slack + 448 * step * 2 * FP32
            # Nearly always the very code of the reference: another one is a tie up to fp32.
            assert (code.float() != expected.float()).double().mean() < 2e-2
        assert (error <= bound + slack).all(), (name, float((error - bound - slack).max()))
    return got


def exact_size(tensors, spec, options):
    """The largest key before smoothing, which sets the rounding error of the difference."""
    doubles = [x.double() for x in tensors]
    return reference(*doubles, PrologueSpec(eps=spec.eps), **options).k.abs().amax()


def true_scale(quantized, name, spec, like):
    """Scales as [B, S, H, 1] or [B, 1, H, D]."""
    if name == "v":
        return quantized.v_scale[:, None]
    rows = spec.q_rows if name == "q" else spec.k_rows or like.shape[1]
    scale = quantized.q_scale / spec.softmax_scale if name == "q" else quantized.k_scale
    scale = scale if scale.dim() == 4 else scale[..., None]
    token = torch.arange(like.shape[1], device=scale.device)  # key n is in group n % 8 // 2 of 4
    found = scale[:, :, token // rows, token % 8 // (8 // scale.shape[3])]
    return found.transpose(1, 2)[..., None]


# Values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_spec
def test_all_features_at_once(spec, dtype):
    tensors, options = inputs(dtype=dtype)
    check(tensors, spec, **options)


@pytest.mark.parametrize("missing", ["norm_q", "norm_k", "rotary", "order"])
def test_each_feature_may_be_missing(missing):
    tensors, options = inputs(length=20)
    check(tensors, replace(INT8, v_layout="channels"), **(options | {missing: None}))


def test_none_of_the_features():
    tensors, _ = inputs(length=20)
    got = check(tensors, PrologueSpec())
    assert got.v is tensors[2]
    assert torch.equal(got.q, tensors[0])
    assert torch.equal(got.k, tensors[1])


@pytest.mark.parametrize("dim", [32, 48, 96, 128, 256])
def test_head_dims(dim):
    tensors, options = inputs(length=19, dim=dim, batch=1)
    check(tensors, replace(INT8, k_rows=16), **options)


@pytest.mark.parametrize("rows", [1, 2, 8, 32, 64, 128])
def test_scales_of_blocks_of_rows(rows):
    tensors, options = inputs(length=131, heads=2, kv_heads=1, batch=1)
    got = check(tensors, PrologueSpec(qk="int8", q_rows=rows, k_rows=rows), **options)
    assert got.q_scale.shape == (1, 2, -(-131 // rows))


@pytest.mark.parametrize("rows", [8, 64, 128])
def test_scales_of_keys_by_thread(rows):
    """Keys of one group of each block are small: they lose nothing to the large ones beside them."""
    tensors, _ = inputs(length=131, heads=2, kv_heads=1, batch=1)
    small = torch.arange(131) % 8 // 2 == 1
    tensors[1][:, small] *= 1e-3
    got = check(tensors, spec := PrologueSpec(qk="int8", k_rows=rows, k_groups=4))
    assert got.k_scale.shape == (1, 1, -(-131 // rows), 4)
    error = (dequantized(got, spec)[1] - tensors[1]).abs()[:, small].sum()
    assert error < 0.02 * tensors[1][:, small].abs().sum()


def test_more_heads_than_a_program_and_a_chunk_of_tokens():
    """11 query heads in groups of 8; 520 tokens in two partial sums."""
    tensors, options = inputs(length=520, heads=11, kv_heads=1, dim=32, batch=1)
    check(tensors, replace(INT8, k_rows=64), **options)
    got = check(tensors, replace(OF_HEAD, smooth_k=True), **options)
    assert (got.k_scale.shape, got.k.float().abs().amax() > 200) == ((1, 1, 1), True)


def test_queries_and_keys_of_different_length():
    (q, _, _), options = inputs(length=37, batch=1)
    (_, k, v), _ = inputs(length=90, batch=1)
    check((q, k, v), INT8, norm_q=options["norm_q"], norm_k=options["norm_k"])
    check((k, q[:, :, :1], q[:, :, 1:2]), INT8)


@pytest.mark.parametrize(("length", "step"), [(2047, 1), (2050, 2), (9001, 8)])
def test_the_mean_is_over_every_few_of_many_tokens(length, step):
    (q, k, v), options = inputs(length=length, batch=1, heads=1, kv_heads=1, dim=16)
    tensors, options = (q[:, :5], k + 3.0, v), {"norm_k": options["norm_k"]}
    got = check(tensors, PrologueSpec(qk="int8", smooth_k=True), **options)
    assert host.mean_step(length) == step
    normed = torch.nn.functional.rms_norm(tensors[1], (16,), options["norm_k"], 1e-6)[:, ::step]
    torch.testing.assert_close(got.k_mean, normed.mean(1), rtol=1e-4, atol=1e-4)


@settings(max_examples=12, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.differing_executors])  # fmt: skip
@given(st.data())
def test_any_combination(data):
    draw = data.draw
    kv_heads = draw(st.integers(1, 2))
    tensors, options = inputs(
        length=draw(st.integers(1, 70)), kv_heads=kv_heads, heads=kv_heads * draw(st.integers(1, 3)),
        dim=draw(st.sampled_from([32, 64])), batch=draw(st.integers(1, 2)), seed=draw(st.integers(0, 99)),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
    )  # fmt: skip
    qk = draw(st.sampled_from(["same", "int8", "fp8"]))
    scaled = {} if qk == "same" else {
        "q_rows": 2 ** draw(st.integers(0, 5)), "k_rows": 2 ** draw(st.integers(0, 5)),
        "softmax_scale": draw(st.sampled_from([1.0, 0.125])),
    }  # fmt: skip
    spec = PrologueSpec(
        qk=qk, v=draw(st.sampled_from(["same", "fp8"])), smooth_k=draw(st.booleans()),
        v_layout=draw(st.sampled_from(host.LAYOUTS)), v_padding=draw(st.sampled_from([16, 128])), **scaled,
    )  # fmt: skip
    kept = {name: value for name, value in options.items() if draw(st.booleans())}
    if spec.smooth_k and tensors[0].shape[1] == 1:
        return  # the difference is rounding alone
    check(tensors, spec, **kept)


@every_spec
def test_norm_over_all_heads(spec):
    """Wan's: one mean square of a token over its 5 query and 3 key heads, which no power of two holds."""
    (q, _, _), options = inputs(length=45, heads=5)
    (_, k, v), _ = inputs(length=45, kv_heads=3, heads=3)
    q, k = q.repeat(1, 1, 3, 1), k * torch.tensor([1.0, 5.0, 0.1], device=DEVICE)[:, None]
    g = torch.Generator().manual_seed(1)
    for name, heads in (("norm_q", 15), ("norm_k", 3)):
        options[name] = 1 + 0.2 * torch.randn(heads * 64, generator=g).to(DEVICE)
    got = check((q, k, v), spec, **options)
    normed = torch.nn.functional.rms_norm(k.flatten(2), (192,), options["norm_k"], 1e-6)
    plain = {"rotary": options["rotary"], "order": options["order"]}
    same = prologue(q, normed.view_as(k), v, spec, norm_q=options["norm_q"], **plain)
    k_old, k_new = dequantized(same, spec)[1], dequantized(got, spec)[1]
    torch.testing.assert_close(k_old, k_new, rtol=0.13, atol=0.03 * float(k_old.abs().max()))
    check((q, k, v), spec, **(options | {"norm_k": options["norm_k"][:64]}))


def test_int4_has_codes_up_to_7():
    tensors, options = inputs(length=40)
    got = check(tensors, PrologueSpec(qk="int4", k_rows=16, smooth_k=True), **options)
    assert got.q.dtype == torch.int8
    assert got.q.abs().max() == 7


# Rotary tables and order --------------------------------------------------------------------------


def test_rotation_is_that_of_diffusers():
    from diffusers.models.embeddings import apply_rotary_emb

    (q, k, v), options = inputs()
    got = prologue(q, k, v, rotary=options["rotary"])
    for x, y in ((q, got.q), (k, got.k)):
        expected = apply_rotary_emb(x, options["rotary"], sequence_dim=1)
        torch.testing.assert_close(y, expected, rtol=0, atol=FP32 * float(x.abs().max()))


def test_forms_of_rotary_tables_agree():
    (q, k, v), options = inputs(length=33)
    cos, sin = options["rotary"]
    whole = prologue(q, k, v, rotary=(cos, sin))
    for tables in ((cos[:, ::2], sin[:, ::2]), (cos[None, :, None], sin[None, :, None])):
        other = prologue(q, k, v, rotary=tables)
        # Two kernels: the compiler may contract other products into FMA.
        for x, y in zip(whole[:2], other[:2], strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=FP32 * float(x.abs().max()))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_order_moves_rows_and_nothing_else(dtype):
    tensors, options = inputs()
    order = options.pop("order")
    spec = PrologueSpec(qk="int8", v="fp8", smooth_k=True)
    still = torch.arange(order.numel(), device=DEVICE, dtype=dtype)  # the same kernel
    plain = prologue(*tensors, spec, **options, order=still)
    moved = prologue(*tensors, spec, **options, order=order.to(dtype))
    for name in "qkv":
        assert torch.equal(getattr(plain, name)[:, order].float(), getattr(moved, name).float())
    for name in ("q_scale", "k_scale"):
        assert torch.equal(getattr(plain, name)[:, :, order], getattr(moved, name))
    assert torch.equal(plain.k_mean, moved.k_mean)


def test_padding_in_the_order_makes_rows_of_zeros():
    tensors, options = inputs(length=30)
    hole = torch.full((18,), -1, device=DEVICE)
    options["order"] = torch.cat((options["order"][:14], hole, options["order"][14:]))
    got = check(tensors, replace(INT8, k_rows=16), **options)
    assert not got.q[:, 14:32].any()
    assert not got.k[:, 14:32].any()
    assert got.q.shape[1] == 48


def test_key_order_is_of_keys_and_values_alone():
    tensors, options = inputs(length=30)
    keys = torch.full((48,), -1, device=DEVICE)
    keys[:17], keys[32:45] = torch.arange(17), torch.arange(17, 30)
    got = check(tensors, replace(INT8, k_rows=16), **options, key_order=keys)
    assert got.q.shape[1] == 30
    assert got.k.shape[1] == 48
    assert got.k_scale.shape[2] == 3
    assert not got.k[:, 17:32].any()
    assert not got.v[..., 48:].float().any()
    check(tensors, PrologueSpec(), **(options | {"order": None}), key_order=keys.int())


def test_keys_of_another_length_have_an_order():
    (q, _, _), _ = inputs(length=37, batch=1)
    (_, k, v), options = inputs(length=90, batch=1)
    check((q, k, v), INT8, key_order=options["order"])
    order = torch.arange(36, -1, -1, device=DEVICE)
    check((q, k, v), INT8, order=order, key_order=options["order"])


def test_channels16_has_tokens_in_the_order_of_the_registers():
    v = torch.arange(40.0, device=DEVICE).view(1, 40, 1, 1).expand(1, 40, 1, 64).contiguous()
    spec = PrologueSpec(v_layout="channels16", v_padding=16)
    got = prologue(v, v, v, spec)
    assert got.v.shape == (1, 1, 64, 48)
    assert got.v[0, 0, 5, :32].tolist() == [*host.SWAPPED, *(16 + t for t in host.SWAPPED)]


# Memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [PrologueSpec(smooth_k=True, v_layout="channels"), INT8, FP8])
def test_everything_is_written_and_repeats_exactly(spec, monkeypatch):
    tensors, options = inputs(length=41)
    results = []
    for byte in (0xFF, 0x01):  # 0xFF: NaN in all floats

        def poisoned(shape, dtype, device, byte=byte):
            count = torch.Size(shape).numel() * dtype.itemsize
            raw = torch.full((count,), byte, dtype=torch.uint8, device=device)
            return raw.view(dtype).view(shape)

        monkeypatch.setattr(host.launch, "_empty", poisoned)
        results.append(prologue(*tensors, spec, **options))
    for name, a, b in zip(host.Operands._fields, *results, strict=True):
        if a is not None:
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), name


@pytest.mark.parametrize("spec", [PrologueSpec(), INT8], ids=["same", "int8"])
def test_reads_strided_views(spec):
    _, options = inputs(length=21)
    qkv = torch.randn(2, 4, 21, 3, 64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    views = [x.transpose(1, 2) for x in qkv.unbind(3)]  # [B, S, H, D], heads outside tokens
    before = qkv.clone()
    got = prologue(*views, spec, **options)
    same = prologue(*(x.contiguous() for x in views), spec, **options)
    columns = [torch.stack((x, x), -1).flatten(-2)[..., ::2] for x in views]
    copied = prologue(*columns, spec, **options)
    for a, b, c in zip(got, same, copied, strict=True):
        assert a is None or (
            torch.equal(a.float(), b.float()) and torch.equal(a.float(), c.float())
        )
    assert torch.equal(qkv, before)


def test_a_call_seen_before_reads_its_own_tensors():
    """On a GPU the second call is launched from a template."""
    for seed in (0, 1, 2):
        tensors, options = inputs(length=70, seed=seed)
        check(tensors, INT8, **options)


# Zeros, NaN, infinity -----------------------------------------------------------------------------


@pytest.mark.parametrize("qk", ["int8", "fp8"])
def test_zeros_have_scales_above_zero(qk):
    (q, k, v), _ = inputs(length=20)
    q[:, 3], k[0, :, 1], v[..., 7] = 0, 0, 0
    got = prologue(q, k, v, PrologueSpec(qk=qk, v="fp8"), norm_q=torch.ones(64, device=DEVICE))
    for scale in (got.q_scale, got.k_scale, got.v_scale):
        assert scale.isfinite().all()
        assert scale.min() > 0
    assert not got.q[:, 3].float().any()
    assert not got.k[0, :, 1].float().any()
    assert not got.v[..., 7].float().any()
    assert got.q.float().isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("qk", ["int8", "fp8"])
def test_what_is_not_finite_shows_in_the_scale_of_its_rows_alone(qk, bad):
    (q, k, v), _ = inputs(length=20)
    spec = PrologueSpec(qk=qk, q_rows=4, v="fp8")
    clean = prologue(q, k, v, spec)
    q[0, 5, 2, 9], k[1, 7, 0, 0], v[0, 3, 1, 8] = bad, bad, bad
    got = prologue(q, k, v, spec)
    expected = [
        torch.zeros_like(s, dtype=torch.bool) for s in (got.q_scale, got.k_scale, got.v_scale)
    ]
    expected[0][0, 2, 1] = expected[1][1, 0, 7] = expected[2][0, 1, 8] = True
    for scale, where in zip((got.q_scale, got.k_scale, got.v_scale), expected, strict=True):
        assert torch.equal(scale.isnan(), where)
    assert torch.equal(got.q[1].float(), clean.q[1].float())
    values, untouched = dequantized(got, spec), dequantized(clean, spec)
    assert values[0][0, 4:8, 2].isnan().all()
    for x, y in zip(values, untouched, strict=True):
        assert torch.equal(x[~x.isnan()], y[~x.isnan()])


def test_what_is_not_finite_passes_through_same():
    (q, k, v), _ = inputs(length=20, dtype=torch.bfloat16)
    q[0, 5, 2, 9], k[1, 7, 0, 0] = float("inf"), float("nan")
    got = prologue(q, k, v)
    assert torch.equal(got.q, q)
    torch.testing.assert_close(got.k, k, rtol=0, atol=0, equal_nan=True)


# Wrong inputs -------------------------------------------------------------------------------------


def test_specs_are_checked_and_survive_a_dict():
    assert PrologueSpec.from_dict(INT8.to_dict()) == INT8
    for wrong in ({"qk": "int2"}, {"v": "int8"}, {"v_layout": "rows"}, {"q_rows": 3, "qk": "int8"},
                  {"k_groups": 2, "k_rows": 8, "qk": "int8"}, {"k_groups": 4, "k_rows": 4, "qk": "int8"},
                  {"k_groups": 4, "k_rows": 8}, {"q_rows": 256, "qk": "int8"}, {"v_padding": 8}, {"softmax_scale": 0.1}, {"version": 2}):  # fmt: skip
        with pytest.raises(ValueError, match=r"must|only|leave"):
            PrologueSpec(**wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, o: t.update(k=t["k"][:, :5]), "k and v"),
        (lambda t, o: t.update(q=t["q"][:, :, :3]), "divide"),
        (lambda t, o: t.update(q=t["q"].double()), "share float16"),
        (lambda t, o: t.update({n: x[:, :0] for n, x in t.items()}), "empty"),
        (lambda t, o: t.update({n: x[..., :15] for n, x in t.items()}), "head dim"),
        (lambda t, o: o.update(norm_q=torch.ones(3 * 64, device=DEVICE)), "over one head"),
        (lambda t, o: o.update(rotary=(o["rotary"][0][:9], o["rotary"][1][:9])), "cos and sin"),
        (lambda t, o: o.update(order=o["order"].float()), "order must be"),
        (lambda t, o: o.update(key_order=o["order"][None]), "key_order must be"),
        (lambda t, o: t.update(q=t["q"][:, :9]), "one length"),
    ],
)
def test_wrong_inputs_are_named(change, message):
    tensors, options = inputs(length=20)
    tensors = dict(zip("qkv", tensors, strict=True))
    change(tensors, options)
    with pytest.raises(ValueError, match=message):
        prologue(*tensors.values(), **options)


def test_gradients_are_refused():
    (q, k, v), _ = inputs(length=4)
    with pytest.raises(ValueError, match="no backward"):
        prologue(q.requires_grad_(), k, v)
