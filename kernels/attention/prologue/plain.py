"""The prologue in plain PyTorch, in the inputs' dtype, and what its operands stand for."""

from __future__ import annotations

import torch
from torch import Tensor

from .spec import FORMATS, SWAPPED, TINY, Operands, PrologueSpec, mean_step


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
    key_order: Tensor | None = None,
) -> Operands:
    """`prologue`, computed in the inputs' dtype: for the exact result, give float64 (q, k and v suffice)."""
    q = _rotated(_normalized(q, norm_q, spec.eps), rotary)
    k = _rotated(_normalized(k, norm_k, spec.eps), rotary)
    v_top, k_top = v.abs().amax(1), k.abs().amax(1)  # [B, Hk, D]
    k_mean = None
    if spec.smooth_k:
        every = not spec.k_rows or (norm_k is not None and norm_k.numel() > k.shape[-1])
        k_mean = k[:, :: 1 if every else mean_step(k.shape[1])].mean(1)
        k, k_top = k - k_mean[:, None], k_top + k_mean.abs()
    q = _ordered(q, order)
    k, v = (_ordered(x, order if key_order is None else key_order) for x in (k, v))
    q_scale = k_scale = v_scale = None
    if spec.qk in FORMATS:
        q, q_scale = _quantized_rows(q, spec.qk, spec.q_rows)
        q_scale = q_scale * spec.softmax_scale
        if spec.k_rows:
            k, k_scale = _quantized_rows(k, spec.qk, spec.k_rows, spec.k_groups)
        else:
            k_scale = (
                k_top.amax(-1, keepdim=True).clamp(min=TINY) / FORMATS[spec.qk][1]
            )  # [B, Hk, 1]
            k = _rounded(k / k_scale[:, None], spec.qk)
    if spec.v in FORMATS:
        v_scale = v_top.clamp(min=TINY) / FORMATS[spec.v][1]
        v = _rounded(v / v_scale[:, None], spec.v)
    if spec.v_layout != "tokens":
        v = torch.nn.functional.pad(
            v.permute(0, 2, 3, 1).float(), (0, -v.shape[1] % spec.v_padding)
        ).to(v.dtype)
    if spec.v_layout == "channels16":
        v = v.unflatten(-1, (-1, 16))[..., list(SWAPPED)].flatten(-2)
    if spec.qk == "int4x2":
        q, k = pack_int4(q), pack_int4(k)
    return Operands(q, k, v, q_scale, k_scale, v_scale, k_mean)


def dequantized(operands: Operands, spec: PrologueSpec) -> tuple[Tensor, Tensor, Tensor]:
    """q, k [B, S, H, D] and v [B, S, Hk, D] that the operands stand for, in float32; q without
    softmax_scale, k without its mean, v with v_mean."""
    q, k, v, q_scale, k_scale, v_scale, _, v_mean = operands
    length = k.shape[1]
    if spec.qk == "int4x2":
        q, k = unpack_int4(q), unpack_int4(k)
    q, k, v = q.float(), k.float(), v.float()
    if q_scale is not None and k_scale is not None:
        q = q * _by_token(q_scale / spec.softmax_scale, spec.q_rows, q.shape[1])
        k = k * _by_token(k_scale, spec.k_rows, length)
    if spec.v_layout == "channels16":
        back = torch.tensor(SWAPPED, device=v.device).argsort()
        v = v.unflatten(-1, (-1, 16))[..., back].flatten(-2)
    if spec.v_layout != "tokens":
        v = v[..., :length].permute(0, 3, 1, 2)
    if v_scale is not None:
        v = v * v_scale[:, None].float()
    return q, k, v if v_mean is None else v + v_mean[:, None].float()


def _by_token(scale: Tensor, rows: int, length: int) -> Tensor:
    """[B, H, n], or [B, H, n, groups] -> [B, S, H, 1]."""
    return scale_of_tokens(scale, rows, length).transpose(1, 2)[..., None].float()


def scale_of_tokens(scale: Tensor, rows: int, length: int) -> Tensor:
    """Scales of so many rows each (0: of all), [B, H, n], or of groups of these, [B, H, n, groups] -> [B, H, length]."""
    if scale.dim() == 4:
        each = 8 // scale.shape[3]
        scale = scale[:, :, :, None].expand(-1, -1, -1, rows // 8, -1).flatten(2)
        rows = each
    return scale.repeat_interleave(rows or length, 2)[..., :length]


def _normalized(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Over every head [D], or over all heads of a token [H * D]."""
    if weight is None:
        return x
    axes = -1 if weight.numel() == x.shape[-1] else (-2, -1)
    weight = weight.to(x.dtype) if axes == -1 else weight.to(x.dtype).view(x.shape[-2:])
    return x * torch.rsqrt(x.square().mean(axes, keepdim=True) + eps) * weight


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


def _quantized_rows(x: Tensor, format: str, rows: int, groups: int = 1) -> tuple[Tensor, Tensor]:
    """Codes [B, S, H, D] and scales [B, H, ceil(S / rows)], of several groups [..., groups], in x's dtype."""
    length = x.shape[1]
    top = torch.nn.functional.pad(x.abs().amax(-1).transpose(1, 2), (0, -length % rows))
    if groups == 1:
        top = top.unflatten(-1, (-1, rows)).amax(-1)
    else:
        top = top.unflatten(-1, (-1, rows // 8, groups, 8 // groups)).amax((-3, -1))
    scale = top.clamp(min=TINY) / FORMATS[format][1]
    by_token = scale_of_tokens(scale, rows, length).transpose(1, 2)[..., None]
    return _rounded(x / by_token, format), scale


def _rounded(x: Tensor, format: str) -> Tensor:
    x = x.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    return x.to(FORMATS[format][0]) if format == "fp8" else x.round().to(torch.int8)


def pack_int4(codes: Tensor) -> Tensor:
    """Codes -7 .. 7 in int8 [..., D] -> two a byte, uint8 [..., D / 2]: channel 2 j in the low bits of byte j.

    Tensor cores of Hopper and newer have no INT4: there codes are unpacked and multiplied as INT8, so that half
    the memory is all that is gained.
    """
    if codes.dtype != torch.int8 or codes.shape[-1] % 2:
        raise ValueError(
            f"pack_int4 takes int8 with an even last dim, got {codes.dtype} {tuple(codes.shape)}."
        )
    low, high = (codes & 15).view(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    return low | (high << 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """The inverse of `pack_int4`: uint8 [..., D / 2] -> int8 [..., D]."""
    if packed.dtype != torch.uint8:
        raise ValueError(f"unpack_int4 takes uint8, got {packed.dtype}.")
    codes = torch.stack((packed << 4, packed & 240), -1).view(torch.int8)
    return (codes >> 4).flatten(-2)  # an arithmetic shift keeps the sign
