"""The rational activation in Triton: read x, write y, all arithmetic in float32 (float64 for float64).

A program takes a tile of [vectors of a row, rows, elements of a vector]. All elements of a vector have the same
coefficients, so a thread holds them in registers, once for all its rows. Vectors come first, because Triton
lays neighbouring threads along the first of two dimensions that are both not contiguous: with rows first, a
warp reads pieces of 64 bytes, at 65% of the speed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import dense, runs

INTERPRET = triton.knobs.runtime.interpret
DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
MAX_BLOCK = 32  # vectors of a row in a tile: one for each thread of a warp


class Tuning(NamedTuple):
    """vectors: of a thread, that is loads in flight."""

    warps: int = 4
    vectors: int = 4


def unsupported(x: Tensor) -> list[str]:
    """Every reason why the kernels cannot run on x; empty if they can."""
    reasons = []
    if x.device.type == "cuda":
        capability = torch.cuda.get_device_capability(x.device)
        if torch.version.hip is None and capability < (8, 0):
            reasons.append(
                f"the GPU has compute capability {capability[0]}.{capability[1]}, 8.0 is needed"
            )
    elif not INTERPRET:
        reasons.append(f"Triton kernels need a GPU, the tensor is on {x.device}")
    if x.dtype not in DTYPES:
        reasons.append(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {x.dtype}")
    return reasons


def forward(
    x: Tensor, numerator: Tensor, denominator: Tensor, version: str, channel_dim: int,
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    x = dense(x)
    out = torch.empty_like(x, dtype=out_dtype)
    if x.numel():
        grid, arguments, options = launch(x, out, numerator, denominator, version, channel_dim)
        forward_kernel[grid](*arguments, **options)
    return out


def launch(
    x: Tensor, out: Tensor, numerator: Tensor, denominator: Tensor, version: str, channel_dim: int,
    tuning: Tuning = Tuning(),
) -> tuple[tuple[int, ...], tuple, dict]:  # fmt: skip
    """Grid, arguments and options of `forward_kernel`. x and out are dense, in the same order."""
    groups = max(numerator.shape[0], denominator.shape[0])
    view = runs(x, channel_dim, groups, itemsize=max(x.itemsize, out.itemsize, 2))
    numerator, denominator = numerator.contiguous(), denominator.contiguous()
    BV = block_of(view.columns)
    BR = max(1, 32 * tuning.warps * tuning.vectors // BV)
    grid = (triton.cdiv(view.columns, BV) * triton.cdiv(view.rows, BR),)
    arguments = (
        x, out, numerator, denominator,
        view.rows, view.columns, view.run, *strides_of_groups(numerator, denominator),
    )  # fmt: skip
    return grid, arguments, {
        "M": numerator.shape[1], "N": denominator.shape[1], "VERSION": version,
        "BR": BR, "BV": BV, "W": view.width, "COMPUTE": compute_dtype(x), "RECIPROCAL": reciprocal(x.dtype),
        "num_warps": tuning.warps,
    }  # fmt: skip


def block_of(vectors: int) -> int:
    """Width of a tile: a power of two that divides a row, unless that makes tiles of few bytes."""
    divisor = min(vectors & -vectors, MAX_BLOCK)
    whole = min(triton.next_power_of_2(vectors), MAX_BLOCK)
    return divisor if divisor >= min(8, vectors) else whole


def strides_of_groups(numerator: Tensor, denominator: Tensor) -> tuple[int, int]:
    """Elements from one group's coefficients to the next: 0 where all groups share them."""
    return tuple(c.shape[1] if c.shape[0] > 1 else 0 for c in (numerator, denominator))


def compute_dtype(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


# Device code ----------------------------------------------------------------------------------------


@triton.jit
def _divide(q):
    return 1.0 / q


@triton.jit
def _approximate(q):
    """rcp.approx, 1 ulp: one instruction, where a division takes eight. Q is at least 0.1."""
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [q], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _refined(q):
    """With a step of Newton's method: for float32 in memory, where there is time for two more instructions."""
    over = _approximate(q)
    return tl.fma(over, tl.fma(-q, over, 1.0), over)


def reciprocal(dtype: torch.dtype):
    """The device function for 1 / q on the GPU that is compiled for, with x in this dtype."""
    if not on_cuda() or dtype == torch.float64:
        return _divide
    return _refined if dtype == torch.float32 else _approximate


def on_cuda() -> bool:
    """Whether inline PTX can be compiled."""
    return not INTERPRET and triton.runtime.driver.active.get_current_target().backend == "cuda"


@triton.jit
def coefficients_of(p, group, stride, COUNT: tl.constexpr, COMPUTE: tl.constexpr):
    """COUNT values [BV, 1, 1], the lowest order first."""
    c = ()
    for i in tl.static_range(COUNT):
        c = c + (tl.load(p + group * stride + i).to(COMPUTE),)
    return c


@triton.jit
def magnitudes(c, COUNT: tl.constexpr):
    out = ()
    for i in tl.static_range(COUNT):
        out = out + (tl.abs(c[i]),)
    return out


@triton.jit
def polynomial(x, c, COUNT: tl.constexpr):
    """c[0] + c[1] x + ... by Horner's rule."""
    value = c[COUNT - 1]
    for i in tl.static_range(1, COUNT):
        value = value * x + c[COUNT - 1 - i]
    return value


@triton.jit
def denominator_of(x, b, N: tl.constexpr, VERSION: tl.constexpr):
    """Q of version A (b: magnitudes), B or C."""
    if VERSION == "A":
        u = tl.abs(x)
        return polynomial(u, b, N) * u + 1.0
    elif VERSION == "B":
        return tl.abs(polynomial(x, b, N) * x) + 1.0
    else:
        return tl.abs(polynomial(x, b, N)) + 0.1


@triton.jit
def tile_of(rows, row, columns, column, W: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr):
    """Element offsets [BV, BR, W] and which of them exist, [BV, BR, 1]."""
    o_r = row + tl.arange(0, BR)[None, :, None]
    o_v = column + tl.arange(0, BV)[:, None, None]
    offsets = (o_r.to(tl.int64) * columns + o_v) * W + tl.arange(0, W)[None, None, :]
    return offsets, (o_r < rows) & (o_v < columns)


@triton.jit(do_not_specialize=["rows", "columns", "run"])
def forward_kernel(
    p_x, p_out, p_a, p_b, rows, columns, run, stride_a, stride_b,
    M: tl.constexpr, N: tl.constexpr, VERSION: tl.constexpr,
    BR: tl.constexpr, BV: tl.constexpr, W: tl.constexpr,
    COMPUTE: tl.constexpr, RECIPROCAL: tl.constexpr,
):  # fmt: skip
    """One tile of [rows, columns, W]; `run` columns make a group. stride_a, stride_b: see the launcher."""
    blocks = tl.cdiv(columns, BV)
    program = tl.program_id(0)
    row, column = program // blocks * BR, program % blocks * BV
    offsets, inside = tile_of(rows, row, columns, column, W, BR, BV)
    x = tl.load(p_x + offsets, mask=inside, other=0.0).to(COMPUTE)  # [BV, BR, W]
    o_v = tl.minimum(column + tl.arange(0, BV), columns - 1)[:, None, None]
    a = coefficients_of(p_a, o_v // run, stride_a, M, COMPUTE)
    b = coefficients_of(p_b, o_v // run, stride_b, N, COMPUTE)
    if VERSION == "A":
        b = magnitudes(b, N)
    y = polynomial(x, a, M) * RECIPROCAL(denominator_of(x, b, N, VERSION))
    tl.store(p_out + offsets, y.to(p_out.dtype.element_ty), mask=inside)
