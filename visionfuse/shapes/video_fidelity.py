"""Read a video back with OpenCV and say whether its caption is fully right.

Every frame is segmented as a picture is (`fidelity.segment`); its pieces are named by colour and, in any
rotation, by shape, and followed from frame to frame. What a piece does is read off its centres and its
rotation. A missing or an extra piece in any frame, or a shape or colour that comes and goes, makes the
caption wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from typing import NamedTuple

import numpy as np
import torch

from visionfuse.shapes.captions import SHAPES
from visionfuse.shapes.fidelity import Piece, Verdict, segment
from visionfuse.shapes.render import Layout, draw
from visionfuse.shapes.video import MAX_ACTORS, ROUND, Clip, parse_clip

READ_SIDE = 256
EDGE = 5  # pixels of READ_SIDE
OVERLAP = 0.80  # intersection over union with the best template of equal area
TEMPLATE = 48  # pixels
SIDE_OF_AREA = 20  # pixels of TEMPLATE: square root of every silhouette's area
DEGREES = 6  # between two templates of a shape
PERIOD = {
    "circle": DEGREES,
    "ring": DEGREES,
    "square": 90,
    "cross": 90,
    "triangle": 120,
    "star": 72,
}
STEADY = 0.8  # share of the frames that must agree on a shape and a colour
MOVED, STILL = 0.1, 0.05  # of the side: more is a motion, less is none; drawn ones travel 0.2
TURNED, UPRIGHT = 45.0, 25.0  # degrees, likewise; drawn ones turn by 90


@dataclass(frozen=True, kw_only=True)
class Followed:
    """One piece through all frames. Unreadable attributes are empty strings."""

    shape: str
    color: str
    motion: str


class Sight(NamedTuple):
    """One piece in one frame. An unknown shape is an empty string."""

    shape: str
    color: str
    angle: float  # degrees, modulo the shape's period
    center: tuple[float, float]  # (x, y) in 0..1


def score_clips(
    videos: Sequence[Sequence[object] | torch.Tensor] | torch.Tensor | np.ndarray,
    captions: Sequence[str | Clip],
) -> list[Verdict]:
    """Judge each video against its caption.

    Args:
        videos: sequences of frames: PIL images, uint8 arrays `[H, W, 3]`, or float tensors `[3, H, W]` in
            0..1; RGB, square, 128 pixels or more a side. A list of them, a uint8 array `[N, F, H, W, 3]`, or
            a tensor `[N, F, 3, H, W]`.
        captions: texts of the caption language of videos, or clips.

    Raises:
        ValueError: the lengths differ, or a text is not in the caption language.
    """
    if len(videos) != len(captions):
        raise ValueError(f"{len(videos)} videos but {len(captions)} captions; pass one for each")
    clips = [parse_clip(c) if isinstance(c, str) else c for c in captions]
    with ThreadPoolExecutor() as pool:
        return list(pool.map(judge_clip, videos, clips))


def judge_clip(video: Sequence[object] | torch.Tensor, clip: Clip) -> Verdict:
    """Read one video and check one clip against it.

    `Verdict.reason` is "", "background", "count", "shape", "color" or "motion".
    """
    background, found = read_clip(video)
    reason = check_clip(clip, background, found)
    return Verdict(
        caption=clip.text, kind=clip.kind, right=not reason, reason=reason, found=tuple(found or ())
    )


def check_clip(clip: Clip, background: str, found: Sequence[Followed] | None) -> str:
    """The first thing that is wrong, or an empty string if the caption is fully right."""
    if not background or (clip.background and background != clip.background):
        return "background"
    if found is None or len(found) != len(clip.actors):
        return "count"
    orders = list(permutations(found))
    for attribute in ("shape", "color", "motion"):
        orders = [
            order
            for order in orders
            if all(
                getattr(f, attribute) == getattr(actor, attribute)
                for f, actor in zip(order, clip.actors, strict=True)
            )
        ]
        if not orders:
            return attribute
    return ""


def read_clip(video: Sequence[object] | torch.Tensor) -> tuple[str, list[Followed] | None]:
    """The background (empty if it changes) and every piece; None if their number changes or is too large."""
    backgrounds, frames = [], []
    for frame in video:
        background, pieces = segment(frame, READ_SIDE, EDGE)
        backgrounds.append(background)
        frames.append([_sight(piece) for piece in pieces])
        if len(pieces) != len(frames[0]) or len(pieces) > MAX_ACTORS:
            return _most(backgrounds), None
    tracks = [[sight] for sight in frames[0]]
    for sights in frames[1:]:
        order = min(permutations(sights), key=lambda o: _distance([t[-1] for t in tracks], o))
        for track, sight in zip(tracks, order, strict=True):
            track.append(sight)
    return _most(backgrounds), [_followed(track) for track in tracks]


def _followed(track: Sequence[Sight]) -> Followed:
    shape = _most([sight.shape for sight in track])
    return Followed(
        shape=shape, color=_most([sight.color for sight in track]), motion=_motion(track, shape)
    )


def _motion(track: Sequence[Sight], shape: str) -> str:
    """What a piece does, or an empty string if that is none of `video.MOTIONS`."""
    centers = np.array([sight.center for sight in track])  # [F, 2]
    (x, y), (width, height) = centers[-1] - centers[0], np.ptp(centers, axis=0)
    turned = _turned([s.angle for s in track if s.shape == shape], shape)
    upright = turned < UPRIGHT
    if max(width, height) < STILL:
        return "stays still" if upright else "turns" if turned >= TURNED else ""
    if upright and width < STILL and height >= MOVED:
        if abs(y) < STILL:
            return "bounces"
        if abs(y) >= max(MOVED, height - STILL):
            return "moves down" if y > 0 else "moves up"
    if upright and height < STILL and abs(x) >= max(MOVED, width - STILL):
        return "moves right" if x > 0 else "moves left"
    return ""


def _turned(angles: Sequence[float], shape: str) -> float:
    """Degrees turned clockwise over the track; negative angles count as far as the shape's period tells."""
    if not shape or shape in ROUND:
        return 0.0
    period = PERIOD[shape]
    steps = (np.diff(angles) + period / 2) % period - period / 2
    return float(np.abs(steps.cumsum()).max(initial=0.0))


def _most(names: Sequence[str]) -> str:
    """The name that most frames agree on, if enough do."""
    name, count = Counter(names).most_common(1)[0]
    return name if count >= STEADY * len(names) else ""


def _distance(before: Sequence[Sight], after: Sequence[Sight]) -> float:
    return sum(
        float(np.hypot(*np.subtract(a.center, b.center)))
        for a, b in zip(before, after, strict=True)
    )


def _sight(piece: Piece) -> Sight:
    """Name a piece: the template with the largest overlap, if that is large."""
    import cv2

    solid = piece.solid.astype(np.float32)
    area = float(solid.sum())
    if not area:
        return Sight("", piece.color, 0.0, (0.0, 0.0))
    rows, columns = np.indices(solid.shape)
    y, x = float((rows * solid).sum() / area), float((columns * solid).sum() / area)
    scale, middle = SIDE_OF_AREA / area**0.5, (TEMPLATE - 1) / 2
    move = np.array([[scale, 0, middle - scale * x], [0, scale, middle - scale * y]], np.float32)
    flags = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    patch = cv2.warpAffine(solid, move, (TEMPLATE, TEMPLATE), flags=flags)
    names, angles, templates = _templates()
    shared = np.minimum(patch, templates).sum((1, 2))
    overlap = shared / (patch.sum() + templates.sum((1, 2)) - shared)
    best = int(overlap.argmax())
    return Sight(
        shape=names[best] if overlap[best] >= OVERLAP else "",
        color=piece.color,
        angle=angles[best],
        center=((piece.corner[0] + x) / piece.side, (piece.corner[1] + y) / piece.side),
    )


@lru_cache(maxsize=1)
def _templates() -> tuple[list[str], list[float], np.ndarray]:
    """Shape and angle in degrees of every template, and the templates `[N, 48, 48]`, of one area."""
    turned = [(name, float(a)) for name in SHAPES for a in range(0, PERIOD[name], DEGREES)]
    shape = torch.tensor([[SHAPES.index(name)] for name, _ in turned])
    angle = torch.tensor([[angle] for _, angle in turned]).deg2rad()

    def silhouettes(radius: torch.Tensor, center: torch.Tensor) -> torch.Tensor:
        """`[N, 48, 48]`, 1 inside."""
        n = len(turned)
        layout = Layout(shape=shape, rgb=torch.ones(n, 1, 3), center=center[:, None],
                        radius=radius[:, None], background=torch.zeros(n, 3), angle=angle)  # fmt: skip
        return draw(layout, TEMPLATE)[:, 0]

    # Drawn once to learn the area and the centre of mass, then to scale.
    radius, center = torch.full((len(turned),), 0.3), torch.full((len(turned), 2), 0.5)
    first = silhouettes(radius, center)
    area = first.sum((1, 2))
    grid = (torch.arange(TEMPLATE) + 0.5) / TEMPLATE
    mass = torch.stack([first.sum(1) @ grid, first.sum(2) @ grid], dim=1) / area[:, None]
    scale = SIDE_OF_AREA / area.sqrt()
    final = silhouettes(radius * scale, 0.5 - (mass - 0.5) * scale[:, None])
    return [name for name, _ in turned], [angle for _, angle in turned], final.numpy()
