"""What local attention brings to FLUX at large sizes: attention alone, and denoising steps with random weights.

    python pipelines/scale_dit_benchmark.py --csv assets/bench/scale_dit.csv                  # on one H200
    python pipelines/scale_dit_benchmark.py --tiny                                            # anywhere, checks the script

Attention "all in" goes from bf16 queries, keys and values to bf16 output, quantisation included, of text, image
and guidance together. Its baseline is cuDNN's dense attention of text and image alone, which the stock model runs. A
step is that of a FLUX.1-dev with random weights in a stock pipeline; the first one warms up, the second is timed.
Dense steps above 4096x4096 take minutes: theirs are computed from one attention call and the rest of our step.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor

from visionfuse.bench.accuracy import sampled_errors
from visionfuse.bench.cases import BASELINE, Case
from visionfuse.bench.peers import PEERS
from visionfuse.bench.runner import TURN_S
from visionfuse.bench.table import Row, show_rows, update_csv
from visionfuse.bench.timing import time_in_turns
from visionfuse.kernels.attention import block_sparse_attention, unsupported_reasons
from visionfuse.kernels.plan import (
    AttentionPlan,
    Dense,
    Segment,
    TokenLayout,
    plan_attention,
)
from visionfuse.kernels.plan.local import local_bounds, relations
from visionfuse.kernels.plan.local_lists import Line
from visionfuse.recipes import build
from visionfuse.scale_dit import Guidance, guided

SUITE = "scale_dit"
TOKEN = 16  # pixels
FLUX = {"num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24,
        "joint_attention_dim": 4096, "pooled_projection_dim": 768, "axes_dims_rope": (16, 56, 56),
        "in_channels": 64, "guidance_embeds": True}  # fmt: skip
TINY = {**FLUX, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 32, "num_attention_heads": 2,
        "joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (8, 12, 12)}  # fmt: skip
# Ways to attend: a name, options of the recipe. Numbered windows of guidance are those of the public code.
ATTENTION = {
    "columns": {},
    "columns, fp8": {"precision": "fp8"},
    "columns, int8_fp8": {"precision": "int8_fp8"},
    "columns, numbered windows": {"guidance": "linear"},
    "columns, numbered windows, fp8": {"guidance": "linear", "precision": "fp8"},
    "columns of 192x32, fp8": {"precision": "fp8", "block": (192, 32)},
    "columns of 192x32, int8_fp8": {"precision": "int8_fp8", "block": (192, 32)},
    "columns of 192x32": {"block": (192, 32)},
    "columns of 192x128": {"block": (192, 128)},
    "columns of 192x128, fp8": {"precision": "fp8", "block": (192, 128)},
    "columns of 192x128, int8_fp8": {"precision": "int8_fp8", "block": (192, 128)},
    "released": {"rule": "released"},
    "hilbert": {"rule": "hilbert"},
    "token": {"rule": "token"},
    "released, fp8": {"rule": "released", "precision": "fp8"},
}
# Relative L1 error, above which nothing is timed.
ALLOWED = {"model": 0.01, "fp8": 0.12, "int8_fp8": 0.1}


def grid_of(size: tuple[int, int]) -> tuple[int, int]:
    return size[0] // TOKEN, size[1] // TOKEN


def layout_of(grid: tuple[int, int], text: int) -> TokenLayout:
    coarse = (grid[0] // 4, grid[1] // 4)
    return TokenLayout(
        (Segment("text", (text,)), Segment("grid", grid), Segment("guidance", coarse))
    )


def kept_keys(plan: AttentionPlan, spec: Any, rows: Tensor) -> Tensor:
    """The keys that ordered queries see, bool [rows, S]: from the rule and its blocks, not from the lists."""
    layout = plan.layout
    line = Line.of(layout, spec, plan.order, rows.device)
    lo, hi, coord = (x[..., line.permutation] for x in local_bounds(layout, spec, rows.device))
    block_q, block_k = spec.block or (1, 1)
    own_q, own_k = line.cut(0, block_q).of_position, line.cut(1, block_k).of_position
    seen = torch.zeros(rows.numel(), layout.length, dtype=torch.bool, device=rows.device)
    for index, row in enumerate(rows.tolist()):
        queries = (own_q == own_q[row]).nonzero()[:, 0]
        for i, j, table in relations(layout):
            keys = slice(layout.offsets[j], layout.offsets[j + 1])
            if i != int(line.segment[row]):
                continue
            if table is None:
                seen[index, keys] = True
                continue
            near = (lo[table][:, queries, None] <= coord[:, None, keys]).all(0)
            near &= (coord[:, None, keys] < hi[table][:, queries, None]).all(0)
            kept = own_k[keys][near.any(0)].unique()
            seen[index, keys] = torch.isin(own_k[keys], kept)
    return seen


def attention(size: tuple[int, int], args: argparse.Namespace) -> list[Row]:
    """Rows of all ways to attend, each beside the dense baseline of the same run."""
    config, device = (TINY if args.tiny else FLUX), torch.device(args.device)
    heads, dim = config["num_attention_heads"], config["attention_head_dim"]
    grid, text = grid_of(size), args.text
    layout, stock = layout_of(grid, text), text + grid[0] * grid[1]
    generator = torch.Generator(device).manual_seed(0)
    shape = (3, 1, layout.length, heads, dim)
    q, k, v = torch.randn(shape, generator=generator, device=device, dtype=args.dtype)
    name = f"{size[0]}x{size[1]} attention, {layout.length:,} tokens, {heads} heads of {dim}"
    case = Case(name=name, layout=TokenLayout.joint(grids=[(1, stock)]), spec=Dense(), heads=heads,
                head_dim=dim, impls=())  # fmt: skip
    dense = PEERS[BASELINE].make(case, *(x[:, :stock] for x in (q, k, v)))
    calls: dict[str, Callable[[], object]] = {BASELINE: dense}
    rows = {BASELINE: Row(suite=SUITE, case=name, impl=BASELINE, density=1.0, note=f"{stock:,} tokens: text and image")}  # fmt: skip
    large = grid[0] * grid[1] > 256 * 256  # where a dense call takes seconds
    for way in args.ways or (args.step_ways if large else ATTENTION):
        recipe = build("scale_dit", **ATTENTION[way])
        precision = recipe.precision.name
        plan = plan_attention(layout, recipe.plan, order=recipe.order, impl=args.impl, head_dim=dim,
                              precision=precision, device=device)  # fmt: skip
        blocks = plan.blocks
        row = Row(suite=SUITE, case=name, impl=args.impl, recipe=way, density=blocks.density,
                  note=f"visited {blocks.visited_density:.2%}, {blocks.tiles} tiles, "
                  f"{(blocks.full.start.numel() + blocks.partial.start.numel()) / blocks.tiles:.1f} entries each")  # fmt: skip
        rows[way] = row
        if reasons := unsupported_reasons(args.impl, q, k, v, blocks, precision):
            row.note = "; ".join(reasons)
            continue
        calls[way] = partial(
            block_sparse_attention, q, k, v, blocks, impl=args.impl, precision=precision
        )
        out = calls[way]()
        assert isinstance(out, Tensor)
        visible = partial(kept_keys, plan, recipe.plan)
        row.rel_l1, row.cosine = sampled_errors(out, q, k, v, visible, queries=24)
        if not row.rel_l1 <= ALLOWED[precision]:
            row.note = f"WRONG, not timed: relative L1 error {row.rel_l1:.3g}"
            del calls[way]
    times = time_in_turns(
        calls,
        device=device,
        seconds=args.seconds,
        between=BASELINE,
        least=2,
        most=2 if large else 6,
        turn=TURN_S if args.seconds else 0.0,
    )
    for way, timing in times.items():
        row = rows[way]
        row.ms, row.ms_p20, row.ms_p80 = timing.ms, timing.ms_p20, timing.ms_p80
        if way != BASELINE:
            row.baseline, row.speedup = BASELINE, times[BASELINE].ms / timing.ms
            row.tflops_visited = 4e-9 * dim * heads * row.density * layout.length**2 / timing.ms
    return list(rows.values())


def random_model(config: dict[str, Any], args: argparse.Namespace) -> FluxTransformer2DModel:
    with torch.device("meta"):
        model = FluxTransformer2DModel(**config).to(args.dtype)
    model = model.to_empty(device=args.device).eval().requires_grad_(False)
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(0, 0.02)
    return model


def step(pipe: FluxPipeline, size: tuple[int, int], args: argparse.Namespace, steps: int) -> tuple[float, float]:  # fmt: skip
    """Seconds of the last of `steps` steps, and GiB at the peak."""
    config, device = pipe.transformer.config, torch.device(args.device)
    generator = torch.Generator(device).manual_seed(0)
    rand = lambda *s: torch.randn(*s, generator=generator, device=device, dtype=args.dtype)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    stamps: list[Any] = []

    def stamp(*_: Any) -> dict:
        if cuda:
            stamps.append(torch.cuda.Event(enable_timing=True))
            stamps[-1].record()
        return {}

    pipe.set_progress_bar_config(disable=True)
    pipe(
        prompt_embeds=rand(1, args.text, config.joint_attention_dim),
        pooled_prompt_embeds=rand(1, config.pooled_projection_dim),
        height=size[0], width=size[1], num_inference_steps=steps, generator=generator,
        output_type="latent", callback_on_step_end=stamp,
    )  # fmt: skip
    if not cuda:
        return 0.0, 0.0
    torch.cuda.synchronize()
    seconds = stamps[-2].elapsed_time(stamps[-1]) / 1e3
    return seconds, torch.cuda.max_memory_allocated() / 2**30


def steps(size: tuple[int, int], args: argparse.Namespace, model: FluxTransformer2DModel, found: list[Row]) -> list[Row]:  # fmt: skip
    """Rows of the stock step, where it does not take minutes, and of ours. found: the rows of attention."""
    pipe = FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None, tokenizer=None,
                        text_encoder_2=None, tokenizer_2=None, transformer=model)  # fmt: skip
    grid = grid_of(size)
    coarse = (grid[0] // 4, grid[1] // 4)
    latents = torch.randn(1, coarse[0] * coarse[1], model.config.in_channels, device=args.device)
    name = f"{size[0]}x{size[1]} step, FLUX.1-dev architecture, random weights"
    layers = model.config.num_layers + model.config.num_single_layers
    dense = next((r.ms for r in found if r.impl == BASELINE), None)
    rows, stock, peak = [], None, None
    if grid[0] * grid[1] <= 256 * 256:
        stock, peak = step(pipe, size, args, 2)
        rows.append(Row(suite=SUITE, case=name, impl="stock", ms=1e3 * stock, peak_gib=peak))
    for way in args.step_ways:
        if dense is not None and not any(r.recipe == way and r.ms for r in found):
            continue
        pipe.enable_visionfuse("scale_dit", impl=args.impl, **ATTENTION[way])
        with guided(model, Guidance(latents=latents, coarse=coarse, image=grid)) if not args.unguided else nullcontext():  # fmt: skip
            seconds, gib = step(pipe, size, args, 3 if grid[0] * grid[1] <= 256 * 256 else 2)
        pipe.disable_visionfuse()
        row = Row(
            suite=SUITE, case=name, impl="visionfuse", recipe=way, ms=1e3 * seconds, peak_gib=gib
        )
        if stock is not None:
            row.baseline, row.speedup = "stock", stock / max(seconds, 1e-9)
            row.note = f"peak memory {gib / max(peak or gib, 1e-9) - 1:+.1%}"
        elif dense is not None:
            own = next(r.ms for r in found if r.recipe == way)
            computed = seconds + layers * (dense - (own or 0.0)) / 1e3
            row.baseline, row.speedup = f"{BASELINE}, computed", computed / max(seconds, 1e-9)
            row.note = f"dense step computed from its attention: {computed:.1f} s"
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--sizes", nargs="+", default=["4096x4096", "8192x8192"], help="height x width, pixels")  # fmt: skip
    parser.add_argument("--parts", nargs="+", choices=("attention", "step"), default=["attention", "step"])  # fmt: skip
    parser.add_argument("--ways", nargs="+", choices=ATTENTION, help="of attention; all by default")
    parser.add_argument("--step-ways", nargs="+", choices=ATTENTION, default=["columns", "columns, fp8"])  # fmt: skip
    parser.add_argument("--impl", default="gluon_sm90")
    parser.add_argument("--text", type=int, default=512)
    parser.add_argument("--unguided", action="store_true", help="steps without guidance")
    parser.add_argument("--seconds", type=float, default=0.5, help="of timing a way to attend")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--commit", default="")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and small sizes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    if args.tiny:
        args.sizes, args.seconds, args.text = ["512x768"], 0.0, 64
        args.impl = "blocks" if args.device == "cpu" else args.impl
    model = random_model(TINY if args.tiny else FLUX, args) if "step" in args.parts else None
    for name in args.sizes:
        height, width = map(int, name.split("x"))
        found = attention((height, width), args) if "attention" in args.parts else []
        _keep(found, name, args)
        if model is not None:
            _keep(steps((height, width), args, model, found), name, args)


def _keep(rows: list[Row], size: str, args: argparse.Namespace) -> None:
    if rows:
        show_rows(rows, title=f"{SUITE}, {size}")
        if args.csv:
            update_csv(rows, args.csv, commit=args.commit)


if __name__ == "__main__":
    main()
