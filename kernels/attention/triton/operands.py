"""What the host sides of the Triton kernels share: which inputs they take, and plans and biases as they read them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ...plan.block_plan import BlockPlan
from ..bias import Bias, RelativeBias
from ..prepared import PackedBits, PreparedPlan
from . import kernel as device

MAX_HEAD_DIM = 256
MAX_BLOCK = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INTERPRET = triton.knobs.runtime.interpret


class Table(NamedTuple):
    """A `RelativeBias` as the kernel reads it; stride_h: of a head."""

    table: Tensor
    q_index: Tensor
    k_index: Tensor
    columns: int
    stride_h: int


class Rows(NamedTuple):
    """A `BlockBias` as the kernel reads it: strides of batch entries, heads and tiles."""

    rows: Tensor
    stride_b: int
    stride_h: int
    stride_t: int


def unsupported_anyhow(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> list[str]:
    """Reasons against q, k, v of any dtype; empty if there are none."""
    reasons = []
    devices = {str(t.device) for t in (q, k, v)} | {str(plan.device)}
    if len(devices) > 1:
        reasons.append(f"q, k, v and the plan must share one device, got {sorted(devices)}")
    if q.device.type == "cuda":
        capability = torch.cuda.get_device_capability(q.device)
        if torch.version.hip is None and capability < (8, 0):
            reasons.append(
                f"the GPU has compute capability {capability[0]}.{capability[1]}, 8.0 is needed"
            )
    elif not INTERPRET:
        reasons.append(f"Triton kernels need a GPU, the tensors are on {q.device}")
    if q.shape[-1] > MAX_HEAD_DIM:
        reasons.append(f"the head dim may be at most {MAX_HEAD_DIM}, got {q.shape[-1]}")
    return reasons


def rows_in_memory(x: Tensor) -> Tensor:
    """x itself if its rows are contiguous and near each other (offsets inside a block are 32-bit)."""
    near = x.stride(1) * MAX_BLOCK < 2**31
    return x if x.stride(-1) == 1 and near else x.contiguous()


def block_sizes(plan: BlockPlan, head_dim: int, least: int = 16) -> dict[str, int]:
    """Tensor cores multiply powers of two from 16 on, codes from 32; what a plan's blocks lack is masked."""
    sides = zip(("BM", "BN", "BD"), (plan.block_q, plan.block_k, head_dim), strict=True)
    return {name: max(least, triton.next_power_of_2(side)) for name, side in sides}


def variant_strides(plan: BlockPlan) -> tuple[int, int]:
    """Strides of `plan.variant` over batch entries and heads, 0 where all share one."""
    if plan.variant is None:
        return 0, 0
    b, h = plan.variant.shape
    return plan.variant.stride(0) * (b > 1), plan.variant.stride(1) * (h > 1)


def mask_policies(ready: PreparedPlan):
    """(what a partial entry needs of every query, which pairs it makes visible), as jit functions."""
    if ready.mask is None:
        return device.positions, None
    if isinstance(ready.mask, PackedBits):
        return device.rows_of_tile, device.in_bits
    if ready.words == 1 and ready.mask.table is None:
        return device.bounds, device.in_interval
    return device.positions, device.in_intervals


def bias_policies(bias: Bias | None):
    """(what a tile of a head needs, what is added to the scores of an entry, the operands)."""
    if bias is None:
        return None, None, None
    if isinstance(bias, RelativeBias):
        table = bias.table.contiguous()
        heads, columns = table.shape
        operands = Table(table, bias.q_index, bias.k_index, columns, columns * (heads > 1))
        return device.table_of_head, device.relative_bias, operands
    rows = bias.rows if bias.rows.stride(-1) == 1 else bias.rows.contiguous()
    strides = (n * (size > 1) for n, size in zip(rows.stride()[:3], rows.shape[:3], strict=True))
    return device.row_of_tile, device.block_bias, Rows(rows, *strides)


def shared_memory(arch: int) -> int:
    """Bytes that a block of an NVIDIA GPU may have, less 3 KiB for masks and the like."""
    return {80: 160, 90: 224, 100: 224, 103: 224}.get(arch, 96) * 1024
