"""The third stream of Scale-DiT: a small clean version of the image travels through FLUX's blocks beside it.

    with guided(transformer, Guidance(latents, coarse=(64, 64), image=(256, 256))):
        pipe(...)                       # stock pipeline; enable_visionfuse("scale_dit") makes its attention local

Its tokens are appended to those of the image, at the places (0, 4 h, 4 w), and dropped from the output. They are
clean, so that every block modulates them for the time 0, and the image for its own: the norm layers of the blocks
hand out `TwoStreams` instead of shifts, scales and gates, so that no block of diffusers is copied. Rotary tables
are stretched (NTK), since the image is larger than those the model was trained on.

"Scale-DiT" (arXiv 2510.16325), section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from ..context import ACTIVE
from ..kernels.order.curves import grid_coordinates
from ..kernels.plan import Segment, TokenLayout
from ..sites.flux import GUIDED
from ..sites.order import map_output
from .lora import lora_on_guidance, without_lora

NTK_FACTOR = 10.0  # of the rotary base in the public code


@dataclass(frozen=True, kw_only=True, eq=False)
class Guidance:
    """What travels beside an image.

    latents: packed clean latents of the small image [B or 1, rows * columns, channels], row-major.
    coarse, image: (rows, columns) of the small image and of the image, in tokens.
    low_band: packed clean latents of the enlarged image [B or 1, tokens, channels], towards which the low
        frequencies of every step are drawn, and how much at a time t (1 to 0): see `drawn_to`; None leaves them free.
    ntk: factor of the rotary base.
    cached: keep the keys and values of the guidance from the first step on. It sees only itself at the time 0,
        hence they are the same in every step: a sixteenth less work for 2 x layers x tokens of memory. Only where
        all layers follow a plan.
    split_lora: LoRA acts on the image only where queries, keys and values are made, as that of Scale-DiT shall.
    """

    latents: Tensor
    coarse: tuple[int, int]
    image: tuple[int, int]
    low_band: Tensor | None = None
    strength: Callable[[float], float] = lambda t: 0.0
    ntk: float = NTK_FACTOR
    cached: bool = False
    split_lora: bool = True

    def __post_init__(self):
        rows, columns = self.coarse
        if self.latents.ndim != 3 or self.latents.shape[1] != rows * columns:
            raise ValueError(
                f"Guidance of {rows}x{columns} tokens needs latents (batch, {rows * columns}, channels), got "
                f"{tuple(self.latents.shape)}."
            )

    @property
    def image_tokens(self) -> int:
        return self.image[0] * self.image[1]

    def ids(self, device=None) -> Tensor:
        """Places (0, row, column) of the image and of the guidance in its units: fp32 [tokens, 3].

        In fp32, since bfloat16, in which pipelines make them, counts only up to 256.
        """
        parts = []
        for grid in (self.image, self.coarse):
            places = grid_coordinates(grid, device).float()
            unit = torch.tensor(
                [n / m for n, m in zip(self.image, grid, strict=True)], device=device
            )
            parts.append(torch.cat([torch.zeros_like(places[:1]), places * unit[:, None]]).T)
        return torch.cat(parts)


@contextmanager
def guided(model: Any, guidance: Guidance) -> Iterator[None]:
    """Inside, a FluxTransformer2DModel carries the guidance. Nested or shared use raises ValueError."""
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    if GUIDED in vars(model):
        raise ValueError("This transformer is guided already; leave the other `guided` first.")
    stream = _Stream(model, guidance)
    with ExitStack() as changes:
        replace(changes, model, GUIDED, stream)
        replace(changes, model.pos_embed, "theta", model.pos_embed.theta * guidance.ntk)
        replace(changes, model, "forward", stream.around(model.forward))
        embed = model.time_text_embed
        replace(changes, embed, "forward", stream.times(embed.forward))
        for block in model.transformer_blocks:
            replace(changes, block.norm1, "forward", stream.modulation(block.norm1))
        for block in model.single_transformer_blocks:
            replace(changes, block.norm, "forward", stream.modulation(block.norm))
        layers = lora_on_guidance(model, lambda: stream.present) if guidance.split_lora else ()
        for layer, forward in layers:
            replace(changes, layer, "forward", forward)
        yield


def replace(changes: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute of this one object, and put what its own `__dict__` had back when `changes` end."""
    own, missing = vars(owner), object()
    before = own.get(name, missing)
    object.__setattr__(owner, name, value)
    if before is missing:
        changes.callback(object.__delattr__, owner, name)
    else:
        changes.callback(object.__setattr__, owner, name, before)


class _Stream:
    """The guidance of one model, while it is guided. present: tokens of it in the sequence of the last forward."""

    def __init__(self, model: Any, guidance: Guidance):
        self.guidance, self.parameters = guidance, signature(model.forward)
        self.present = 0
        self.now: Tensor | None = None  # time embedding of the guidance
        self.order: Tensor | None = None
        self.ids, self.latents = torch.empty(0), guidance.latents
        self.kept: list[tuple[Tensor, Tensor]] = []
        self.layer = 0

    @property
    def replays(self) -> bool:
        """True once the keys and values of the guidance are known and its tokens stay away."""
        return self.guidance.cached and bool(self.kept)

    def layout(self, text: int) -> TokenLayout:
        """Of the attention in the next forward."""
        own = Segment("guidance", self.guidance.coarse, keys_only=self.replays)
        return TokenLayout((Segment("text", (text,)), Segment("grid", self.guidance.image), own))

    def around(self, forward: Callable) -> Callable:
        def run(*args, **kwargs):
            given = dict(self.parameters.bind(*args, **kwargs).arguments)
            image = given["hidden_states"]
            self.set_order(given["encoder_hidden_states"].shape[1], image)
            given["img_ids"] = self.ids
            # Stays until the next forward: gradient checkpointing computes blocks once more after this one.
            self.present = 0 if self.replays else self.latents.shape[1]
            if self.replays:
                given["img_ids"] = self.ids[: image.shape[1]]
            else:
                latents = self.latents.expand(image.shape[0], -1, -1)
                given["hidden_states"] = torch.cat([image, latents], 1)
            self.layer = 0
            ACTIVE.keys = self.keys if self.guidance.cached else None
            try:
                out = forward(**given)
            finally:
                ACTIVE.keys = None

            def of_image(sample: Tensor) -> Tensor:
                sample = sample[:, : image.shape[1]]
                if self.guidance.low_band is None:
                    return sample
                return self.drawn(sample, image, float(given["timestep"].flatten()[0]))

            return map_output(out, of_image)

        return run

    def set_order(self, text: int, image: Tensor) -> None:
        """Places and latents of the guidance in the order in which the tokens of this run lie."""
        order, n = ACTIVE.permutation, image.shape[1]
        if self.ids.numel() and self.order is order:
            return
        self.order, self.ids = order, self.guidance.ids(image.device)
        self.latents = self.guidance.latents.to(image)
        if order is not None and order.numel() == text + self.ids.shape[0]:
            places = order[text:].to(image.device) - text  # int64 [image + guidance]
            self.ids, self.latents = self.ids[places], self.latents[:, places[n:] - n]

    def times(self, forward: Callable) -> Callable:
        def embed(timestep: Tensor, *others: Tensor) -> Tensor:
            self.now = forward(torch.zeros_like(timestep), *others)
            return forward(timestep, *others)

        return embed

    def modulation(self, norm: nn.Module) -> Callable:
        """The norm layer of a block, which modulates the guidance by its own time."""
        own = norm.forward
        base = without_lora(norm, own) if self.guidance.split_lora else own

        def forward(x: Tensor, emb: Tensor) -> tuple:
            if not self.present:
                return base(x, emb=emb)
            at = x.shape[1] - self.present
            out, *image = base(x, emb=emb)
            small, *clean = own(x[:, at:], emb=self.now)
            out[:, at:] = small
            return out, *(TwoStreams(a, b, at) for a, b in zip(image, clean, strict=True))

        return forward

    def keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the keys and values of the guidance, or add those that were kept."""
        if self.present:
            self.kept.append((k[:, -self.present :].clone(), v[:, -self.present :].clone()))
            return k, v
        own_k, own_v = self.kept[self.layer % len(self.kept)]
        self.layer += 1
        return torch.cat([k, own_k], 1), torch.cat([v, own_v], 1)

    def drawn(self, velocity: Tensor, image: Tensor, t: float) -> Tensor:
        low_band = self.guidance.low_band
        assert low_band is not None
        rows, columns = self.ids[: image.shape[1], 1:].long().unbind(1)
        clean = low_band.to(image)[:, rows * self.guidance.image[1] + columns]
        return drawn_to(velocity, image, clean, t, self.guidance.strength(t))


def drawn_to(velocity: Tensor, noisy: Tensor, clean: Tensor, t: float, strength: float) -> Tensor:
    """The velocity with its low frequencies moved by `strength` to those that lead to `clean`.

    velocity, noisy, clean: packed latents [B, tokens, channels * 4]. A token holds 2x2 latents, whose mean is the
    low band of a Haar wavelet: v + a (LP((x_t - x_clean) / t) - LP(v)).
    """
    if not strength or not t:
        return velocity
    wanted = (noisy.float() - clean.float()) / t - velocity.float()
    low = wanted.unflatten(-1, (-1, 4)).mean(-1, keepdim=True).expand(-1, -1, -1, 4).flatten(-2)
    return (velocity.float() + strength * low).to(velocity.dtype)


@dataclass(frozen=True, slots=True)
class TwoStreams:
    """A shift, scale or gate of the image [B, D], and another of the guidance, whose tokens begin at `at`.

    It knows what blocks do with one: add an axis, add 1, and multiply or add it to tokens [B, S, D].
    """

    image: Tensor
    guidance: Tensor
    at: int

    def unsqueeze(self, axis: int) -> TwoStreams:
        return TwoStreams(self.image.unsqueeze(axis), self.guidance.unsqueeze(axis), self.at)

    def __getitem__(self, index: Any) -> TwoStreams:
        return TwoStreams(self.image[index], self.guidance[index], self.at)

    def __radd__(self, x: Tensor | int) -> Any:
        if not isinstance(x, Tensor):
            return TwoStreams(x + self.image, x + self.guidance, self.at)
        return self._apply(x, torch.add)

    __add__ = __radd__

    def __rmul__(self, x: Tensor) -> Tensor:
        return self._apply(x, torch.mul)

    __mul__ = __rmul__

    def _apply(self, x: Tensor, f: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        out = f(x, self.image)
        out[:, self.at :] = f(x[:, self.at :], self.guidance)
        return out
