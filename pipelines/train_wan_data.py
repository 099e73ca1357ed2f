"""What Wan models are trained on: videos as latents with the embeddings of their captions, made once and kept.

`shapes` renders the project's own videos; `folder` reads a folder of videos with a `metadata.jsonl`, one line
`{"file_name": "a.mp4", "text": "..."}` for each, as Hugging Face's `datasets` has it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import WanPipeline
from torch import Tensor

from visionfuse.pipelines.wan_micro import encode
from visionfuse.shapes.render import Layout, draw
from visionfuse.shapes.video import Clip, training_clips
from visionfuse.shapes.video_render import FRAMES, Clips, animate, pack_clips, stage

TEXT_LENGTH = 512  # of WanPipeline, which pads with zeros
CHUNK = 64  # shapes videos encoded at once


class Samples(NamedTuple):
    """N videos, ready to train on."""

    latents: Tensor  # [N, C, f, h, w] bfloat16, normalised
    text: Tensor  # [N, L, D], zero after the end of each caption
    nothing: Tensor  # [1, L, D] of the empty caption
    labels: Tensor | None = (
        None  # [N, 3, f * h * w] uint8: shape, colour and motion there, 0 for none
    )

    def to(self, device: torch.device | str) -> Samples:
        labels = None if self.labels is None else self.labels.to(device)
        return Samples(*(x.to(device) for x in self[:3]), labels=labels)


class Batch(NamedTuple):
    """One step's samples, on the device. A time of 1 is pure noise."""

    latents: Tensor  # [B, C, f, h, w] float32
    noise: Tensor  # the same
    text: Tensor  # [B, 512, D]
    labels: Tensor | None  # [B, 3, tokens] int64


def draw_batch(
    samples: Samples, size: int, seed: tuple[int, ...], device: torch.device, *, drop: float
) -> Batch:
    """The batch of a seed, the same whenever it is asked for. drop: share of empty captions."""
    number = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> np.uint64(1))
    generator = torch.Generator().manual_seed(number)
    index = torch.randint(len(samples.latents), (size,), generator=generator)
    dropped = torch.rand(size, 1, 1, generator=generator) < drop
    index = index.to(samples.latents.device)
    latents = samples.latents[index].to(device, torch.float32)
    noise_generator = torch.Generator(device).manual_seed(number)
    text = torch.where(dropped.to(samples.text.device), samples.nothing, samples.text[index])
    labels = None if samples.labels is None else samples.labels[index].to(device).long()
    noise = torch.randn(latents.shape, generator=noise_generator, device=device)
    return Batch(latents, noise, padded(text.to(device)), labels)


def padded(text: Tensor) -> Tensor:
    """`[B, 512, D]` from `[B, L, D]`: what WanPipeline gives the transformer."""
    return F.pad(text, (0, 0, 0, TEXT_LENGTH - text.shape[1]))


@torch.no_grad()
def embed(pipe: WanPipeline, captions: Sequence[str], batch: int = 512) -> Tensor:
    """`[N, L, D]` as WanPipeline embeds captions, L being the longest one's tokens."""
    told = pipe.tokenizer(list(captions), padding=True, truncation=True, max_length=TEXT_LENGTH,
                          return_tensors="pt")  # fmt: skip
    device, parts = pipe.text_encoder.device, []
    for ids, mask in zip(
        told.input_ids.split(batch), told.attention_mask.split(batch), strict=True
    ):
        mask = mask.to(device)
        out = pipe.text_encoder(ids.to(device), mask).last_hidden_state
        parts.append((out * mask[..., None]).float())
    return torch.cat(parts)


@torch.no_grad()
def samples_of(
    pipe: WanPipeline, captions: Sequence[str], videos: Iterator[tuple[Tensor, Tensor | None]]
) -> Samples:
    """Encode `videos`: chunks `[n, F, 3, H, W]` in 0..1, with labels or without, as many as captions in all."""
    text = embed(pipe, ["", *captions])
    latents, labels = [], []
    for chunk, named in videos:
        latents.append(encode(pipe.vae, chunk.to(pipe.vae.dtype)).to(torch.bfloat16))
        if named is not None:
            labels.append(named)
    return Samples(
        latents=torch.cat(latents),
        text=text[1:],
        nothing=text[:1],
        labels=torch.cat(labels) if labels else None,
    )


def shapes(
    pipe: WanPipeline, clips: Sequence[Clip], *, side: int, seed: int, frames: int = FRAMES
) -> Samples:
    """Rendered videos of `clips`, with labels, on the VAE's device. The same for the same seed."""
    device = pipe.vae.device
    packed = pack_clips(clips).to(device)

    def videos() -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator(device).manual_seed(seed)
        for first in range(0, len(clips), CHUNK):
            part = packed[slice(first, first + CHUNK)]
            layout = animate(stage(part, generator), part.motion, frames)
            video = draw(layout, side).unflatten(0, (-1, frames))
            yield video, _labels(part, layout, side // 8, frames)

    return samples_of(pipe, [clip.text for clip in clips], videos())


def training_shapes(
    pipe: WanPipeline, count: int, *, side: int, seed: int, frames: int = FRAMES
) -> Samples:
    """`count` rendered videos of captions that are not held out."""
    return shapes(
        pipe, list(islice(training_clips(seed), count)), side=side, seed=seed, frames=frames
    )


def _labels(clips: Clips, layout: Layout, tokens: int, frames: int) -> Tensor:
    """`[N, 3, f * tokens * tokens]`: which shape, colour and motion a token belongs to, 0 for none.

    Latent frame j > 0 stands for frames 4 j - 3 to 4 j.
    """
    device = layout.center.device
    middle = torch.tensor([0, *range(2, frames, 4)], device=device)
    center = layout.center.unflatten(0, (-1, frames))[:, middle]  # [N, f, 2, 2]
    radius = layout.radius.unflatten(0, (-1, frames))[:, middle][..., None]  # [N, f, 2, 1]
    grid = (torch.arange(tokens, device=device) + 0.5) / tokens
    columns = (grid - center[..., 0, None]).abs() < radius  # [N, f, 2, tokens]
    rows = (grid - center[..., 1, None]).abs() < radius
    inside = (rows[..., :, None] & columns[..., None, :]).flatten(3)  # [N, f, 2, tokens * tokens]
    inside &= (clips.shape >= 0)[:, None, :, None]
    named = torch.stack([clips.shape, clips.color, clips.motion], dim=1) + 1  # [N, 3, 2]
    return (named[:, :, None, :, None] * inside[:, None]).amax(3).flatten(2).to(torch.uint8)


def folder(
    pipe: WanPipeline, path: Path, *, height: int, width: int, frames: int = FRAMES
) -> Samples:
    """The first `frames` frames of every video that `path/metadata.jsonl` names.

    Raises ValueError where the folder or a video is not as it must be.
    """
    if frames % 4 != 1:
        raise ValueError(f"Wan's autoencoder takes 4 k + 1 frames, got {frames}.")
    listing = path / "metadata.jsonl"
    if not listing.is_file():
        raise ValueError(
            f"{path} has no metadata.jsonl. Write one line "
            '{"file_name": "a.mp4", "text": "what it shows"} for each video.'
        )
    lines = [json.loads(line) for line in listing.read_text(encoding="utf-8").splitlines() if line]
    if not lines or any({"file_name", "text"} - set(line) for line in lines):
        raise ValueError(
            f"Every line of {listing} needs file_name and text, and there must be one."
        )

    def videos() -> Iterator[tuple[Tensor, None]]:
        for line in lines:
            video = read_video(path / line["file_name"], height=height, width=width, frames=frames)
            yield video[None].to(pipe.vae.device), None

    return samples_of(pipe, [line["text"] for line in lines], videos())


def read_video(path: Path, *, height: int, width: int, frames: int) -> Tensor:
    """The first frames of a video, `[F, 3, H, W]` in 0..1: scaled to cover the size, then cut to it."""
    import cv2

    reader, pictures = cv2.VideoCapture(str(path)), []
    while len(pictures) < frames:
        going, picture = reader.read()
        if not going:
            raise ValueError(f"{path} has {len(pictures)} readable frames; {frames} are needed.")
        scale = max(height / picture.shape[0], width / picture.shape[1])
        size = [max(round(side * scale), least)
                for side, least in zip(picture.shape[:2], (height, width), strict=True)]  # fmt: skip
        picture = cv2.resize(picture, (size[1], size[0]), interpolation=cv2.INTER_AREA)
        top, left = (size[0] - height) // 2, (size[1] - width) // 2
        pictures.append(picture[top : top + height, left : left + width, ::-1])
    reader.release()
    stacked = torch.from_numpy(np.ascontiguousarray(np.stack(pictures)))
    return stacked.permute(0, 3, 1, 2).float() / 255
