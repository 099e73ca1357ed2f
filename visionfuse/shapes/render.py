"""Draw scenes: random layouts and anti-aliased shapes, batched, on a CPU or a GPU.

`pack` turns scenes into tensors once, `arrange` draws a random layout that makes each caption
true, `draw` paints it. Lengths are fractions of the image side, so a caption means the same at
every resolution. Objects keep a gap of `GAP` between their bounding boxes and never overlap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from visionfuse.shapes.captions import (
    BACKGROUNDS,
    COLORS,
    MAX_OBJECTS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
)

RADIUS = {"small": (0.060, 0.075), "large": (0.120, 0.150)}  # half the side of the bounding box
GAP = 0.04  # one 8-pixel token at 256x256 is 0.031
MARGIN = 0.03  # between an object and the image border
STEP = 0.2  # neighbouring centres along the axis of a relation
THIRDS = {-1: (0.0, 0.30), 0: (0.42, 0.58), 1: (0.70, 1.0), None: (0.0, 1.0)}
CANDIDATES = 64  # layouts tried per image


class Scenes(NamedTuple):
    """N scenes as tensors. Unnamed attributes are -1."""

    shape: Tensor  # [N, 5] index into SHAPES, -1 where there is no object
    color: Tensor  # [N, 5] index into COLORS
    size: Tensor  # [N, 5] index into SIZES or -1
    low: Tensor  # [N, 5, 2] smallest centre (x, y) of the named place
    high: Tensor  # [N, 5, 2] largest centre
    axis: Tensor  # [N] 0 or 1: the axis of the relation, or -1
    sign: Tensor  # [N] +1 rising, -1 falling along the axis
    background: Tensor  # [N] index into BACKGROUNDS or -1

    def __getitem__(self, index) -> Scenes:  # type: ignore[override]
        return Scenes(*(tensor[index] for tensor in tuple(self)))

    def to(self, device: torch.device | str) -> Scenes:
        return Scenes(*(tensor.to(device) for tensor in tuple(self)))


class Layout(NamedTuple):
    """N pictures, ready to draw."""

    shape: Tensor  # [N, 5] index into SHAPES, -1 where there is no object
    rgb: Tensor  # [N, 5, 3] in 0..1
    center: Tensor  # [N, 5, 2] (x, y) in 0..1
    radius: Tensor  # [N, 5]
    background: Tensor  # [N, 3] in 0..1


def pack(scenes: Sequence[Scene]) -> Scenes:
    """Scenes as tensors on the CPU."""
    shapes, colors, sizes, boxes, relations, backgrounds = [], [], [], [], [], []
    tables = (SHAPES, COLORS, SIZES, BACKGROUNDS)
    index = {name: i for names in tables for i, name in enumerate(names)}
    for scene in scenes:
        objects = scene.objects
        spare = MAX_OBJECTS - len(objects)
        shapes.append([index[o.shape] for o in objects] + [-1] * spare)
        colors.append([index[o.color] for o in objects] + [0] * spare)
        sizes.append([index[o.size] if o.size else -1 for o in objects] + [-1] * spare)
        thirds = [PLACES.get(o.place, (None, None)) for o in objects] + [(None, None)] * spare
        boxes.append([[THIRDS[column], THIRDS[row]] for column, row in thirds])
        relations.append(RELATIONS.get(scene.relation, (-1, 1)))
        backgrounds.append(index[scene.background] if scene.background else -1)
    box = torch.tensor(boxes)  # [N, 5, 2, 2]
    relation = torch.tensor(relations)
    return Scenes(
        shape=torch.tensor(shapes),
        color=torch.tensor(colors),
        size=torch.tensor(sizes),
        low=box[..., 0],
        high=box[..., 1],
        axis=relation[:, 0],
        sign=relation[:, 1],
        background=torch.tensor(backgrounds),
    )


def arrange(scenes: Scenes, generator: torch.Generator | None = None) -> Layout:
    """Draw `CANDIDATES` random layouts per scene and keep the first that fits.

    Centres are uniform in their place. A relation sorts them along its axis. If none fits (never
    seen in 100,000 scenes), the least bad layout is kept. No host synchronisation.
    """
    n, device = len(scenes.shape), scenes.shape.device

    def uniform(*size: int) -> Tensor:
        return torch.rand(n, *size, generator=generator, device=device)

    present = (scenes.shape >= 0)[:, None]  # [N, 1, 5]
    crowded = present.sum(-1, keepdim=True) >= 3
    coin = torch.where(crowded, 0, (uniform(CANDIDATES, MAX_OBJECTS) < 0.5).long())
    size = torch.where(scenes.size[:, None] >= 0, scenes.size[:, None], coin)  # [N, K, 5]
    bounds = torch.tensor([RADIUS[name] for name in SIZES], device=device)[size]  # [N, K, 5, 2]
    radius = torch.lerp(bounds[..., 0], bounds[..., 1], uniform(CANDIDATES, MAX_OBJECTS))

    u = uniform(CANDIDATES, MAX_OBJECTS, 2)
    ordered = torch.where(present[..., None], u, 2.0).sort(dim=2).values  # absent objects last
    ordered = torch.where(scenes.sign[:, None, None, None] > 0, ordered, 1 - ordered)
    along = scenes.axis[:, None] == torch.arange(2, device=device)  # [N, 2]
    u = torch.where(along[:, None, None], ordered, u)
    edge = (radius + MARGIN)[..., None]
    center = torch.lerp(
        torch.maximum(scenes.low[:, None], edge), torch.minimum(scenes.high[:, None], 1 - edge), u
    )  # [N, K, 5, 2]

    first, second = torch.triu_indices(MAX_OBJECTS, MAX_OBJECTS, 1, device=device)
    delta = center[:, :, second] - center[:, :, first]  # [N, K, 10, 2]
    room = delta.abs().amax(-1) - radius[:, :, first] - radius[:, :, second] - GAP
    step = (delta * along[:, None, None]).sum(-1) * scenes.sign[:, None, None] - STEP
    room = torch.where(along.any(-1)[:, None, None], torch.minimum(room, step), room)
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
