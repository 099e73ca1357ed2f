"""Block-sparse attention through FlexAttention: a second, independent oracle and a baseline.

FlexAttention wants blocks on a fixed grid and a function (batch, head, query, key) -> bool. A plan's
runs start anywhere, so it becomes a lookup table with a code for every (list row, key): 0 invisible,
1 visible, 2 + x partial, where x is the bound table (intervals) or the entry (bits). The table takes
one byte (intervals) or four (bits) per query tile and key, 104 MB for Hunyuan's 115,200 tokens.
FlexAttention: arXiv 2412.05496.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.utils.weak import WeakTensorKeyDictionary

from ..plan.block_plan import BlockPlan, Entries, IntervalMask
from .bias import Bias, BlockBias

BLOCK = 128  # FlexAttention's own default on every GPU
# Rows of the table filled at once: 2**26 codes take 0.5 GB before they shrink to a byte.
CODES_AT_ONCE = 1 << 26
# FlexAttention keeps one compiled kernel per shape and mask kind; the default of 8 is soon reached,
# and past it the eager version would form all scores.
COMPILED_KERNELS = 64


def unsupported(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> list[str]:
    """Every reason why `forward` cannot run on these inputs; empty if it can."""
    reasons = []
    head_dim = q.shape[-1]
    if q.device.type == "cuda" and (head_dim < 16 or head_dim & (head_dim - 1)):
        reasons.append(
            f"compiled FlexAttention needs a power of two from 16 on as head dim, got {head_dim}"
        )
    pairs = q.shape[0] * q.shape[2] * plan.length_q * plan.length_k
    if q.device.type != "cuda" and pairs > 1 << 30:
        reasons.append(
            f"without a GPU it forms all {pairs:.2g} scores; use it on small inputs only"
        )
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        reasons.append(f"dtype must be float16, bfloat16, float32 or float64, got {q.dtype}")
    return reasons


def forward(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float, return_lse: bool,
    bias: Bias | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """q (B, S_q, H, D), k and v (B, S_k, H_kv, D) -> out (B, S_q, H, D), lse (B, H, S_q) fp32 or None."""
    batch, _, heads, _ = q.shape
    out, aux = _attention(q.device.type)(
        *(x.transpose(1, 2) for x in (q, k, v)),
        score_mod=None if bias is None else _score_mod(bias, plan),
        block_mask=block_mask(plan, batch, heads),
        scale=scale,
        enable_gqa=heads != k.shape[2],
        return_aux=AuxRequest(lse=True),
    )
    return out.transpose(1, 2).contiguous(), aux.lse.float() if return_lse else None


@cache
def _attention(device: str) -> Callable:
    if device != "cuda":
        return flex_attention
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(*args, **kwargs):
        with torch._dynamo.config.patch(recompile_limit=COMPILED_KERNELS):
            return compiled(*args, **kwargs)

    return attend


# Keyed by a tensor: a custom op makes a new BlockPlan of the same tensors in every call.
_masks: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def block_mask(plan: BlockPlan, batch: int, heads: int) -> BlockMask:
    """The plan as FlexAttention's BlockMask, cached while the plan's tensors live."""
    others = (plan.full.start, plan.partial.offset, plan.partial.start)
    found = _masks.get(plan.full.offset)
    if (
        found is None
        or any(a is not b for a, b in zip(found[0], others, strict=True))
        or found[1] != (batch, heads)
    ):
        found = (others, (batch, heads), _block_mask(plan, batch, heads))
        _masks[plan.full.offset] = found
    return found[2]


def _block_mask(plan: BlockPlan, batch: int, heads: int) -> BlockMask:
    codes, owner = _codes(plan), _owner(plan)
    some, every = _occupancy(plan, codes, owner)  # [V, query blocks, key blocks]
    if plan.variant is not None:
        chosen = plan.variant.expand(batch, heads).long()
        some, every = some[chosen], every[chosen]
    else:
        some, every = some[None], every[None]
    return BlockMask.from_kv_blocks(
        *_lists(some & ~every), *_lists(every), BLOCK_SIZE=BLOCK,
        mask_mod=_mask_mod(plan, codes, owner, batch, heads),
        seq_lengths=(plan.length_q, plan.length_k),
    )  # fmt: skip


def _owner(plan: BlockPlan) -> Tensor:
    """The tile of every query: int64 [Sq]."""
    tile = torch.arange(plan.tiles, device=plan.device)
    owner = torch.zeros(plan.length_q, dtype=torch.int64, device=plan.device)
    count = plan.q_count.long()
    within = torch.arange(int(count.sum()), device=plan.device)
    within -= torch.repeat_interleave(count.cumsum(0) - count, count)
    owner[torch.repeat_interleave(plan.q_start.long(), count) + within] = torch.repeat_interleave(
        tile, count
    )
    return owner


def _score_mod(bias: Bias, plan: BlockPlan) -> Callable:
    if isinstance(bias, BlockBias):
        rows, owner = bias.rows, _owner(plan)
        batches, head_step = rows.shape[0] > 1, rows.shape[1] > 1

        def of_tile(score, b, h, q, k):
            return score + rows[b * batches, h * head_step, owner[q], k]

        return of_tile

    table, q_index, k_index = bias.table, bias.q_index, bias.k_index
    columns, heads = table.shape[1], table.shape[0] > 1

    def relative(score, b, h, q, k):
        index = k_index[k] - q_index[q]
        inside = (index >= 0) & (index < columns)
        return score + torch.where(inside, table[h * heads, torch.where(inside, index, 0)], 0.0)

    return relative


def _codes(plan: BlockPlan) -> Tensor:
    """The table of the module docstring: uint8 or int32 [rows, Sk]."""
    rows = plan.variants * plan.tiles
    small = plan.mask is None or (
        isinstance(plan.mask, IntervalMask) and plan.mask.lo.shape[0] < 254
    )
    codes = torch.empty(
        rows, plan.length_k, dtype=torch.uint8 if small else torch.int32, device=plan.device
    )
    if isinstance(plan.mask, IntervalMask):
        kind = plan.mask.table.long()
    else:
        kind = torch.arange(plan.partial.start.numel(), device=plan.device)
    for first in range(0, rows, max(1, CODES_AT_ONCE // plan.length_k)):
        part = codes[first : first + max(1, CODES_AT_ONCE // plan.length_k)]
        # A run is a step up where it starts and a step down where it ends; runs never overlap.
        steps = torch.zeros(part.shape[0], plan.length_k + 1, dtype=torch.int64, device=plan.device)
        _add_runs(steps, plan.full, torch.ones_like(plan.full.start).long(), first)
        _add_runs(steps, plan.partial, kind + 2, first)
        part.copy_(steps.cumsum(1)[:, :-1])
    return codes


def _add_runs(steps: Tensor, entries: Entries, code: Tensor, first: int) -> None:
    row = entries.rows
    chosen = ((row >= first) & (row < first + steps.shape[0])).nonzero()[:, 0]
    row, code = row[chosen] - first, code[chosen]
    start, count = entries.start[chosen].long(), entries.count[chosen].long()
    steps.index_put_((row, start), code, accumulate=True)
    steps.index_put_((row, start + count), -code, accumulate=True)


def _occupancy(plan: BlockPlan, codes: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
    """Which blocks may hold a visible pair, and which hold only visible ones: bool [V, nq, nk]."""
    nq, nk = -(-plan.length_q // BLOCK), -(-plan.length_k // BLOCK)
    blocks = torch.arange(plan.length_k, device=plan.device) // BLOCK
    size = torch.bincount(blocks, minlength=nk)
    rows = codes.shape[0]
    shape = (rows, nk)
    seen = torch.zeros(shape, dtype=torch.int32, device=plan.device)
    whole = torch.zeros_like(seen)
    for r in range(0, rows, max(1, CODES_AT_ONCE // plan.length_k)):
        part = codes[r : r + max(1, CODES_AT_ONCE // plan.length_k)]
        seen[r : r + part.shape[0]].index_add_(1, blocks, (part != 0).int())
        whole[r : r + part.shape[0]].index_add_(1, blocks, (part == 1).int())
    seen = (seen > 0).view(plan.variants, plan.tiles, nk)
    # Blocks at the ragged end are never full: FlexAttention would read past it without a mask.
    whole = ((whole == size) & (size == BLOCK)).view(plan.variants, plan.tiles, nk)
    pairs = torch.unique(
        torch.arange(plan.length_q, device=plan.device) // BLOCK * plan.tiles + owner
    )
    block, tile = pairs // plan.tiles, pairs % plan.tiles
    some = torch.zeros(plan.variants, nq, nk, dtype=torch.int32, device=plan.device)
    every = some.clone()
    some.index_add_(1, block, seen[:, tile].int())
    every.index_add_(1, block, whole[:, tile].int())
    tiles_of = torch.bincount(block, minlength=nq)
    full_height = (torch.arange(nq, device=plan.device) + 1) * BLOCK <= plan.length_q
    return some > 0, (every == tiles_of[:, None]) & full_height[:, None]


def _lists(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """kv_num_blocks [.., nq] and kv_indices [.., nq, nk] of a bool [.., nq, nk]."""
    if blocks.dim() == 3:
        blocks = blocks[None]
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1).int(), order.int()


def _mask_mod(plan: BlockPlan, codes: Tensor, owner: Tensor, batch: int, heads: int) -> Callable:
    tiles, mask = plan.tiles, plan.mask
    variant = codes.new_zeros(batch, heads, dtype=torch.int64)
    if plan.variant is not None:
        variant = plan.variant.expand(batch, heads).long().contiguous()

    def everything(b, h, q, k):
        return codes[variant[b, h] * tiles + owner[q], k] == 1

    if mask is None:
        return everything

    if isinstance(mask, IntervalMask):
        lo, hi, coord = mask.lo, mask.hi, mask.coord

        def intervals(b, h, q, k):
            code = codes[variant[b, h] * tiles + owner[q], k].int()
            table = (code - 2).clamp(min=0)
            inside = code >= 2
            for axis in range(coord.shape[0]):
                x = coord[axis, k]
                inside = inside & (lo[table, axis, q] <= x) & (x < hi[table, axis, q])
            return (code == 1) | inside

        return intervals

    words, start, q_start = mask.bits, plan.partial.start, plan.q_start

    def bits(b, h, q, k):
        code = codes[variant[b, h] * tiles + owner[q], k]
        entry = (code - 2).clamp(min=0)
        column = (k - start[entry]).clamp(min=0, max=words.shape[2] * 32 - 1)
        word = words[entry, q - q_start[owner[q]], column // 32]
        return (code == 1) | ((code >= 2) & (((word >> (column % 32)) & 1) == 1))

    return bits
