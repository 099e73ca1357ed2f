"""What the tokens of one attention call are: segments of text, grids and registers in one sequence."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Literal

SegmentKind = Literal["text", "grid", "guidance", "register"]


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens of one kind. `shape` is (n,) for text and registers, (T, H, W), (H, W) or (L,) for grids.

    keys_only: tokens that are attended to and do not attend; such segments end a layout.
    """

    kind: SegmentKind
    shape: tuple[int, ...]
    keys_only: bool = False

    def __post_init__(self):
        if not self.shape or any(n < 1 for n in self.shape):
            raise ValueError(
                f"A segment needs at least one token on every axis, got {self.kind} {self.shape}."
            )
        if self.kind in ("text", "register") and len(self.shape) != 1:
            raise ValueError(f"A {self.kind} segment has one axis, got shape {self.shape}.")

    @property
    def length(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class TokenLayout:
    """The segments of a sequence, in the order in which the model holds them.

    >>> TokenLayout.joint(text=512, grids=[(64, 64)]).length
    4608
    """

    segments: tuple[Segment, ...]

    def __post_init__(self):
        kept = [s.keys_only for s in self.segments]
        if kept != sorted(kept):
            raise ValueError(f"Segments of keys only must end a layout, got {self.segments}.")

    @classmethod
    def joint(cls, *, text: int = 0, grids: list[tuple[int, ...]], text_first: bool = True):
        """Text and one or more grids, as the joint attention of FLUX (text first) or Wan (no text) sees them."""
        words = (Segment("text", (text,)),) if text else ()
        images = tuple(Segment("grid", tuple(shape)) for shape in grids)
        return cls(words + images if text_first else images + words)

    @property
    def length(self) -> int:
        return sum(s.length for s in self.segments)

    @property
    def queries(self) -> int:
        """Number of tokens that attend: the first of the sequence."""
        return sum(s.length for s in self.segments if not s.keys_only)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where each segment starts, and the total length: len(segments) + 1 numbers."""
        return (0, *accumulate(s.length for s in self.segments))
