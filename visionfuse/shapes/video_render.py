"""Draw clips: a frame of a video is a picture whose shapes stand a little further on.

`pack_clips` turns clips into tensors once, `stage` draws where their shapes begin, `animate` gives the
layout of every frame, and `render.draw` paints them all at once. Lengths are fractions of the side.
Two shapes keep to their half of the picture, the first on the left, so that nothing is ever hidden.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from visionfuse.shapes.captions import BACKGROUNDS, COLORS, SHAPES
from visionfuse.shapes.render import Layout, draw
from visionfuse.shapes.video import MAX_ACTORS, MOTIONS, Clip

FRAMES = 17  # 4 k + 1, as Wan's autoencoder wants it
RADIUS = (0.105, 0.115)
TRAVEL = 0.2  # from the first frame to the last
HOP = 0.2  # height of a bounce
HOPS = 2
TURN = math.pi / 2  # from the first frame to the last, clockwise
JITTER = (0.015, 0.06)  # of the middle of the way, in x and y
ANCHORS = {1: [(0.5, 0.5)], 2: [(0.255, 0.5), (0.745, 0.5)]}
# Displacement over the whole clip in units of TRAVEL, (x, y) with y down.
WAYS = {"moves left": (-1, 0), "moves right": (1, 0), "moves up": (0, -1), "moves down": (0, 1)}


class Clips(NamedTuple):
    """N clips as tensors, with room for two shapes each."""

    shape: Tensor  # [N, 2] index into SHAPES, -1 where there is none
    color: Tensor  # [N, 2] index into COLORS, 0 where there is none
    motion: Tensor  # [N, 2] index into MOTIONS, 0 where there is none
    anchor: Tensor  # [N, 2, 2] (x, y), the middle of the way
    background: Tensor  # [N] index into BACKGROUNDS, -1 where the caption names none

    def __getitem__(self, index) -> Clips:  # type: ignore[override]
        return Clips(*(tensor[index] for tensor in tuple(self)))

    def to(self, device: torch.device | str) -> Clips:
        return Clips(*(tensor.to(device) for tensor in tuple(self)))


def pack_clips(clips: Sequence[Clip]) -> Clips:
    """Clips as tensors on the CPU."""
    index = {
        name: i for names in (SHAPES, COLORS, MOTIONS, BACKGROUNDS) for i, name in enumerate(names)
    }
    index[""] = -1

    def column(name: str, absent: int) -> Tensor:
        rows = [[index[getattr(actor, name)] for actor in clip.actors] for clip in clips]
        return torch.tensor([row + [absent] * (MAX_ACTORS - len(row)) for row in rows])

    anchors = [ANCHORS[len(clip.actors)] for clip in clips]
    return Clips(
        shape=column("shape", -1),
        color=column("color", 0),
        motion=column("motion", 0),
        anchor=torch.tensor([row + [(0.5, 0.5)] * (MAX_ACTORS - len(row)) for row in anchors]),
        background=torch.tensor([index[clip.background] for clip in clips]),
    )


def stage(clips: Clips, generator: torch.Generator | None = None) -> Layout:
    """Draw size, place and background of N clips: the layout in the middle of their ways."""
    device = clips.shape.device
    uniform = torch.rand(*clips.shape.shape, 3, generator=generator, device=device)
    palette = torch.tensor(list(COLORS.values()), device=device) / 255
    grounds = torch.tensor(list(BACKGROUNDS.values()), device=device) / 255
    any_ground = torch.rand(len(clips.shape), generator=generator, device=device) * len(grounds)
    ground = torch.where(clips.background >= 0, clips.background, any_ground.long())
    jitter = torch.tensor(JITTER, device=device)
    return Layout(
        shape=clips.shape,
        rgb=palette[clips.color],
        center=clips.anchor + (2 * uniform[..., :2] - 1) * jitter,
        radius=RADIUS[0] + (RADIUS[1] - RADIUS[0]) * uniform[..., 2],
        background=grounds[ground],
        angle=torch.zeros_like(uniform[..., 2]),
    )


def animate(layout: Layout, motion: Tensor, frames: int = FRAMES) -> Layout:
    """The layouts of all frames `[N * frames, ...]`, clip by clip.

    layout: of N clips, in the middle of their ways. motion: `[N, 2]` index into MOTIONS.
    """
    device = layout.center.device
    time = torch.linspace(0, 1, frames, device=device)[None, :, None]  # [1, frames, 1]
    ways = torch.tensor([WAYS.get(m, (0, 0)) for m in MOTIONS], device=device) * TRAVEL
    center = layout.center[:, None] + ways[motion][:, None] * (time - 0.5)[..., None]
    hop = (HOPS * time) % 1
    height = HOP * 4 * hop * (1 - hop) - HOP / 2
    bounces = (motion == MOTIONS.index("bounces"))[:, None]
    center[..., 1] -= torch.where(bounces, height, 0.0)
    turns = (motion == MOTIONS.index("turns"))[:, None]
    angle = torch.where(turns, TURN * time, 0.0)

    def each(x: Tensor) -> Tensor:
        return x[:, None].expand(-1, frames, *x.shape[1:]).flatten(0, 1)

    return Layout(
        shape=each(layout.shape),
        rgb=each(layout.rgb),
        center=center.flatten(0, 1),
        radius=each(layout.radius),
        background=each(layout.background),
        angle=angle.flatten(0, 1),
    )


def render_clips(
    clips: Sequence[Clip],
    side: int,
    *,
    frames: int = FRAMES,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw a random true video of each clip: `[N, frames, 3, side, side]` in 0..1."""
    generator = torch.Generator(device).manual_seed(seed)
    packed = pack_clips(clips).to(device)
    layout = animate(stage(packed, generator), packed.motion, frames)
    return draw(layout, side).unflatten(0, (-1, frames))
