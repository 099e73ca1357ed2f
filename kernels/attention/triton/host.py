"""Block-sparse attention, forward, in portable Triton: NVIDIA sm_80 and newer, AMD, and the interpreter.

The host side of `kernel`: `forward` for inputs of 16 or 32 bits, `forward_quantized` for the
codes that the prologue writes. `prepared.py` derives the lists and the packed masks from the plan.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ...plan.block_plan import BlockPlan
from ...plan.tiles import launch_options
from ..bias import Bias
from ..prepared import prepare
from ..prologue import EIGHT_BIT, Operands, PrologueSpec
from . import kernel as device
from . import sm90 as hopper
from .kernel import forward_kernel
from .operands import (
    DTYPES,
    INTERPRET,
    MAX_BLOCK,
    bias_policies,
    block_sizes,
    mask_policies,
    rows_in_memory,
    shared_memory,
    unsupported_anyhow,
    variant_strides,
)

# Tokens that share a scale of keys, unless each has its own.
SCALE_ROWS = 128
# What `forward_quantized` reads; k_rows=1, smooth_k and softmax_scale are free. Values of 16 bits make "int8"
# run where tensor cores have no FP8.
TRITON_EIGHT_BIT = EIGHT_BIT | {
    "int8": PrologueSpec(qk="int8", k_rows=SCALE_ROWS),
    "int4": PrologueSpec(qk="int4x2", k_rows=SCALE_ROWS),
}
_CODES = (torch.int8, torch.float8_e4m3fn, torch.uint8)


class Scales(NamedTuple):
    """What codes are multiplied by, all fp32: q [B, H, Sq], k [B, Hk, blocks], v [B, Hk, D] or None. v_mean, of the
    shape of v or None: what is added to outputs."""

    q: Tensor
    k: Tensor
    v: Tensor | None
    v_mean: Tensor | None
    blocks: int


def unsupported(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> list[str]:
    """Every reason why `forward` cannot run on these inputs; empty if it can."""
    reasons = unsupported_anyhow(q, k, v, plan)
    dtypes = {t.dtype for t in (q, k, v)}
    if len(dtypes) > 1:
        reasons.append(f"q, k and v must share one dtype, got {sorted(map(str, dtypes))}")
    if q.dtype not in DTYPES:
        reasons.append(f"dtype must be float16, bfloat16 or float32, got {q.dtype}")
    if v.shape[-1] != q.shape[-1]:
        reasons.append(f"v must have the head dim of q, got {v.shape[-1]} and {q.shape[-1]}")
    if q.is_cuda and torch.version.hip is None and q.dtype == torch.float32:
        block = block_sizes(plan, q.shape[-1])
        major, minor = torch.cuda.get_device_capability(q.device)
        # Queries in fp32 and, as six products want them, three times in bf16, two at a time.
        if 7 * block["BM"] * block["BD"] > shared_memory(10 * major + minor):
            reasons.append(
                f"float32 in blocks of {plan.block_q} queries at head dim {q.shape[-1]} takes more shared "
                "memory than the GPU has"
            )
    if max(plan.block_q, plan.block_k) > MAX_BLOCK:
        reasons.append(
            f"plan blocks may have at most {MAX_BLOCK} tokens a side, got {plan.block_q} queries "
            f"x {plan.block_k} keys"
        )
    return reasons


def unsupported_quantized(x: Operands, plan: BlockPlan) -> list[str]:
    """Every reason why `forward_quantized` cannot run on these operands; empty if it can."""
    if x.q_scale is None or x.k_scale is None:
        return ["the operands have no scales; make them with a spec of TRITON_EIGHT_BIT"]
    reasons = unsupported_anyhow(x.q, x.k, x.v, plan)
    values = "float8_e4m3fn with a scale" if x.v_scale is not None else "of 16 or 32 bits"
    if x.q.dtype not in _CODES or x.k.dtype != x.q.dtype:
        reasons.append(
            "queries and keys must both be int8, float8_e4m3fn or uint8 (two codes of INT4 a byte), got "
            f"{x.q.dtype}, {x.k.dtype}"
        )
    if x.v.dtype not in (DTYPES if x.v_scale is None else (torch.float8_e4m3fn,)):
        reasons.append(f"values must be {values}, got {x.v.dtype}")
    if torch.float8_e4m3fn in (x.q.dtype, x.v.dtype):
        reasons += _unsupported_fp8(x.q.device)
    if x.q.shape[2] % x.k.shape[2]:
        reasons.append(f"{x.q.shape[2]} query heads do not divide into {x.k.shape[2]} key heads")
    reasons += [
        f"{name} must be {' or '.join(map(str, shapes))}, got {tuple(getattr(tensor, 'shape', ()))}"
        for name, tensor, *shapes in _expected_shapes(x, plan)
        if getattr(tensor, "shape", ()) not in shapes
    ]
    if plan.block_q > MAX_BLOCK or plan.block_k > SCALE_ROWS:
        reasons.append(
            f"plan blocks may have at most {MAX_BLOCK} queries and {SCALE_ROWS} keys, got "
            f"{plan.block_q} x {plan.block_k}"
        )
    step, straddles = _key_grid(plan)
    if straddles and _key_rows(x) > 1:
        reasons.append(f"key blocks of the plan must not straddle multiples of {SCALE_ROWS}")
    if x.v_scale is not None and step % 16:
        reasons.append("key blocks of the plan must start at multiples of 16 where values are FP8")
    return reasons


def _unsupported_fp8(where: torch.device) -> list[str]:
    """Triton multiplies e4m3 on sm_89 and newer and on gfx950; gfx942 has another e4m3 (fnuz)."""
    if where.type != "cuda":
        return []
    if torch.version.hip:
        arch = torch.cuda.get_device_properties(where).gcnArchName.split(":")[0]
        return [] if arch == "gfx950" else [f"its FP8 is e4m3fn, which {arch} does not multiply"]
    if torch.cuda.get_device_capability(where) < (8, 9):
        return [f"FP8 needs sm_89 or newer, this is {torch.cuda.get_device_name(where)}"]
    return []


def _expected_shapes(x: Operands, plan: BlockPlan):
    batch, _, heads, width = x.q.shape
    kv_heads, blocks, dim = x.k.shape[2], -(-plan.length_k // SCALE_ROWS), x.head_dim
    yield "q", x.q, (batch, plan.length_q, heads, width)
    yield "k", x.k, (batch, plan.length_k, kv_heads, width)
    yield "q_scale", x.q_scale, (batch, heads, plan.length_q)
    yield "k_scale", x.k_scale, (batch, kv_heads, blocks), (batch, kv_heads, plan.length_k)
    if x.v_scale is None:
        yield "v", x.v, (batch, plan.length_k, kv_heads, dim)
    else:
        yield "v", x.v, (batch, kv_heads, dim, blocks * SCALE_ROWS)
        yield "v_scale", x.v_scale, (batch, kv_heads, dim)
        if x.v_mean is not None:
            yield "v_mean", x.v_mean, (batch, kv_heads, dim)


def _key_rows(x: Operands) -> int:
    """Keys that share a scale."""
    return 1 if x.k_scale.shape[2] == x.k.shape[1] else SCALE_ROWS


# (what divides the starts of all entries, whether one straddles a block of scales), by the tensor that
# identifies a plan.
_grids: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _key_grid(plan: BlockPlan) -> tuple[int, bool]:
    """The first call for a plan waits for the device, once."""
    if plan.full.offset not in _grids:
        start = torch.cat([plan.full.start, plan.partial.start]).long()
        count = torch.cat([plan.full.count, plan.partial.count]).long()
        straddles = start % SCALE_ROWS + count > SCALE_ROWS
        facts = torch.stack([(start % 16).any().long(), straddles.any().long()])
        odd, straddling = facts.tolist()
        _grids[plan.full.offset] = (1 if odd else 16, bool(straddling))
    return _grids[plan.full.offset]


def forward(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float, return_lse: bool,
    bias: Bias | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """softmax(scale * q k^T + bias, over the pairs that the plan makes visible) v.

    q: [B, Sq, H, D]; k, v: [B, Sk, Hk, D] with Hk a divisor of H; fp16, bf16 or fp32, any strides.
    Returns out [B, Sq, H, D] in q's dtype and, if asked for, the log-sum-exp of these scores per
    query, fp32 [B, H, Sq], natural logarithm. Queries that see no key get 0 and -inf.
    """
    if INTERPRET and q.dtype == torch.bfloat16:
        # The interpreter multiplies the bit patterns of bf16 operands (Triton 3.6).
        out, lse = forward(q.float(), k.float(), v.float(), plan, scale, return_lse, bias)
        return out.to(q.dtype), lse
    if scale <= 0:  # the running maximum is taken before scaling, which needs a positive scale
        q, scale = (-q, -scale) if scale else (torch.zeros_like(q), 1.0)
    q, k, v = rows_in_memory(q), rows_in_memory(k), rows_in_memory(v)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return _run(q, k, v, out, None, plan, scale, return_lse, bias)


def forward_quantized(
    x: Operands, plan: BlockPlan, scale: float, return_lse: bool, bias: Bias | None = None
) -> tuple[Tensor, Tensor | None]:
    """The same of quantised q, k, v, as a spec of `TRITON_EIGHT_BIT` makes them.

    Entries of the plan lie within blocks of 128 keys, as scales do, or every key has its own scale; FP8
    values want entries that start at multiples of 16. Returns out [B, Sq, H, D], bf16 or in the dtype of
    16-bit values, and lse as `forward`, of the keys as they are stored: without the mean that smoothing has
    taken. The scale must be positive.
    """
    if not scale > 0:
        raise ValueError(f"The scale must be positive, got {scale}; negate the queries instead.")
    if INTERPRET and x.v.dtype == torch.bfloat16:
        out, lse = forward_quantized(x._replace(v=x.v.float()), plan, scale, return_lse, bias)
        return out.to(x.v.dtype), lse
    scales = Scales(
        *(
            None if s is None else s.contiguous()
            for s in (x.q_scale, x.k_scale, x.v_scale, x.v_mean)
        ),
        x.k_scale.shape[2],
    )
    dtype = x.v.dtype if x.v_scale is None else torch.bfloat16
    q, k, v = rows_in_memory(x.q), rows_in_memory(x.k), rows_in_memory(x.v)
    out = torch.empty(*q.shape[:3], x.head_dim, dtype=dtype, device=q.device)
    return _run(q, k, v, out, scales, plan, scale, return_lse, bias)


def _run(q, k, v, out, scales, plan, scale, return_lse, bias) -> tuple[Tensor, Tensor | None]:
    lse = None
    if return_lse:
        lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32, device=q.device)
    if out.numel():
        with torch.cuda.device_of(q):
            for kernel, grid, arguments, options in launches(
                q, k, v, out, lse, plan, scale, scales, bias
            ):
                if kernel is forward_kernel:
                    kernel[grid](*arguments, **options)
                else:
                    hopper.run_whole(grid, arguments, options)
    return out, lse


def launches(
    q, k, v, out, lse, plan: BlockPlan, scale: float, scales: Scales | None = None,
    bias: Bias | None = None,
) -> list[tuple]:  # fmt: skip
    """(kernel, grid, positional arguments, keyword arguments), in their order: one or two kernels."""
    block = block_sizes(plan, q.shape[-1])
    if scales is not None or bias is not None or not hopper.fits(q, k, v, plan, block):
        return [(forward_kernel, *launch(q, k, v, out, lse, plan, scale, scales, bias))]
    ready = prepare(plan, width=block["BN"])
    if not hopper.is_worth_it(plan, ready):
        return [(forward_kernel, *launch(q, k, v, out, lse, plan, scale))]
    found, others = None, []
    if ready.mask is not None or ready.whole_end is not None:
        found = (
            torch.empty(q.shape, dtype=torch.float32, device=q.device),
            torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32, device=q.device),
        )
        grid, arguments, options = launch(q, k, v, *found, plan, scale)
        others = [(forward_kernel, grid, arguments, options | {"WHOLE": False})]
    whole = hopper.launch_whole(q, k, v, out, lse, plan, ready, scale, found)
    return [*others, (hopper.whole_kernel, *whole)]


def launch(
    q, k, v, out, lse, plan: BlockPlan, scale: float, scales: Scales | None = None,
    bias: Bias | None = None,
) -> tuple[tuple, tuple, dict]:  # fmt: skip
    """Grid, positional arguments and keyword arguments of `forward_kernel`."""
    batch, _, heads, head_dim = out.shape
    block = block_sizes(plan, head_dim, least=16 if scales is None else 32)
    if q.dtype == torch.uint8:  # half of the channels are multiplied at once
        block["BD"] = max(64, block["BD"])
    ready = prepare(plan, width=block["BN"])
    rows, visible = mask_policies(ready)
    own, added, bias_operands = bias_policies(bias)
    values, value_strides, key_rows = device.rows_of_values, v.stride()[:3], 0
    if scales is not None:
        key_rows = 1 if scales.blocks == plan.length_k else SCALE_ROWS
        if scales.v is not None:
            values = device.channels_of_values
            value_strides = (v.stride(0), v.stride(2), v.stride(1))
    arguments = (
        q, k, v, out, lse, scales,
        *q.stride()[:3], *k.stride()[:3], *value_strides, *out.stride()[:3],
        plan.q_start, plan.q_count, ready.order, plan.variant, *variant_strides(plan),
        plan.full.offset, ready.whole_end, ready.full_start, ready.full_count,
        plan.partial.offset, plan.partial.start, plan.partial.count, ready.mask, bias_operands,
        plan.length_q, heads, heads // k.shape[2], plan.tiles, ready.heavy, scale / math.log(2.0),
    )  # fmt: skip
    tuning = _tuning(q.dtype, v.dtype, **block)
    if scales is None:
        tuning |= launch_options("triton", head_dim, plan.block_q, plan.block_k, device=q.device)
    options = {"D": head_dim, **block, "ROWS": rows, "VISIBLE": visible, "OWN": own, "BIAS": added,
               "WORDS": ready.words, "PARTS": block["BN"] // tuning["BN"], "VALUES": values, "K_ROWS": key_rows,
               "WHOLE": True}  # fmt: skip
    return (plan.tiles * batch * heads,), arguments, options | tuning


def _tuning(qk: torch.dtype, pv: torch.dtype, BM: int, BN: int, BD: int) -> dict:
    """How the GPU at hand multiplies such blocks: BN keys at once, warps, pipeline stages, precision of
    dots and whether they are waited for."""
    if INTERPRET:
        return {"BN": BN, "PRECISION": "ieee", "WAIT": False}
    target = triton.runtime.driver.active.get_current_target()
    if target.backend == "hip":  # matrix cores multiply fp32 as it is
        return {"BN": min(BN, 64), "num_warps": 4 if BM * BD <= 128 * 64 else 8, "num_stages": 1,
                "PRECISION": "ieee", "WAIT": False}  # fmt: skip
    # fp32 as sums of three bf16 numbers, six products: 4 to 5 times as fast as without tensor cores
    # ("ieee"), and nearer to the exact result than it, 5.6e-8 against 2.9e-7. TF32 would leave fp32
    # inputs the accuracy of fp16.
    wide = torch.float32 in (qk, pv)
    # More keys at once spill registers: all operands are in registers where tensor cores take them from
    # there, three times as many of fp32.
    BN = min(BN, max(16, 2048 // BD) if wide else 128 if target.arch in (90, 100, 103) else 64)
    limit = shared_memory(target.arch)
    # A third stage gains 3% with codes at head dim 128 on an H200, and loses 5% with 16 bits.
    stages = 3 if pv.itemsize == 1 and BD >= 128 and target.arch == 90 else 2
    if BM * BD * qk.itemsize + stages * BN * BD * (qk.itemsize + pv.itemsize) > limit:
        stages = 1
    # Numbers in the registers of all threads: output, scores, and an FP8 block of its own. On sm_90 the
    # operands are in shared memory: 128 x 64 at head dim 128 spills a little with four warps and yet
    # reaches 462 TFLOP/s on an H200, with eight 308.
    numbers = BM * (BD * (2 if pv.itemsize == 1 else 1) + BN)
    most = 64 * 64 * 2 if wide else 128 * 192 if target.arch == 90 else 64 * 320
    warps = 4 if numbers <= most else 8
    wait = target.arch == 90 or (pv.itemsize == 1 and target.arch in (89, 120))
    # Six products of larger blocks exceed the tensor memory of sm_100: Triton 3.6 compiles a trap.
    six = wide and not (target.arch in (100, 103) and BM * BD > 64 * 64)
    return {"BN": BN, "num_warps": warps, "num_stages": stages,
            "PRECISION": "bf16x6" if six else "ieee", "WAIT": wait}  # fmt: skip
