"""`sage_attention`: attention with rounded operands under the signature of `sageattention.sageattn`.

SageAttention2 (Zhang et al., arXiv 2411.10958) with what its own package lacks: masks, packed sequences with a
mean of keys for each, right-aligned causal attention, head sizes to 256, gradients, torch.compile without graph
breaks, CUDA graphs and side streams. Nothing is dropped: what cannot be honoured raises.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, library

from ..kernels.attention import Precision, dispatch
from ..kernels.attention.quantize import saturated
from .plans import as_boolean, choose, lacks_kernel, plan_of_mask, plan_of_sequences

if TYPE_CHECKING:  # typing has it from Python 3.11 on
    from typing_extensions import Unpack

DEFAULT_PRECISION = "int8_fp8+k_thread"


class SageOptions(TypedDict, total=False):
    """precision: a `Precision` or its name; impl: an implementation, "auto" picks; check: whether to raise
    FloatingPointError for outputs that are not finite, which waits for the GPU and cannot be compiled or captured. The
    others are those of `scaled_dot_product_attention`, for calls that were written for it: scale is sm_scale, dropout_p must be 0,
    enable_gqa changes nothing, heads tell."""

    precision: str | Precision
    impl: str
    check: bool
    scale: float | None
    dropout_p: float
    enable_gqa: bool


def sage_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    sm_scale: float | None = None,
    return_lse: bool = False,
    *,
    attn_mask: Tensor | None = None,
    **options: Unpack[SageOptions],
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention with INT8 queries and keys that lost their mean, and FP8 weights and values; or another precision.

    q: (B, H, S_q, D) in layout "HND", (B, S_q, H, D) in "NHD"; k, v: the same with S_k tokens and H_kv heads, H_kv
        dividing H. float16, bfloat16 or float32, any strides, D to 256 (kernels want it even and 16 at least).
    is_causal: the last query sees every key, as with a KV cache; with S_q = S_k that is the usual triangle.
    sm_scale: of the scores, 1 / sqrt(D) by default.
    return_lse: also return the natural log-sum-exp of the scores, (B, H, S_q) float32.
    attn_mask: broadcast to (B, H, S_q, S_k): bool, True where a query sees a key, or float, added to the scores.
        Of 0 and -inf it is the same as a bool one. With other numbers nothing is rounded: PyTorch's own
        attention runs, with a warning, and under torch.compile it raises ValueError. A mask is read once
        and remembered with its tensor: pass the same tensor again, a new one waits for the GPU. In a CUDA
        graph it must have been used before.
    options: see `SageOptions`; precision is "int8_fp8+k_thread" by default, as in SageAttention2 on Hopper. INT4 is multiplied as INT8 where tensor cores
        have no INT4: it shows the quality of 4 bits and saves no time.

    Returns out in the layout and dtype of q; queries that see no key are 0. "HND" is a transposed view of (B,
    S_q, H, D), which `out.transpose(1, 2).reshape(...)` takes for free. On a GPU without a kernel for the precision
    exact attention runs, with a warning; without a GPU every precision is emulated, with the same numbers, slowly.
    Finite inputs give finite outputs, in kernels where scores stay below 2^30. NaN and infinities raise ValueError where
    they are emulated. A GPU makes NaN of what shares a scale with them, at most of their head: with check=True that
    raises FloatingPointError.
    Gradients are straight-through: those of exact attention at q, k and v.

    Raises ValueError for wrong shapes and values, TypeError for options it does not know, UnsupportedError
    where a named impl cannot run. Source: SageAttention2, section 3; signature: sageattention 2.2.
    """
    scale, precision, impl = _options(q, sm_scale, options)
    if tensor_layout not in ("HND", "NHD"):
        raise ValueError(
            f'tensor_layout must be "HND" (B, H, S, D) or "NHD" (B, S, H, D), got {tensor_layout!r}. A mask goes '
            "into attn_mask=."
        )
    if any(x.dim() != 4 for x in (q, k, v)):
        raise ValueError(
            f"q, k and v must have 4 dimensions, got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}. Packed "
            "sequences go into sage_attention_varlen."
        )
    if tensor_layout == "HND":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    _check(q, k, v)
    if attn_mask is not None:
        _check_mask(attn_mask, q, k)
        if attn_mask.is_floating_point() and not torch.compiler.is_compiling():
            visible = as_boolean(attn_mask)
            if visible is None:
                out = _exact(q, k, v, attn_mask, tensor_layout, is_causal, scale, return_lse)
                return _checked(out, options)
            attn_mask = visible
    out, lse = sage_attention_op(
        q, k, v, attn_mask, None, None, is_causal, scale, return_lse, precision, impl
    )
    out = _checked(out.transpose(1, 2) if tensor_layout == "HND" else out, options)
    return (out, lse) if return_lse else out


def sage_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    is_causal: bool = False,
    sm_scale: float | None = None,
    return_lse: bool = False,
    **options: Unpack[SageOptions],
) -> Tensor | tuple[Tensor, Tensor]:
    """`sage_attention` of sequences packed into one line; the keys of each lose their own mean.

    q: (total of S_q, H, D); k, v: (total of S_k, H_kv, D). cu_seqlens_q, cu_seqlens_k: int32 or int64 [n + 1], where
    sequences begin, and the totals. They are read once and remembered with their tensors: pass the same
    tensors in every layer, new ones wait for the GPU. max_seqlen_q, max_seqlen_k: nothing needs them.
    is_causal: right-aligned in every sequence. return_lse: also the lse, (H, total of S_q) float32.

    Returns (total of S_q, H, D). Other arguments, errors and gradients as in `sage_attention`.
    """
    scale, precision, impl = _options(q, sm_scale, options)
    if any(x.dim() != 3 for x in (q, k, v)):
        raise ValueError(
            "Packed q, k and v have 3 dimensions, (tokens, heads, head dim), got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}."
        )
    q, k, v = q[None], k[None], v[None]
    _check(q, k, v)
    out, lse = sage_attention_op(
        q, k, v, None, cu_seqlens_q, cu_seqlens_k, is_causal, scale, return_lse, precision, impl
    )
    out = _checked(out, options)
    return (out[0], lse[0]) if return_lse else out[0]


# What is refused -----------------------------------------------------------------------------------


def _options(q: Tensor, sm_scale: float | None, options: SageOptions) -> tuple[float, str, str]:
    """scale, precision and implementation; raises where an option would be dropped."""
    unknown = sorted(set(options) - set(SageOptions.__annotations__))
    if unknown:
        raise TypeError(
            f"sage_attention has no argument {', '.join(map(repr, unknown))}. It has attn_mask and the options "
            f"{', '.join(SageOptions.__annotations__)}; smoothing is a part of the precision, as in "
            'precision="int8_fp8-smooth_k".'
        )
    if options.get("dropout_p"):
        raise ValueError(
            f"sage_attention has no dropout, got dropout_p={options.get('dropout_p')}. Use 0."
        )
    scale = options.get("scale")
    if scale is not None and sm_scale is not None and scale != sm_scale:
        raise ValueError(f"sm_scale={sm_scale} and scale={scale} are one thing. Give one of them.")
    scale = sm_scale if scale is None else scale
    impl = options.get("impl", "auto")
    if impl != "auto":
        dispatch.require_known(impl)
    precision = options.get("precision", DEFAULT_PRECISION)
    if not torch.compiler.is_compiling():
        precision = Precision.parse(precision)
    return float(q.shape[-1] ** -0.5 if scale is None else scale), str(precision), impl


def _checked(out: Tensor, options: SageOptions) -> Tensor:
    if options.get("check") and not bool(out.isfinite().all()):
        raise FloatingPointError(
            "The output of sage_attention holds NaN or infinities: an infinite query, key or value spoils all that "
            'shares its scale. Look at q, k and v, or use precision="model".'
        )
    return out


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    """(B, S, H, D) each."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} as (B, S, H, D)"
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"k and v must have one shape, and B and D of q, got {shapes}.")
    if not k.shape[2] or q.shape[2] % k.shape[2]:
        raise ValueError(f"The heads of k and v must divide those of q, got {shapes}.")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(
            f"q, k and v must share a floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}."
        )
    if not q.device == k.device == v.device:
        raise ValueError(
            f"q, k and v must be on one device, got {q.device}, {k.device}, {v.device}."
        )


def _check_mask(mask: Tensor, q: Tensor, k: Tensor) -> None:
    full = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    fits = 0 < mask.dim() <= 4 and all(
        n in (1, m) for n, m in zip(mask.shape[::-1], full[::-1], strict=False)
    )
    if not fits:
        raise ValueError(f"attn_mask must broadcast to {full}, got {tuple(mask.shape)}.")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"attn_mask must be bool or floating, got {mask.dtype}.")
    if mask.device != q.device:
        raise ValueError(f"attn_mask must be on {q.device}, got {mask.device}.")


def _exact(q, k, v, mask, tensor_layout, is_causal, scale, return_lse):
    """PyTorch's attention, for a mask that adds numbers to scores. Tensors are (B, S, H, D)."""
    if return_lse:
        raise ValueError(
            "A float attn_mask with other numbers than 0 and -inf runs in PyTorch's attention, which returns no "
            "lse. Leave out return_lse, or make the mask bool."
        )
    warnings.warn(
        "attn_mask adds other numbers than 0 and -inf to the scores: PyTorch's own attention runs, and nothing is "
        "rounded. Where large negative numbers mean 'hidden', pass a bool mask.",
        stacklevel=3,
    )
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if is_causal:
        rows, columns = q.shape[2], k.shape[2]
        seen = mask.new_ones(rows, columns, dtype=torch.bool).tril(columns - rows)
        mask = mask.masked_fill(~seen, -torch.inf)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask.to(q.dtype), scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out if tensor_layout == "HND" else out.transpose(1, 2)


# One opaque op: plans are made where shapes are numbers and masks have values ----------------------


@library.custom_op("visionfuse::sage_attention", mutates_args=())
def sage_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    is_causal: bool,
    scale: float,
    return_lse: bool,
    precision: str,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """out (B, S_q, H, D) and lse (B, H, S_q), the latter empty unless asked for."""
    if not q.numel() or not k.numel():
        lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=torch.float32)
        return torch.zeros_like(q, memory_format=torch.contiguous_format), lse if return_lse else lse.new_empty(0)  # fmt: skip
    formats, means = Precision.parse(precision), None
    shape = choose(impl, q.device, q.dtype, q.shape[3], formats)
    if cu_seqlens_q is None or cu_seqlens_k is None:
        plan = plan_of_mask(q, k, mask, is_causal, shape)
    else:
        plan, packed = plan_of_sequences(q, k, cu_seqlens_q, cu_seqlens_k, is_causal, shape)
        if formats.smooth_k:
            means = packed.means(k)  # [B, n, H_kv, D]
            k = saturated(k - means[:, packed.of_key], k.dtype)
            formats = replace(formats, smooth_k=False)
    if impl == "auto" and q.is_cuda and lacks_kernel(q, k, v, plan, formats):
        formats = Precision()
    out, lse = dispatch.run(impl, q, k, v, plan, scale, return_lse, formats)
    if lse is None:
        return out, q.new_empty(0, dtype=torch.float32)
    if means is not None:
        means = means.repeat_interleave(q.shape[2] // k.shape[2], 2)[:, packed.of_query]
        shifted = lse + scale * (q.float() * means).sum(-1).transpose(1, 2)
        lse = torch.where(lse == -torch.inf, lse, shifted)
    return out, lse


@sage_attention_op.register_fake
def _(q, k, v, mask, cu_seqlens_q, cu_seqlens_k, is_causal, scale, return_lse, precision, impl):
    lse = (q.shape[0], q.shape[2], q.shape[1]) if return_lse else (0,)
    return (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        q.new_empty(lse, dtype=torch.float32),
    )


@library.custom_op("visionfuse::sage_attention_backward", mutates_args=())
def sage_attention_backward_op(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of exact attention at q, k and v, straight through the rounding."""
    if not q.numel() or not k.numel():
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    shape = choose("auto", q.device, q.dtype, q.shape[3], Precision())
    if cu_seqlens_q is None or cu_seqlens_k is None:
        plan = plan_of_mask(q, k, mask, is_causal, shape)
    else:
        plan, _ = plan_of_sequences(q, k, cu_seqlens_q, cu_seqlens_k, is_causal, shape)
    d_q, d_k, d_v, _ = dispatch.run_backward(
        "auto", grad, grad_lse, q, k, v, None, None, plan, scale, None, False
    )
    return d_q, d_k, d_v


@sage_attention_backward_op.register_fake
def _(grad, grad_lse, q, k, v, mask, cu_seqlens_q, cu_seqlens_k, is_causal, scale):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _save(ctx, inputs, output) -> None:
    *tensors, is_causal, scale, return_lse, _, _ = inputs
    ctx.save_for_backward(*tensors)
    ctx.numbers, ctx.with_lse = (is_causal, scale), return_lse
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad: Tensor | None, grad_lse: Tensor | None):
    q, *others = ctx.saved_tensors
    grad = torch.zeros_like(q) if grad is None else grad
    grad_lse = grad_lse if ctx.with_lse else None
    found = sage_attention_backward_op(grad, grad_lse, q, *others, *ctx.numbers)
    return *found, *[None] * 8


sage_attention_op.register_autograd(_differentiate, setup_context=_save)
