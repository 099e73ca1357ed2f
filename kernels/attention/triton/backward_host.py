"""Gradients of block-sparse attention in portable Triton: the host side of `backward_kernel`.

Queries are walked through the forward's lists (`prepared`), keys through the transposed ones (`transposed`).
Nothing is added in memory by several programs: the same inputs give the same bits.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from ...plan.block_plan import BlockPlan
from ..bias import Bias, RelativeBias
from ..prepared import prepare
from ..transposed import transpose
from . import bias_gradient
from .backward_kernel import keys_kernel, prepare_kernel, queries_kernel
from .host import unsupported
from .operands import (
    INTERPRET,
    bias_policies,
    block_sizes,
    mask_policies,
    rows_in_memory,
    variant_strides,
)

__all__ = ["backward", "unsupported"]


def backward(
    grad: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    out: Tensor, lse: Tensor, plan: BlockPlan, scale: float, bias: Bias | None = None,
    table_gradient: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of q, k, v and of a relative bias' table, from those of out (B, S_q, H, D) and lse (B, H, S_q).

    out, lse: what the forward gave. Sums are fp32; weights and their gradients are rounded to q's dtype
    before they are multiplied, as in the forward. Queries that see no key get 0.
    """
    if INTERPRET and q.dtype == torch.bfloat16:
        # The interpreter multiplies the bit patterns of bf16 operands (Triton 3.6).
        wide = (x.float() for x in (q, k, v, out))
        found = backward(grad.float(), grad_lse, *wide, lse, plan, scale, bias, table_gradient)
        return *(x.to(q.dtype) for x in found[:3]), found[3]
    q, k, v, out, grad = (rows_in_memory(x) for x in (q, k, v, out, grad))
    d_q, d_k, d_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    shift, delta = (torch.empty_like(lse) for _ in range(2))
    if not plan.length_q or not plan.length_k or not q.numel():
        d_q, d_k, d_v = (x.zero_() for x in (d_q, d_k, d_v))
        return d_q, d_k, d_v, torch.zeros_like(bias.table) if table_gradient else None
    with torch.cuda.device_of(q):
        for kernel, grid, arguments, options in launches(
            grad, grad_lse, q, k, v, out, lse, plan, scale, bias, (shift, delta, d_q, d_k, d_v)
        ):
            kernel[grid](*arguments, **options)
        d_table = None
        if table_gradient and isinstance(bias, RelativeBias):
            d_table = bias_gradient.table_gradient(grad, q, k, v, shift, delta, plan, scale, bias)
    return d_q, d_k, d_v, d_table


def launches(
    grad, grad_lse, q, k, v, out, lse, plan: BlockPlan, scale: float, bias: Bias | None, results
) -> list[tuple]:
    """(kernel, grid, positional arguments, keyword arguments) of all kernels, in their order.

    results: where they write lse and delta (prepared for the others), and the gradients of q, k, v.
    """
    shift, delta, d_q, d_k, d_v = results
    batch, length, heads, head_dim = q.shape
    block = block_sizes(plan, head_dim)
    tuning = _tuning(q.dtype, has_masks=plan.partial.start.numel() > 0, **block)
    BD, group = block["BD"], heads // k.shape[2]
    rows = max(1, 8192 // BD)
    first = (
        out, grad, lse, None if grad_lse is None else grad_lse.contiguous(), shift, delta,
        *out.stride()[:3], *grad.stride()[:3], length, heads,
    )  # fmt: skip
    first_options = {"D": head_dim, "BM": rows, "BD": BD, "num_warps": 4}

    ready = prepare(plan, width=block["BN"])
    policies, operands = _policies(ready, bias)
    operand_strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3])
    inputs = (q, k, v, grad, shift, delta)
    scale_log2 = scale / math.log(2.0)
    own = tuning["queries"]
    parts = block["BM"] // own["BM"]
    by_query = (
        *inputs, d_q, *operand_strides,
        plan.q_start, plan.q_count, ready.order, plan.variant, *variant_strides(plan),
        plan.full.offset, ready.whole_end, ready.full_start, ready.full_count,
        plan.partial.offset, plan.partial.start, plan.partial.count, *operands,
        length, heads, group, plan.tiles, ready.heavy, scale_log2, scale,
    )  # fmt: skip
    by_query_options = {"D": head_dim, "BD": BD, "TILE_PARTS": parts, "PARTS": block["BN"] // own["BN"],
                        **policies, **own}  # fmt: skip

    own = tuning["keys"]
    lists = transpose(plan, rows=own["BM"], width=own["BN"])
    by_key = (
        *inputs, d_k, d_v, *operand_strides,
        lists.k_start, lists.k_count, lists.order, plan.variant, *variant_strides(plan),
        lists.whole, lists.cut, lists.partial, *operands,
        length, plan.length_k, heads, group, lists.blocks, lists.heavy, scale_log2, scale,
    )  # fmt: skip
    return [
        (prepare_kernel, (triton.cdiv(length, rows) * batch * heads,), first, first_options),
        (keys_kernel, (lists.blocks * batch * (heads // group),), by_key,
         {"D": head_dim, "BD": BD, **policies, **own}),
        (queries_kernel, (plan.tiles * parts * batch * heads,), by_query, by_query_options),
    ]  # fmt: skip


def _policies(ready, bias: Bias | None) -> tuple[dict, tuple]:
    """Constants of masks and biases, and their operands."""
    rows, visible = mask_policies(ready)
    own, added, bias_operands = bias_policies(bias)
    constants = {"ROWS": rows, "VISIBLE": visible, "OWN": own, "BIAS": added, "WORDS": ready.words}
    return constants, (ready.mask, bias_operands)


def _tuning(dtype: torch.dtype, *, has_masks: bool, BM: int, BN: int, BD: int) -> dict[str, dict]:
    """How the GPU at hand multiplies: for both kernels the queries (BM) and keys (BN) at once, warps, stages.

    BM, BN: the sides of the plan's blocks, which `queries` divides. `keys` cuts as it likes, but where entries
    are masked no wider than they are: it would multiply what lies beside them.
    """
    widest = BN if has_masks else 256
    if INTERPRET:
        common = {"PRECISION": "ieee", "WAIT": False}
        return {
            "queries": {"BM": min(BM, 32), "BN": min(BN, 32), **common},
            "keys": {"BM": min(BM, 32), "BN": min(widest, 64), **common},
        }
    target = triton.runtime.driver.active.get_current_target()
    wide, arch = dtype == torch.float32, target.arch
    stages, warps, precision = 2, 8, "ieee"
    # The largest that spill few registers, compiled and not timed, but for sm_90.
    if target.backend == "hip":
        queries, keys, stages = (64, 64 if BD <= 64 else 32), (32, 64), 1
    elif wide:
        queries = keys = (32, 32) if BD <= 128 else (16, 16)
        # Triton 3.6 compiles a trap of six products of blocks that exceed the tensor memory of sm_100.
        precision = "ieee" if arch in (100, 103) else "bf16x6"
    elif BD > 128:
        queries, keys = (64, 32), (32, 64 if arch in (80, 90, 100, 103) else 32)
    elif arch == 90:
        # Two programs a multiprocessor. With blocks of 128 and 8 warps 1.2 and 1.4 times the time at head dims
        # 128 and 64 (H200).
        queries, keys, warps = (64, 64), (64, 64), 4
    elif BD > 64:
        queries, keys = (128, 64), (64, 64)
    elif arch in (100, 103):
        queries, keys = (128, 128), (64, 128)
    else:
        queries, keys = (128, 64), (32, 64)
    common = {"PRECISION": precision, "num_warps": warps, "num_stages": stages}
    more = {"num_stages": 3} if arch == 90 and 64 < BD <= 128 and not wide else {}
    # A product that is in flight across the edge of the loop holds registers: waited for, `keys` spills
    # nothing at head dim 128 on sm_90, where it spilled 192 bytes a thread.
    return {
        "queries": {"BM": min(BM, queries[0]), "BN": min(BN, queries[1]), "WAIT": False, **common},
        "keys": {"BM": min(BM, keys[0]), "BN": min(widest, keys[1]), "WAIT": target.backend == "cuda",
                 **common, **more},
    }  # fmt: skip
