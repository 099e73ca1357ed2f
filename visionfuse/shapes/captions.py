"""The caption language of the shapes data set: scenes, their text, and the held-out split.

A scene is one to three groups ("two small red circles"), at most one relation between two of them and
a background. `Scene.text` writes it in English, `parse` reads that text back, `sample` draws one.

Two things keep the test captions out of training (`is_held_out`): six colour-shape pairs that no
training caption names, and one sixteenth of all other captions, chosen by a checksum of the text.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLORS = {
    "red": (220, 40, 40),
    "orange": (245, 140, 20),
    "yellow": (245, 220, 40),
    "green": (40, 160, 60),
    "cyan": (40, 200, 220),
    "blue": (40, 80, 220),
    "purple": (140, 50, 180),
    "pink": (250, 130, 190),
}
BACKGROUNDS = {
    "white": (245, 245, 245),
    "black": (20, 20, 20),
    "gray": (128, 128, 128),
    "beige": (225, 205, 165),
}
SIZES = ("small", "large")
NUMBERS = {"two": 2, "three": 3, "four": 4}
MAX_OBJECTS = 4

# Where the centre lies, in (column, row) thirds: -1 first, 0 middle, 1 last, None anywhere.
PLACES = {
    "in the top left corner": (-1, -1),
    "in the top right corner": (1, -1),
    "in the bottom left corner": (-1, 1),
    "in the bottom right corner": (1, 1),
    "in the center": (0, 0),
    "at the top": (None, -1),
    "at the bottom": (None, 1),
    "on the left": (-1, None),
    "on the right": (1, None),
}
# (axis, sign): along axis 0 (x) or 1 (y), the two groups stand in rising (+1) or falling (-1) order.
BETWEEN = {
    "above": (1, 1),
    "below": (1, -1),
    "to the left of": (0, 1),
    "to the right of": (0, -1),
}

HELD_OUT_PAIRS = frozenset(
    {
        ("red", "star"),
        ("blue", "ring"),
        ("green", "triangle"),
        ("yellow", "cross"),
        ("purple", "circle"),
        ("cyan", "square"),
    }
)
PAIRS = tuple((color, shape) for color in COLORS for shape in SHAPES)
TRAIN_PAIRS = tuple(pair for pair in PAIRS if pair not in HELD_OUT_PAIRS)

# How often each kind of caption is drawn; seven in ten name two objects or more.
KINDS = {
    "single": 0.14,
    "place": 0.16,
    "count": 0.16,
    "pair": 0.14,
    "places": 0.14,
    "relation": 0.20,
    "list": 0.06,
}


@dataclass(frozen=True, kw_only=True)
class Group:
    """`count` equal objects. An empty `size` or `place` is not named and may be anything."""

    color: str
    shape: str
    count: int = 1
    size: str = ""
    place: str = ""

    @property
    def text(self) -> str:
        noun = self.shape if self.count == 1 else plural(self.shape)
        words = [word for word in (self.size, self.color, noun, self.place) if word]
        if self.count == 1:
            words.insert(0, "an" if words[0][0] in "aeiou" else "a")
        else:
            words.insert(0, next(word for word, n in NUMBERS.items() if n == self.count))
        return " ".join(words)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a caption says. An empty `relation` or `background` is not named."""

    groups: tuple[Group, ...]
    relation: str = ""
    background: str = ""

    @property
    def text(self) -> str:
        texts = [group.text for group in self.groups]
        if self.relation:
            body = f"{texts[0]} {self.relation} {texts[1]}"
        else:
            body = ", ".join(texts[:-1]) + " and " + texts[-1] if len(texts) > 1 else texts[0]
        return f"{body} on a {self.background} background" if self.background else body

    @property
    def kind(self) -> str:
        """The row of `KINDS` this scene belongs to."""
        if self.relation:
            return "relation"
        if any(group.count > 1 for group in self.groups):
            return "count"
        placed = any(group.place for group in self.groups)
        if len(self.groups) == 1:
            return "place" if placed else "single"
        return "places" if placed else "pair" if len(self.groups) == 2 else "list"

    @property
    def objects(self) -> tuple[Group, ...]:
        """One entry per object to draw, groups repeated `count` times."""
        return tuple(group for group in self.groups for _ in range(group.count))


def is_held_out(scene: Scene) -> bool:
    """True if the scene must not be trained on: it belongs to the test captions."""
    if any((group.color, group.shape) in HELD_OUT_PAIRS for group in scene.groups):
        return True
    return zlib.crc32(scene.text.encode()) % 16 == 0


def sample(rng: random.Random, pairs: tuple[tuple[str, str], ...] = PAIRS) -> Scene:
    """Draw one scene whose groups have distinct (colour, shape) pairs out of `pairs`."""
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    groups_of = {"single": 1, "place": 1, "list": 3}
    counts = [rng.randint(2, MAX_OBJECTS)] if kind == "count" else [1] * groups_of.get(kind, 2)
    rng.shuffle(counts)  # moves nothing, but a seed must keep giving the captions it always gave
    places = {"place": 1, "places": 2}.get(kind, 0)
    named = rng.sample(list(PLACES), places) + [""] * (len(counts) - places)
    # Three large objects leave each other little room, so crowds name "small" or nothing.
    sizes = ("", *SIZES) if sum(counts) < 3 else ("", "small")
    chosen = rng.sample(pairs, len(counts))
    groups = tuple(
        Group(color=color, shape=shape, count=count, size=rng.choice(sizes), place=place)
        for (color, shape), count, place in zip(chosen, counts, named, strict=True)
    )
    return Scene(
        groups=groups,
        relation=rng.choice(list(BETWEEN)) if kind == "relation" else "",
        background=rng.choice(list(BACKGROUNDS)) if rng.random() < 0.85 else "",
    )


def training_scenes(seed: int = 0) -> Iterator[Scene]:
    """Endless stream of scenes that are not held out."""
    rng = random.Random(f"train-{seed}")
    while True:
        scene = sample(rng, TRAIN_PAIRS)
        if not is_held_out(scene):
            yield scene


def held_out_scenes(count: int, seed: int = 0) -> list[Scene]:
    """`count` distinct test scenes; every second one names a colour-shape pair never trained on."""
    rng = random.Random(f"test-{seed}")
    scenes: dict[str, Scene] = {}
    while len(scenes) < count:
        new_pair = len(scenes) % 2 == 0
        scene = sample(rng, PAIRS if new_pair else TRAIN_PAIRS)
        has_new_pair = any((g.color, g.shape) in HELD_OUT_PAIRS for g in scene.groups)
        if is_held_out(scene) and has_new_pair == new_pair:
            scenes.setdefault(scene.text, scene)
    return list(scenes.values())


def parse(text: str) -> Scene:
    """Read a caption back into a scene; the inverse of `Scene.text`.

    Raises:
        ValueError: `text` is not in the caption language.
    """
    body, background, relation = text.strip().rstrip("."), "", ""
    if match := re.fullmatch(rf"(.*) on an? ({'|'.join(BACKGROUNDS)}) background", body):
        body, background = match.groups()
    if match := re.fullmatch(rf"(.*?) ({'|'.join(BETWEEN)}) (.*)", body):
        relation, parts = match[2], [match[1], match[3]]
    else:
        parts = re.split(r", and |, | and ", body)
    groups = tuple(_parse_group(part, text) for part in parts)
    return Scene(groups=groups, relation=relation, background=background)


def vocabulary() -> tuple[str, ...]:
    """Every word that a caption can contain, "from", and the comma.

    No caption says "from", but the tokenizers and embeddings of flux-micro are made of this list.
    """
    words = ["a", "an", "and", "on", "background", *NUMBERS, *SIZES, *COLORS, *BACKGROUNDS]
    words += [*SHAPES, *map(plural, SHAPES)]
    words += [word for phrase in (*PLACES, *BETWEEN) for word in phrase.split()]
    return (*dict.fromkeys(words), "from", ",")


def plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


_SINGULAR = {plural(shape): shape for shape in SHAPES} | {shape: shape for shape in SHAPES}
_GROUP = re.compile(
    rf"(?P<count>an?|{'|'.join(NUMBERS)}) (?:(?P<size>{'|'.join(SIZES)}) )?"
    rf"(?P<color>{'|'.join(COLORS)}) (?P<shape>{'|'.join(_SINGULAR)})(?: (?P<place>.+))?"
)


def _parse_group(text: str, caption: str) -> Group:
    match = _GROUP.fullmatch(text)
    if match is None or (match["place"] and match["place"] not in PLACES):
        raise ValueError(
            f"cannot read {text!r} in {caption!r}; write for example "
            "'a large red circle above a small blue square on a white background'"
        )
    return Group(
        color=match["color"],
        shape=_SINGULAR[match["shape"]],
        count=NUMBERS.get(match["count"], 1),
        size=match["size"] or "",
        place=match["place"] or "",
    )
