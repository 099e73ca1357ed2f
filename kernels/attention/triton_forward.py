"""Block-sparse attention, forward, in portable Triton: NVIDIA sm_80 and newer, AMD, and the interpreter.

One program computes one query tile of one head. It walks three lists with the online softmax of
FlashAttention (Dao, arXiv 2307.08691, algorithm 1): whole full entries with no mask at all, ragged
full entries (shorter than the block), and partial entries under an interval or a bit mask.
`prepared.py` derives these lists and the packed masks from the plan.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..plan.block_plan import BlockPlan
from .prepared import PackedBits, PreparedPlan, prepare

MAX_HEAD_DIM = 256
MAX_BLOCK = 256
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_INTERPRET = triton.knobs.runtime.interpret
_LN2: tl.constexpr = tl.constexpr(math.log(2.0))


def unsupported(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> list[str]:
    """Every reason why `forward` cannot run on these inputs; empty if it can."""
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
    elif not _INTERPRET:
        reasons.append(f"Triton kernels need a GPU, the tensors are on {q.device}")
    dtypes = {t.dtype for t in (q, k, v)}
    if len(dtypes) > 1:
        reasons.append(f"q, k and v must share one dtype, got {sorted(map(str, dtypes))}")
    if q.dtype not in _DTYPES:
        reasons.append(f"dtype must be float16, bfloat16 or float32, got {q.dtype}")
    if q.shape[-1] > MAX_HEAD_DIM:
        reasons.append(f"the head dim may be at most {MAX_HEAD_DIM}, got {q.shape[-1]}")
    if v.shape[-1] != q.shape[-1]:
        reasons.append(f"v must have the head dim of q, got {v.shape[-1]} and {q.shape[-1]}")
    if max(plan.block_q, plan.block_k) > MAX_BLOCK:
        reasons.append(
            f"plan blocks may have at most {MAX_BLOCK} tokens a side, got {plan.block_q} queries "
            f"x {plan.block_k} keys"
        )
    return reasons


def forward(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """softmax(scale * q k^T, over the pairs that the plan makes visible) v.

    q: [B, Sq, H, D]; k, v: [B, Sk, Hk, D] with Hk a divisor of H; fp16, bf16 or fp32, any strides.
    Returns out [B, Sq, H, D] in q's dtype and, if asked for, the log-sum-exp of scale * q k^T per
    query, fp32 [B, H, Sq], natural logarithm. Queries that see no key get 0 and -inf.
    """
    if _INTERPRET and q.dtype == torch.bfloat16:
        # The interpreter multiplies the bit patterns of bf16 operands (Triton 3.6).
        out, lse = forward(q.float(), k.float(), v.float(), plan, scale, return_lse)
        return out.to(q.dtype), lse
    if scale <= 0:  # the running maximum is taken before scaling, which needs a positive scale
        q, scale = (-q, -scale) if scale else (torch.zeros_like(q), 1.0)
    q, k, v = _rows_in_memory(q), _rows_in_memory(k), _rows_in_memory(v)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = None
    if return_lse:
        lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32, device=q.device)
    if out.numel():
        with torch.cuda.device_of(q):
            grid, arguments, options = launch(q, k, v, out, lse, plan, scale)
            forward_kernel[grid](*arguments, **options)
    return out, lse


def launch(q, k, v, out, lse, plan: BlockPlan, scale: float) -> tuple[tuple, tuple, dict]:
    """Grid, positional arguments and keyword arguments of `forward_kernel`."""
    batch, _, heads, head_dim = q.shape
    # Tensor cores multiply powers of two from 16 on; what a plan's blocks lack is masked.
    sides = zip(("BM", "BN", "BD"), (plan.block_q, plan.block_k, head_dim), strict=True)
    block = {name: max(16, triton.next_power_of_2(side)) for name, side in sides}
    ready = prepare(plan, width=block["BN"])
    rows, visible = _policies(ready)
    variant_strides = (0, 0)
    if plan.variant is not None:
        b, h = plan.variant.shape
        variant_strides = (plan.variant.stride(0) * (b > 1), plan.variant.stride(1) * (h > 1))
    arguments = (
        q, k, v, out, lse,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        plan.q_start, plan.q_count, ready.order, plan.variant, *variant_strides,
        plan.full.offset, ready.whole_end, ready.full_start, ready.full_count,
        plan.partial.offset, plan.partial.start, plan.partial.count, ready.mask,
        plan.length_q, heads, heads // k.shape[2], plan.tiles, ready.heavy, scale / math.log(2.0),
    )  # fmt: skip
    options = {"D": head_dim, **block, "ROWS": rows, "VISIBLE": visible, "WORDS": ready.words}
    return (plan.tiles * batch * heads,), arguments, options | _tuning(q.dtype, **block)


def _tuning(dtype: torch.dtype, BM: int, BN: int, BD: int) -> dict[str, int | str]:
    """Warps, pipeline stages and the precision of dots, for the GPU at hand."""
    if _INTERPRET:
        return {"PRECISION": "ieee"}
    target = triton.runtime.driver.active.get_current_target()
    if target.backend == "hip":  # matrix cores multiply fp32 as it is
        return {"num_warps": 4 if BM * BD <= 128 * 64 else 8, "num_stages": 1, "PRECISION": "ieee"}
    # sm_80, sm_90 and sm_100 have 163, 227 and 227 KiB of shared memory a block, the others 99.
    limit = {80: 160, 90: 224, 100: 224, 103: 224}.get(target.arch, 96) * 1024
    stages = 2 if (BM + 4 * BN) * BD * dtype.itemsize <= limit else 1
    # Four warps hold an accumulator of 64 x 128, beyond that registers spill (128 x 128: 350 instead
    # of 420 TFLOP/s). A third stage gains 4% under masks and loses 5% without.
    warps = 4 if BM * max(BD, BN) <= 64 * 128 else 8
    # fp32 as sums of three bf16 numbers, six products: 4 to 5 times as fast as without tensor cores
    # ("ieee"), and nearer to the exact result than it, 5.6e-8 against 2.9e-7. TF32 would leave fp32
    # inputs the accuracy of fp16.
    return {"num_warps": warps, "num_stages": stages, "PRECISION": "bf16x6"}


def _policies(ready: PreparedPlan):
    """(what a partial entry needs of every query, which pairs it makes visible), as jit functions."""
    if ready.mask is None:
        return _positions, None
    if isinstance(ready.mask, PackedBits):
        return _positions, _in_bits
    if ready.words == 1 and ready.mask.table is None:
        return _bounds, _in_interval
    return _positions, _in_intervals


def _rows_in_memory(x: Tensor) -> Tensor:
    """x itself if its rows are contiguous and near each other (offsets inside a block are 32-bit)."""
    near = x.stride(1) * MAX_BLOCK < 2**31
    return x if x.stride(-1) == 1 and near else x.contiguous()


# Policies of masks: ROWS reads once what all entries of a tile need, VISIBLE decides on an entry.


@triton.jit
def _positions(mask, o_q):
    return o_q


@triton.jit
def _bounds(mask, o_q):
    return tl.load(mask.lo + o_q), tl.load(mask.hi + o_q)


@triton.jit
def _in_run(mask, rows, e, start, count, WORDS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Ragged full entries: every column of the run."""
    return tl.broadcast_to((tl.arange(0, BN) < count)[None, :], (BM, BN))


@triton.jit
def _in_interval(
    mask, rows, e, start, count, WORDS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """lo <= coord < hi on all axes at once, on one packed word, see `prepared.py`."""
    o_n = tl.arange(0, BN)
    b_coord = tl.load(mask.coord + tl.where(o_n < count, start + o_n, mask.length_k))  # [BN]
    guard = tl.load(mask.guard)
    left = b_coord[None, :] - rows[0][:, None]  # [BM, BN]
    right = rows[1][:, None] - b_coord[None, :]
    return (left & right & guard) == guard


@triton.jit
def _in_intervals(
    mask, rows, e, start, count, WORDS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """The same on several words, with the bound table of the entry."""
    o_n = tl.arange(0, BN)
    o_k = tl.where(o_n < count, start + o_n, mask.length_k)
    o_table = tl.zeros((), tl.int64)  # and 64-bit offsets from here on
    if mask.table is not None:
        o_table = tl.load(mask.table + e).to(tl.int64) * WORDS
    seen = tl.full((BM, BN), True, tl.int1)
    for w in tl.static_range(WORDS):
        o_bound = (o_table + w) * mask.length_q
        b_lo = tl.load(mask.lo + o_bound + rows)  # [BM]
        b_hi = tl.load(mask.hi + o_bound + rows)
        b_coord = tl.load(
            mask.coord + (tl.zeros((), tl.int64) + w) * (mask.length_k + 1) + o_k
        )  # [BN]
        guard = tl.load(mask.guard + w)
        left = b_coord[None, :] - b_lo[:, None]
        right = b_hi[:, None] - b_coord[None, :]
        seen = seen & ((left & right & guard) == guard)
    return seen


@triton.jit
def _in_bits(mask, rows, e, start, count, WORDS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Bit j % 32 of word j // 32, for the columns of the run."""
    o_m, o_n = tl.arange(0, BM), tl.arange(0, BN)
    inside = (o_m < mask.block_q)[:, None] & (o_n < count)[None, :]
    o_row = ((tl.zeros((), tl.int64) + e) * mask.block_q + o_m) * WORDS
    b_word = tl.load(mask.bits + o_row[:, None] + (o_n // 32)[None, :], mask=inside, other=0)
    return inside & (((b_word >> (o_n % 32)[None, :]) & 1) != 0)


@triton.jit
def _load_rows(p, o_r, stride, count, D: tl.constexpr, BD: tl.constexpr):
    """Rows `o_r` of a matrix, [ROWS, BD]: zero past row `count` (None: all exist) and column D."""
    o_d = tl.arange(0, BD)
    p = p + o_r[:, None] * stride + o_d[None, :]
    if count is not None:
        inside = (o_r < count)[:, None] & (o_d < D)[None, :]
        block = tl.load(p, mask=inside, other=0.0)
    elif D < BD:
        block = tl.load(p, mask=(o_d < D)[None, :], other=0.0)
    else:
        block = tl.load(p)
    return block


@triton.jit
def _walk(
    acc, l, m, b_q, p_k, p_v, stride_ks, stride_vs, p_start, p_count, first, last,
    mask, rows, scale_log2, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    VISIBLE: tl.constexpr, WORDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Entries first .. last of one list, the online softmax over them; VISIBLE None: no mask."""
    o_n = tl.arange(0, BN)
    for e in range(first, last):
        start = tl.load(p_start + e)
        count = None
        if VISIBLE is not None:
            count = tl.load(p_count + e)
        # Masked rows are not loaded: past the end there is no memory, and elsewhere 0 * NaN is NaN.
        b_k = _load_rows(p_k + start.to(tl.int64) * stride_ks, o_n, stride_ks, count, D, BD)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BM, BN]
        if VISIBLE is not None:
            seen = VISIBLE(mask, rows, e, start, count, WORDS, BM, BN)
            b_s = tl.where(seen, b_s, float("-inf"))
        m_new = tl.maximum(m, tl.max(b_s, 1) * scale_log2)
        offset = m_new
        if VISIBLE is not None:  # a row that has seen nothing yet: exp2(-inf - 0), not -inf - -inf
            offset = tl.where(m_new == float("-inf"), 0.0, m_new)
        b_p = tl.exp2(b_s * scale_log2 - offset[:, None])
        rescale = tl.exp2(m - offset)
        l = l * rescale + tl.sum(b_p, 1)
        b_v = _load_rows(p_v + start.to(tl.int64) * stride_vs, o_n, stride_vs, count, D, BD)
        acc = tl.dot(b_p.to(b_v.dtype), b_v, acc * rescale[:, None], input_precision=PRECISION)
        m = m_new
    return acc, l, m


@triton.jit(do_not_specialize=["length_q", "heads", "group", "tiles", "heavy"])
def forward_kernel(
    p_q, p_k, p_v, p_o, p_lse,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh, stride_ob, stride_os, stride_oh,
    p_q_start, p_q_count, p_order, p_variant, stride_variant_b, stride_variant_h,
    p_full, p_whole_end, p_full_start, p_full_count,
    p_partial, p_partial_start, p_partial_count, mask,
    length_q, heads, group, tiles, heavy, scale_log2,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    ROWS: tl.constexpr, VISIBLE: tl.constexpr, WORDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Programs: the heavy tiles of all heads, then the light tiles head by head.
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    n_heavy = heavy * (programs // tiles)
    if pid < n_heavy:
        slot, bh = pid % heavy, pid // heavy
    else:
        slot, bh = heavy + (pid - n_heavy) % (tiles - heavy), (pid - n_heavy) // (tiles - heavy)
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    row = 0
    if p_variant is not None:
        row = tl.load(p_variant + b * stride_variant_b + h * stride_variant_h) * tiles
    tile = tl.load(p_order + row + slot)
    row += tile
    q_start = tl.load(p_q_start + tile).to(tl.int64)
    q_count = tl.load(p_q_count + tile)

    o_m, o_d = tl.arange(0, BM), tl.arange(0, BD)
    # Rows past the tile repeat its last one: a mask, which the store shares, would stay in registers
    # through all loops and spill.
    o_row = tl.minimum(o_m, q_count - 1)
    p_q += b * stride_qb + h * stride_qh + q_start * stride_qs
    b_q = _load_rows(p_q, o_row, stride_qs, None, D, BD)  # [BM, BD]
    p_k += b * stride_kb + (h // group) * stride_kh
    p_v += b * stride_vb + (h // group) * stride_vh
    rows = q_start + o_row
    acc = tl.zeros((BM, BD), tl.float32)
    l = tl.zeros((BM,), tl.float32)
    m = tl.full((BM,), float("-inf"), tl.float32)

    first, last = tl.load(p_full + row), tl.load(p_full + row + 1)
    whole_end = last
    if p_whole_end is not None:
        whole_end = tl.load(p_whole_end + row)
    acc, l, m = _walk(acc, l, m, b_q, p_k, p_v, stride_ks, stride_vs, p_full_start, p_full_count,
                      first, whole_end, mask, rows, scale_log2, D, BM, BN, BD, None, WORDS, PRECISION)  # fmt: skip
    if p_whole_end is not None:
        acc, l, m = _walk(acc, l, m, b_q, p_k, p_v, stride_ks, stride_vs, p_full_start, p_full_count,
                          whole_end, last, mask, rows, scale_log2, D, BM, BN, BD, _in_run, WORDS,
                          PRECISION)  # fmt: skip
    if VISIBLE is not None:
        rows = ROWS(mask, rows)
        first, last = tl.load(p_partial + row), tl.load(p_partial + row + 1)
        acc, l, m = _walk(acc, l, m, b_q, p_k, p_v, stride_ks, stride_vs, p_partial_start,
                          p_partial_count, first, last, mask, rows, scale_log2, D, BM, BN, BD,
                          VISIBLE, WORDS, PRECISION)  # fmt: skip

    l = tl.where(l == 0.0, 1.0, l)  # a row without keys: 0 / 1, and -inf + log2(1)
    b_o = acc / l[:, None]
    p_o += b * stride_ob + h * stride_oh + q_start * stride_os
    stored = o_m < q_count
    tl.store(p_o + o_m[:, None] * stride_os + o_d[None, :], b_o.to(p_o.dtype.element_ty),
             mask=stored[:, None] & (o_d < D)[None, :])  # fmt: skip
    if p_lse is not None:
        p_lse += (b * heads + h) * length_q + q_start
        tl.store(p_lse + o_m, (m + tl.log2(l)) * _LN2, mask=stored)
