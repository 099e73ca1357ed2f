"""What stands between the projections and the attention kernel, in one pass: `prologue`.

RMSNorm and rotary embedding of Q and K, order of the tokens, smoothing of K and quantisation after
SageAttention2 (Zhang et al., arXiv 2411.10958, sections 3.1 to 3.3), and V as 8-bit tensor cores want it.
Every element is read once and written once; the mean of K over all tokens and the scales of V per channel
have to be known before, so each of these costs a first read of K or V. Everything is computed in fp32 and
rounded once, where diffusers rounds after the norm and after the rotation.

`reference` is the same in plain PyTorch, for the tests, and for the reader.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .api import UnsupportedError

if TYPE_CHECKING:
    from .prologue_kernel import Launch

FORMATS = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}
LAYOUTS = ("tokens", "channels", "channels16")
# Position p of every 16 tokens of "channels16" holds token SWAPPED[p]: the fp32 accumulator of Q K^T then is, register for register, the
# 8-bit operand of P V (SageAttention's order).
SWAPPED = (0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)
MAX_HEAD_DIM = 256
MAX_ROWS = 128
TINY = 2.0**-100  # the least maximum that a scale is made of: a row of zeros has a scale above zero
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, kw_only=True, slots=True)
class PrologueSpec:
    """What the attention kernel wants.

    qk: "same" (the dtype of the inputs), "int8" or "fp8" (e4m3).
    q_rows, k_rows: tokens that share a scale: 1, 2, 4, ... 128. (128 of head dim 256 spill registers.)
    v: "same" or "fp8" (e4m3, a scale per channel).
    v_layout: "tokens" [B, S, H, D]; "channels" [B, H, D, S padded] or "channels16", the same with the
        tokens inside every 16 in the order `SWAPPED`.
    v_padding: the channel layouts are padded with zeros to a multiple of it.
    smooth_k: subtract from K its mean over tokens. It changes no softmax, only the log-sum-exp: a kernel
        that returns one adds softmax_scale * (q . k_mean).
    softmax_scale: is multiplied into q_scale (not into q).
    eps: of the RMSNorm.
    """

    qk: str = "same"
    q_rows: int = 1
    k_rows: int = 1
    v: str = "same"
    v_layout: str = "tokens"
    v_padding: int = 128
    smooth_k: bool = False
    softmax_scale: float = 1.0
    eps: float = 1e-6
    version: int = 1

    def __post_init__(self):
        for name, known in (
            ("qk", ("same", *FORMATS)),
            ("v", ("same", "fp8")),
            ("v_layout", LAYOUTS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}.")
        for name in ("q_rows", "k_rows"):
            rows = getattr(self, name)
            if not 1 <= rows <= MAX_ROWS or rows & (rows - 1):
                raise ValueError(f"{name} must be a power of two up to {MAX_ROWS}, got {rows}.")
        if self.v_padding < 16 or self.v_padding % 16:
            raise ValueError(f"v_padding must be a multiple of 16, got {self.v_padding}.")
        if self.qk == "same" and (self.q_rows, self.k_rows, self.softmax_scale) != (1, 1, 1.0):
            raise ValueError(
                "q_rows, k_rows and softmax_scale are about scales, which qk='same' has not: "
                "leave them at 1, or choose qk='int8' or 'fp8'."
            )
        if self.version != 1:
            raise ValueError(f"PrologueSpec version {self.version} is not known, only 1.")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PrologueSpec:
        return cls(**values)


# What `gluon_sm90_8bit` reads; smooth_k and softmax_scale are free.
EIGHT_BIT = {
    name: PrologueSpec(qk=qk, k_rows=128, v="fp8", v_layout="channels16")
    for name, qk in (("fp8", "fp8"), ("int8_fp8", "int8"))
}


class Operands(NamedTuple):
    """The operands of an attention kernel. None: this spec has none.

    q [B, S, H, D], k [B, S, Hk, D]; v in the layout of the spec.
    q_scale [B, H, ceil(S / q_rows)], k_scale [B, Hk, ceil(S / k_rows)], v_scale [B, Hk, D]: fp32, above
    zero; a value is code * scale, and that of q includes softmax_scale.
    k_mean [B, Hk, D]: fp32, what smoothing has subtracted.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_scale: Tensor | None
    k_scale: Tensor | None
    v_scale: Tensor | None
    k_mean: Tensor | None


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
) -> Operands:
    """Q, K and V as they come from the projections -> what the attention kernel reads.

    q [B, Sq, H, D], k and v [B, Sk, Hk, D] with Hk a divisor of H: fp16, bf16 or fp32, D even, 16 to 256;
        D contiguous, other strides are free (a copy is made of tensors without contiguous rows).
    norm_q, norm_k [D]: weights of an RMSNorm over D, in any float dtype.
    rotary: cos and sin, of pairs of neighbouring channels (diffusers' `apply_rotary_emb` with
        use_real_unbind_dim=-1): [S, D] with every angle twice as in its FLUX, [1, S, 1, D] as in its Wan, or
        [S, D / 2], which is half the reading. Row i belongs to input token i. Of [S, D] the even columns
        of cos and the odd ones of sin count.
    order: int32 or int64 [S_out]: output row i is input row order[i], and zeros where order[i] is -1 (the
        padding of tiles). Usually a permutation; values are not checked, as that would wait for the GPU,
        but one outside -1 .. S - 1 reads nothing either. Mean of K and scales of V are over all input tokens.

    Without rounding of V, its transposition and order, `v` is returned as it is. NaN and infinities pass
    through "same" as in PyTorch. In 8 bits they make the scale of their rows (Q, K) or channel (V) NaN or
    infinite and the codes 0, so that the products are NaN, as they would be without quantisation. A
    non-finite K also makes its channel of k_mean non-finite, hence with smoothing all keys of the head.

    Raises ValueError for wrong inputs and UnsupportedError where Triton cannot run.
    """
    check(q, k, v, norm_q=norm_q, norm_k=norm_k, rotary=rotary, order=order)
    if reasons := unsupported(q, k, v, spec):
        raise UnsupportedError("The prologue cannot run: " + "; ".join(reasons) + ".")
    operands, launches = plan_launches(
        q, k, v, spec, norm_q=norm_q, norm_k=norm_k, rotary=rotary, order=order
    )
    with torch.cuda.device_of(q):
        for launch in launches:
            launch.run()
    return operands


def unsupported(q: Tensor, k: Tensor, v: Tensor, spec: PrologueSpec) -> list[str]:
    """Every reason why the kernels cannot run on these inputs; empty if they can."""
    reasons = []
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        reasons.append("it has no backward, and an input requires a gradient")
    try:
        from . import prologue_kernel
    except ImportError as error:
        return [*reasons, f"Triton cannot be imported ({error})"]
    if not q.is_cuda:
        if not prologue_kernel._INTERPRET:
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
    *,
    norm_q: Tensor | None,
    norm_k: Tensor | None,
    rotary: tuple[Tensor, Tensor] | None,
    order: Tensor | None,
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
    tables = rotary or ()
    others = [x for x in (k, v, norm_q, norm_k, order, *tables) if x is not None]
    if any(x.device != q.device for x in others):
        raise ValueError(
            f"all tensors must be on {q.device}, got {[str(x.device) for x in others]}."
        )
    for name, weight in (("norm_q", norm_q), ("norm_k", norm_k)):
        if weight is not None and weight.shape != (head_dim,):
            raise ValueError(
                f"{name} must be ({head_dim},), over one head, got {tuple(weight.shape)}. A norm over all "
                "heads (Wan) has to run before."
            )
    if (rotary is not None or order is not None) and q.shape[1] != k.shape[1]:
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
        raise ValueError(
            f"cos and sin must have one shape, got {[tuple(t.shape) for t in tables]}."
        )
    if order is not None and (
        order.dim() != 1 or order.dtype not in (torch.int32, torch.int64) or not order.numel()
    ):
        raise ValueError(
            f"order must be int32 or int64 [S_out], not empty, got {order.dtype} {tuple(order.shape)}."
        )


def plan_launches(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: PrologueSpec,
    *,
    norm_q: Tensor | None = None,
    norm_k: Tensor | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    order: Tensor | None = None,
) -> tuple[Operands, list[Launch]]:
    """Empty outputs, and the launches that fill them, in their order. Inputs as in `prologue`, checked."""
    from . import prologue_kernel as kernels

    head_dim = q.shape[-1]
    order = None if order is None else order.contiguous()
    tables = None
    if rotary is not None:
        cos, sin = (_rows_in_memory(x.reshape(-1, x.shape[-1])) for x in rotary)
        tables = kernels.Rotary(cos, sin, cos.stride(0), sin.stride(0))

    def side(x: Tensor) -> kernels.Side:
        x = _rows_in_memory(x)
        length = x.shape[1] if order is None else order.numel()
        return kernels.Side(
            x, None, None, None, None, *x.stride()[:3], 0, 0, 0, 0, x.shape[1], length, x.shape[2]
        )

    def written(
        x: kernels.Side, out: Tensor, scale: Tensor | None, strides: tuple[int, ...]
    ) -> kernels.Side:
        names = ("out_b", "out_s", "out_h", "out_d")
        return x._replace(out=out, scale=scale, **dict(zip(names, strides, strict=True)))

    def float32(*shape: int) -> Tensor:
        return _empty(shape, torch.float32, q.device)

    batch = q.shape[0]
    sides = {
        "q": side(q)._replace(weight=None if norm_q is None else norm_q.contiguous()),
        "k": side(k)._replace(weight=None if norm_k is None else norm_k.contiguous()),
        "v": side(v),
    }
    k_mean = float32(batch, k.shape[2], head_dim) if spec.smooth_k else None
    v_scale = float32(batch, k.shape[2], head_dim) if spec.v != "same" else None
    launches: list[Launch] = []
    if k_mean is not None or v_scale is not None:
        launches += kernels.first_read_launches(
            sides["k"], sides["v"], tables, eps=spec.eps, mean=k_mean, scale=v_scale
        )

    for name, rows in (("q", spec.q_rows), ("k", spec.k_rows)):
        x = sides[name]
        dtype = FORMATS[spec.qk][0] if spec.qk in FORMATS else q.dtype
        out = _empty((batch, x.out_length, x.heads, head_dim), dtype, q.device)
        scale = float32(batch, x.heads, -(-x.out_length // rows)) if spec.qk != "same" else None
        sides[name] = written(x, out, scale, out.stride())
    sides["k"] = sides["k"]._replace(mean=k_mean)
    launches.append(
        kernels.qk_launch(
            sides["q"], sides["k"], tables, order, eps=spec.eps, fold=spec.softmax_scale,
            rows=(spec.q_rows, spec.k_rows),
        )
    )  # fmt: skip

    v_out = v
    if spec.v != "same" or spec.v_layout != "tokens" or order is not None:
        x = sides["v"]
        dtype = FORMATS[spec.v][0] if spec.v in FORMATS else v.dtype
        padded, strides = x.out_length, (1, 2, 3)
        if spec.v_layout == "tokens":
            v_out = _empty((batch, padded, x.heads, head_dim), dtype, q.device)
            strides = v_out.stride()
        else:
            padded = -(-padded // spec.v_padding) * spec.v_padding
            v_out = _empty((batch, x.heads, head_dim, padded), dtype, q.device)
            strides = tuple(v_out.stride(axis) for axis in (0, 3, 1, 2))
        x = written(x, v_out, v_scale, strides)
        launches.append(kernels.value_launch(x, order, padded=padded, layout=spec.v_layout))
    return (
        Operands(sides["q"].out, sides["k"].out, v_out, sides["q"].scale, sides["k"].scale, v_scale, k_mean),
        launches,
    )  # fmt: skip


def _rows_in_memory(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """All outputs come from here: tests fill them with what must not be left."""
    return torch.empty(shape, dtype=dtype, device=device)


# In plain PyTorch ----------------------------------------------------------------------------------


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: PrologueSpec = PrologueSpec(),
    *,
    norm_q: Tensor | None = None,
    norm_k: Tensor | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    order: Tensor | None = None,
) -> Operands:
    """`prologue`, computed in the inputs' dtype: for the exact result, give float64 (q, k and v suffice)."""
    q = _rotated(_normalized(q, norm_q, spec.eps), rotary)
    k = _rotated(_normalized(k, norm_k, spec.eps), rotary)
    v_top = v.abs().amax(1)  # [B, Hk, D]
    k_mean = k.mean(1) if spec.smooth_k else None
    if k_mean is not None:
        k = k - k_mean[:, None]
    q, k, v = (_ordered(x, order) for x in (q, k, v))
    q_scale = k_scale = v_scale = None
    if spec.qk in FORMATS:
        q, q_scale = _quantized_rows(q, spec.qk, spec.q_rows)
        q_scale = q_scale * spec.softmax_scale
        k, k_scale = _quantized_rows(k, spec.qk, spec.k_rows)
    if spec.v in FORMATS:
        v_scale = v_top.clamp(min=TINY) / FORMATS[spec.v][1]
        v = _rounded(v / v_scale[:, None], spec.v)
    if spec.v_layout != "tokens":
        v = torch.nn.functional.pad(
            v.permute(0, 2, 3, 1).float(), (0, -v.shape[1] % spec.v_padding)
        ).to(v.dtype)
    if spec.v_layout == "channels16":
        v = v.unflatten(-1, (-1, 16))[..., list(SWAPPED)].flatten(-2)
    return Operands(q, k, v, q_scale, k_scale, v_scale, k_mean)


def dequantized(operands: Operands, spec: PrologueSpec) -> tuple[Tensor, Tensor, Tensor]:
    """q, k [B, S, H, D] and v [B, S, Hk, D] that the operands stand for, in float32; q without
    softmax_scale, k without its mean."""
    q, k, v, q_scale, k_scale, v_scale, _ = operands
    length = k.shape[1]
    q, k, v = q.float(), k.float(), v.float()
    if q_scale is not None and k_scale is not None:
        q = q * _by_token(q_scale / spec.softmax_scale, spec.q_rows, q.shape[1])
        k = k * _by_token(k_scale, spec.k_rows, length)
    if spec.v_layout == "channels16":
        back = torch.tensor(SWAPPED, device=v.device).argsort()
        v = v.unflatten(-1, (-1, 16))[..., back].flatten(-2)
    if spec.v_layout != "tokens":
        v = v[..., :length].permute(0, 3, 1, 2)
    return q, k, v if v_scale is None else v * v_scale[:, None].float()


def _by_token(scale: Tensor, rows: int, length: int) -> Tensor:
    """[B, H, n] -> [B, S, H, 1]."""
    return scale.repeat_interleave(rows, 2)[..., :length].transpose(1, 2)[..., None].float()


def _normalized(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return x
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(x.dtype)


def _rotated(x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
    if rotary is None:
        return x
    cos, sin = (t.reshape(-1, 1, t.shape[-1]).to(x.dtype) for t in rotary)
    if cos.shape[-1] == x.shape[-1]:
        cos, sin = cos[..., 0::2], sin[..., 1::2]
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)


def _ordered(x: Tensor, order: Tensor | None) -> Tensor:
    if order is None:
        return x
    return x[:, order.long().clamp(min=0)].masked_fill((order < 0)[None, :, None, None], 0.0)


def _quantized_rows(x: Tensor, format: str, rows: int) -> tuple[Tensor, Tensor]:
    """Codes [B, S, H, D] and scales [B, H, ceil(S / rows)] in x's dtype."""
    length = x.shape[1]
    top = torch.nn.functional.pad(x.abs().amax(-1).transpose(1, 2), (0, -length % rows))
    scale = top.unflatten(-1, (-1, rows)).amax(-1).clamp(min=TINY) / FORMATS[format][1]
    by_token = scale.repeat_interleave(rows, 2)[..., :length].transpose(1, 2)[..., None]
    return _rounded(x / by_token, format), scale


def _rounded(x: Tensor, format: str) -> Tensor:
    dtype = FORMATS[format][0]
    x = x.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    return (x.round() if dtype == torch.int8 else x).to(dtype)
