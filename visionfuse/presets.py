"""Neighbourhoods by model and grid: those of the GNA paper where it has one, else what `visionfuse simulate
--search` finds at the same density.

Paper: arXiv 2504.16922, tables of FLUX.1-dev at 4K, HunyuanVideo and Cosmos. Search: H200, bf16, windows of at least
0.66 of the grid's proportions, as the paper's own are; the quality of these was not measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import log, prod
from typing import Literal

from .kernels.plan import Neighborhood

# A grid with less than this share of the tokens of a model's smallest preset has none: attention is short there.
LEAST_SHARE = 0.7


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """model: class of the denoiser. dense_start: share of the run, from its first step, that stays dense.

    source: "paper", or "simulated": no more than fast, by prediction. scaled_from: the grid that it was made
    for, where it was carried over to another one.
    """

    model: str
    name: str
    grid: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]
    dense_start: float
    source: Literal["paper", "simulated"]
    scaled_from: tuple[int, ...] | None = None

    @property
    def neighborhood(self) -> Neighborhood:
        return Neighborhood(window=self.window, stride=self.stride)

    def describe(self) -> str:
        """For the report: "FLUX.1 4K (paper): window 80x80, stride 16x16, the first 32% of the run dense"."""
        window, stride = ("x".join(map(str, x)) for x in (self.window, self.stride))
        origin = self.source
        if self.scaled_from is not None:
            origin += f", scaled from {'x'.join(map(str, self.scaled_from))}"
        dense = f"the first {self.dense_start:.0%} of the run dense"
        return f"{self.name} ({origin}): window {window}, stride {stride}, {dense}"


_FLUX, _HUNYUAN, _COSMOS = 9 / 28, 15 / 50, 12 / 35


def _preset(model: str, name: str, grid, window, stride, dense_start: float, source) -> Preset:
    return Preset(model=model, name=name, grid=grid, window=window, stride=stride,
                  dense_start=dense_start, source=source)  # fmt: skip


_FLUX_1, _FLUX_2 = "FluxTransformer2DModel", "Flux2Transformer2DModel"
_WAN, _LTX = "WanTransformer3DModel", "LTXVideoTransformer3DModel"
PRESETS = (
    # At 1K the text alone keeps a fifth of the pairs, and a tenth of the grid would gain little: 0.3 of it.
    _preset(_FLUX_1, "FLUX.1 1K", (64, 64), (32, 40), (16, 8), _FLUX, "simulated"),
    _preset(_FLUX_1, "FLUX.1 2K", (128, 128), (36, 48), (12, 16), _FLUX, "simulated"),
    _preset(_FLUX_1, "FLUX.1 4K", (256, 256), (80, 80), (16, 16), _FLUX, "paper"),
    _preset(_FLUX_2, "FLUX.2 1K", (64, 64), (32, 40), (16, 8), _FLUX, "simulated"),
    _preset(_FLUX_2, "FLUX.2 2K", (128, 128), (36, 48), (12, 16), _FLUX, "simulated"),
    _preset(_WAN, "Wan 480p", (21, 30, 52), (21, 9, 16), (1, 3, 8), _HUNYUAN, "simulated"),
    # 4% behind the fastest that was found (9x16x48), with the proportions of the paper's for HunyuanVideo.
    _preset(_WAN, "Wan 720p", (21, 45, 80), (12, 24, 24), (4, 8, 8), _HUNYUAN, "simulated"),
    _preset(_WAN, "Wan 2.2 5B 720p", (31, 22, 40), (30, 7, 12), (1, 1, 4), _HUNYUAN, "simulated"),
    _preset("HunyuanVideoTransformer3DModel", "HunyuanVideo 720p", (30, 48, 80), (18, 24, 24),
            (16, 8, 8), _HUNYUAN, "paper"),
    _preset("CosmosTransformer3DModel", "Cosmos 720p", (16, 44, 80), (16, 24, 16), (1, 8, 16),
            _COSMOS, "paper"),
    _preset(_LTX, "LTX-Video", (21, 24, 40), (20, 8, 12), (1, 2, 4), _HUNYUAN, "simulated"),
)  # fmt: skip


def named(name: str) -> Preset:
    """The preset of that name, for its own grid. Raises ValueError with all names."""
    for found in PRESETS:
        if found.name.lower() == name.lower():
            return found
    known = ", ".join(f"{p.name!r} ({p.source})" for p in PRESETS)
    raise ValueError(f"There is no preset {name!r}. Choose from {known}.")


def preset(model: str, grid: tuple[int, ...]) -> Preset | None:
    """The preset of a denoiser class for the nearest grid, carried over to this one by proportion.

    model: the name of the class. grid: its token grid, frames first. None where the class has no preset, or the
    grid is smaller than all of them.
    """
    known = [p for p in PRESETS if p.model == model and len(p.grid) == len(grid)]
    if not known or prod(grid) < LEAST_SHARE * min(prod(p.grid) for p in known):
        return None
    nearest = min(
        known, key=lambda p: sum(abs(log(n / m)) for n, m in zip(grid, p.grid, strict=True))
    )
    return nearest if nearest.grid == grid else _scaled(nearest, grid)


def _scaled(found: Preset, grid: tuple[int, ...]) -> Preset:
    """Windows keep their share of the axis, in whole strides where they were; strides stay, unless longer."""
    window, stride = [], []
    for n, m, w, s in zip(grid, found.grid, found.window, found.stride, strict=True):
        unit = s if w % s == 0 else 1
        share = n if w == m else min(max(1, round(w / m * n / unit)) * unit, n)
        window.append(share)
        stride.append(min(s, share))
    return replace(
        found, grid=grid, window=tuple(window), stride=tuple(stride), scaled_from=found.grid
    )
