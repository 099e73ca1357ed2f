"""The layer and its gradients in Triton: the basis is made in registers, where a matrix product needs it.

With r = 1 / (1 + 2^(slope (x - g))), phi = 4 r (1 - r) and dphi/dx = -(2 / width) (1 - 2 r) phi, so that a
bump takes one exponential and one reciprocal, which is what limits these kernels. In 16 bits a channel takes
one exponential for all its bumps, 2^(slope x), times constants. The 4 multiplies sums, not summands.

Three kernels: y = phi W^T, dx from grad W (sums over the bumps of a channel in its epilogue), and dW =
grad^T phi, cut along the rows into as many parts as fill the GPU, which are added in a fixed order.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rational.triton_forward import reciprocal
from ..rational.triton_forward import unsupported as unsupported_tensor
from .ops import slope_of

WAVES = 2  # programs of a multiprocessor that dW is cut into


class Tuning(NamedTuple):
    """rows, outputs and channels of a tile; a channel is `count` columns of a product."""

    BM: int
    BN: int
    BC: int
    warps: int
    stages: int


def tuning(weight: Tensor, count: int) -> Tuning:
    """Tiles by format: float32 products have no tensor cores unless TF32 is allowed."""
    if weight.itemsize == 2:
        return Tuning(128, 128, max(1, 64 // count), 8, 3)
    return Tuning(64, 64, max(1, 32 // count), 8, 2)


def unsupported(x: Tensor, weight: Tensor) -> list[str]:
    """Every reason why the kernels cannot run on these; empty if they can."""
    reasons = unsupported_tensor(x)
    if weight.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        reasons.append(f"the weight must be float16, bfloat16 or float32, got {weight.dtype}")
    if x.dtype == torch.float64:
        reasons.append("x must not be float64")
    count = weight.shape[1] // x.shape[-1]
    if count & (count - 1) or count > 32:
        reasons.append(f"the number of centres must be a power of two up to 32, got {count}")
    return reasons


def forward(x: Tensor, weight: Tensor, low: float, high: float, width: float) -> Tensor:
    """x [rows, channels] -> [rows, outputs], contiguous, in the dtype of the weight."""
    out = weight.new_empty(x.shape[0], weight.shape[0])
    if out.numel():
        grid, arguments, options = forward_launch(x, weight, out, low, high, width)
        forward_kernel[grid](*arguments, **options)
    return out


def forward_launch(x, weight, out, low, high, width) -> tuple[tuple[int, ...], tuple, dict]:
    """Grid, arguments and options of `forward_kernel`."""
    (rows, channels), outputs = x.shape, weight.shape[0]
    options = _options(x, weight, low, high, width)
    grid = (triton.cdiv(rows, options["BM"]) * triton.cdiv(outputs, options["BN"]),)
    return grid, (x, weight, out, rows, channels, outputs), options


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, low: float, high: float, width: float,
    need_x: bool, need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of x and weight, None where not needed."""
    dx = dw = None
    if need_x:
        dx = torch.empty_like(x)
        if dx.numel():
            grid, arguments, options = dx_launch(grad, x, weight, dx, low, high, width)
            dx_kernel[grid](*arguments, **options)
    if need_weight:
        if not x.numel():
            return dx, torch.zeros_like(weight)
        grid, arguments, options, parts = dw_launch(grad, x, weight, low, high, width)
        dw_kernel[grid](*arguments, **options)
        dw = parts.sum(0).to(weight.dtype) if parts.shape[0] > 1 else parts[0].to(weight.dtype)
    return dx, dw


def dx_launch(grad, x, weight, dx, low, high, width) -> tuple[tuple[int, ...], tuple, dict]:
    """Grid, arguments and options of `dx_kernel`."""
    (rows, channels), outputs = x.shape, weight.shape[0]
    options = _options(x, weight, low, high, width)
    options["BC"] *= 2  # columns of a tile are channels here, its depth are outputs
    options["BN"] //= 2
    grid = (triton.cdiv(rows, options["BM"]) * triton.cdiv(channels, options["BC"]),)
    return grid, (grad, x, weight, dx, rows, channels, outputs), options


def dw_launch(grad, x, weight, low, high, width) -> tuple[tuple[int, ...], tuple, dict, Tensor]:
    """Grid, arguments and options of `dw_kernel`, and the parts [parts, outputs, columns] it writes."""
    (rows, channels), outputs = x.shape, weight.shape[0]
    options = _options(x, weight, low, high, width)
    options["BC"] *= 2
    options["BM"] //= 2  # the depth
    tiles = triton.cdiv(outputs, options["BN"]) * triton.cdiv(channels, options["BC"])
    steps = triton.cdiv(rows, options["BM"])
    asked = max(1, min(steps, WAVES * _multiprocessors(x) // tiles))
    of_part = triton.cdiv(steps, asked)
    parts = x.new_empty(
        (triton.cdiv(steps, of_part), outputs, weight.shape[1]), dtype=torch.float32
    )
    arguments = (grad, x, parts, rows, channels, outputs, of_part)
    return (tiles, parts.shape[0]), arguments, options, parts


def _options(x: Tensor, weight: Tensor, low: float, high: float, width: float) -> dict:
    count = weight.shape[1] // x.shape[1]
    BM, BN, BC, warps, stages = tuning(weight, count)
    half = weight.itemsize == 2
    return {
        "COUNT": count, "LOW": low, "STEP": (high - low) / max(1, count - 1), "WIDTH": width,
        "SLOPE": slope_of(width), "SWITCHES": factored if half else separate,
        "RECIPROCAL": reciprocal(weight.dtype), "BM": BM, "BN": BN, "BC": BC,
        "PRECISION": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


@cache
def _multiprocessors_of(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def _multiprocessors(x: Tensor) -> int:
    return _multiprocessors_of(x.device.index) if x.is_cuda else 2


# Device code ----------------------------------------------------------------------------------------

# With exponents of at most 100, 1 + 2^exponent is finite and its reciprocal not denormal; phi is 0 long before.


@triton.jit
def separate(x, COUNT: tl.constexpr, LOW: tl.constexpr, STEP: tl.constexpr, SLOPE: tl.constexpr):
    """1 + 2^(SLOPE (x - g)) for x [A, B], an exponential each: [A, B, COUNT]."""
    centres = LOW + STEP * tl.arange(0, COUNT).to(tl.float32)[None, None, :]
    return 1.0 + tl.exp2(at_most_100(SLOPE * (x[:, :, None] - centres)))


@triton.jit
def factored(x, COUNT: tl.constexpr, LOW: tl.constexpr, STEP: tl.constexpr, SLOPE: tl.constexpr):
    """The same from one exponential for all centres, to 2e-6."""
    centres = LOW + STEP * tl.arange(0, COUNT).to(tl.float32)[None, None, :]
    return 1.0 + tl.exp2(at_most_100(SLOPE * x))[:, :, None] * tl.exp2(-SLOPE * centres)


@triton.jit
def at_most_100(x):
    """Powers of two that stay finite; NaN, which a GPU's plain minimum drops, stays NaN."""
    return tl.minimum(x, 100.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def load_tile(p, o_0, o_1, size_0, size_1):
    """[len(o_0), len(o_1)] of a matrix [size_0, size_1], 0 outside."""
    inside = (o_0 < size_0)[:, None] & (o_1 < size_1)[None, :]
    return tl.load(p + o_0[:, None].to(tl.int64) * size_1 + o_1[None, :], mask=inside, other=0.0)


@triton.jit
def store_tile(p, value, o_0, o_1, size_0, size_1):
    inside = (o_0 < size_0)[:, None] & (o_1 < size_1)[None, :]
    o = o_0[:, None].to(tl.int64) * size_1 + o_1[None, :]
    tl.store(p + o, value.to(p.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    p_x, p_w, p_out, rows, channels, outputs,
    COUNT: tl.constexpr, LOW: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr, SLOPE: tl.constexpr,
    SWITCHES: tl.constexpr, RECIPROCAL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile [BM, BN] of y; neighbouring programs have the same rows."""
    blocks = tl.cdiv(outputs, BN)
    o_m = tl.program_id(0) // blocks * BM + tl.arange(0, BM)
    o_n = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    out = tl.zeros([BM, BN], tl.float32)
    for c in range(0, channels, BC):
        x = load_tile(p_x, o_m, c + tl.arange(0, BC), rows, channels).to(tl.float32)  # [BM, BC]
        r = RECIPROCAL(SWITCHES(x, COUNT, LOW, STEP, SLOPE))
        phi = tl.reshape(r - r * r, [BM, BC * COUNT]).to(p_w.dtype.element_ty)
        o_k = c * COUNT + tl.arange(0, BC * COUNT)
        w = load_tile(p_w, o_n, o_k, outputs, channels * COUNT)  # [BN, BC * COUNT]
        out = tl.dot(phi, tl.trans(w), out, input_precision=PRECISION)
    store_tile(p_out, 4.0 * out, o_m, o_n, rows, outputs)


@triton.jit(do_not_specialize=["rows"])
def dx_kernel(
    p_grad, p_x, p_w, p_dx, rows, channels, outputs,
    COUNT: tl.constexpr, LOW: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr, SLOPE: tl.constexpr,
    SWITCHES: tl.constexpr, RECIPROCAL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile [BM, BC] of dx: grad W [BM, BC * COUNT], times dphi/dx, summed over the bumps."""
    blocks = tl.cdiv(channels, BC)
    o_m = tl.program_id(0) // blocks * BM + tl.arange(0, BM)
    channel = tl.program_id(0) % blocks * BC
    o_k = channel * COUNT + tl.arange(0, BC * COUNT)
    product = tl.zeros([BM, BC * COUNT], tl.float32)
    for n in range(0, outputs, BN):
        o_n = n + tl.arange(0, BN)
        grad = load_tile(p_grad, o_m, o_n, rows, outputs)  # [BM, BN]
        w = load_tile(p_w, o_n, o_k, outputs, channels * COUNT)  # [BN, BC * COUNT]
        product = tl.dot(grad.to(w.dtype), w, product, input_precision=PRECISION)
    o_c = channel + tl.arange(0, BC)
    x = load_tile(p_x, o_m, o_c, rows, channels).to(tl.float32)
    r = RECIPROCAL(SWITCHES(x, COUNT, LOW, STEP, SLOPE))
    slope = (1.0 - 2.0 * r) * (r - r * r)  # times -8 / WIDTH
    dx = tl.sum(tl.reshape(product, [BM, BC, COUNT]) * slope, axis=2)
    store_tile(p_dx, (-8.0 / WIDTH) * dx, o_m, o_c, rows, channels)


@triton.jit(do_not_specialize=["rows", "steps"])
def dw_kernel(
    p_grad, p_x, p_parts, rows, channels, outputs, steps,
    COUNT: tl.constexpr, LOW: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr, SLOPE: tl.constexpr,
    SWITCHES: tl.constexpr, RECIPROCAL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile [BN, BC * COUNT] of dW over `steps` blocks of rows."""
    blocks = tl.cdiv(channels, BC)
    o_n = tl.program_id(0) // blocks * BN + tl.arange(0, BN)
    channel = tl.program_id(0) % blocks * BC
    part = tl.program_id(1)
    dw = tl.zeros([BN, BC * COUNT], tl.float32)
    for step in range(part * steps, tl.minimum((part + 1) * steps, tl.cdiv(rows, BM))):
        o_m = step * BM + tl.arange(0, BM)
        grad = load_tile(p_grad, o_m, o_n, rows, outputs)  # [BM, BN]
        x = load_tile(p_x, o_m, channel + tl.arange(0, BC), rows, channels).to(tl.float32)
        r = RECIPROCAL(SWITCHES(x, COUNT, LOW, STEP, SLOPE))
        phi = tl.reshape(r - r * r, [BM, BC * COUNT]).to(grad.dtype)
        dw = tl.dot(tl.trans(grad), phi, dw, input_precision=PRECISION)
    columns = channels * COUNT
    o_k = channel * COUNT + tl.arange(0, BC * COUNT)
    p_part = p_parts + part.to(tl.int64) * outputs * columns
    store_tile(p_part, 4.0 * dw, o_n, o_k, outputs, columns)
