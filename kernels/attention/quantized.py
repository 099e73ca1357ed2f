"""Rounded attention on kernels that multiply codes: one pass of the prologue, one kernel.

An implementation joins by two functions, `unsupported(operands, plan)` and `forward(operands, plan, scale,
return_lse, bias)`, and by the width of its key slots. Nothing waits for the GPU after the first call for a plan,
so that calls can be captured in CUDA graphs.

A NaN or an infinity makes the scale of all that share it NaN or infinite, hence every product with them NaN:
128 keys, one query or a channel of values, and with smoothing all keys of a head. Finding them would wait for
the GPU in every call. Values up to 2^60 stay finite where scores are below 2^30, which queries and keys up to 2^13 keep
them; numbers below 2^-100 become 0. (A score less the largest one is one instruction, whose product is exact and whose
other side was rounded: of scores of 2^30 that leaves 2^6, and exp2 of it is in the sum. On Hopper sums of INT8 products lie
on an offset, whose rounding is three quarters of what one code counts: where that is more than 25 bits, which takes queries
and keys of 1,800 at head dim 128, all FP8 weights of a row may round to 0, and its output is 0.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..order.permute import IN_PLACE, Orders, take, through
from ..plan.block_plan import BlockPlan
from . import key_slots as slots
from . import prologue as fused
from . import quantize
from .bias import Bias, BlockBias
from .precision import SCALES, TILE, Groups, Precision
from .prologue import FORMATS, SWAPPED, Operands, PrologueSpec

if TYPE_CHECKING:
    from .projected import Prelude

SCALE_ROWS = 128  # keys that share a scale of "block"
# Where entries may begin if all keys of a head share a scale: values have another order within.
KEY_STEP = len(SWAPPED)


@dataclass(frozen=True, slots=True)
class Native:
    """Where an implementation's kernel for rounded operands is.

    width: of its key slots; None: least. int4: how it reads codes of INT4, of the formats of the prologue.
    key_groups: whether it reads scales of groups of keys, and one of a head; otherwise it gets that of its group for
        every key, and none of a head.
    """

    module: str
    forward: str
    unsupported: str
    width: int | None = None
    int4: str = "int4"
    key_groups: bool = False

    def load(self) -> ModuleType:
        return import_module(f".{self.module}", __package__)


NATIVE = {
    "gluon_sm90": Native(
        "gluon_sm90.eight_bit", "forward", "unsupported", width=SCALE_ROWS, key_groups=True
    ),
    "triton": Native("triton", "forward_quantized", "unsupported_quantized", int4="int4x2"),
}
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


# Answers of `unsupported`, by the tensor that identifies a plan: asking takes 0.1 ms of the host.
_answers: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def unsupported(
    impl: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    precision: Precision,
    bias: Bias | None = None,
) -> list[str]:
    """Every reason why `forward` cannot run; empty if it can."""
    training = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    question = (impl, precision, q.shape, k.shape, q.dtype, q.device, training, type(bias))
    lists = plan.full.start, plan.partial.start
    answers: dict = _answers.setdefault(plan.full.offset, {})  # pyright: ignore
    known = answers.get(question)
    if known is None or any(a is not b for a, b in zip(known[0], lists, strict=True)):
        reasons = _reasons(NATIVE[impl], q, k, v, plan, precision, bias)
        answers[question] = known = lists, reasons
    return known[1].copy()


def _reasons(
    native: Native, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, precision: Precision,
    bias: Bias | None,
) -> list[str]:  # fmt: skip
    try:
        module = native.load()
    except ImportError as error:
        return [f"it does not import here: {error}"]
    reasons = []
    if precision.qk == "model":
        reasons.append("qk='model' with rounded values is emulated only")
    for name, groups in _groups(precision).items():
        of_head = groups.tile is None and precision.qk == "fp8" and native.key_groups
        if name == "k_scale" and (of_head or groups == SCALES["thread"][1]):
            continue
        if groups.tile is None or groups.groups > 1:
            reasons.append(
                f"{name}={getattr(precision, name)!r} is emulated only: the prologue writes scales of 1 to "
                f"{fused.MAX_ROWS} neighbours"
            )
        elif name == "k_scale" and groups.tile not in (1, SCALE_ROWS):
            reasons.append(f"k_scale={precision.k_scale!r} is emulated only: kernels take blocks of "
                           f"{SCALE_ROWS} keys")  # fmt: skip
    if not hasattr(module, native.forward):
        reasons.append("it has no forward for rounded operands")
    if precision.smooth_q and bias is not None and not isinstance(bias, BlockBias):
        reasons.append("smoothing of queries beside another bias than BlockBias is emulated only")
    if q.dtype not in _DTYPES:
        reasons.append(f"dtype must be bfloat16, float16 or float32, got {q.dtype}")
    reasons += slots.unsupported(plan, *_slots(native, plan, precision))
    if reasons:
        return reasons
    spec = _spec(native, precision)
    reasons += fused.unsupported(q, k, v, spec)
    moved = slots.key_slots(plan, *_slots(native, plan, precision))
    shapes = _operand_shapes(q, k, moved.plan.length_k, spec, precision, native.key_groups)
    found = _function(module, native.unsupported)(shapes, moved.plan)
    return list(dict.fromkeys(reasons + found))


def forward(
    impl: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    scale: float,
    return_lse: bool,
    precision: Precision,
    bias: Bias | None = None,
    order: Orders = IN_PLACE,
    prelude: Prelude | None = None,
) -> tuple[Tensor, Tensor | None]:
    """q (B, S_q, H, D), k and v (B, S_k, H_kv, D) -> out (B, S_q, H, D) in q's dtype, lse (B, H, S_q) fp32.

    order: of these tokens beside that of the plan, for kernels that write rows to their places. prelude: of q and k, done
    by the pass that rounds both, without lse, means of queries and scales by tile.
    """
    native = NATIVE[impl]
    module = native.load()
    if scale <= 0:  # kernels take the running maximum before scaling, which needs a positive scale
        q, scale = (-q, -scale) if scale else (torch.zeros_like(q), 1.0)
    given_q, dtype = q, q.dtype
    v_mean = None
    if precision.smooth_v:
        v_mean = quantize.token_mean(v)  # [B, 1, Hk, D]
        v = quantize.saturated(v - v_mean, dtype)
        v_mean = v_mean - quantize.token_mean(v)  # numbers of one exponent are rounded to one side
    by_tile = precision.q_scale == TILE
    moved = slots.key_slots(plan, *_slots(native, plan, precision))
    q_order, key_order = order.queries, through(order.keys, moved.order)
    if precision.smooth_q or by_tile or key_order is None:  # tiles are of the plan's order
        q, q_order = take(q, q_order), None
    if precision.smooth_q:
        from . import query_means

        q, q_mean = query_means.without_means(q, plan)
    spec, more = _spec(native, precision), {}
    if prelude is not None:
        spec, more = replace(spec, eps=prelude.eps), prelude.options
    x = fused.prologue(
        q[:, :1] if by_tile else q, k, v, spec, order=q_order, key_order=key_order, **more
    )
    if by_tile:  # the prologue knows no tiles: it had one query to do
        from .query_tiles import round_tiles

        codes, q_scale = round_tiles(q, plan, spec.qk)
        x = x._replace(q=codes, q_scale=q_scale)
    elif x.q_scale is not None and spec.q_rows > 1:  # kernels read a scale for every query
        q_scale = x.q_scale.repeat_interleave(spec.q_rows, 2)[..., : q.shape[1]]
        x = x._replace(q_scale=q_scale)
    if spec.k_groups > 1 and not native.key_groups:
        assert x.k_scale is not None
        x = x._replace(k_scale=fused.scale_of_tokens(x.k_scale, spec.k_rows, x.k.shape[1]))
    v_scale = None
    if precision.pv == "fp16" and dtype != torch.float16:
        v_scale = quantize.fp16_scale(v.abs().amax(1, keepdim=True).float())
        x = x._replace(v=(x.v / v_scale).half())
    moved_bias = None if bias is None else moved.bias(bias)
    if precision.smooth_q:
        rows = query_means.rows(q_mean, k, x.k_mean, scale, key_order)
        moved_bias = BlockBias(
            rows + moved_bias.rows if isinstance(moved_bias, BlockBias) else rows
        )
    if v_mean is not None and x.v_scale is not None:  # added by the kernel
        x, v_mean = x._replace(v_mean=v_mean[:, 0]), None
    with_lse = return_lse or v_mean is not None
    own = () if order.queries is None else (order.queries,)
    out, lse = _function(module, native.forward)(x, moved.plan, scale, with_lse, moved_bias, *own)
    group = q.shape[2] // k.shape[2]
    if v_scale is not None:
        out = out * v_scale.repeat_interleave(group, 2)
    if v_mean is not None:
        seen = (lse != -torch.inf).transpose(1, 2)[..., None]  # rows that see no key stay 0
        out = out + torch.where(seen, v_mean.repeat_interleave(group, 2), 0.0)
    if return_lse and x.k_mean is not None:
        shifted = lse + quantize.smoothing_shift(given_q, x.k_mean, scale)
        lse = torch.where(lse == -torch.inf, lse, shifted)  # huge numbers may shift by infinity
    # Kernels write bfloat16, in which the largest float16 is a number past it.
    out = quantize.saturated(out.float(), dtype) if dtype == torch.float16 else out.to(dtype)
    return out, lse if return_lse else None


def _groups(precision: Precision) -> dict[str, Groups]:
    """By field of a Precision, tokens that share a scale; none where queries and keys are not rounded."""
    if precision.qk == "model":
        return {}
    # Of a tile, queries are rounded by `query_tiles`, and keys lie in a slot of their own.
    of_q = Groups(1) if precision.q_scale == TILE else SCALES[precision.q_scale][0]
    of_k = Groups(SCALE_ROWS) if precision.k_scale == TILE else SCALES[precision.k_scale][1]
    return {"q_scale": of_q, "k_scale": of_k}


def _slots(native: Native, plan: BlockPlan, precision: Precision) -> tuple[int, int]:
    """Width and step of the slots. Keys with scales of their own may lie as close as their entries allow; entries with
    one each may not share what the prologue gives one; with one scale of a head only the order of values matters."""
    if precision.k_scale == TILE:
        return SCALE_ROWS, SCALE_ROWS
    if native.width is None or precision.k_scale == "token":
        return slots.slot_width(plan.block_k), 0
    return native.width, KEY_STEP if precision.k_scale == "tensor" else 0


def _spec(native: Native, precision: Precision) -> PrologueSpec:
    """What the prologue is asked for; smoothing of queries and values is done around it. Values in 16 bits
    stay tokens; in 8 bits they are transposed, as the kernel's registers want them."""
    layout = getattr(native.load(), "QUANTIZED_V_LAYOUT", "channels16")
    groups = _groups(precision)
    return PrologueSpec(
        qk=native.int4 if precision.qk == "int4" else precision.qk,
        q_rows=groups["q_scale"].tile or 1,
        k_rows=groups["k_scale"].tile or 0,
        k_groups=groups["k_scale"].groups,
        v="fp8" if precision.pv == "fp8" else "same",
        v_layout=layout if precision.pv == "fp8" else "tokens",
        smooth_k=bool(precision.smooth_k),
    )


def _operand_shapes(
    q: Tensor, k: Tensor, length_k: int, spec: PrologueSpec, precision: Precision, key_groups: bool
) -> Operands:
    """Operands of the right shapes, dtypes and device, each one element long: what can be asked before any
    is made."""
    batch, length_q, heads, dim = q.shape
    kv_heads = k.shape[2]

    def like(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(1, dtype=dtype, device=q.device).expand(shape)

    values = torch.float16 if precision.pv == "fp16" else q.dtype
    v = (batch, length_k, kv_heads, dim)
    if spec.v_layout != "tokens":
        v = (batch, kv_heads, dim, -(-length_k // spec.v_padding) * spec.v_padding)
    code, f32 = FORMATS[spec.qk][0], torch.float32
    of_keys = spec.key_scales(length_k)
    if spec.k_groups > 1 and not key_groups:
        of_keys = (length_k,)
    width = dim // 2 if code == torch.uint8 else dim
    return Operands(
        q=like(code, batch, length_q, heads, width),
        k=like(code, batch, length_k, kv_heads, width),
        v=like(FORMATS[spec.v][0] if spec.v in FORMATS else values, *v),
        q_scale=like(f32, batch, heads, length_q),
        k_scale=like(f32, batch, kv_heads, *of_keys),
        v_scale=like(f32, batch, kv_heads, dim) if spec.v in FORMATS else None,
        k_mean=like(f32, batch, kv_heads, dim) if spec.smooth_k else None,
    )


def _function(module: ModuleType, name: str) -> Callable:
    return getattr(module, name)
