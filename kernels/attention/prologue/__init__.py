"""What stands between the projections and the attention kernel, in one pass: `prologue`.

RMSNorm and rotary embedding of Q and K, order of the tokens, smoothing of K and quantisation after
SageAttention2 (Zhang et al., arXiv 2411.10958, sections 3.1 to 3.3), and V as 8-bit tensor cores want it.
Every element is read once and written once; the mean of K, the scales of V per channel and a norm over all
heads have to be known before, so each of these costs a first read, that of K of every eighth token.
Everything is computed in fp32 and rounded once, where diffusers rounds after the norm and after the rotation.

`reference` is the same in plain PyTorch, for the tests, and for the reader.
"""

from __future__ import annotations

import torch
from torch import Tensor, library

from ..api import UnsupportedError
from .plain import dequantized, pack_int4, reference, scale_of_tokens, unpack_int4
from .spec import (
    EIGHT_BIT,
    FORMATS,
    K_GROUPS,
    LAYOUTS,
    MAX_HEAD_DIM,
    MAX_ROWS,
    SWAPPED,
    TINY,
    Operands,
    PrologueSpec,
    mean_step,
)

__all__ = ["EIGHT_BIT", "FORMATS", "K_GROUPS", "LAYOUTS", "MAX_HEAD_DIM", "MAX_ROWS", "SWAPPED", "TINY", "Operands",
           "PrologueSpec", "dequantized", "mean_step", "pack_int4", "prologue", "reference",
           "scale_of_tokens", "unpack_int4"]  # fmt: skip
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def prologue(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: PrologueSpec = PrologueSpec(),
    *,
    norm_q: Tensor | None = None,
    norm_k: Tensor | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    order: Tensor | None = None,
    key_order: Tensor | None = None,
) -> Operands:
    """Q, K and V as they come from the projections -> what the attention kernel reads.

    q [B, Sq, H, D], k and v [B, Sk, Hk, D] with Hk a divisor of H: fp16, bf16 or fp32, D even, 16 to 256;
        D contiguous, other strides are free (a copy is made of tensors without contiguous rows).
    norm_q, norm_k: weights of an RMSNorm, in any float dtype: [D] over every head, or [H * D] and [Hk * D]
        over all heads of a token together, as in Wan, which reads Q or K once more.
    rotary: cos and sin, of pairs of neighbouring channels (diffusers' `apply_rotary_emb` with
        use_real_unbind_dim=-1): [S, D] with every angle twice as in its FLUX, [1, S, 1, D] as in its Wan, or
        [S, D / 2], which is slower (1.2 to 1.4 times, H200). Row i belongs to input token i. Of [S, D] the even
        columns of cos and the odd ones of sin count.
    order: int32 or int64 [S_out]: output row i is input row order[i], and zeros where order[i] is -1 (the
        padding of tiles). Usually a permutation; values are not checked, as that would wait for the GPU,
        but one outside -1 .. S - 1 reads nothing either. The mean of K and scales of V are of input tokens.
    key_order: the same for K and V alone, in place of `order`: keys that start tiles at other multiples than
        queries do, say. Q may then have its own length.

    Without rounding of V, its transposition and order, `v` is returned as it is. NaN and infinities pass
    through "same" as in PyTorch. In 8 bits they make the scale of their rows (Q, K) or channel (V) NaN,
    and the codes there mean nothing: the products are NaN, as they would be without quantisation. A
    non-finite K also makes its channel of k_mean non-finite, hence with smoothing all keys of the head.

    torch.compile sees one opaque op, `visionfuse::prologue`. Launches go to the current stream and may be
    captured in a CUDA graph, after a first call with the same shapes.

    Raises ValueError for wrong inputs and UnsupportedError where Triton cannot run.
    """
    cos, sin = (None, None) if rotary is None else rotary
    if torch.compiler.is_compiling():
        found = prologue_op(
            q, k, v, spec.qk, spec.q_rows, spec.k_rows, spec.k_groups, spec.v, spec.v_layout, spec.v_padding,
            spec.smooth_k, spec.softmax_scale, spec.eps, norm_q, norm_k, cos, sin, order, key_order,
        )  # fmt: skip
        return _operands(found, v, spec)
    return _run(q, k, v, spec, norm_q, norm_k, cos, sin, order, key_order)


def _run(q: Tensor, k: Tensor, v: Tensor, spec: PrologueSpec, *options: Tensor | None) -> Operands:
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        _refuse(unsupported(q, k, v, spec))
    try:
        from .launch import Inputs
        from .run import run
    except ImportError:
        _refuse(unsupported(q, k, v, spec))
        raise
    inputs = Inputs(q, k, v, *options)

    def checked() -> None:
        check(*inputs)
        _refuse(unsupported(q, k, v, spec))

    return Operands(*run(inputs, spec, checked))


def _refuse(reasons: list[str]) -> None:
    if reasons:
        raise UnsupportedError("The prologue cannot run: " + "; ".join(reasons) + ".")


# One opaque op for torch.compile --------------------------------------------------------------------


@library.custom_op("visionfuse::prologue", mutates_args=())
def prologue_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qk_format: str,
    q_rows: int,
    k_rows: int,
    k_groups: int,
    v_format: str,
    v_layout: str,
    v_padding: int,
    smooth_k: bool,
    softmax_scale: float,
    eps: float,
    norm_q: Tensor | None,
    norm_k: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    order: Tensor | None,
    key_order: Tensor | None,
) -> list[Tensor]:
    """The fields of `Operands` that are not None and not the input v, in their order."""
    spec = PrologueSpec(
        qk=qk_format, q_rows=q_rows, k_rows=k_rows, k_groups=k_groups, v=v_format, v_layout=v_layout,
        v_padding=v_padding, smooth_k=smooth_k, softmax_scale=softmax_scale,
        eps=eps,
    )  # fmt: skip
    found = _run(q, k, v, spec, norm_q, norm_k, cos, sin, order, key_order)
    return [x for x in found if x is not None and x is not v]


@prologue_op.register_fake
def _(
    q, k, v, qk_format, q_rows, k_rows, k_groups, v_format, v_layout, v_padding, smooth_k, softmax_scale, eps,
    norm_q, norm_k, cos, sin, order, key_order,
):  # fmt: skip
    (batch, length_q, heads, dim), (_, length_k, kv_heads, _) = q.shape, k.shape
    moved = order if key_order is None else key_order
    length_q = length_q if order is None else order.shape[0]
    length_k = length_k if moved is None else moved.shape[0]
    code = FORMATS[qk_format][0] if qk_format in FORMATS else q.dtype
    width = dim // 2 if code == torch.uint8 else dim

    def float32(*shape):
        return q.new_empty(shape, dtype=torch.float32)

    found = [
        q.new_empty(batch, length_q, heads, width, dtype=code),
        q.new_empty(batch, length_k, kv_heads, width, dtype=code),
    ]
    if v_format != "same" or v_layout != "tokens" or moved is not None:
        shape = (batch, length_k, kv_heads, dim)
        if v_layout != "tokens":
            shape = (batch, kv_heads, dim, -(-length_k // v_padding) * v_padding)
        dtype = FORMATS[v_format][0] if v_format in FORMATS else v.dtype
        found.append(q.new_empty(shape, dtype=dtype))
    if qk_format != "same":
        found.append(float32(batch, heads, -(-length_q // q_rows)))
        spec = PrologueSpec(qk=qk_format, k_rows=k_rows, k_groups=k_groups)
        found.append(float32(batch, kv_heads, *spec.key_scales(length_k)))
    if v_format != "same":
        found.append(float32(batch, kv_heads, dim))
    if smooth_k:
        found.append(float32(batch, kv_heads, dim))
    return found


def _operands(found: list[Tensor], v: Tensor, spec: PrologueSpec) -> Operands:
    """What `prologue_op` leaves out is put back."""
    scaled, rounded = 2 * (spec.qk != "same"), int(spec.v != "same")
    count = 2 + scaled + rounded + spec.smooth_k
    rest = iter(found[2:])
    v_out = v if len(found) == count else next(rest)
    present = (scaled, scaled, rounded, spec.smooth_k)
    return Operands(found[0], found[1], v_out, *(next(rest) if x else None for x in present))


def unsupported(q: Tensor, k: Tensor, v: Tensor, spec: PrologueSpec) -> list[str]:
    """Every reason why the kernels cannot run on these inputs; empty if they can."""
    reasons = []
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        reasons.append("it has no backward, and an input requires a gradient")
    try:
        from .kernel import INTERPRETED
    except ImportError as error:
        return [*reasons, f"Triton cannot be imported ({error})"]
    if not q.is_cuda:
        if not INTERPRETED:
            reasons.append(f"Triton kernels need a GPU, the tensors are on {q.device}")
    elif "fp8" in (spec.qk, spec.v):
        if torch.version.hip:
            reasons.append("fp8 is e4m3fn, which has not been tried on AMD")
        elif torch.cuda.get_device_capability(q.device) < (8, 9):
            reasons.append(
                f"fp8 needs sm_89 or newer, this is {torch.cuda.get_device_name(q.device)}"
            )
    return reasons


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    norm_q: Tensor | None,
    norm_k: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    order: Tensor | None,
    key_order: Tensor | None,
) -> None:
    """Raise ValueError unless shapes, dtypes and devices are those of `prologue`."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise ValueError(f"q must be (B, Sq, H, D), k and v (B, Sk, Hk, D), got {shapes}.")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[2] % max(k.shape[2], 1):
        raise ValueError(f"q and k must share B and D, and Hk must divide H, got {shapes}.")
    if not q.numel() or not k.numel():
        raise ValueError(f"q, k and v must not be empty, got {shapes}.")
    head_dim = q.shape[3]
    if not 16 <= head_dim <= MAX_HEAD_DIM or head_dim % 2:
        raise ValueError(f"the head dim must be even, 16 to {MAX_HEAD_DIM}, got {head_dim}.")
    if len({x.dtype for x in (q, k, v)}) > 1 or q.dtype not in _DTYPES:
        raise ValueError(
            f"q, k and v must share float16, bfloat16 or float32, got {q.dtype}, {k.dtype}, {v.dtype}."
        )
    tables = [x for x in (cos, sin) if x is not None]
    others = [x for x in (k, v, norm_q, norm_k, order, key_order, *tables) if x is not None]
    if any(x.device != q.device for x in others):
        raise ValueError(
            f"all tensors must be on {q.device}, got {[str(x.device) for x in others]}."
        )
    for name, weight, heads in (("norm_q", norm_q, q.shape[2]), ("norm_k", norm_k, k.shape[2])):
        if weight is not None and weight.shape not in ((head_dim,), (heads * head_dim,)):
            raise ValueError(
                f"{name} must be ({head_dim},), over one head, or ({heads * head_dim},), over all heads, got "
                f"{tuple(weight.shape)}."
            )
    shared = bool(tables) or (order is not None and key_order is None)
    if shared and q.shape[1] != k.shape[1]:
        raise ValueError(f"rotary and order are for q and k of one length, got {shapes}.")
    for table in tables:
        rows, columns = table.numel() // max(table.shape[-1], 1), table.shape[-1]
        flat = table.dim() == 2 or table.shape[:-1] == (1, q.shape[1], 1)
        if not flat or rows != q.shape[1] or columns not in (head_dim, head_dim // 2):
            raise ValueError(
                f"cos and sin must be (S, D) or (S, D / 2) with S {q.shape[1]}, D {head_dim}, got "
                f"{tuple(table.shape)}."
            )
    if len({table.shape for table in tables}) > 1:
        raise ValueError(f"cos and sin differ: {[tuple(t.shape) for t in tables]}.")
    for name, rows in (("order", order), ("key_order", key_order)):
        if rows is not None and (
            rows.dim() != 1 or rows.dtype not in (torch.int32, torch.int64) or not rows.numel()
        ):
            raise ValueError(
                f"{name} must be int32 or int64 [S_out], not empty, got {rows.dtype} {tuple(rows.shape)}."
            )


# In plain PyTorch ----------------------------------------------------------------------------------
