"""What the entry points of the Hopper kernel share: TMA views, what a plan needs on the device, the launch."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ...plan.block_plan import BlockPlan
from ..prepared import prepare
from . import split
from .kernel import forward_kernel
from .mask import masks_of
from .types import Spec
from .work import deal

ROWS = 64  # queries of a warpgroup, the M of wgmma
BLOCK_K = 128
# TMA begins to read along a row at multiples of 16 bytes: elsewhere the instruction is illegal.
ROW_STEP = 4  # numbers of a row
MAX_GROUPS = 3  # consumer warpgroups
MAX_HEAD_DIM = 256
_TYPES = {
    torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.int32: gl.int32,
    torch.float8_e4m3fn: gl.float8e4nv, torch.int8: gl.int8,
}  # fmt: skip
# By number of consumer warpgroups: registers of every thread at entry, and of consumers and producers
# after setmaxnreg has moved them: 3 * 160 + 24 <= 4 * 128, 2 * 240 + 24 <= 3 * 168.
_REGISTERS = {2: (168, 240, 24), 3: (128, 160, 24)}
# What a block may use, less 512 bytes for barriers.
_SHARED_BYTES = 227 * 1024 - 512
# Blocks of keys and values in flight, at most, by bytes of a value and head dim: 980 TFLOP/s in 8 bits at
# 128 with 3, 631 at 64 with 4 (H200).
_MAX_STAGES = {(2, 64): 3, (2, 128): 3, (2, 256): 2, (1, 64): 4, (1, 128): 3, (1, 256): 2}


class Scales(NamedTuple):
    """Of quantised operands, fp32: q [B, H, Sq], k [B, Hk, blocks, Sk or 1] or [B, Hk, blocks, 4], v [B, Hk, D] or None;
    v_mean [B, Hk, D], what is added to outputs, or None."""

    q: Tensor
    k: Tensor
    v: Tensor | None
    v_mean: Tensor | None


def reasons_against(q: Tensor, plan: BlockPlan) -> list[str]:
    """What no entry point can run."""
    reasons = []
    if q.device.type != "cuda":
        reasons.append(f"it needs a Hopper GPU, the tensors are on {q.device}")
    elif torch.version.hip or torch.cuda.get_device_capability(q.device)[0] != 9:
        reasons.append(f"it needs a Hopper GPU, this is a {torch.cuda.get_device_name(q.device)}")
    if q.shape[-1] > MAX_HEAD_DIM:
        reasons.append(f"the head dim must be at most {MAX_HEAD_DIM}, got {q.shape[-1]}")
    most_q = (MAX_GROUPS if q.shape[-1] <= 128 else 2) * ROWS
    if plan.block_q > most_q or plan.block_k > BLOCK_K:
        reasons.append(
            f"plan blocks may have at most {most_q} queries and {BLOCK_K} keys, got "
            f"{plan.block_q} x {plan.block_k}"
        )
    return reasons


def launch(
    q: Tensor, k: Tensor, v: Tensor, scales: Scales | None, plan: BlockPlan, scale: float,
    out: Tensor, lse: Tensor | None, bias: Tensor | None = None, order: Tensor | None = None,
    most: tuple[Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    """Write out [B, Sq, H, D] and lse [B, H, Sq]. v: [B, Sk, Hk, D], or [B, Hk, D, Sk padded] in 8 bits.

    bias: fp32, what is added to the scores of every tile of queries, [B, H, tiles, Sk]. order: int64 [Sq], the row
    of out and lse of every query, its own if None. most: `move.moved_with_squares`, for a softmax without maximum.
    """
    batch, length, heads, head_dim = q.shape
    width = _width(head_dim)
    ready = prepare(plan, width=BLOCK_K)
    programs = torch.cuda.get_device_properties(q.device).multi_processor_count
    work = deal(plan, batch, heads, programs)
    none = work.offset
    groups = 3 if plan.block_q > 2 * ROWS else 2
    masks = masks_of(plan) if plan.partial.start.numel() else None
    parts = split.buffers(work, groups * ROWS, head_dim) if work.slots else None
    of_keys = () if scales is None else tuple(scales.k.shape[2:])
    k_rows = of_keys == (plan.length_k,) and plan.length_k > 1
    if (k_rows or bias is not None) and not entries_start_at(plan, ROW_STEP):
        raise ValueError(
            f"With rows of numbers a key (a bias or scales) the key blocks of a plan must start at multiples of "
            f"{ROW_STEP}."
        )
    spec = _spec(
        head_dim, groups, q.element_size(), v.element_size(), scales is not None, k_rows, of_keys == (1,), of_keys[1:],
        q.dtype == torch.int8, bias is not None, most is not None,
        None if masks is None else masks.by_group, masks is not None and masks.mixed,
        ready.whole_end is not None, lse is not None, parts is not None, order is not None,
        scales is not None and scales.v_mean is not None,
    )  # fmt: skip

    def pointer(x: Tensor | None) -> Tensor:
        return none if x is None else x

    with torch.cuda.device_of(q):
        forward_kernel[(programs,)](
            _boxes(_readable(q).transpose(1, 2), (1, 1, ROWS, width)),
            _boxes(_readable(k).transpose(1, 2), (1, 1, BLOCK_K, width)),
            _boxes(v.contiguous(), (1, 1, width, BLOCK_K)) if v.element_size() == 1
            else _boxes(_readable(v).transpose(1, 2), (1, 1, BLOCK_K, width)),
            _row_boxes(scales.k.unsqueeze(2)) if scales and k_rows else none,
            none if bias is None else _row_boxes(bias.expand(batch, heads, -1, -1)),
            *map(pointer, scales or (None,) * 4), *map(pointer, most or (None, None)),
            out, out if lse is None else lse, pointer(order), pointer(work.part), *map(pointer, parts or (None, None)),
            work.offset, work.item, plan.q_start, plan.q_count,
            plan.full.offset, pointer(ready.whole_end), ready.full_start, ready.full_count,
            plan.partial.offset, plan.partial.start, pointer(masks and masks.entries), pointer(masks and masks.bits),
            length, heads, heads // k.shape[2], plan.tiles, plan.variants,
            math.prod(of_keys), plan.block_q, scale / math.log(2.0),
            SPEC=spec, num_warps=4, maxnreg=_REGISTERS[groups][0], launch_pdl=True,
        )  # fmt: skip
        if parts is not None:
            split.combine(work, plan, parts, out, lse, order)


# Whether entries start at multiples of a number, by the tensor that identifies a plan.
_starts: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def entries_start_at(plan: BlockPlan, multiple: int) -> bool:
    """The first call for a plan waits for the device, once."""
    known = _starts.setdefault(plan.full.offset, {})
    if multiple not in known:
        starts = torch.cat([plan.full.start, plan.partial.start])
        known[multiple] = not bool((starts % multiple).any())
    return known[multiple]


@lru_cache(maxsize=256)
def _spec(
    head_dim: int, groups: int, qk_bytes: int, v_bytes: int, scaled: bool, k_rows: bool, k_head: bool,
    k_groups: tuple[int, ...], int8: bool, bias: bool, bounded: bool, by_group: bool | None, mixed: bool, ragged: bool,
    lse: bool, split: bool, ordered: bool, v_mean: bool,
) -> Spec:  # fmt: skip
    width = _width(head_dim)
    queries = groups * ROWS * width * qk_bytes
    block = BLOCK_K * (width * (qk_bytes + v_bytes) + 4 * (k_rows + bias))
    _, consumer, producer = _REGISTERS[groups]

    def accumulator(columns: int, operand_bytes: int) -> gl.NVMMADistributedLayout:
        return gl.NVMMADistributedLayout(
            version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 32 // operand_bytes]
        )

    return Spec(
        HEAD_DIM=head_dim, D=width, BM=ROWS, BN=BLOCK_K, GROUPS=groups,
        STAGES=min(_MAX_STAGES[v_bytes, width], (_SHARED_BYTES - queries) // block),
        PARTIAL=by_group is not None, BY_GROUP=by_group is True, BITS=mixed or by_group is False,
        RAGGED=ragged, LSE=lse, SPLIT=split, ORDERED=ordered, SCALED=scaled,
        K_ROWS=k_rows, K_HEAD=k_head, K_GROUPS=math.prod(k_groups), OFFSET=int8, BIAS=bias, BOUNDED=bounded,
        VALUES_8BIT=v_bytes == 1, VALUES_MEAN=v_mean,
        LS=accumulator(BLOCK_K, qk_bytes), LO=accumulator(width, v_bytes), LL=accumulator(8, v_bytes),
        LW=_written(width),
        REGISTERS=consumer, PRODUCER_REGISTERS=producer,
    )  # fmt: skip


def _written(width: int) -> gl.DistributedLinearLayout:
    """Of [64, width] in 16 bits: four threads write 32 bytes of a row, which memory takes at once. In an accumulator
    their 8 columns lie together, 16 bytes; two pairs of threads exchange halves."""
    far = [[0, 16 << i] for i in range((width // 16).bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], *far, [8, 0]],
        lane_bases=[[0, 8], [0, 4], [1, 0], [2, 0], [4, 0]], warp_bases=[[16, 0], [32, 0]],
        block_bases=[], shape=[ROWS, width],
    )  # fmt: skip


def _width(head_dim: int) -> int:
    """The head dim as the kernel computes it, past the real one zeros."""
    return 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256


# TMA views -----------------------------------------------------------------------------------------


def _readable(x: Tensor) -> Tensor:
    """x [B, S, H, D]; where TMA cannot read it in place, a copy with rows of a multiple of 16 bytes."""
    size = x.element_size()
    if (
        x.stride(-1) == 1
        and x.data_ptr() % 16 == 0
        and all(step * size % 16 == 0 for step in x.stride()[:3])
    ):
        return x
    same = x.view(torch.int8) if size == 1 else x  # torch fills no float8
    return (
        torch.nn.functional.pad(same, (0, -x.shape[-1] % (16 // size))).contiguous().view(x.dtype)
    )


def _boxes(x: Tensor, block: tuple[int, ...]) -> TensorDescriptor:
    return TensorDescriptor(
        x, list(x.shape), list(x.stride()), list(block), _shared_layout(block, x.dtype)
    )


def _row_boxes(x: Tensor) -> TensorDescriptor:
    """Rows of a number a key, fp32 [.., .., .., Sk], in boxes of a block of keys."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=4)
    x = _readable(x)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, 1, BLOCK_K], layout)


@lru_cache(maxsize=64)
def _shared_layout(block: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(block), _TYPES[dtype])
