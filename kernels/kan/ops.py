"""The layer and its gradient as torch ops: what torch.compile, TorchScript, fx and autocast see."""

from __future__ import annotations

from importlib import import_module
from math import log2

import torch
from torch import Tensor, library

IMPLEMENTATIONS = ("reference", "portable", "triton")
WIDEST = 25.0  # powers of two between a centre and 0, so that no product of exponentials overflows


def check(x: Tensor, weight: Tensor, low: float, high: float, width: float) -> None:
    """Raises ValueError unless these are what `api.rswaf_linear` describes."""
    if not x.is_floating_point() or not weight.is_floating_point() or x.dim() == 0:
        raise ValueError(
            f"x (..., channels) and weight must be floating, got {x.dtype}, {tuple(x.shape)=}, {weight.dtype}."
        )
    if weight.dim() != 2 or x.shape[-1] == 0 or weight.shape[1] % x.shape[-1] or not weight.numel():
        raise ValueError(
            "Expected weight (outputs, channels * centres) for x (..., channels), got "
            f"{tuple(weight.shape)=}, {tuple(x.shape)=}."
        )
    if x.device != weight.device:
        raise ValueError(f"x and weight must be on one device, got {x.device} and {weight.device}.")
    if not width > 0 or not low <= high or slope_of(width) * max(abs(low), abs(high)) > WIDEST:
        raise ValueError(
            "Expected width > 0, low <= high and centres within "
            f"{WIDEST / 2 * 0.69:.1f} widths of 0, got {low=}, {high=}, {width=}."
        )


def slope_of(width: float) -> float:
    """(1 + tanh(x / width)) / 2 = 1 / (1 + 2^(-slope x))."""
    return 2 / width * log2(2.718281828459045)


def _implementation(impl: str, x: Tensor, weight: Tensor):
    if impl == "auto":
        impl = "triton" if x.is_cuda and not _triton().unsupported(x, weight) else "portable"
    return _triton() if impl == "triton" else import_module(".portable", __package__)


def _triton():
    return import_module(".triton_rswaf", __package__)


@library.custom_op("visionfuse::rswaf_linear", mutates_args=())
def rswaf_linear_op(
    x: Tensor,
    weight: Tensor,
    low: float = -2.0,
    high: float = 2.0,
    width: float = 0.33,
    impl: str = "auto",
) -> Tensor:
    """(..., outputs), contiguous, in the dtype of weight. See `api.rswaf_linear`."""
    check(x, weight, low, high, width)
    module = _implementation(impl, x, weight)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    with torch.cuda.device_of(x):  # Triton launches on the current device
        out = module.forward(rows, weight.contiguous(), low, high, width)
    return out.view(*x.shape[:-1], weight.shape[0])


@library.custom_op("visionfuse::rswaf_linear_backward", mutates_args=())
def rswaf_linear_backward_op(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    low: float,
    high: float,
    width: float,
    impl: str,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight; without elements where not needed."""
    module = _implementation(impl, x, weight)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    grad = grad.reshape(-1, weight.shape[0]).contiguous()
    with torch.cuda.device_of(x):
        dx, dw = module.backward(
            grad, rows, weight.contiguous(), low, high, width, need_x, need_weight
        )
    return (
        x.new_empty(0) if dx is None else dx.view(x.shape),
        weight.new_empty(0) if dw is None else dw,
    )


@rswaf_linear_op.register_fake
def _(x, weight, low=-2.0, high=2.0, width=0.33, impl="auto"):
    check(x, weight, low, high, width)
    return weight.new_empty(*x.shape[:-1], weight.shape[0])


@rswaf_linear_backward_op.register_fake
def _(grad, x, weight, low, high, width, impl, need_x, need_weight):
    dx = x.new_empty(x.shape) if need_x else x.new_empty(0)
    return dx, weight.new_empty(weight.shape) if need_weight else weight.new_empty(0)


def _keep(ctx, inputs, output) -> None:
    x, weight, *ctx.options = inputs
    ctx.save_for_backward(x, weight)


def _gradients(ctx, grad: Tensor):
    need_x, need_weight = ctx.needs_input_grad[:2]
    dx, dw = rswaf_linear_backward_op(grad, *ctx.saved_tensors, *ctx.options, need_x, need_weight)
    return dx if need_x else None, dw if need_weight else None, *[None] * 4


rswaf_linear_op.register_autograd(_gradients, setup_context=_keep)


def _under_autocast(device_type: str):
    """The products in autocast's dtype; x as it is, which the kernel widens anyway: no cast of x."""

    def rswaf_linear(x, weight, low=-2.0, high=2.0, width=0.33, impl="auto"):
        if weight.dtype != torch.float64:
            weight = weight.to(torch.get_autocast_dtype(device_type))
        with torch.autocast(device_type, enabled=False):
            return rswaf_linear_op(x, weight, low, high, width, impl)

    return rswaf_linear


_library = library.Library("visionfuse", "FRAGMENT")
for _device in ("CPU", "CUDA"):
    _library.impl("rswaf_linear", _under_autocast(_device.lower()), f"Autocast{_device}")
