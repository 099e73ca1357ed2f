"""The operands of 8-bit attention, and a plain torch quantiser: what any faster prologue must reproduce.

Two pairs of formats: "fp8" is e4m3 throughout, "int8_fp8" has queries and keys in int8 and weights and
values in e4m3, as in SageAttention2 (Zhang et al., arXiv 2411.10958).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

K_BLOCK = 128  # keys that share a scale
E4M3_MAX = 448.0
# Position p of 16 stored value tokens holds token ORDER[p]. So the registers in which a thread finds
# its scores already are the ones in which wgmma takes 8-bit weights: no shuffles.
ORDER = (0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)
_LARGEST = {"fp8": E4M3_MAX, "int8_fp8": 127.0}
PRECISIONS = tuple(_LARGEST)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Operands:
    """x = scale * stored, all scales fp32 and positive.

    q: [B, Sq, H, D], k: [B, Sk, Hk, D], both int8 or both e4m3. q_scale: [B, H, Sq], one a query.
    k_scale: [B, Hk, ceil(Sk / 128)], one a block of 128 keys.
    v: e4m3 [B, Hk, D, Sk rounded up to 128], tokens of every 16 in ORDER, zero (or finite) past Sk.
    v_scale: [B, Hk, D], one a channel.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_scale: Tensor
    k_scale: Tensor
    v_scale: Tensor


def quantize(q: Tensor, k: Tensor, v: Tensor, precision: str) -> Operands:
    """q [B, Sq, H, D], k and v [B, Sk, Hk, D] of any float dtype; no smoothing."""
    largest = _LARGEST[precision]
    q, k, v = (x.float() for x in (q, k, v))
    batch, length, heads, _ = k.shape
    blocks = -(-length // K_BLOCK)

    q_scale = _scale(q.abs().amax(-1), largest)  # [B, Sq, H]
    k_max = pad(k.abs().amax(-1), (0, 0, 0, blocks * K_BLOCK - length))
    k_scale = _scale(k_max.view(batch, blocks, K_BLOCK, heads).amax(2), largest)
    k_each = k_scale.repeat_interleave(K_BLOCK, 1)[:, :length]  # [B, Sk, Hk]
    v_scale = _scale(v.abs().amax(1), E4M3_MAX)  # [B, Hk, D]

    v = pad((v / v_scale[:, None]).permute(0, 2, 3, 1), (0, blocks * K_BLOCK - length))
    order = torch.tensor(ORDER, device=v.device)
    v = v.unflatten(-1, (-1, 16))[..., order].flatten(-2)
    return Operands(
        q=_stored(q / q_scale[..., None], precision), k=_stored(k / k_each[..., None], precision),
        v=_stored(v, "fp8"), q_scale=q_scale.transpose(1, 2).contiguous(),
        k_scale=k_scale.transpose(1, 2).contiguous(), v_scale=v_scale,
    )  # fmt: skip


def dequantize(x: Operands, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, Sq, H, D], k and v [B, Sk, Hk, D] that the stored values stand for."""
    length = x.k.shape[1]
    q = x.q.float().to(dtype) * x.q_scale.to(dtype).transpose(1, 2)[..., None]
    k_each = x.k_scale.to(dtype).transpose(1, 2).repeat_interleave(K_BLOCK, 1)[:, :length]
    k = x.k.float().to(dtype) * k_each[..., None]
    place = torch.tensor(ORDER, device=x.v.device).argsort()
    v = x.v.float().to(dtype).unflatten(-1, (-1, 16))[..., place].flatten(-2)[..., :length]
    v = (v * x.v_scale.to(dtype)[..., None]).permute(0, 3, 1, 2)
    return q, k, v


def _scale(most: Tensor, largest: float) -> Tensor:
    return most.clamp(min=1e-7) / largest  # a row of zeros has a scale too


def _stored(x: Tensor, precision: str) -> Tensor:
    if precision == "int8_fp8":
        return x.round().clamp(-127, 127).to(torch.int8)
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
