"""The layer of bumps on edges against float64: every implementation, odd sizes, dtypes, and as a torch op."""

from __future__ import annotations

import pytest
import torch
from torch import library, nn

from visionfuse.kernels.kan import reference, rswaf_linear, unsupported_reasons
from visionfuse.kernels.rational import UnsupportedError
from visionfuse.models import FasterKAN
from visionfuse.testing import check_traced, poisoned_memory, saved_for_backward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLEMENTATIONS = ["portable", "triton"]
# Relative to the largest value: in 16 bits two roundings of the basis, weights are exact.
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def inputs(shape, outputs, *, count=8, dtype=torch.float32, scale=1.0, seed=0):
    """x, weight, the gradient of y."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g) * scale
    weight = torch.randn(outputs, shape[-1] * count, generator=g) * (shape[-1] * count) ** -0.5
    grad = torch.randn(*shape[:-1], outputs, generator=g)
    return tuple(t.to(DEVICE, dtype) for t in (x, weight, grad))


def results(x, weight, grad, *options, **named):
    """y and the gradients of x and weight."""
    leaves = [t.detach().requires_grad_() for t in (x, weight)]
    y = rswaf_linear(*leaves, *options, **named)
    return (y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype)))


def check(x, weight, grad, *options, impl):
    exact = results(x.double(), weight.double(), grad.double(), *options, impl="reference")
    with poisoned_memory():
        got = results(x, weight, grad, *options, impl=impl)
    for name, one, like, true in zip(("y", "dx", "dw"), got, (grad, x, weight), exact, strict=True):
        assert (one.shape, one.dtype) == (like.shape, like.dtype), name
        error = (one.double() - true).abs().max() / true.abs().max()
        assert error <= TOLERANCE[weight.dtype], (name, error)
    return got


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("shape", "outputs"),
    [((3, 5, 24), 70), ((1, 1), 1), ((130, 8), 65), ((2, 3, 4, 12), 33), ((70, 100), 16)],
    ids=str,
)
def test_shapes(impl, shape, outputs):
    check(*inputs(shape, outputs), impl=impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("count", "low", "high", "width"), [(4, -1.0, 1.5, 0.5), (16, -2.0, 2.0, 0.33), (1, 0.0, 0.0, 1.0)])  # fmt: skip
def test_centres(impl, count, low, high, width):
    check(*inputs((37, 12), 20, count=count), low, high, width, impl=impl)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(300, 40), (3, 8)], ids=str)
def test_half_precision(dtype, shape):
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("products of bfloat16 are wrong in Triton's interpreter")
    check(*inputs(shape, 200, dtype=dtype), impl="triton")


def test_half_precision_portable():
    for dtype in (torch.bfloat16, torch.float16):
        check(*inputs((64, 24), 40, dtype=dtype), impl="portable")


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_large_values_nan_and_strides(impl):
    """Far from all centres the bumps are 0 and flat; NaN stays in its row."""
    x, weight, grad = inputs((40, 16), 24, scale=30.0)
    x[3] = torch.tensor([1e30, -1e30] * 8)
    x[4] = torch.tensor([torch.inf, -torch.inf] * 8)
    check(x[::2], weight, grad[::2], impl=impl)
    got = results(x, weight, grad, impl=impl)
    for t in got:
        assert t.isfinite().all()
    for t in (got[0][3:5], got[1][3:5]):
        assert t.abs().max() < 1e-6
    x[7, 5] = torch.nan
    y, dx, dw = results(x, weight, grad, impl=impl)
    assert y[7].isnan().all()
    assert torch.equal(y[8:], got[0][8:])
    assert dx.isnan().nonzero().tolist() == [[7, 5]]
    of_channel = dw.unflatten(1, (16, -1)).isnan()
    assert of_channel[:, 5].all()
    assert of_channel.sum() == of_channel[:, 5].numel()
    assert rswaf_linear(x, weight.half(), impl=impl)[7].isnan().all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_equal_bits_and_no_needless_gradients(impl):
    x, weight, grad = inputs((150, 24), 40)
    first = results(x, weight, grad, impl=impl)
    with poisoned_memory():
        again = results(x, weight, grad, impl=impl)
    assert all(torch.equal(p, q) for p, q in zip(first, again, strict=True))
    for i, which in ((1, "x"), (2, "weight")):
        leaves = {"x": x.clone(), "weight": weight.clone()}
        leaves[which].requires_grad_()
        (got,) = torch.autograd.grad(rswaf_linear(**leaves, impl=impl), leaves[which], grad)
        assert torch.equal(got, first[i])


def test_nothing_as_large_as_the_basis_is_kept():
    """What autograd holds is x and the weight; the formula holds four tensors of the basis."""
    x, weight, _ = inputs((256, 32), 48)
    kept = {}
    for impl in ("portable", "reference"):
        leaves = [t.detach().requires_grad_() for t in (x, weight)]
        with saved_for_backward() as saved:
            rswaf_linear(*leaves, impl=impl)
        kept[impl] = max(t.numel() for t in saved)
    assert kept["portable"] == max(x.numel(), weight.numel())
    assert kept["reference"] == 8 * x.numel()


def test_no_rows_and_gradcheck():
    x, weight, _ = inputs((0, 6), 5)
    y, dx, dw = results(x, weight, y_like(x, weight))
    assert y.shape == (0, 5)
    assert dx.shape == x.shape
    assert not dw.any()
    x, weight, _ = inputs((3, 4), 5, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, weight)]
    assert torch.autograd.gradcheck(lambda *t: rswaf_linear(*t), leaves)


def y_like(x, weight):
    return x.new_zeros(*x.shape[:-1], weight.shape[0])


# As a torch op ----------------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(inputs((1, 16), 12)[1])

    def forward(self, x):
        return torch.ops.visionfuse.rswaf_linear(x * 1.0, self.weight)


@pytest.mark.parametrize(
    "how", ["aot_eager", "script", "fx", "export", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_one_op_for_every_tracer(how):
    check_traced(how, Layer(), inputs((3, 5, 16), 12)[0])


def test_opcheck():
    x, weight, grad = inputs((3, 16), 12)
    leaves = [t.clone().requires_grad_() for t in (x, weight)]
    library.opcheck(torch.ops.visionfuse.rswaf_linear.default, (*leaves,))
    library.opcheck(
        torch.ops.visionfuse.rswaf_linear_backward.default,
        (grad, x, weight, -2.0, 2.0, 0.33, "auto", True, True),
    )


def test_autocast_multiplies_in_its_type_and_reads_x_as_it_is():
    x, weight, grad = inputs((30, 16), 12)
    leaves = [t.requires_grad_() for t in (x, weight)]
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = rswaf_linear(*leaves)
    assert y.dtype == torch.bfloat16
    dx, dw = torch.autograd.grad(y, leaves, grad.bfloat16())
    assert dx.dtype == dw.dtype == torch.float32
    exact = reference.forward(x.double(), weight.double(), -2.0, 2.0, 0.33)
    assert (y - exact).abs().max() < TOLERANCE[torch.bfloat16] * exact.abs().max()


def test_faster_kan_is_layernorm_bumps_and_a_product():
    """The formula of FasterKAN, step by step as it is published."""
    torch.manual_seed(0)
    kan, x = FasterKAN(16, 32, 16).to(DEVICE), torch.randn(20, 16, device=DEVICE)
    expected = x
    for layer in kan.layers:
        normal = nn.functional.layer_norm(expected, expected.shape[-1:])
        scaled = (normal[..., None] - torch.linspace(-2, 2, 8, device=DEVICE)) * (1 / 0.33)
        bumps = (1 - torch.tanh(scaled) * torch.tanh(scaled)).view(len(x), -1)
        expected = nn.functional.linear(bumps, layer.spline_linear.weight)
    torch.testing.assert_close(kan(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.jit.script(kan)(x), kan(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 3)}, "Expected weight .outputs, channels . centres."),
        ({"x": torch.zeros(4, 4, dtype=torch.int32)}, "must be floating"),
        ({"width": 0.0}, "Expected width > 0"),
        ({"high": 20.0}, r"centres within 8\.6 widths of 0"),
        ({"impl": "cuda"}, "Unknown implementation 'cuda'"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_errors_say_what_to_do(change, message):
    good = {"x": torch.zeros(4, 4), "weight": torch.zeros(5, 32)}
    with pytest.raises(ValueError, match=message):
        rswaf_linear(**(good | change))


def test_what_the_kernels_cannot_do():
    x, weight = torch.zeros(4, 4, device=DEVICE), torch.zeros(5, 12, device=DEVICE)
    assert "power of two" in unsupported_reasons("triton", x, weight)[-1]
    with pytest.raises(UnsupportedError, match="got 3"):
        rswaf_linear(x, weight, impl="triton")
    assert rswaf_linear(x, weight).shape == (4, 5)
    assert "float64" in unsupported_reasons("triton", x.double(), weight[:, :8])[0]
