"""What `visionfuse bench neighborhood` measures: `neighborhood_attention` with everything that a layer pays.

The baseline is dense attention by cuDNN on the same tokens, so that a speed-up of 10 is what the rule saves. Keys and
queries come as a layer has them, (B, *grid, H, D): orders and their inverses are in the times. Gradients are
compared by the pairs of visited blocks a second, see `gradients`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from torch import Tensor

from ..kernels.plan.layout import TokenLayout
from ..kernels.plan.neighborhood import Dense, Neighborhood
from ..neighborhood import neighborhood_attention
from .attention import visible_keys
from .cases import BASELINE, Case
from .gradients import gradient_rows
from .peers import PEERS
from .suite import Candidate, Suite, Work

RECIPES = ("bf16", "fp8", "fp8+k_tensor", "int8_fp8")


def candidates(work: Work, q: Tensor, k: Tensor, v: Tensor) -> Iterator[Candidate]:
    """Dense attention, then the window in every format."""
    assert work.rule is not None
    layout = TokenLayout.joint(grids=[work.grid])
    case = Case(name=work.name, layout=layout, spec=work.rule, heads=work.heads, head_dim=work.head_dim,
                impls=())  # fmt: skip
    peer = PEERS[BASELINE]
    yield Candidate(impl=BASELINE, recipe="", reasons=[], note=peer.note(q.device.type),
                    call=peer.make(replace(case, spec=Dense()), q, k, v))  # fmt: skip
    density = work.rule.resolve(work.grid).visible / work.tokens**2
    on_grid = [x.unflatten(1, work.grid) for x in (q, k, v)]
    for recipe in work.recipes:
        precision = "model" if recipe in ("bf16", "fp32") else recipe
        yield Candidate(
            impl=work.impl, recipe=recipe, reasons=[], density=density, visited=density,
            visible=partial(visible_keys, case), note="orders included; TFLOP/s of visible pairs",
            call=partial(_attend, on_grid, work.rule, precision),
        )  # fmt: skip


def _attend(on_grid: list[Tensor], rule: Neighborhood, precision: str) -> Tensor:
    q, k, v = on_grid
    assert rule.window is not None
    out = neighborhood_attention(
        q, k, v, rule.window, stride=rule.stride or 1, dilation=rule.dilation, precision=precision
    )
    assert isinstance(out, Tensor)
    return out.flatten(1, -3)


# -- works --------------------------------------------------------------------------------------------


def _work(
    key: str, name: str, grid: tuple[int, ...], heads: int, window: int | tuple[int, ...],
    stride: int | tuple[int, ...] = 1, *, head_dim: int = 128, batch: int = 1,
    recipes: tuple[str, ...] = RECIPES,
) -> Work:  # fmt: skip
    rule = Neighborhood(window=window, stride=stride)
    return Work(key=key, name=name, grid=grid, heads=heads, head_dim=head_dim, batch=batch, rule=rule,
                recipes=recipes, impl="auto")  # fmt: skip


_FLUX, _WAN, _WAN480, _HUNYUAN = (256, 256), (21, 45, 80), (21, 30, 52), (30, 48, 80)
WORKS = (
    _work("flux-16", "FLUX 4K, window 80, stride 16", _FLUX, 24, 80, 16),
    _work("flux", "FLUX 4K, window 80", _FLUX, 24, 80),
    _work("wan-8", "Wan 720p, window 12x24x24, stride 4x8x8", _WAN, 12, (12, 24, 24), (4, 8, 8)),
    _work("wan", "Wan 720p, window 12x24x24", _WAN, 12, (12, 24, 24)),
    _work("wan-90", "Wan 720p, 10% of the keys: window 21x15x24, stride 1x3x12", _WAN, 12, (21, 15, 24), (1, 3, 12)),
    _work("wan-480-90", "Wan 480p, 10% of the keys: window 21x9x17, stride 1x3x6", _WAN480, 12, (21, 9, 17), (1, 3, 6)),
    _work("hunyuan-16", "Hunyuan, window 18x24x24, stride 16x8x8", _HUNYUAN, 24, (18, 24, 24), (16, 8, 8)),
    _work("hunyuan-8", "Hunyuan, window 18x24x24, stride 1x8x8", _HUNYUAN, 24, (18, 24, 24), (1, 8, 8)),
    _work("hunyuan", "Hunyuan, window 18x24x24", _HUNYUAN, 24, (18, 24, 24)),
    _work("hunyuan-32", "Hunyuan, window 30x40x40, stride 1x32x8", _HUNYUAN, 24, (30, 40, 40), (1, 32, 8)),
    _work("ltx", "LTX VAE 29x68x120, 4 heads of 64, window 11", (29, 68, 120), 4, 11, head_dim=64, recipes=("bf16",)),
    _work("vit-32", "ViT 56x56, batch 64, 4 heads of 32, window 7", (56, 56), 4, 7, head_dim=32, batch=64, recipes=("bf16",)),
    _work("vit-64", "ViT 56x56, batch 64, 4 heads of 64, window 7", (56, 56), 4, 7, head_dim=64, batch=64, recipes=("bf16",)),
)  # fmt: skip
TINY = (
    _work("tiny", "tiny, window 8", (24, 24), 2, 8, 4, head_dim=32, recipes=("fp32", "int8_fp8")),
)
NEIGHBORHOOD = Suite(
    name="neighborhood", works=WORKS, tiny=TINY, make=candidates, more={"gradients": gradient_rows}
)
