"""The activation and its gradient as torch ops: what torch.compile, TorchScript, fx, autocast and vmap see."""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor, library

VERSIONS = ("A", "B", "C")
IMPLEMENTATIONS = ("reference", "portable", "triton")


def choose(x: Tensor) -> str:
    """The implementation that "auto" takes."""
    return "triton" if x.is_cuda and not _triton("forward").unsupported(x) else "portable"


def _triton(direction: str):
    return import_module(f".triton_{direction}", __package__)


def _implementation(impl: str, x: Tensor, direction: str):
    impl = choose(x) if impl == "auto" else impl
    module = import_module(".portable", __package__) if impl == "portable" else _triton(direction)
    return getattr(module, direction)


def check(
    x: Tensor, numerator: Tensor, denominator: Tensor, version: str, channel_dim: int
) -> None:
    """Raises ValueError unless these are what `api.rational` describes."""
    if version not in VERSIONS:
        raise ValueError(f"Unknown version {version!r}. Choose one of {', '.join(VERSIONS)}.")
    if not x.is_floating_point() or not -x.dim() <= channel_dim < x.dim():
        raise ValueError(
            "x must be a floating-point tensor with a dimension channel_dim, got "
            f"{x.dtype}, {tuple(x.shape)=}, {channel_dim=}."
        )
    shapes = f"{tuple(numerator.shape)=} and {tuple(denominator.shape)=}"
    if (
        numerator.dim() != 2
        or denominator.dim() != 2
        or 0 in (*numerator.shape, *denominator.shape)
    ):
        raise ValueError(
            f"Expected numerator (groups or 1, m + 1) and denominator (groups or 1, n), got {shapes}."
        )
    groups = max(numerator.shape[0], denominator.shape[0])
    if any(c.shape[0] not in (1, groups) for c in (numerator, denominator)):
        raise ValueError(
            f"Numerator and denominator must have as many groups, or 1 to share it, got {shapes}."
        )
    if x.shape[channel_dim] % groups:
        raise ValueError(
            f"{groups} groups of coefficients must divide the {x.shape[channel_dim]} channels of x "
            f"{tuple(x.shape)} in dimension {channel_dim}."
        )
    if not x.device == numerator.device == denominator.device:
        raise ValueError(
            f"x and its coefficients must be on one device, got {x.device}, {numerator.device}, "
            f"{denominator.device}."
        )


@library.custom_op("visionfuse::rational", mutates_args=())
def rational_op(
    x: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    version: str = "A",
    channel_dim: int = -1,
    out_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """P(x) / Q(x) in out_dtype, that of x by default; in the memory order of x. See `api.rational`."""
    check(x, numerator, denominator, version, channel_dim)
    forward = _implementation(impl, x, "forward")
    with torch.cuda.device_of(x):  # Triton launches on the current device
        return forward(x, numerator, denominator, version, channel_dim, out_dtype or x.dtype)


@library.custom_op("visionfuse::rational_backward", mutates_args=())
def rational_backward_op(
    grad: Tensor,
    x: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    version: str,
    channel_dim: int,
    impl: str,
    need_x: bool,
    need_coefficients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, numerator and denominator; without elements where not needed."""
    backward = _implementation(impl, x, "backward")
    with torch.cuda.device_of(x):
        found = backward(
            grad, x, numerator, denominator, version, channel_dim, need_x, need_coefficients
        )
    like = (x, numerator, denominator)
    dx, da, db = (t.new_empty(0) if g is None else g for g, t in zip(found, like, strict=True))
    return dx, da, db


@rational_op.register_fake
def _(x, numerator, denominator, version="A", channel_dim=-1, out_dtype=None, impl="auto"):
    check(x, numerator, denominator, version, channel_dim)
    return torch.empty_like(x, dtype=out_dtype or x.dtype)


@rational_backward_op.register_fake
def _(grad, x, numerator, denominator, version, channel_dim, impl, need_x, need_coefficients):
    dx = torch.empty_like(x) if need_x else x.new_empty(0)
    coefficients = (numerator, denominator)
    if need_coefficients:
        da, db = (c.new_empty(c.shape) for c in coefficients)
    else:
        da, db = (c.new_empty(0) for c in coefficients)
    return dx, da, db


# Gradients ------------------------------------------------------------------------------------------


def _keep(ctx, inputs, output) -> None:
    x, numerator, denominator, ctx.version, ctx.channel_dim, _, ctx.impl = inputs
    ctx.save_for_backward(x, numerator, denominator)


def _gradients(ctx, grad: Tensor):
    need_x, need_a, need_b = ctx.needs_input_grad[:3]
    dx, da, db = rational_backward_op(
        grad, *ctx.saved_tensors, ctx.version, ctx.channel_dim, ctx.impl, need_x, need_a or need_b
    )
    return dx if need_x else None, da if need_a else None, db if need_b else None, *[None] * 4


rational_op.register_autograd(_gradients, setup_context=_keep)


def _keep_twice(ctx, inputs, output) -> None:
    *tensors, ctx.version, ctx.channel_dim, _, ctx.need_x, ctx.need_coefficients = inputs
    ctx.save_for_backward(*tensors)


def _second_gradients(ctx, *grads: Tensor):
    """Of the first gradients, by autograd through the reference: correct everywhere, fast nowhere."""
    from . import reference

    wanted = [ctx.need_x, ctx.need_coefficients, ctx.need_coefficients]
    with torch.enable_grad():
        grad, *inputs = leaves = [t.detach().requires_grad_() for t in ctx.saved_tensors]
        out = reference.forward(*inputs, ctx.version, ctx.channel_dim)
        firsts = torch.autograd.grad(out, inputs, grad.to(out.dtype), create_graph=True)
        used = [(f, g) for f, g, w in zip(firsts, grads, wanted, strict=True) if w]
        seconds = torch.autograd.grad(
            [f for f, _ in used], leaves, [g for _, g in used], allow_unused=True
        )
    return *seconds, *[None] * 5


rational_backward_op.register_autograd(_second_gradients, setup_context=_keep_twice)


# Autocast and vmap ----------------------------------------------------------------------------------


def _under_autocast(device_type: str):
    """Reads x as it is and writes the type that the next matrix product wants: no cast kernels."""

    def rational(
        x, numerator, denominator, version="A", channel_dim=-1, out_dtype=None, impl="auto"
    ):
        if out_dtype is None and x.dtype != torch.float64:
            out_dtype = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            return rational_op(x, numerator, denominator, version, channel_dim, out_dtype, impl)

    return rational


_library = library.Library("visionfuse", "FRAGMENT")
for _device in ("CPU", "CUDA"):
    _library.impl("rational", _under_autocast(_device.lower()), f"Autocast{_device}")


@rational_op.register_vmap
def _(info, in_dims, x, numerator, denominator, version="A", channel_dim=-1, *options):
    if in_dims[1] is None and in_dims[2] is None:  # the batch is one more dimension
        channel_dim += channel_dim >= 0
        x = x.movedim(in_dims[0], 0)
        return rational_op(x, numerator, denominator, version, channel_dim, *options), 0
    inputs = (x, numerator, denominator, version, channel_dim, *options)
    in_dims = (
        *in_dims[:3],
        *[None] * (len(inputs) - 3),
    )  # arguments that have their default are left out
    return _each(rational_op, info, in_dims, inputs), 0


@rational_backward_op.register_vmap
def _(info, in_dims, *inputs):
    outs = _each(rational_backward_op, info, in_dims, inputs)
    return outs, (0,) * len(outs)


def _each(op, info, in_dims, inputs):
    """One call for every entry of the batch: coefficients that differ by entry, gradients for each entry."""
    calls = [
        op(*(t if d is None else t.select(d, i) for t, d in zip(inputs, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    if isinstance(calls[0], Tensor):
        return torch.stack(calls)
    return tuple(torch.stack(parts) for parts in zip(*calls, strict=True))
