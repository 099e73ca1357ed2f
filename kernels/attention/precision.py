"""Precision: in which number formats queries meet keys (qk) and weights meet values (pv).

>>> Precision.parse("int8_fp8")
Precision(qk='int8', pv='fp8', smooth_k=True, smooth_q=False, smooth_v=False, q_scale='token', k_scale='block')
>>> str(Precision(qk="fp8", pv="fp8", smooth_k=False))
'fp8-smooth_k'
>>> Precision.parse("fp8_tile") == Precision(qk="fp8", pv="fp8", q_scale="tile", k_scale="tile")
True
>>> str(Precision(qk="int4", pv="fp16", smooth_q=True, q_scale="thread", k_scale="thread"))
'int4_fp16+smooth_q+q_thread+k_thread'
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, NamedTuple

QK_FORMATS = ("model", "int8", "fp8", "int4")
PV_FORMATS = ("model", "fp8", "fp16")


class Groups(NamedTuple):
    """Tokens of a head that share a scale. tile: neighbouring tokens, None for all; groups: of a tile, which
    token n joins by (n % 8) // (8 // groups), as the threads of a warp own the rows of a tensor core's tile."""

    tile: int | None
    groups: int = 1


# By name, of queries and of keys. Without a suffix as SageAttention2 does it on Hopper (tiles of 16 queries a
# warp and 128 keys); "_sm80" as in its paper and on sm_80 and sm_89 (32 queries a warp, 64 keys).
SCALES: dict[str, tuple[Groups, Groups]] = {
    "tensor": (Groups(None), Groups(None)),
    "block": (Groups(128), Groups(128)),
    "warp": (Groups(16), Groups(128)),
    "thread": (Groups(16, 8), Groups(128, 4)),
    "token": (Groups(1), Groups(1)),
    "block_sm80": (Groups(128), Groups(64)),
    "warp_sm80": (Groups(32), Groups(64)),
    "thread_sm80": (Groups(32, 8), Groups(64, 4)),
}
# Not among them: the tokens of a tile of the plan, of queries, and of an entry of its lists, of keys.
TILE = "tile"
SCALE_NAMES = (*SCALES, TILE)

# The short names that have one word for both formats.
_SHORT = {("model", "model"): "model", ("fp8", "fp8"): "fp8", ("int8", "model"): "int8",
          ("int4", "model"): "int4"}  # fmt: skip
NAMES = {
    **{name: formats for formats, name in _SHORT.items()},
    **{f"{qk}_{pv}": (qk, pv) for qk in QK_FORMATS for pv in PV_FORMATS if (qk, pv) not in _SHORT},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """The formats of one attention. Immutable and hashable; `str` and `parse` are inverse.

    qk: of queries and keys. "model" keeps what the model computes in, usually bfloat16; "int8", "fp8"
        (e4m3) and "int4" round queries and keys to it. INT4 is multiplied as INT8, as tensor cores since Hopper
        have no INT4: it costs accuracy and saves no time. The portable kernel ("triton") reads two codes a
        byte and unpacks them in registers: half the memory of INT8. The one for Hopper, whose tensor cores
        read codes from where they were loaded to, has a byte for each.
    pv: of weights and values. "model"; "fp8" (e4m3): values have a scale per channel, weights are at most 448,
        and every block of keys is summed from zero and then added in fp32, because tensor cores sum FP8
        products with 14 bits (two-level accumulation); "fp16": weights have 3 bits more than in bfloat16.
    smooth_k: subtract from the keys their mean first (of every few of many tokens), which changes no softmax. True by default
        where keys are rounded. Keys of real models have channels far from 0: with one at 15 times their
        deviation the error of FP8 falls by a quarter and that of INT8 by more; it takes 0.4% of the
        time at 16,896 tokens and 4% at 4,608 (H200, dense).
    smooth_q: subtract from the queries the mean of their tile of the plan; its products with the keys are
        added in fp32.
    smooth_v: subtract from the values their mean over tokens, and add it to the output.
    q_scale, k_scale: tokens that share a scale, by the names of `SCALES`: "tensor" (all of a head), "block" (128
        neighbours), "warp" (16 queries; 128 keys), "thread" (2 queries of 16; 32 keys of 128), "token", and with "_sm80"
        what SageAttention's paper and its older kernels share: 4 queries of 32, 16 keys of 64 to a thread.
        Keys are counted within the entries of the plan, where those are long enough. "tile": what the kernel
        multiplies together, a tile of queries of the plan, an entry of keys, however short; with tile windows
        these are 3-D tiles of a video, or pieces of those larger than a block. A short name with "_tile"
        behind it has it for both.

    Sources: SageAttention2 (Zhang et al., arXiv 2411.10958, section 3); "fp8_tile": FPSAttention (arXiv 2506.04648).
    """

    qk: str = "model"
    pv: str = "model"
    smooth_k: bool | None = None
    smooth_q: bool = False
    smooth_v: bool = False
    q_scale: str = "token"
    k_scale: str = "block"

    def __post_init__(self):
        known = {"qk": QK_FORMATS, "pv": PV_FORMATS, "q_scale": SCALE_NAMES, "k_scale": SCALE_NAMES}
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"Unknown precision {name}={getattr(self, name)!r}. "
                    f"Available: {', '.join(map(repr, choices))}."
                )
        if self.smooth_k is None:
            object.__setattr__(self, "smooth_k", self.qk != "model")
        for name in ("smooth_k", "smooth_q", "smooth_v"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}.")
        changed = [name for name in ("smooth_k", "smooth_q") if getattr(self, name)]
        changed += [f"{name}={getattr(self, name)!r}" for name, default in
                    (("q_scale", "token"), ("k_scale", "block")) if getattr(self, name) != default]  # fmt: skip
        if self.qk == "model" and changed:
            raise ValueError(
                f"{', '.join(changed)} is about rounded queries and keys, which qk='model' has not. "
                "Choose qk='int8', 'fp8' or 'int4', or leave it out."
            )
        if self.pv == "model" and self.smooth_v:
            raise ValueError(
                "smooth_v is about rounded values, which pv='model' has not. Choose pv='fp8', or leave it out."
            )

    @property
    def is_model(self) -> bool:
        """True where nothing is rounded."""
        return self.qk == self.pv == "model"

    @property
    def name(self) -> str:
        """The short name of the formats alone: "model", "fp8", "int8_fp8", "int8", ..."""
        return _SHORT.get((self.qk, self.pv), f"{self.qk}_{self.pv}")

    @property
    def caveat(self) -> str:
        """What a user should know before choosing it; empty if nothing."""
        if self.qk != "int4":
            return ""
        return (
            "INT4 codes are multiplied as INT8, as GPUs since Hopper have no INT4 units: it shows the quality of 4 bits "
            "and saves no time; only impl='triton' stores two of them a byte, which saves memory"
        )

    def __str__(self) -> str:
        """The short name with what differs from its defaults: "int8_fp8-smooth_k+smooth_q"."""
        by_tile = self.q_scale == self.k_scale == TILE
        plain = Precision(qk=self.qk, pv=self.pv)
        if by_tile:
            plain = replace(plain, q_scale=TILE, k_scale=TILE)
        out = self.name + by_tile * _BY_TILE
        for name in ("smooth_k", "smooth_q", "smooth_v"):
            if (ours := getattr(self, name)) != getattr(plain, name):
                out += f"{'+' if ours else '-'}{name}"
        for name in ("q_scale", "k_scale"):
            if (ours := getattr(self, name)) != getattr(plain, name):
                out += f"+{name[0]}_{ours}"
        return out

    @classmethod
    def parse(cls, text: str | Precision) -> Precision:
        """From a short name, with "+flag" or "-flag" for what differs. A Precision is returned as it is.

        Raises ValueError that names the choices.
        """
        return text if isinstance(text, Precision) else _parse(text)

    def to_dict(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Precision:
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(
                f"A precision has no {', '.join(map(repr, unknown))}. It has: {', '.join(known)}."
            )
        return cls(**values)


# What may follow a short name: the field it sets, and the value.
FLAGS: dict[str, tuple[str, bool | str]] = {
    **{name: (name, True) for name in ("smooth_k", "smooth_q", "smooth_v")},
    **{f"{side}_{scale}": (f"{side}_scale", scale) for side in "qk" for scale in SCALE_NAMES},
}
_BY_TILE = "_tile"


@lru_cache(maxsize=256)
def _parse(text: str) -> Precision:
    if not isinstance(text, str):
        raise TypeError(f"A precision is a name or a Precision, got {type(text).__name__}.")
    name, *flags = text.replace("-", "+-").split("+")
    formats = name.removesuffix(_BY_TILE)
    if formats not in NAMES:
        raise ValueError(
            f"Unknown precision {text!r}. Available: {', '.join(map(repr, NAMES))}, each with "
            "_tile, +smooth_q, -smooth_k, +q_thread and others behind it."
        )
    qk, pv = NAMES[formats]
    options: dict[str, Any] = {}
    if formats != name:
        options = {"q_scale": TILE, "k_scale": TILE}
    for flag in flags:
        field, value = FLAGS.get(flag.removeprefix("-"), (None, None))
        if field is None or (flag.startswith("-") and value is not True):
            raise ValueError(
                f"Unknown flag {flag!r} in the precision {text!r}. Available: "
                f"{', '.join(f'+{flag}' for flag in FLAGS)}, -smooth_k, -smooth_q, -smooth_v."
            )
        options[field] = not flag.startswith("-") if value is True else value
    return Precision(qk=qk, pv=pv, **options)


MODEL = Precision()
