"""What the prologue is asked for, and what it gives."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Codes and the largest one. "int4" is -7 .. 7 in int8, for tensor cores without 4 bits, "int4x2" two of them a byte,
# as `pack_int4` stores them.
FORMATS = {
    "int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0), "int4": (torch.int8, 7.0),
    "int4x2": (torch.uint8, 7.0),
}  # fmt: skip
LAYOUTS = ("tokens", "channels", "channels16")
# Position p of every 16 tokens of "channels16" holds token SWAPPED[p]: the fp32 accumulator of Q K^T then is,
# register for register, the 8-bit operand of P V (SageAttention's order).
SWAPPED = (0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)
MAX_HEAD_DIM = 256
MAX_ROWS = 128
# Keys of a block that have a scale together with k_groups: key n with those of equal n % 8 // 2, whose scores one thread
# of a tensor core's tile holds (SageAttention2, section 3.3).
K_GROUPS = 4
TINY = 2.0**-100  # the least maximum that a scale is made of: a row of zeros has a scale above zero


def mean_step(length: int) -> int:
    """The mean that smoothing takes from keys is over every so many of `length` tokens (all, after a norm over heads).

    What is taken from all keys alike changes no softmax, so it need not be the mean itself. Of 1,024 tokens or
    more it is within 3% of the deviation, and K is read once and an eighth, not twice.
    """
    return max(1, min(8, length // 1024))


@dataclass(frozen=True, kw_only=True, slots=True)
class PrologueSpec:
    """What the attention kernel wants.

    qk: "same" (the dtype of the inputs), "int8", "fp8" (e4m3), "int4" (-7 .. 7, kept in int8) or "int4x2" (two of
        these a byte, `pack_int4`).
    q_rows, k_rows: tokens that share a scale: 1, 2, 4, ... 128. (128 of head dim 256 spill registers.) k_rows may be
        0, one scale for all keys of a head: of a bound of their largest channel, which a first read finds; e4m3 rounds
        the same under any.
    k_groups: 1, or 4: so many scales for every k_rows keys (8 at least), see `K_GROUPS`.
    v: "same" or "fp8" (e4m3, a scale per channel).
    v_layout: "tokens" [B, S, H, D]; "channels" [B, H, D, S padded] or "channels16", the same with the
        tokens inside every 16 in the order `SWAPPED`.
    v_padding: the channel layouts are padded with zeros to a multiple of it.
    smooth_k: subtract from K its mean over tokens (over every few, see `mean_step`). It changes no softmax,
        only the log-sum-exp: a kernel that returns one adds softmax_scale * (q . k_mean).
    softmax_scale: is multiplied into q_scale (not into q).
    eps: of the RMSNorm.
    """

    qk: str = "same"
    q_rows: int = 1
    k_rows: int = 1
    k_groups: int = 1
    v: str = "same"
    v_layout: str = "tokens"
    v_padding: int = 128
    smooth_k: bool = False
    softmax_scale: float = 1.0
    eps: float = 1e-6
    version: int = 1

    def __post_init__(self):
        choices = {"qk": ("same", *FORMATS), "v": ("same", "fp8"), "v_layout": LAYOUTS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}.")
        for name in ("q_rows", "k_rows"):
            rows = getattr(self, name)
            if (name, rows) == ("k_rows", 0) and self.qk != "same":
                continue
            if not 1 <= rows <= MAX_ROWS or rows & (rows - 1):
                raise ValueError(f"{name} must be a power of two up to {MAX_ROWS}, got {rows}.")
        if self.k_groups not in (1, K_GROUPS) or (self.k_groups > 1 and self.k_rows < 8):
            raise ValueError(
                f"k_groups must be 1 or {K_GROUPS}, of 8 k_rows or more, got {self.k_groups} of {self.k_rows}."
            )
        if self.v_padding < 16 or self.v_padding % 16:
            raise ValueError(f"v_padding must be a multiple of 16, got {self.v_padding}.")
        if self.qk == "same" and (
            self.q_rows, self.k_rows, self.k_groups, self.softmax_scale) != (1, 1, 1, 1.0):  # fmt: skip
            raise ValueError(
                "q_rows, k_rows, k_groups and softmax_scale are about scales, which qk='same' has not: "
                "leave them at 1, or choose qk='int8' or 'fp8'."
            )
        if self.k_rows == 0 and self.qk != "fp8":
            raise ValueError(
                f"k_rows=0, one scale for all keys of a head, is for qk='fp8', got {self.qk!r}."
            )
        if self.version != 1:
            raise ValueError(f"PrologueSpec version {self.version} is not known, only 1.")

    def key_scales(self, length: int) -> tuple[int, ...]:
        """The shape of the scales of so many keys of a head."""
        if self.k_rows == 0:
            return (1,)
        return (-(-length // self.k_rows), *[self.k_groups] * (self.k_groups > 1))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PrologueSpec:
        return cls(**values)


# What `gluon_sm90.eight_bit` reads; smooth_k and softmax_scale are free.
EIGHT_BIT = {
    name: PrologueSpec(qk=qk, k_rows=128, v="fp8", v_layout="channels16")
    for name, qk in (("fp8", "fp8"), ("int8_fp8", "int8"))
}


class Operands(NamedTuple):
    """The operands of an attention kernel. None: this spec has none.

    q [B, S, H, D], k [B, S, Hk, D], uint8 [..., D / 2] where they hold two codes a byte; v in the layout of the spec.
    q_scale [B, H, ceil(S / q_rows)], k_scale [B, Hk, *spec.key_scales(S)], v_scale [B, Hk, D]: fp32, above
    zero; a value is code * scale, and that of q includes softmax_scale.
    k_mean [B, Hk, D]: fp32, what smoothing has subtracted.
    v_mean [B, Hk, D]: fp32, with v_scale: what kernels add to outputs of queries that see a key. Who takes a mean
        from the values before puts it here (weights of a row add up to 1).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_scale: Tensor | None
    k_scale: Tensor | None
    v_scale: Tensor | None
    k_mean: Tensor | None
    v_mean: Tensor | None = None

    @property
    def head_dim(self) -> int:
        return self.q.shape[-1] * (2 if self.q.dtype == torch.uint8 else 1)

    @property
    def nbytes(self) -> int:
        """Memory of all of them."""
        return sum(x.nbytes for x in self if x is not None)
