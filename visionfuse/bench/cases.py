"""What the attention benchmark runs: shapes of image and video models by name, and their windows.

The windows are those for which peers publish numbers, on grids without text, as NATTEN needs them. Speeds
are guesses for `--dry-run` and for keeping a run inside its time; they are never reported as results.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from ..kernels.plan.layout import TokenLayout
from ..kernels.plan.neighborhood import Dense, Neighborhood
from ..kernels.plan.planner import AttentionPlan

# Every case is compared with this one: cuDNN on a GPU, PyTorch's own on a CPU.
BASELINE = "dense"
# Visible pairs a second as TFLOP/s, in dense cases and under windows: an H200 at head dim 128 and bf16,
# two AVX-512 cores at fp32.
_SPEEDS = {
    "cuda": {
        "dense": (590, 590), "flash": (340, 340), "efficient": (200, 200), "sage": (700, 700),
        "gluon_sm90": (640, 250), "triton": (290, 190), "flex": (330, 150), "natten": (500, 250),
    },
    "cpu": {"dense": (0.14, 0.14), "blocks": (0.1, 0.09), "natten": (0.005, 0.005)},
}  # fmt: skip
_SLOWEST = {"cuda": 100.0, "cpu": 0.01}
_BYTES_PER_S = {"cuda": 4.2e12, "cpu": 2e10}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One attention call: (batch, layout.length, heads, head_dim). impls: run unless others are named."""

    name: str
    layout: TokenLayout
    spec: Dense | Neighborhood
    heads: int
    head_dim: int
    impls: tuple[str, ...]
    batch: int = 1

    @property
    def density(self) -> float:
        """Visible pairs as a share of all, from the rule alone. One grid, any text."""
        length, visible = self.layout.length, self.layout.length**2
        for part in self.layout.segments:
            if part.kind == "grid" and isinstance(self.spec, Neighborhood):
                rule = self.spec.resolve(part.shape)
                bounds = (rule.axis_bounds(axis) for axis in range(len(part.shape)))
                visible += prod(int((end - start).sum()) for start, end in bounds) - part.length**2
        return visible / length**2

    @property
    def pairs(self) -> int:
        return self.batch * self.heads * self.layout.length**2

    @property
    def flops(self) -> float:
        """Of visible pairs: a multiplication and an addition per channel, for scores and for values."""
        return 4 * self.head_dim * self.pairs * self.density

    def tensor_bytes(self, itemsize: int) -> int:
        """q, k, v and the result, each once."""
        return 4 * self.batch * self.layout.length * self.heads * self.head_dim * itemsize

    def expected_ms(self, impl: str, device: str) -> float:
        """A guess, see the module."""
        slowest = _SLOWEST[device]
        dense, windowed = _SPEEDS[device].get(impl, (slowest, slowest))
        always_dense = isinstance(self.spec, Dense) or impl == BASELINE
        speed = dense if always_dense else windowed
        if device == "cuda" and self.head_dim < 128:
            speed *= 0.7
        flops = self.flops / self.density if impl == BASELINE else self.flops
        itemsize = 2 if device == "cuda" else 4
        return max(
            flops / speed * 1e-9, self.tensor_bytes(itemsize) / _BYTES_PER_S[device] * 1e3, 0.01
        )


_ALL = (BASELINE, "flash", "efficient", "gluon_sm90", "triton", "sage")
_LONG = (BASELINE, "flash", "gluon_sm90", "sage")  # the others take a fifth of a second or more
_SPARSE = (BASELINE, "gluon_sm90", "triton", "natten")


def _window(window: tuple[int, ...], stride: int | tuple[int, ...] = 1) -> Neighborhood:
    return Neighborhood(window=window, stride=stride)


def _cases(model: str, grid: tuple[int, ...], heads: int, text: int, dense: tuple[str, ...],
           windows: dict[str, Neighborhood]) -> list[Case]:  # fmt: skip
    """The dense call of a model with its text, and windows on its grid alone."""
    layout = TokenLayout.joint(text=text, grids=[grid])
    own = {"heads": heads, "head_dim": 128}
    found = [
        Case(name=f"{model}, dense, {layout.length:,} tokens", layout=layout, spec=Dense(),
             impls=dense, **own)
    ]  # fmt: skip
    for name, spec in windows.items():
        found.append(
            Case(name=f"{model}, {name}", layout=TokenLayout.joint(grids=[grid]), spec=spec,
                 impls=_SPARSE, **own)
        )  # fmt: skip
    return found


def _vit(side: int, batch: int, heads: int, extra: int) -> Case:
    layout = TokenLayout.joint(text=extra, grids=[(side, side)])
    return Case(
        name=f"ViT, dense, {layout.length:,} tokens, batch {batch}", layout=layout, spec=Dense(),
        heads=heads, head_dim=64, impls=_ALL, batch=batch,
    )  # fmt: skip


def gpu_shapes() -> dict[str, list[Case]]:
    """Cases by the name of their shape."""
    flux_2k = _cases(
        "FLUX 2K", (128, 128), 24, 512, _ALL,
        {
            "window 48": _window((48, 48)),
            "window 48, stride 16": _window((48, 48), 16),
        },
    )  # fmt: skip
    flux_2k.append(
        Case(name="FLUX 2K + text, density 0.1", heads=24, head_dim=128,
             layout=TokenLayout.joint(text=512, grids=[(128, 128)]), spec=Neighborhood(density=0.1),
             impls=(BASELINE, "gluon_sm90", "triton"))
    )  # fmt: skip
    return {
        "flux-1k": _cases("FLUX 1K", (64, 64), 24, 512, _ALL, {}),
        "flux-2k": flux_2k,
        "flux-4k": _cases(
            "FLUX 4K", (256, 256), 24, 512, _LONG,
            {"window 80": _window((80, 80)), "window 80, stride 16": _window((80, 80), 16)},
        ),
        "wan-480p": _cases(
            "Wan 480p", (21, 30, 52), 12, 0, _LONG, {"window 12x16x16": _window((12, 16, 16))}
        ),
        "wan-720p": _cases(
            "Wan 720p", (21, 45, 80), 12, 0, _LONG,
            {
                "window 12x24x24": _window((12, 24, 24)),
                "window 12x24x24, stride 4x8x8": _window((12, 24, 24), (4, 8, 8)),
            },
        ),
        "vit": [_vit(14, 256, 12, 1), _vit(24, 64, 16, 1), _vit(32, 64, 16, 0)],
        "hunyuan": _cases(
            "Hunyuan", (30, 48, 80), 24, 256, (BASELINE, "gluon_sm90", "sage"),
            {
                "window 18x24x24": _window((18, 24, 24)),
                "window 18x24x24, stride 16x8x8": _window((18, 24, 24), (16, 8, 8)),
                "window 30x40x40, stride 1x32x8": _window((30, 40, 40), (1, 32, 8)),
            },
        ),
        "tiny": _tiny(_SPARSE),
    }  # fmt: skip


def cpu_shapes() -> dict[str, list[Case]]:
    """A tenth of the pairs, by windows that move by 16, 8 and 1 tokens."""
    windows = {"48x32": ((48, 32), 16), "40x40": ((40, 40), 8), "41x41": ((41, 41), 1)}
    grid = [
        Case(
            name=f"128x128 grid, 8 heads of 64, window {name}, stride {stride}",
            layout=TokenLayout.joint(grids=[(128, 128)]),
            spec=_window(window, stride),
            heads=8,
            head_dim=64,
            impls=(BASELINE, "blocks"),
        )
        for name, (window, stride) in windows.items()
    ]
    return {"grid-128": grid, "tiny": _tiny((BASELINE, "blocks"))}


def tiles(plan: AttentionPlan) -> str:
    """The tiles of a plan and, with "in", their sub-tiles: "16x16", "16x16 in 8x16", or nothing."""
    return " in ".join(
        "x".join(map(str, shape)) for shape in (plan.order.tile, plan.order.subtile) if shape
    )


def _tiny(impls: tuple[str, ...]) -> list[Case]:
    """A second of work, to see that everything runs; only by name."""
    own = {"heads": 2, "head_dim": 64, "impls": impls}
    return [
        Case(name="tiny, window 8", layout=TokenLayout.joint(grids=[(24, 24)]),
             spec=_window((8, 8), 4), **own),
        Case(name="tiny + text, dense", layout=TokenLayout.joint(text=16, grids=[(24, 24)]),
             spec=Dense(), **own),
    ]  # fmt: skip
