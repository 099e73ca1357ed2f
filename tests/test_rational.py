"""The rational activation against float64: every implementation, version, layout and dtype, and as a torch op."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import library

from visionfuse.kernels.rational import UnsupportedError, rational, reference, unsupported_reasons
from visionfuse.testing import assert_within_budget, check_traced, poisoned_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLEMENTATIONS = ["portable", "triton"]


def inputs(shape, *, groups=8, shared=True, orders=(5, 4), dtype=torch.float32, scale=1.0, seed=0):
    """x, the gradient of y, numerator and denominator; coefficients in float32, in float64 for float64."""
    g = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(shape, generator=g) * f for f in (scale, 1.0))
    a = torch.randn(1 if shared else groups, orders[0] + 1, generator=g) * 0.4
    b = torch.randn(groups, orders[1], generator=g) * 0.4
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return x.to(DEVICE, dtype), grad.to(DEVICE, dtype), a.to(DEVICE, wide), b.to(DEVICE, wide)


def results(call, x, grad, a, b):
    """y and the gradients of x, numerator and denominator."""
    leaves = [t.detach().requires_grad_() for t in (x, a, b)]
    y = call(*leaves)
    return (y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype)))


def check(x, grad, a, b, version="A", channel_dim=-1, impl="triton"):
    """Within twice the error of the same formula with x's own dtype around it, 2 ulp and rounding, of float64."""

    def exactly(*leaves):
        return reference.forward(*leaves, version, channel_dim)

    def low(x, a, b):  # what careful arithmetic in float32 gives in the dtype of x
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        return reference.forward(x.to(wide), a, b, version, channel_dim).to(x.dtype)

    exact = results(exactly, x.double(), grad, a.double(), b.double())
    budget = results(low, x, grad, a, b)
    with poisoned_memory():
        got = results(
            lambda *t: rational(*t, version, channel_dim=channel_dim, impl=impl), x, grad, a, b
        )
    rounding = sizes(x, grad, a, b, version, channel_dim)
    for name, one, like, true, twin, most in zip(
        ("y", "dx", "da", "db"), got, (x, x, a, b), exact, budget, rounding, strict=True
    ):
        assert (one.shape, one.dtype) == (like.shape, like.dtype), name
        # The twin may round luckily: where terms cancel, what counts is how large they are.
        unlucky = 4 * torch.finfo(a.dtype).eps * most
        assert_within_budget(one, true, twin + unlucky.copysign(twin - true), what=name)
    return got


def sizes(x, grad, a, b, version, channel_dim):
    """The sums of the magnitudes of all terms of y, dx, da and db: what rounding errors are relative to."""
    x, grad, a, b = (t.double() for t in (x, grad, a, b))

    def plain(c, x):  # the polynomial with these coefficients
        return reference.forward(x, c, torch.zeros_like(b), "A", channel_dim)

    over = reference.forward(x, torch.ones_like(a[:, :1]), b, version, channel_dim)  # 1 / Q
    leaf, a, b = (t.detach().abs().requires_grad_() for t in (x, a, b))
    terms = b if version == "C" else torch.cat([torch.ones_like(b[:, :1]), b], 1)
    p, d = plain(a, leaf), plain(terms, leaf)
    weight = grad.abs() * over * d.detach() * over  # d / Q is how much Q amplifies
    p_slope, d_slope = (torch.autograd.grad(f.sum(), leaf, retain_graph=True)[0] for f in (p, d))
    dx = weight * (p_slope + d_slope * p * over)
    da = torch.autograd.grad((p * weight).sum(), a, retain_graph=True)[0]
    db = torch.autograd.grad((d * weight * p.detach() * over).sum(), b)[0]
    return tuple(t.detach() for t in (p * over * d * over, dx, da, db))


# Against float64 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("version", ["A", "B", "C"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str
)
def test_versions_and_dtypes(impl, version, dtype):
    check(*inputs((3, 7, 48), dtype=dtype), version, impl=impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("shape", "channel_dim", "groups"),
    [
        ((5, 192), -1, 8),  # runs of 24
        ((2, 3, 56), 2, 8),  # runs of 7: vectors of one element
        ((9,), 0, 1),
        ((4, 3, 1), -1, 1),
        ((2, 16, 5, 7), 1, 4),  # NCHW, 35 pixels
        ((2, 64, 16, 16), -3, 8),  # a row of 2048 vectors: folded
        ((3, 8, 4, 5, 2), 1, 2),
        ((70, 64), -1, 1),
    ],
    ids=str,
)
def test_layouts(impl, shape, channel_dim, groups):
    check(*inputs(shape, groups=groups), channel_dim=channel_dim, impl=impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("orders", [(0, 1), (1, 1), (3, 2), (2, 5), (7, 6)], ids=str)
@pytest.mark.parametrize("version", ["A", "C"])
def test_orders(impl, orders, version):
    check(*inputs((5, 32), groups=4, orders=orders), version, impl=impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_coefficients_of_groups(impl):
    check(*inputs((5, 32), groups=4, shared=False), impl=impl)
    x, grad, a, b = inputs((5, 32), groups=4, shared=False)
    check(x, grad, a, b[:1], impl=impl)  # a shared denominator
    vector = rational(x, a[0], b[0], impl=impl)
    assert torch.equal(vector, rational(x, a[:1], b[:1], impl=impl))


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_anything(data):
    groups = data.draw(st.sampled_from([1, 2, 3, 8]), label="groups")
    dims = data.draw(st.integers(1, 4), label="dims")
    shape = [data.draw(st.integers(0, 5)) for _ in range(dims)]
    channel = data.draw(st.integers(0, dims - 1), label="channel")
    shape[channel] = groups * data.draw(st.integers(1, 9), label="channels of a group")
    orders = (data.draw(st.integers(0, 6)), data.draw(st.integers(1, 5)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    x, grad, a, b = inputs(
        shape, groups=groups, shared=data.draw(st.booleans()), orders=orders, dtype=dtype
    )
    order = data.draw(st.permutations(range(dims)), label="memory order")
    undo = sorted(range(dims), key=order.__getitem__)
    x = x.permute(order).contiguous().permute(undo)
    version = data.draw(st.sampled_from("ABC"))
    for impl in IMPLEMENTATIONS:
        if x.numel():
            check(x, grad, a, b, version, channel, impl=impl)
        else:
            got = results(
                lambda *t, i=impl: rational(*t, version, channel_dim=channel, impl=i), x, grad, a, b
            )
            assert got[0].shape == x.shape
            assert not got[2].any()
            assert not got[3].any()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_memory_order_is_kept(impl):
    x, grad, a, b = inputs((2, 16, 3, 5), groups=4)
    x = x.to(memory_format=torch.channels_last)
    got = check(x, grad, a, b, channel_dim=1, impl=impl)
    assert got[0].stride() == got[1].stride() == x.stride()
    gaps = inputs((4, 6, 64), groups=4)[0][:, ::2, 32:]
    check(gaps, grad.new_ones(()).expand(gaps.shape), a, b, impl=impl)


# Signs of zero, large values, infinity ---------------------------------------------------------------


@pytest.mark.parametrize("impl", [*IMPLEMENTATIONS, "reference"])
def test_a_zero_counts_as_positive(impl):
    """A denominator that starts at zero must learn: |b| has the slope 1 at +0, where autograd's has 0."""
    x, grad, a, b = inputs((6, 16), groups=2)
    b = torch.zeros_like(b)
    _, _, _, db = results(lambda *t: rational(*t, impl=impl), x, grad, a, b)
    per_group = (grad * rational(x, a, b, impl=impl)).unflatten(-1, (2, 8))
    powers = torch.stack([x.unflatten(-1, (2, 8)).abs() ** j for j in (1, 2, 3, 4)], -1)
    sums = (per_group[..., None] * powers).sum((0, 2))
    torch.testing.assert_close(db, -sums, rtol=1e-5, atol=1e-4)
    below = results(lambda *t: rational(*t, impl=impl), x, grad, a, -b)[3]  # -0
    torch.testing.assert_close(below, -db)


@pytest.mark.parametrize("impl", [*IMPLEMENTATIONS, "reference"])
def test_derivative_at_zero(impl):
    x = torch.tensor([[0.0, -0.0]], device=DEVICE)
    a, b = (torch.tensor([v], device=DEVICE) for v in ([0.5, 2.0], [0.25, 0.0]))
    dx = results(lambda *t: rational(*t, impl=impl), x, torch.ones_like(x), a, b)[1]
    assert dx.tolist() == [[2.0 - 0.125, 2.0 + 0.125]]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_large_values(impl, dtype):
    """x^5 of 1000 overflows float16 but not the arithmetic."""
    x, grad, a, b = inputs((8, 32), groups=4, dtype=dtype, scale=300.0)
    x[0, :4] = torch.tensor([1e3, -1e3, 9.5, 0.0])
    check(x, grad, a * 0.01, b, impl=impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_nan_and_infinity_stay_where_they_are(impl):
    """Of y and dx no other element changes, of the coefficients' gradients no other group."""
    x, grad, a, b = inputs((4, 32), groups=4, shared=False)
    x[1, 3], x[2, 17], x[3, 22] = torch.nan, torch.inf, -torch.inf
    wrong = ~x.isfinite()
    got, clean = (
        results(lambda *t: rational(*t, impl=impl), t, grad, a, b)
        for t in (x, x.nan_to_num(0, 0, 0))
    )
    for one, without in zip(got[:2], clean[:2], strict=True):
        assert not one[wrong].isfinite().any()
        assert torch.equal(one[~wrong], without[~wrong])
    for one, without in zip(got[2:], clean[2:], strict=True):
        assert not one[[0, 2]].isfinite().all(-1).any()
        assert torch.equal(one[[1, 3]], without[[1, 3]])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_equal_bits_and_no_needless_gradients(impl):
    x, grad, a, b = inputs((50, 64))
    first = results(lambda *t: rational(*t, impl=impl), x, grad, a, b)
    for _ in range(3):
        with poisoned_memory():
            again = results(lambda *t: rational(*t, impl=impl), x, grad, a, b)
        assert all(torch.equal(p, q) for p, q in zip(first, again, strict=True))
    leaf = x.detach().requires_grad_()
    (dx,) = torch.autograd.grad(rational(leaf, a, b, impl=impl), leaf, grad)
    torch.testing.assert_close(dx, first[1], rtol=1e-6, atol=1e-6)  # a kernel of its own
    leaf = a.detach().requires_grad_()
    (da,) = torch.autograd.grad(rational(x, leaf, b, impl=impl), leaf, grad)
    assert torch.equal(da, first[2])


def test_gradients_of_gradients():
    x, _, a, b = inputs((3, 8), groups=2, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, a, b)]
    for version in "ABC":
        assert torch.autograd.gradcheck(lambda *t, v=version: rational(*t, v), leaves)
        assert torch.autograd.gradgradcheck(lambda *t, v=version: rational(*t, v), leaves)


def test_version_d_is_b_with_noise():
    x, _, a, b = inputs((4, 16), groups=2)
    assert torch.equal(rational(x, a, b, "D"), rational(x, a, b, "B"))
    torch.manual_seed(0)
    noisy = rational(x, a, b, "D", training=True)
    torch.manual_seed(0)
    spread = torch.empty_like(a).uniform_(0.9, 1.1)
    assert torch.equal(noisy, rational(x, a * spread, b, "B"))
    assert not torch.equal(noisy, rational(x, a, b, "B"))


# As a torch op ----------------------------------------------------------------------------------------


class Activation(torch.nn.Module):
    def __init__(self):
        super().__init__()
        _, _, a, b = inputs((1, 8))
        self.a, self.b = torch.nn.Parameter(a), torch.nn.Parameter(b)

    def forward(self, x):
        return torch.ops.visionfuse.rational(x * 1.0, self.a, self.b, "A", -1)


@pytest.mark.parametrize(
    "how", ["aot_eager", "script", "fx", "export", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_one_op_for_every_tracer(how):
    check_traced(how, Activation(), torch.randn(3, 5, 16, device=DEVICE))


def test_compiled_without_recompilation_for_another_batch():
    x, _, a, b = inputs((9, 7, 16))  # no two sizes alike: dynamo takes those for one
    counter = torch._dynamo.testing.CompileCounter()
    call = torch.compile(
        lambda x: rational(x, a, b) + 1, fullgraph=True, dynamic=True, backend=counter
    )
    for batch in (9, 5, 3):
        some = x[:batch].clone()
        torch.testing.assert_close(call(some), rational(some, a, b) + 1)
    assert counter.frame_count == 1


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("how", [lambda f: f, torch.jit.script], ids=["eager", "script"])
def test_autocast_reads_what_it_gets_and_writes_what_is_next(impl, how):
    x, grad, a, b = inputs((4, 16))
    module = how(Activation()) if impl == "portable" else None
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = module(x) if module else rational(x, a, b, impl=impl)
        exact = rational(x.double(), a, b, impl=impl)
    assert y.dtype == torch.bfloat16
    assert exact.dtype == torch.float64
    leaf = x.requires_grad_()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = rational(leaf, a, b, impl=impl)
    (dx,) = torch.autograd.grad(y, leaf, grad.bfloat16())
    assert dx.dtype == torch.float32
    assert_within_budget(y, exact, exact.bfloat16())
    assert rational(leaf, a, b, out_dtype=torch.float16, impl=impl).dtype == torch.float16


def test_vmap():
    x, _, a, b = inputs((5, 3, 16))
    torch.testing.assert_close(
        torch.vmap(lambda x: rational(x, a, b), in_dims=1)(x), rational(x.movedim(1, 0), a, b)
    )
    nchw, coefficients = x.unflatten(-1, (4, 4)), torch.stack([a, 2 * a, 3 * a])
    got = torch.vmap(lambda x, a: rational(x, a, b, channel_dim=-1), in_dims=(1, 0))(
        x, coefficients
    )
    for i in range(3):
        torch.testing.assert_close(got[i], rational(x[:, i], coefficients[i], b))
    got = torch.vmap(lambda x: rational(x, a, b[:2], channel_dim=1))(nchw)
    torch.testing.assert_close(got, rational(nchw, a, b[:2], channel_dim=2))
    y = rational(x.requires_grad_(), a, b)
    rows = torch.autograd.grad(y, x, torch.stack([y, -y]), is_grads_batched=True)[0]
    torch.testing.assert_close(rows[0], -rows[1])


def test_opcheck():
    x, grad, a, b = inputs((3, 16))
    leaves = [t.requires_grad_() for t in (x, a, b)]
    library.opcheck(torch.ops.visionfuse.rational.default, (*leaves, "A", -1, None, "auto"))
    library.opcheck(
        torch.ops.visionfuse.rational_backward.default,
        (grad, *(t.detach() for t in leaves), "A", -1, "auto", True, True),
    )


# What cannot work -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "E"}, "Unknown version 'E'. Choose one of A, B, C"),
        ({"x": torch.zeros(4, 15)}, "2 groups of coefficients must divide the 15 channels"),
        ({"x": torch.zeros(4, 16, dtype=torch.int32)}, "floating-point tensor"),
        ({"channel_dim": 2}, "channel_dim=2"),
        ({"numerator": torch.zeros(3, 6)}, "as many groups"),
        ({"numerator": torch.zeros(1, 0)}, "denominator .groups or 1, n."),
        ({"impl": "cuda"}, "Unknown implementation 'cuda'. Choose 'auto' or one of reference"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_errors_say_what_to_do(change, message):
    good = {
        "x": torch.zeros(4, 16),
        "numerator": torch.zeros(1, 6),
        "denominator": torch.zeros(2, 4),
    }
    moved = {
        k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in (good | change).items()
    }
    with pytest.raises(ValueError, match=message):
        rational(**moved)


def test_a_named_implementation_says_why_not(monkeypatch):
    from visionfuse.kernels.rational import triton_forward

    monkeypatch.setattr(triton_forward, "INTERPRET", False)
    x = torch.zeros(4, 16)
    assert "need a GPU" in unsupported_reasons("triton", x)[0]
    with pytest.raises(UnsupportedError, match="need a GPU"):
        rational(x, torch.zeros(1, 6), torch.zeros(2, 4), impl="triton")
