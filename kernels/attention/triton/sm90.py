"""Whole entries on Hopper: the hot loop of `host` under Triton's own warp specialisation.

Triton 3.6 gives a loop that reads through TMA a warp of its own that loads, and splits 128 queries over two
warpgroups, so that one computes weights while the other multiplies: 596 TFLOP/s at head dim 128 on an H200,
where the portable loop reaches 462 and cuDNN 670. (At head dim 64 it is the other way round, 405 and 443.) It
takes one loop without masks, no branch before it, and queries through TMA as well. Other entries are computed
before by the portable kernel, and what it has found is merged by the log-sum-exp.
"""

from __future__ import annotations

import math
from contextvars import copy_context
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from triton.tools.tensor_descriptor import TensorDescriptor

from ...plan.block_plan import BlockPlan
from ..prepared import PreparedPlan
from .kernel import LN2
from .operands import variant_strides

BLOCK_Q = 128
BLOCKS_K = (64, 128)
HEAD_DIMS = (128,)
# Loads in flight. Three give wrong results with blocks of 64 keys (Triton 3.6, on an H200).
STAGES = 2
# Whole entries a tile from which a second kernel and its 130 KB of memory traffic a tile pay.
WORTH_A_SPLIT = 24


def fits(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, block: dict[str, int]) -> bool:
    """Whether `whole_kernel` can run these inputs on the GPU at hand."""
    return (
        _is_hopper()
        and q.dtype in (torch.float16, torch.bfloat16)
        and (block["BM"], plan.block_k) in [(BLOCK_Q, n) for n in BLOCKS_K]
        and q.shape[-1] in HEAD_DIMS
        and all(_as_matrix(x) is not None for x in (q, k, v))
    )


def _is_hopper() -> bool:
    if triton.knobs.runtime.interpret:
        return False
    target = triton.runtime.driver.active.get_current_target()
    return (target.backend, target.arch) == ("cuda", 90)


def is_worth_it(plan: BlockPlan, ready: PreparedPlan) -> bool:
    """Whether tiles have enough whole entries. The first call for a plan waits for the device, once."""
    if ready.mask is None and ready.whole_end is None:
        return True
    if plan.full.offset not in _whole:
        _whole[plan.full.offset] = int((plan.full.count == plan.block_k).sum())
    return _whole[plan.full.offset] >= WORTH_A_SPLIT * plan.tiles * plan.variants


# Whole entries, by the tensor that identifies a plan.
_whole: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def launch_whole(
    q, k, v, out, lse, plan: BlockPlan, ready: PreparedPlan, scale: float, found: tuple | None
) -> tuple[tuple, tuple, dict]:
    """Grid, positional and keyword arguments of `whole_kernel`.

    found: out and lse of all other entries, fp32 [B, Sq, H, D] and [B, H, Sq], where there are such.
    """
    batch, _, heads, head_dim = q.shape
    matrices = [_as_matrix(x) for x in (q, k, v)]
    assert all(matrices), "fits() was not asked"
    shapes, places = zip(*matrices, strict=True)
    boxes = [
        TensorDescriptor(x, shape, [x.stride(1), 1], [plan.block_k, head_dim])
        for x, shape in zip((k, v), shapes[1:], strict=True)
    ]
    arguments = (
        q, *shapes[0], q.stride(1), *boxes, out, lse, *(found or (None, None)),
        *(n for place in places for n in place), *out.stride()[:3],
        plan.q_start, plan.q_count, ready.order, plan.variant, *variant_strides(plan),
        plan.full.offset, ready.whole_end, ready.full_start,
        plan.length_q, heads, heads // k.shape[2], plan.tiles, ready.heavy, scale / math.log(2.0),
    )  # fmt: skip
    options = {"D": head_dim, "BM": BLOCK_Q, "BN": plan.block_k, "STAGES": STAGES}
    return (plan.tiles * batch * heads,), arguments, options | {"num_warps": 4}


def run_whole(grid: tuple, arguments: tuple, options: dict) -> None:
    """Launch `whole_kernel`, with memory for the descriptions that it makes; others' allocator stays."""

    def launch() -> None:
        triton.set_allocator(lambda size, _, __: torch.empty(size, dtype=torch.int8, device=device))
        whole_kernel[grid](*arguments, **options)

    device = arguments[0].device
    copy_context().run(launch)


def _as_matrix(x: Tensor) -> tuple[list[int], tuple[int, int, int]] | None:
    """A tensor [B, S, H, D] as one matrix that TMA reads: its shape, and where a block of it lies.

    Token s of head h of batch entry b is row b * r + h * t + s, columns from h * c on, with (r, t, c) the
    second result. None if there is no such matrix, or if TMA cannot read it.
    """
    return None if x.data_ptr() % 16 else _matrix(tuple(x.shape), x.stride(), x.itemsize)


@lru_cache(maxsize=256)
def _matrix(sizes: tuple[int, ...], strides: tuple[int, ...], itemsize: int):
    batch, length, heads, dim = sizes
    b, s, h, d = strides
    b, h = b * (batch > 1), h * (heads > 1)
    if d != 1 or s < dim or b % s or any(n * itemsize % 16 for n in (s, b, h)):
        return None
    rows, columns = (h // s, 0) if h % s == 0 else (0, h)
    shape = [(batch - 1) * (b // s) + (heads - 1) * rows + length, (heads - 1) * columns + dim]
    if shape[0] >= 2**31 or shape[1] > s:
        return None
    return shape, (b // s, rows, columns)


_RUNTIME = ["length_q", "heads", "group", "tiles", "heavy", "q_rows", "q_columns"]
_RUNTIME += [f"{x}_{place}" for x in "qkv" for place in ("batch", "head", "column")]


@triton.jit(do_not_specialize=_RUNTIME)
def whole_kernel(
    p_q, q_rows, q_columns, stride_qs, k_box, v_box, p_o, p_lse, p_found, p_found_lse,
    q_batch, q_head, q_column, k_batch, k_head, k_column, v_batch, v_head, v_column,
    stride_ob, stride_os, stride_oh,
    p_q_start, p_q_count, p_order, p_variant, stride_variant_b, stride_variant_h,
    p_full, p_whole_end, p_full_start, length_q, heads, group, tiles, heavy, scale_log2,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # Programs as in `forward_kernel`, without its branch.
    pid = tl.program_id(0)
    n_heavy = heavy * (tl.num_programs(0) // tiles)
    is_light = pid >= n_heavy
    place = tl.where(is_light, pid - n_heavy, pid)
    share = tl.where(is_light, tiles - heavy, heavy)
    slot, bh = tl.where(is_light, heavy, 0) + place % share, place // share
    b, h = bh // heads, bh % heads
    hk = h // group
    row = 0
    if p_variant is not None:
        row = tl.load(p_variant + b * stride_variant_b + h * stride_variant_h) * tiles
    tile = tl.load(p_order + row + slot)
    row += tile
    q_start = tl.load(p_q_start + tile)
    q_count = tl.load(p_q_count + tile)
    first = tl.load(p_full + row)
    if p_whole_end is not None:
        last = tl.load(p_whole_end + row)
    else:
        last = tl.load(p_full + row + 1)

    # Described here: of a box that the host describes, Triton 3.6 loads all rows where it splits the load
    # over warpgroups, and waits for ever. Rows past the tile are those of others, or zero, and not stored.
    q_box = tl.make_tensor_descriptor(p_q, [q_rows, q_columns], [stride_qs, 1], [BM, D])
    b_q = q_box.load([b * q_batch + h * q_head + q_start, h * q_column])  # [BM, D]
    k_row, v_row = b * k_batch + hk * k_head, b * v_batch + hk * v_head
    acc = tl.zeros((BM, D), tl.float32)
    l = tl.zeros((BM,), tl.float32)
    m = tl.full((BM,), float("-inf"), tl.float32)
    for e in tl.range(first, last, num_stages=STAGES, warp_specialize=True):
        start = tl.load(p_full_start + e)
        b_k = k_box.load([k_row + start, hk * k_column])
        b_s = tl.dot(b_q, b_k.T)  # [BM, BN]
        m_new = tl.maximum(m, tl.max(b_s, 1) * scale_log2)
        b_p = tl.exp2(b_s * scale_log2 - m_new[:, None])
        rescale = tl.exp2(m - m_new)
        l = l * rescale + tl.sum(b_p, 1)
        b_v = v_box.load([v_row + start, hk * v_column])
        acc = tl.dot(b_p.to(b_v.dtype), b_v, acc * rescale[:, None])
        m = m_new

    o_m, o_d = tl.arange(0, BM), tl.arange(0, D)
    stored = o_m < q_count
    o_row = (b * heads + h).to(tl.int64) * length_q + q_start
    o_out = b.to(tl.int64) * length_q + q_start
    if p_found is not None:
        m_found = tl.load(p_found_lse + o_row + o_m, mask=stored, other=0.0) / LN2
        top = tl.maximum(m, m_found)
        top = tl.where(top == float("-inf"), 0.0, top)
        ours, theirs = tl.exp2(m - top), tl.exp2(m_found - top)
        p_found += (o_out + o_m)[:, None] * (heads * D) + h * D + o_d[None, :]
        b_found = tl.load(p_found, mask=stored[:, None], other=0.0)
        acc = acc * ours[:, None] + b_found * theirs[:, None]
        l = l * ours + theirs
        m = top
    empty = l == 0.0  # a row without keys: 0, and -inf
    l = tl.where(empty, 1.0, l)
    p_o += (
        b.to(tl.int64) * stride_ob + h.to(tl.int64) * stride_oh + q_start.to(tl.int64) * stride_os
    )
    tl.store(p_o + o_m[:, None] * stride_os + o_d[None, :],
             (acc / l[:, None]).to(p_o.dtype.element_ty), mask=stored[:, None])  # fmt: skip
    if p_lse is not None:
        tl.store(p_lse + o_row + o_m, tl.where(empty, float("-inf"), (m + tl.log2(l)) * LN2),
                 mask=stored)  # fmt: skip
