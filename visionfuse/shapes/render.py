"""Draw scenes: tidy layouts and anti-aliased shapes, batched, on a CPU or a GPU.

`pack` turns scenes into tensors once, `arrange` draws a layout that makes each caption true, `draw`
paints it. Every kind of caption has its own arrangement (`anchors`), and each object is shifted at
random by up to `JITTER`: with objects anywhere in the picture a 6 M parameter model needs many times
the training to place the right number of them. Lengths are fractions of the image side, so a
caption means the same at every resolution. Bounding boxes keep a gap of `GAP`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from visionfuse.shapes.captions import (
    BACKGROUNDS,
    BETWEEN,
    COLORS,
    MAX_OBJECTS,
    PLACES,
    SHAPES,
    Scene,
)

# Half the side of the bounding box. An object without a size word is of medium size.
RADIUS = {"": (0.105, 0.115), "small": (0.075, 0.085), "large": (0.140, 0.155)}
JITTER = 0.04  # around the anchor, in x and y
GAP = 0.04  # one 8-pixel token at 256x256 is 0.031
MARGIN = 0.03  # between an object and the image border
THIRDS = {-1: 0.2, 0: 0.5, 1: 0.8, None: 0.5}
NEAR, FAR = 0.28, 0.72  # of two objects side by side
# Where objects without a place or a relation stand, by their number.
ANCHORS = {
    1: [(0.5, 0.5)],
    2: [(NEAR, 0.5), (FAR, 0.5)],
    3: [(0.5, 0.3), (NEAR, 0.7), (FAR, 0.7)],
    4: [(NEAR, NEAR), (FAR, NEAR), (NEAR, FAR), (FAR, FAR)],
}
CANDIDATES = 32  # layouts tried per image


class Scenes(NamedTuple):
    """N scenes as tensors, with room for `MAX_OBJECTS` = 4 objects each."""

    shape: Tensor  # [N, 4] index into SHAPES, -1 where there is no object
    color: Tensor  # [N, 4] index into COLORS, 0 where there is no object
    size: Tensor  # [N, 4] index into RADIUS, whose entry 0 is for objects without a size word
    anchor: Tensor  # [N, 4, 2] (x, y) around which the centre is drawn
    background: Tensor  # [N] index into BACKGROUNDS, -1 where the caption names none

    def __getitem__(self, index) -> Scenes:  # type: ignore[override]
        return Scenes(*(tensor[index] for tensor in tuple(self)))

    def to(self, device: torch.device | str) -> Scenes:
        return Scenes(*(tensor.to(device) for tensor in tuple(self)))


class Layout(NamedTuple):
    """N pictures, ready to draw."""

    shape: Tensor  # [N, 4] index into SHAPES, -1 where there is no object
    rgb: Tensor  # [N, 4, 3] in 0..1
    center: Tensor  # [N, 4, 2] (x, y) in 0..1
    radius: Tensor  # [N, 4]
    background: Tensor  # [N, 3] in 0..1
    angle: Tensor | None = None  # [N, 4] clockwise in radians, 0 by default

    def take(self, rows: Tensor) -> Layout:
        """The pictures of these rows."""
        angle = None if self.angle is None else self.angle[rows]
        return Layout(*(tensor[rows] for tensor in self[:5]), angle=angle)


def anchors(scene: Scene) -> list[tuple[float, float]]:
    """Where the objects of a scene stand, (x, y) in 0..1, before the jitter.

    Raises ValueError for a scene that there is no arrangement for; `sample` draws none.
    """
    placed = [bool(group.place) for group in scene.groups]
    several = len(scene.objects) != len(scene.groups)
    if (
        len(scene.objects) not in ANCHORS
        or (several and (scene.relation or any(placed)))
        or (any(placed) and (scene.relation or not all(placed)))
    ):
        raise ValueError(
            f"cannot arrange {scene.text!r}: there may be up to {MAX_OBJECTS} objects; with a relation two "
            "single ones, and with places one for each single object"
        )
    if scene.relation:
        axis, sign = BETWEEN[scene.relation]
        values = (NEAR, FAR)[::sign]
        return [(value, 0.5) if axis == 0 else (0.5, value) for value in values]
    if any(group.place for group in scene.groups):
        thirds = [PLACES[group.place] for group in scene.groups]
        return [(THIRDS[column], THIRDS[row]) for column, row in thirds]
    return ANCHORS[len(scene.objects)]


def pack(scenes: Sequence[Scene]) -> Scenes:
    """Scenes as tensors on the CPU."""
    shapes, colors, sizes, points, backgrounds = [], [], [], [], []
    tables = (SHAPES, COLORS, RADIUS, BACKGROUNDS)
    index = {name: i for names in tables for i, name in enumerate(names)}
    for scene in scenes:
        objects = scene.objects
        spare = MAX_OBJECTS - len(objects)
        shapes.append([index[o.shape] for o in objects] + [-1] * spare)
        colors.append([index[o.color] for o in objects] + [0] * spare)
        sizes.append([index[o.size] for o in objects] + [0] * spare)
        points.append(anchors(scene) + [(0.5, 0.5)] * spare)
        backgrounds.append(index[scene.background] if scene.background else -1)
    return Scenes(
        shape=torch.tensor(shapes),
        color=torch.tensor(colors),
        size=torch.tensor(sizes),
        anchor=torch.tensor(points),
        background=torch.tensor(backgrounds),
    )


def arrange(scenes: Scenes, generator: torch.Generator | None = None) -> Layout:
    """Draw `CANDIDATES` random layouts per scene and keep the first without a collision.

    If all collide, the one with the least overlap is kept. No host synchronisation.
    """
    n, device = len(scenes.shape), scenes.shape.device

    def uniform(*size: int) -> Tensor:
        return torch.rand(n, *size, generator=generator, device=device)

    bounds = torch.tensor(list(RADIUS.values()), device=device)[scenes.size]  # [N, 4, 2]
    bounds = bounds[:, None]
    radius = torch.lerp(bounds[..., 0], bounds[..., 1], uniform(CANDIDATES, MAX_OBJECTS))
    shift = JITTER * (2 * uniform(CANDIDATES, MAX_OBJECTS, 2) - 1)
    edge = (radius + MARGIN)[..., None]
    center = torch.clamp(scenes.anchor[:, None] + shift, edge, 1 - edge)  # [N, K, 4, 2]

    first, second = torch.triu_indices(MAX_OBJECTS, MAX_OBJECTS, 1, device=device)
    apart = (center[:, :, second] - center[:, :, first]).abs().amax(-1)  # [N, K, 6]
    room = apart - radius[:, :, first] - radius[:, :, second] - GAP
    present = (scenes.shape >= 0)[:, None]  # [N, 1, 4]
    both = present[..., first] & present[..., second]
    slack = torch.where(both, room, 1.0).amin(-1).clamp(max=0)  # [N, K], 0 where it fits
    slack = slack - 1e-6 * torch.arange(CANDIDATES, device=device)  # the first of equals
    best = slack.argmax(1)
    rows = torch.arange(n, device=device)

    palette = torch.tensor(list(COLORS.values()), device=device) / 255
    grounds = torch.tensor(list(BACKGROUNDS.values()), device=device) / 255
    any_ground = (uniform() * len(BACKGROUNDS)).long()
    ground = torch.where(scenes.background >= 0, scenes.background, any_ground)
    return Layout(
        shape=scenes.shape,
        rgb=palette[scenes.color],
        center=center[rows, best],
        radius=radius[rows, best],
        background=grounds[ground],
    )


def draw(layout: Layout, side: int) -> Tensor:
    """Paint `[N, 3, side, side]` float32 images in 0..1 with one pixel of anti-aliasing."""
    device = layout.shape.device
    grid = (torch.arange(side, device=device) + 0.5) / side
    image = layout.background[:, :, None, None].repeat(1, 1, side, side)
    for index, distance in enumerate(DISTANCES.values()):
        for chosen in (layout.shape == index).nonzero().split(256):  # bounds the memory
            owner, slot = chosen.unbind(1)
            center, radius = layout.center[owner, slot], layout.radius[owner, slot, None, None]
            x = (grid[None, None, :] - center[:, 0, None, None]) / radius  # [M, 1, side]
            y = (grid[None, :, None] - center[:, 1, None, None]) / radius  # [M, side, 1]
            if layout.angle is not None:
                angle = layout.angle[owner, slot, None, None]
                sine, cosine = angle.sin(), angle.cos()
                x, y = x * cosine + y * sine, y * cosine - x * sine  # [M, side, side]
            cover = (0.5 - distance(x, y) * radius * side).clamp(0, 1)  # [M, side, side]
            paint = layout.rgb[owner, slot] - layout.background[owner]  # [M, 3]
            image.index_add_(0, owner, cover[:, None] * paint[:, :, None, None])
    return image


def render(
    scenes: Sequence[Scene], side: int, seed: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """Draw a random true picture of each scene: `[N, 3, side, side]` in 0..1."""
    generator = torch.Generator(device).manual_seed(seed)
    return draw(arrange(pack(scenes).to(device), generator), side)


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 1


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.9


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    """Upright, tip (0, -1), base from (-1, 0.8) to (1, 0.8)."""
    return torch.maximum((x.abs() * 1.8 - y - 1) / (1 + 1.8**2) ** 0.5, y - 0.8)


def _star(x: Tensor, y: Tensor) -> Tensor:
    """Upright five-pointed star: fold the plane onto half a point, which has one straight edge."""
    fifth = 2 * math.pi / 5
    angle = torch.atan2(x, -y)  # 0 towards the upper tip
    folded = (angle - fifth * torch.round(angle / fifth)).abs()  # 0 at a tip, pi/5 in a notch
    reach = torch.hypot(x, y)
    # The edge runs from the tip at (1, 0) to the notch, 0.5 from the centre.
    along, across = 0.5 * math.cos(fifth / 2) - 1, 0.5 * math.sin(fifth / 2)
    offset = (reach * torch.cos(folded) - 1) * across - reach * torch.sin(folded) * along
    return offset / math.hypot(along, across)


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.74).abs() - 0.26


def _cross(x: Tensor, y: Tensor) -> Tensor:
    far, near = torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
    return torch.maximum(far - 1, near - 0.34)


# Distance to the outline in radii, negative inside, for coordinates with the y axis down.
DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
}
