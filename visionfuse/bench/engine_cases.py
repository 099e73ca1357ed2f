"""What `visionfuse bench engine` measures: shapes, rules, and the ways to attend that are compared on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..kernels.attention import key_slots
from ..kernels.attention.api import block_sparse_attention, unsupported_reasons
from ..kernels.attention.precision import Precision
from ..kernels.attention.prologue import EIGHT_BIT, prologue
from ..kernels.plan.block_plan import BlockPlan
from ..kernels.plan.layout import TokenLayout
from ..kernels.plan.neighborhood import Dense, Neighborhood
from ..kernels.plan.planner import plan_attention
from ..kernels.plan.tiles import block_shapes
from .attention import visible_keys
from .block_lists import BLOCK_K, all_keys, band_of, block_list, list_visible
from .cases import BASELINE, Case, tiles
from .peers import PEERS
from .suite import Candidate, Suite, Work
from .table import Row

EIGHT_BITS = ("fp8", "int8_fp8", "fp8, all in", "int8_fp8, all in")
LISTS = "whole blocks"  # the impl of rows of unmasked lists, that masked plans are compared with


def candidates(work: Work, q: Tensor, k: Tensor, v: Tensor) -> Iterator[Candidate]:
    """The baseline first, then what is compared with it."""
    if work.rule is not None:
        for recipe in work.recipes:
            yield from _windowed(work, recipe, q, k, v)
        return
    case = Case(name=work.name, layout=TokenLayout.joint(grids=[(1, work.tokens)]), spec=Dense(),
                heads=work.heads, head_dim=work.head_dim, impls=())  # fmt: skip
    peer = PEERS[BASELINE]
    yield Candidate(impl=BASELINE, recipe="", call=peer.make(case, q, k, v), reasons=[],
                    note=peer.note(q.device.type))  # fmt: skip
    for impl, recipes in ((work.impl, work.recipes), ("triton", work.portable)):
        for recipe in recipes:
            yield _listed(work, impl, recipe, q, k, v)


def _listed(work: Work, impl: str, recipe: str, q: Tensor, k: Tensor, v: Tensor) -> Candidate:
    """Whole blocks by a rule on their numbers. Dense plans come from the planner, as a user's do."""
    length = work.tokens
    if work.keys is all_keys:
        layout = TokenLayout.joint(grids=[(1, length)])
        plan = plan_attention(
            layout, Dense(), impl=impl, head_dim=work.head_dim, precision=_precision(recipe),
            device=q.device,
        ).blocks  # fmt: skip
        visible = None
    else:
        block_q = _fastest_tile(impl, recipe, q)
        plan = block_list(length, length, block_q, work.keys).to(q.device)
        visible = list_visible(length, block_q, work.keys)
    reasons, call = attend(impl, recipe, q, k, v, plan)
    density = plan.visited_density
    return Candidate(
        impl=impl, recipe=recipe, call=call, reasons=reasons, note=_note(recipe, plan),
        visible=visible, density=density, visited=density,
    )  # fmt: skip


def _windowed(work: Work, recipe: str, q: Tensor, k: Tensor, v: Tensor) -> Iterator[Candidate]:
    """Lists of as many whole blocks without a mask, and the plan of the window in its own order."""
    assert work.rule is not None
    layout = TokenLayout.joint(grids=[work.grid])
    plan = plan_attention(
        layout, work.rule, impl=work.impl, head_dim=work.head_dim, precision=_precision(recipe),
        device=q.device,
    )  # fmt: skip
    blocks, length = plan.blocks, work.tokens
    entries = blocks.full.start.numel() + blocks.partial.start.numel()
    masked = blocks.partial.start.numel() / entries
    share = entries * blocks.block_q * blocks.block_k / length**2  # of whole blocks, tile by tile
    block_q = _fastest_tile(work.impl, recipe, q)
    lists = block_list(
        length, length, block_q, band_of(share if work.share == "tiles" else plan.density)
    )
    lists = lists.to(q.device)
    visible = list_visible(
        length, block_q, band_of(share if work.share == "tiles" else plan.density)
    )
    in_lists = lists.full.start.numel() * block_q * BLOCK_K / length**2
    reasons, call = attend(work.impl, recipe, q, k, v, lists)
    yield Candidate(
        impl=LISTS, recipe=recipe, call=call, reasons=reasons, visible=visible, baseline="",
        density=lists.visited_density, visited=lists.visited_density, note=_note(recipe, lists),
        work=in_lists if work.share == "tiles" else lists.visited_density,
    )  # fmt: skip
    q, k, v = (x if plan.permutation is None else x[:, plan.permutation] for x in (q, k, v))
    reasons, call = attend(work.impl, recipe, q, k, v, blocks)
    case = Case(name=work.name, layout=layout, spec=work.rule, heads=work.heads,
                head_dim=work.head_dim, impls=())  # fmt: skip
    yield Candidate(
        impl=work.impl, recipe=recipe, call=call, reasons=reasons, inverse=plan.inverse,
        visible=partial(visible_keys, case), density=plan.density, visited=blocks.visited_density,
        baseline=f"{LISTS}, {recipe}", work=share if work.share == "tiles" else plan.density,
        note=f"{_note(recipe, blocks)}, tile {tiles(plan)}, {masked:.0%} of them masked; speed-up: ratio of "
        f"{'pairs of visited blocks' if work.share == 'tiles' else 'visible pairs'} a second",
    )  # fmt: skip


def attend(
    impl: str, recipe: str, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan
) -> tuple[list[str], Callable[[], Tensor]]:
    """Reasons against, and the call. Kernels alone have their operands rounded beforehand."""
    precision, _, part = recipe.partition(", ")
    name = _precision(recipe)
    reasons = unsupported_reasons(impl, q, k, v, plan, name)
    if reasons or part or name == "model":
        return reasons, lambda: block_sparse_attention(q, k, v, plan, impl=impl, precision=name)
    from ..kernels.attention.gluon_sm90 import eight_bit

    moved = key_slots.key_slots(plan, BLOCK_K)
    spec = replace(EIGHT_BIT[precision], smooth_k=Precision.parse(precision).smooth_k is True)
    x = prologue(q, k, v, spec, key_order=moved.order)
    scale = q.shape[-1] ** -0.5
    return [], lambda: eight_bit.forward(x, moved.plan, scale, False)[0]


def _precision(recipe: str) -> str:
    name = recipe.partition(", ")[0]
    return "model" if name in ("bf16", "fp32") else name


def _fastest_tile(impl: str, recipe: str, q: Tensor) -> int:
    shapes = block_shapes(impl, q.shape[-1], precision=_precision(recipe), device=q.device)
    return max(shapes, key=lambda shape: shape.speed).block_q


def _note(recipe: str, plan: BlockPlan) -> str:
    part = "from q, k, v to out" if recipe.endswith(", all in") else "kernel"
    return f"{part}, blocks {plan.block_q}x{plan.block_k}"


def _dense(key: str, length: int, heads: int, recipes: tuple[str, ...], **options) -> Work:
    head_dim, batch = options.pop("head_dim", 128), options.get("batch", 1)
    name = f"{length:,} tokens, {batch * heads} heads of {head_dim}, dense"
    return Work(key=key, name=name, length=length, heads=heads, head_dim=head_dim,
                recipes=recipes, **options)  # fmt: skip


def _window(
    key: str, name: str, share: str, grid: tuple[int, ...], heads: int, rule: Neighborhood,
    recipes: tuple[str, ...] = ("bf16",),
) -> Work:  # fmt: skip
    return Work(key=key, name=name, grid=grid, heads=heads, head_dim=128, share=share, rule=rule,
                recipes=recipes)  # fmt: skip


_WAN, _FLUX, _HUNYUAN = (21, 45, 80), (256, 256), (30, 48, 80)
_MASKED = ("bf16", "fp8", "fp8, all in")
WORKS = (
    _dense("4608", 4608, 24, ("bf16", *EIGHT_BITS)),
    _dense("16896", 16896, 24, ("bf16", *EIGHT_BITS), portable=("bf16",)),
    _dense("32760", 32760, 12, ("bf16", *EIGHT_BITS)),
    _dense("75600", 75600, 12, ("bf16", *EIGHT_BITS), portable=("bf16",)),
    _dense("75648", 75648, 12, ("bf16", "fp8", "int8_fp8")),
    _dense("d64", 16384, 16, ("bf16", "fp8", "int8_fp8"), batch=2, head_dim=64, portable=("bf16",)),
    Work(key="band", name="75,648 tokens, 12 heads of 128, lists of 9%", length=75648, heads=12, head_dim=128,
         keys=band_of(0.09), recipes=("bf16", "fp8", "int8_fp8", "fp8, all in", "int8_fp8, all in")),
    _window("wan-8", "Wan 720p, window 12x24x24, stride 4x8x8", "visible", _WAN, 12,
            Neighborhood(window=(12, 24, 24), stride=(4, 8, 8)), _MASKED),
    _window("flux-16", "FLUX 4K, window 80, stride 16", "visible", _FLUX, 24,
            Neighborhood(window=80, stride=16), _MASKED),
    _window("flux", "FLUX 4K, window 80, stride 1", "tiles", _FLUX, 24, Neighborhood(window=80), ("bf16", "fp8")),
    _window("hunyuan-18", "Hunyuan, window 18x24x24, stride 1", "tiles", _HUNYUAN, 24,
            Neighborhood(window=(18, 24, 24))),
    _window("hunyuan-30", "Hunyuan, window 30x40x40, stride 1", "tiles", _HUNYUAN, 24,
            Neighborhood(window=(30, 40, 40))),
)  # fmt: skip
# A second of work where there is no GPU, to see that everything runs.
TINY = (
    Work(key="tiny", name="tiny, dense", length=640, heads=2, head_dim=64, recipes=("fp32",),
         impl="blocks"),
    Work(key="tiny-window", name="tiny, window 8", grid=(24, 24), heads=2, head_dim=64, impl="blocks",
         rule=Neighborhood(window=8, stride=4), recipes=("fp32", "int8_fp8, all in")),
)  # fmt: skip


def prologue_rows(device: torch.device, seconds: float) -> list[Row]:
    """The prologue's share of the bandwidth of a copy, at 16,896 and at 75,600 tokens."""
    from .prologue import CASES, measure
    from .prologue import Case as Prologue

    wan = Prologue(
        name="75600 tokens, 12 heads of 128", batch=1, length=75600, heads=12, head_dim=128
    )
    rows = []
    for case in (CASES[0], wan):
        found = measure(
            case, suite="engine", device=device, seconds=min(seconds, 0.1), halves=False
        )
        rows += [replace(row, case=f"prologue, {row.case}") for row in found if row.impl != "torch"]
    return rows


ENGINE = Suite(
    name="engine", works=WORKS, tiny=TINY, make=candidates, more={"prologue": prologue_rows}
)
