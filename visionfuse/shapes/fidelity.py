"""Read a picture back with OpenCV and say whether its caption is fully right.

The reader knows the palette and the six silhouettes, not the caption: it segments whatever differs
from the background, names each piece by colour (nearest in CIELAB) and shape (overlap of the
silhouette with a drawn template), and measures place and size. `check` then looks for an
assignment of the pieces to the caption's objects that makes every named attribute true. A speck,
a missing or an extra object, a blurred shape or a mixed colour makes the caption wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, permutations
from typing import Any, NamedTuple

import numpy as np
import torch

from visionfuse.shapes.captions import (
    BACKGROUNDS,
    BETWEEN,
    COLORS,
    PLACES,
    SHAPES,
    Group,
    Scene,
    parse,
)
from visionfuse.shapes.render import Layout, draw

FOREGROUND = 18.0  # CIELAB distance from the background that starts an object
SAME_COLOR = 30.0  # CIELAB distance to the palette above which a colour has no name
PURE = 0.9  # share of an object's inner pixels that must be near its median colour
OVERLAP = 0.80  # intersection over union with the best template; the wrong ones reach 0.75
SPECK = 0.0004  # share of the image below which a piece is anti-aliasing dust
LARGE = 0.112  # radius (half the longer bounding-box side) from which an object is large
ORDERED = 0.1  # least distance of the centres along a relation; drawn ones keep 0.36
THIRDS = {-1: (0.0, 0.38), 0: (0.36, 0.64), 1: (0.62, 1.0), None: (0.0, 1.0)}
READ_SIDE = 512  # smaller pictures are enlarged, or the filter would blunt the tips of stars
EDGE = 9  # pixels of READ_SIDE: the anti-aliased rim on both sides, left out of an object's colour
TEMPLATE = 48  # pixels


@dataclass(frozen=True, kw_only=True)
class Found:
    """One piece of the picture. Unreadable attributes are empty strings."""

    shape: str
    color: str
    size: str
    center: tuple[float, float]  # (x, y) in 0..1


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a caption is fully right, and what is wrong first."""

    caption: str
    kind: str
    right: bool
    reason: str  # "", "background", "count", "shape", "color", "size", "place" or "relation"
    found: tuple[Any, ...]  # what was read: Found, of a video Followed


def score(
    images: Sequence[object] | torch.Tensor, captions: Sequence[str | Scene]
) -> list[Verdict]:
    """Judge each image against its caption.

    Args:
        images: PIL images, uint8 arrays `[H, W, 3]`, or float tensors `[3, H, W]` in 0..1; RGB,
            square, 128 pixels or more a side. A list of them, or a tensor `[N, 3, H, W]`.
        captions: texts of the caption language, or scenes.

    Raises:
        ValueError: the lengths differ, or a text is not in the caption language.
    """
    if len(images) != len(captions):
        raise ValueError(f"{len(images)} images but {len(captions)} captions; pass one for each")
    scenes = [parse(c) if isinstance(c, str) else c for c in captions]
    return [judge(image, scene) for image, scene in zip(images, scenes, strict=True)]


def accuracy(verdicts: Sequence[Verdict]) -> float:
    """Share of captions that are fully right."""
    return sum(verdict.right for verdict in verdicts) / max(len(verdicts), 1)


def breakdown(verdicts: Sequence[Verdict]) -> dict[str, dict[str, float]]:
    """Accuracy and number by kind of caption, and the number of each reason for a failure."""
    kinds = sorted({verdict.kind for verdict in verdicts})
    table = {kind: [v for v in verdicts if v.kind == kind] for kind in kinds}
    return {
        "accuracy": {kind: accuracy(rows) for kind, rows in table.items()},
        "count": {kind: len(rows) for kind, rows in table.items()},
        "reasons": dict(Counter(v.reason for v in verdicts if not v.right).most_common()),
    }


def judge(image: object, scene: Scene) -> Verdict:
    """Read one image and check one scene against it."""
    background, found = read(image)
    reason = check(scene, background, found)
    return Verdict(
        caption=scene.text, kind=scene.kind, right=not reason, reason=reason, found=tuple(found)
    )


def check(scene: Scene, background: str, found: Sequence[Found]) -> str:
    """The first thing that is wrong, or an empty string if the caption is fully right."""
    if scene.background and background != scene.background:
        return "background"
    if not background:
        return "background"
    objects = scene.objects
    if len(found) != len(objects):
        return "count"
    tests = {
        "shape": lambda order: all(f.shape == o.shape for f, o in zip(order, objects, strict=True)),
        "color": lambda order: all(f.color == o.color for f, o in zip(order, objects, strict=True)),
        "size": lambda order: all(
            o.size in ("", f.size) for f, o in zip(order, objects, strict=True)
        ),
        "place": lambda order: all(_is_at(f, o) for f, o in zip(order, objects, strict=True)),
        "relation": lambda order: _is_ordered(order, scene.relation),
    }
    orders = list(permutations(found))
    for reason, test in tests.items():
        orders = [order for order in orders if test(order)]
        if not orders:
            return reason
    return ""


def read(image: object) -> tuple[str, list[Found]]:
    """Name the background and every object of an RGB picture (see `score` for the types)."""
    background, pieces = segment(image, READ_SIDE, EDGE)
    return background, [_found(piece) for piece in pieces]


class Piece(NamedTuple):
    """One connected piece of a picture, in its bounding box."""

    solid: np.ndarray  # bool [h, w]; edge pixels belong to the side that they are nearer to
    color: str  # of the palette, empty if it has none or several
    corner: tuple[int, int]  # (x, y) of the box in pixels
    side: int  # of the picture in pixels


def segment(image: object, side: int, edge: int) -> tuple[str, list[Piece]]:
    """The background's name, and what differs from it, of an RGB picture enlarged to `side` pixels.

    edge: pixels of the anti-aliased rim on both sides, left out of a piece's colour.
    """
    import cv2

    rgb = _to_uint8(image)
    rgb = cv2.medianBlur(cv2.resize(rgb, (side, side), interpolation=cv2.INTER_LINEAR), 3)
    lab = cv2.cvtColor(rgb.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    rim = np.concatenate([lab[0], lab[-1], lab[:, 0], lab[:, -1]])
    ground = np.median(rim, axis=0)
    background = _nearest(ground, BACKGROUNDS)

    from_ground = _distance(lab, ground)
    mask = (from_ground > FOREGROUND).astype(np.uint8)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    pieces = []
    for index, (x, y, width, height, area) in enumerate(stats[1:], start=1):
        if area < SPECK * side * side:
            continue
        window = slice(y, y + height), slice(x, x + width)
        inside = labels[window] == index
        solid, color = _solid(lab[window], inside, from_ground[window], edge)
        rows, columns = np.flatnonzero(solid.any(1)), np.flatnonzero(solid.any(0))
        if len(rows):
            solid = solid[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            x, y = x + columns[0], y + rows[0]
        pieces.append(Piece(solid, color, (int(x), int(y)), side))
    return background, pieces


def _solid(
    lab: np.ndarray, mask: np.ndarray, from_ground: np.ndarray, edge: int
) -> tuple[np.ndarray, str]:
    """The silhouette of one connected piece, and the name of its colour."""
    import cv2

    core = np.ones((edge, edge), np.uint8)
    inner = (
        cv2.erode(mask.astype(np.uint8), core, borderType=cv2.BORDER_CONSTANT, borderValue=0) > 0
    )
    inner = inner if inner.any() else mask
    median = np.median(lab[inner], axis=0)
    from_color = _distance(lab, median)
    pure = (from_color[inner] < SAME_COLOR).mean() >= PURE
    # An edge pixel belongs to the side it is nearer to, so halos do not grow the silhouette.
    return mask & (from_color < from_ground), _nearest(median, COLORS) if pure else ""


def _found(piece: Piece) -> Found:
    height, width = piece.solid.shape
    if not piece.solid.any():
        return Found(shape="", color="", size="", center=(0.0, 0.0))
    return Found(
        shape=_name_shape(piece.solid),
        color=piece.color,
        size="large" if max(height, width) / 2 / piece.side >= LARGE else "small",
        center=(
            (piece.corner[0] + width / 2) / piece.side,
            (piece.corner[1] + height / 2) / piece.side,
        ),
    )


def _name_shape(solid: np.ndarray) -> str:
    """The template with the largest overlap, if that is large and the proportions agree."""
    patch = _resize(solid)
    overlaps = {}
    for name, (template, aspect) in _templates().items():
        union = np.maximum(patch, template).sum()
        fits = 0.75 < solid.shape[1] / solid.shape[0] / aspect < 1.33
        overlaps[name] = np.minimum(patch, template).sum() / union if fits else 0.0
    best = max(overlaps, key=overlaps.__getitem__)
    return best if overlaps[best] >= OVERLAP else ""


@lru_cache(maxsize=1)
def _templates() -> dict[str, tuple[np.ndarray, float]]:
    """Silhouette in its bounding box, resized to a square, and width over height, by shape."""
    shape = torch.arange(len(SHAPES))[:, None]
    pictures = draw(
        Layout(
            shape=shape,
            rgb=torch.ones(len(SHAPES), 1, 3),
            center=torch.full((len(SHAPES), 1, 2), 0.5),
            radius=torch.full((len(SHAPES), 1), 0.4),
            background=torch.zeros(len(SHAPES), 3),
        ),
        side=256,
    )
    templates = {}
    for name, picture in zip(SHAPES, pictures[:, 0].numpy() > 0.5, strict=True):
        rows, columns = np.flatnonzero(picture.any(1)), np.flatnonzero(picture.any(0))
        solid = picture[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        templates[name] = (_resize(solid), solid.shape[1] / solid.shape[0])
    return templates


def _resize(solid: np.ndarray) -> np.ndarray:
    import cv2

    size = (TEMPLATE, TEMPLATE)
    shrinks = min(solid.shape) > TEMPLATE
    mode = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(solid.astype(np.float32), size, interpolation=mode)


@lru_cache(maxsize=2)
def _lab_of(colors: tuple[tuple[int, int, int], ...]) -> np.ndarray:
    import cv2

    rgb = np.array(colors, np.float32)[None] / 255
    return cv2.cvtColor(rgb, cv2.COLOR_RGB2LAB)[0]


def _nearest(lab: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str:
    """Name of the nearest palette colour, or an empty string if all are far."""
    distance = _distance(_lab_of(tuple(palette.values())), lab)
    return list(palette)[int(distance.argmin())] if distance.min() < SAME_COLOR else ""


def _distance(lab: np.ndarray, color: np.ndarray) -> np.ndarray:
    """CIELAB distance (Delta E 1976) of `[..., 3]` pixels to one colour."""
    difference = lab - color
    return np.sqrt(np.einsum("...c,...c->...", difference, difference))


def _is_at(found: Found, group: Group) -> bool:
    thirds = PLACES.get(group.place, (None, None))
    return all(
        THIRDS[third][0] <= value <= THIRDS[third][1]
        for third, value in zip(thirds, found.center, strict=True)
    )


def _is_ordered(order: Sequence[Found], relation: str) -> bool:
    if not relation:
        return True
    axis, sign = BETWEEN[relation]
    values = [sign * found.center[axis] for found in order]
    return all(after - before >= ORDERED for before, after in pairwise(values))


def _to_uint8(image: object) -> np.ndarray:
    """RGB uint8 `[H, W, 3]`."""
    if isinstance(image, torch.Tensor):
        rgb = (image.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu()
        return np.ascontiguousarray(rgb.numpy())
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(
            f"expected an RGB picture, uint8 [H, W, 3]; got {array.dtype} {array.shape}. "
            "Convert with image.convert('RGB')"
        )
    return np.ascontiguousarray(array)
