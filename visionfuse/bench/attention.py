"""Block-sparse attention against dense attention: `python -m visionfuse.bench.attention`.

Every implementation is first compared with an exact result on sampled queries, from the rule itself
and not from the plan; a wrong one stops the run. On a GPU the shapes are those of image and video
models and the baseline is cuDNN; on a CPU it is one shape and PyTorch's dense attention.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ..kernels.attention.api import block_sparse_attention, unsupported_reasons
from ..kernels.plan.layout import TokenLayout
from ..kernels.plan.neighborhood import Dense, Neighborhood
from ..kernels.plan.planner import AttentionPlan, plan_attention
from .table import Row, show_rows, write_rows
from .timing import time_in_turns

SAMPLED_QUERIES = 128
SAMPLED_HEADS = 2
# Relative L1 error that stops the run: 16-bit attention has 2e-3 on normal data, fp32 3e-7.
MOST_ERROR = {torch.bfloat16: 8e-3, torch.float32: 1e-5}


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    layout: TokenLayout
    spec: Dense | Neighborhood
    heads: int
    head_dim: int
    impls: tuple[str, ...]


def _window(window: tuple[int, ...], stride: int | tuple[int, ...] = 1) -> Neighborhood:
    return Neighborhood(window=window, stride=stride)


def gpu_cases() -> list[Case]:
    """Shapes and windows for which peers publish numbers."""
    shapes = [
        # name, text, grid, heads, spec, with FlexAttention (each compilation takes 20 s)
        ("FLUX 2K, window 48", 0, (128, 128), 24, _window((48, 48)), True),
        ("FLUX 2K, window 48, stride 16", 0, (128, 128), 24, _window((48, 48), (16, 16)), False),
        ("FLUX 2K + text, density 0.1", 512, (128, 128), 24, Neighborhood(density=0.1), False),
        ("FLUX 4K, window 80", 0, (256, 256), 24, _window((80, 80)), True),
        ("FLUX 4K, window 80, stride 16", 0, (256, 256), 24, _window((80, 80), (16, 16)), False),
        ("Wan 480p, window 12x16x16", 0, (21, 30, 52), 12, _window((12, 16, 16)), True),
        ("Wan 720p, window 12x24x24", 0, (21, 45, 80), 12, _window((12, 24, 24)), False),
        ("Wan 720p, window 12x24x24, stride 4x8x8", 0, (21, 45, 80), 12,
         _window((12, 24, 24), (4, 8, 8)), False),
        ("Hunyuan, window 18x24x24", 0, (30, 48, 80), 24, _window((18, 24, 24)), False),
        ("Hunyuan, window 18x24x24, stride 16x8x8", 0, (30, 48, 80), 24,
         _window((18, 24, 24), (16, 8, 8)), False),
        ("FLUX 2K, dense", 0, (128, 128), 24, Dense(), False),
    ]  # fmt: skip
    return [
        Case(
            name=name, layout=TokenLayout.joint(text=text, grids=[grid]), spec=spec, heads=heads,
            head_dim=128, impls=("triton", "flex") if flex else ("triton",),
        )
        for name, text, grid, heads, spec, flex in shapes
    ]  # fmt: skip


def cpu_cases() -> list[Case]:
    """A tenth of the pairs, by windows that move by 16, 8 and 1 tokens."""
    windows = {"48x32": ((48, 32), 16), "40x40": ((40, 40), 8), "41x41": ((41, 41), 1)}
    return [
        Case(
            name=f"128x128 grid, 8 heads of 64, window {name}, stride {stride}",
            layout=TokenLayout.joint(grids=[(128, 128)]),
            spec=_window(window, stride),
            heads=8,
            head_dim=64,
            impls=("blocks",),
        )
        for name, (window, stride) in windows.items()
    ]


def measure(case: Case, device: torch.device, *, suite: str, seconds: float) -> list[Row]:
    """Rows of the dense baseline and of every implementation of the case."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, case.layout.length, case.heads, case.head_dim)
    q, k, v = (
        torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(3)
    )
    rows = {"dense": Row(suite=suite, case=case.name, impl="dense", density=1.0)}
    visited = {"dense": 1.0}
    dense = _dense(q, k, v)
    with torch.no_grad():
        rows["dense"].note = f"SDPA, {'cuDNN' if device.type == 'cuda' else 'CPU'}"
        calls: dict[str, Callable[[], object]] = {"dense": dense}
        for impl in case.impls:
            plan = plan_attention(
                case.layout, case.spec, impl=impl, head_dim=case.head_dim, device=device
            )
            row = Row(suite=suite, case=case.name, impl=impl, recipe=_recipe(case.spec),
                      baseline="dense", density=plan.density)  # fmt: skip
            rows[impl] = row
            q_o, k_o, v_o = (_moved(x, plan.permutation) for x in (q, k, v))
            if reasons := unsupported_reasons(impl, q_o, k_o, v_o, plan.blocks):
                row.note = "; ".join(reasons)
                continue
            call = _sparse(q_o, k_o, v_o, plan, impl)
            row.rel_l1, row.cosine = _errors(_moved(call(), plan.inverse), q, k, v, case)
            if row.rel_l1 > MOST_ERROR[dtype]:
                raise RuntimeError(
                    f"{impl} is wrong on {case.name}: relative L1 error {row.rel_l1:.3g}"
                )
            tile = "x".join(map(str, plan.tile or ()))
            row.note = f"blocks {plan.blocks.block_q}x{plan.blocks.block_k}"
            row.note += f", tile {tile}" if tile else ""
            visited[impl] = plan.blocks.visited_density
            calls[impl] = call
            if device.type == "cuda":
                row.peak_gib = _peak_gib(call)
            if device.type == "cpu" and plan.permutation is not None:
                name = f"{impl} with order"
                rows[name] = Row(suite=suite, case=case.name, impl=name, recipe=row.recipe,
                                 baseline="dense", density=plan.density, rel_l1=row.rel_l1,
                                 cosine=row.cosine, note="q, k, v into the order and out back")  # fmt: skip
                visited[name] = visited[impl]
                calls[name] = _with_order(q, k, v, plan, impl)
        times = time_in_turns(calls, device=device, seconds=seconds)
    for name, timing in times.items():
        row = rows[name]
        row.ms, row.ms_p20, row.ms_p80 = timing.ms, timing.ms_p20, timing.ms_p80
        flops = 4 * case.heads * case.head_dim * case.layout.length**2 * visited[name]
        row.tflops_visited = flops / timing.ms * 1e-9
        if name != "dense":
            row.speedup = times["dense"].ms / timing.ms
    return list(rows.values())


def _dense(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # heads first
    if not q.is_cuda:
        return lambda: scaled_dot_product_attention(q, k, v)

    def dense() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(q, k, v)

    return dense


def _sparse(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, impl: str
) -> Callable[[], Tensor]:
    return lambda: block_sparse_attention(q, k, v, plan.blocks, impl=impl)


def _with_order(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, impl: str
) -> Callable[[], Tensor]:
    def call() -> Tensor:
        q_o, k_o, v_o = (_moved(x, plan.permutation) for x in (q, k, v))
        out = block_sparse_attention(q_o, k_o, v_o, plan.blocks, impl=impl)
        return _moved(out, plan.inverse)

    return call


def _moved(x: Tensor, index: Tensor | None) -> Tensor:
    return x if index is None else x[:, index]


def _recipe(spec: Dense | Neighborhood) -> str:
    return "dense" if isinstance(spec, Dense) else "gna"


def _errors(out: Tensor, q: Tensor, k: Tensor, v: Tensor, case: Case) -> tuple[float, float]:
    """Relative L1 error and cosine on sampled queries and heads against float64."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randperm(case.layout.length, generator=generator)[:SAMPLED_QUERIES].to(q.device)
    heads = slice(SAMPLED_HEADS)
    qd, kd, vd = (
        x[0, index, heads].double().transpose(0, 1)
        for x, index in ((q, rows), (k, slice(None)), (v, slice(None)))
    )  # [H, S, D]
    scores = (qd @ kd.mT) * case.head_dim**-0.5
    scores.masked_fill_(~_visible(case, rows), -torch.inf)
    exact = scores.softmax(-1) @ vd
    got = out[0, rows, heads].double().transpose(0, 1)
    rel_l1 = (got - exact).abs().sum() / exact.abs().sum()
    cosine = (got * exact).sum() / (got.norm() * exact.norm())
    return float(rel_l1), float(cosine)


def _visible(case: Case, rows: Tensor) -> Tensor:
    """Which keys the queries `rows` see, from the rule: bool [rows, S]. One grid, any text."""
    seen = torch.ones(rows.numel(), case.layout.length, dtype=torch.bool, device=rows.device)
    for part, offset in zip(case.layout.segments, case.layout.offsets, strict=False):
        if part.kind != "grid" or isinstance(case.spec, Dense):
            continue
        lo, hi, coord = case.spec.resolve(part.shape).intervals(rows.device)
        own = (rows >= offset) & (rows < offset + part.length)
        at = rows[own] - offset
        inside = (lo[:, at, None] <= coord[:, None]) & (coord[:, None] < hi[:, at, None])
        block = seen[own]
        block[:, offset : offset + part.length] = inside.all(0)
        seen[own] = block
    return seen


def _peak_gib(call: Callable[[], object]) -> float:
    """Memory that one call takes on top of its inputs."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("assets/bench"), help="folder of the CSV")
    parser.add_argument("--device", choices=("cpu", "cuda"),
                        default="cuda" if torch.cuda.is_available() else "cpu")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, the first case")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    suite = "attention" if device.type == "cuda" else "attention-cpu"
    cases = gpu_cases() if device.type == "cuda" else cpu_cases()
    rows: list[Row] = []
    for case in cases[:1] if arguments.quick else cases:
        rows += measure(case, device, suite=suite, seconds=0.1 if arguments.quick else 0.5)
    show_rows(rows, title=f"Attention on {device.type}")
    print(f"Wrote {write_rows(rows, arguments.out)}")


if __name__ == "__main__":
    main()
