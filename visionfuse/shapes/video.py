"""The caption language of the shapes videos: clips of one or two moving shapes, and the held-out split.

    a green triangle moves left while a red circle stays still on a white background

Colours, shapes, backgrounds and the pairs that no training caption names are those of the pictures
(`captions`). Test captions are kept out of training in the same two ways: by these pairs, and by a
checksum of the text.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from visionfuse.shapes.captions import (
    BACKGROUNDS,
    COLORS,
    HELD_OUT_PAIRS,
    PAIRS,
    SHAPES,
    TRAIN_PAIRS,
    Group,
)

MOTIONS = (
    "stays still",
    "moves left",
    "moves right",
    "moves up",
    "moves down",
    "turns",
    "bounces",
)
ROUND = ("circle", "ring")  # turning one changes nothing
MAX_ACTORS = 2
TWO = 0.65  # share of captions with two shapes
NAMED_BACKGROUND = 0.85


@dataclass(frozen=True, kw_only=True)
class Actor:
    """One shape and what it does during the whole clip."""

    color: str
    shape: str
    motion: str

    @property
    def text(self) -> str:
        return f"{Group(color=self.color, shape=self.shape).text} {self.motion}"


@dataclass(frozen=True, kw_only=True)
class Clip:
    """What a caption says. An empty `background` is not named and may be any."""

    actors: tuple[Actor, ...]
    background: str = ""

    @property
    def text(self) -> str:
        body = " while ".join(actor.text for actor in self.actors)
        return f"{body} on a {self.background} background" if self.background else body

    @property
    def kind(self) -> str:
        return "one" if len(self.actors) == 1 else "two"


def has_new_pair(clip: Clip) -> bool:
    """Whether it names a colour and shape that no training caption names together."""
    return any((actor.color, actor.shape) in HELD_OUT_PAIRS for actor in clip.actors)


def is_held_out(clip: Clip) -> bool:
    """True if the clip must not be trained on: it belongs to the test captions."""
    return has_new_pair(clip) or zlib.crc32(clip.text.encode()) % 16 == 0


def sample(rng: random.Random, pairs: Sequence[tuple[str, str]] = PAIRS) -> Clip:
    """Draw one clip whose shapes have distinct (colour, shape) pairs out of `pairs`."""
    chosen = rng.sample(pairs, 2 if rng.random() < TWO else 1)

    def motion(shape: str) -> str:
        return rng.choice([m for m in MOTIONS if m != "turns" or shape not in ROUND])

    return Clip(
        actors=tuple(
            Actor(color=color, shape=shape, motion=motion(shape)) for color, shape in chosen
        ),
        background=rng.choice(list(BACKGROUNDS)) if rng.random() < NAMED_BACKGROUND else "",
    )


def training_clips(seed: int = 0) -> Iterator[Clip]:
    """Endless stream of clips that are not held out."""
    rng = random.Random(f"train-video-{seed}")
    while True:
        clip = sample(rng, TRAIN_PAIRS)
        if not is_held_out(clip):
            yield clip


def held_out_clips(count: int, seed: int = 0) -> list[Clip]:
    """`count` distinct test clips; every second one names a colour-shape pair never trained on."""
    rng = random.Random(f"test-video-{seed}")
    clips: dict[str, Clip] = {}
    while len(clips) < count:
        new_pair = len(clips) % 2 == 0
        clip = sample(rng, PAIRS if new_pair else TRAIN_PAIRS)
        if is_held_out(clip) and has_new_pair(clip) == new_pair:
            clips.setdefault(clip.text, clip)
    return list(clips.values())


def otherwise(clip: Clip, change: Callable[[Actor], Actor]) -> Clip:
    """The clip whose first shape is another, for checks with a wrong caption."""
    return Clip(actors=(change(clip.actors[0]), *clip.actors[1:]), background=clip.background)


_ACTOR = re.compile(
    rf"an? (?P<color>{'|'.join(COLORS)}) (?P<shape>{'|'.join(SHAPES)}) (?P<motion>{'|'.join(MOTIONS)})"
)


def parse_clip(text: str) -> Clip:
    """Read a caption back into a clip; the inverse of `Clip.text`.

    Raises:
        ValueError: `text` is not in the caption language.
    """
    body, background = text.strip().rstrip("."), ""
    if match := re.fullmatch(rf"(.*) on an? ({'|'.join(BACKGROUNDS)}) background", body):
        body, background = match.groups()
    matches = [_ACTOR.fullmatch(part) for part in body.split(" while ")]
    if not all(matches) or len(matches) > MAX_ACTORS:
        raise ValueError(
            f"cannot read {text!r}; write for example 'a green triangle moves left while a red circle "
            "stays still on a white background'"
        )
    actors = tuple(Actor(**match.groupdict()) for match in matches if match)
    return Clip(actors=actors, background=background)


def clip_vocabulary() -> tuple[str, ...]:
    """Every word that a caption of a video can contain."""
    words = ["a", "an", "while", "on", "background", *COLORS, *SHAPES, *BACKGROUNDS]
    words += [word for motion in MOTIONS for word in motion.split()]
    return tuple(dict.fromkeys(words))
