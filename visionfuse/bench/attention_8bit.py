"""8-bit attention on Hopper against cuDNN in bf16: `python -m visionfuse.bench.attention_8bit --csv PATH`.

Operands are quantised beforehand, by plain torch: times are of the kernel alone. Errors are against
float64 of the inputs before quantisation, on sampled queries; a wrong result is reported, not timed.
The CSV is written after every case.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ..kernels.plan.block_plan import BlockPlan, Entries
from .table import Row, show_rows, update_csv
from .timing import time_in_turns

SAMPLED_QUERIES = 64
SAMPLED_HEADS = 2
MOST_ERROR = 0.12  # relative L1; 8-bit attention of normal data has 0.04 to 0.06
BLOCK_Q, BLOCK_K = 192, 128


@dataclass(frozen=True, kw_only=True)
class Case:
    """keys: the key blocks that query tile `tile` of `tiles` visits, of `blocks`."""

    name: str
    length: int
    heads: int
    head_dim: int
    keys: Callable[[int, int, int], Iterable[int]]


def all_keys(tile: int, tiles: int, blocks: int) -> range:
    return range(blocks)


def band(tile: int, tiles: int, blocks: int) -> range:
    """9% of the keys, around the queries."""
    width = round(0.09 * blocks)
    first = min(max(tile * blocks // tiles - width // 2, 0), blocks - width)
    return range(first, first + width)


CASES = (
    Case(name="16,896 tokens, 24 heads of 128, dense", length=16896, heads=24, head_dim=128, keys=all_keys),
    Case(name="75,648 tokens, 12 heads of 128, 9% band", length=75648, heads=12, head_dim=128, keys=band),
    Case(name="16,384 tokens, 24 heads of 64, dense", length=16384, heads=24, head_dim=64, keys=all_keys),
    Case(name="75,600 tokens, 12 heads of 128, dense", length=75600, heads=12, head_dim=128, keys=all_keys),
)  # fmt: skip


def block_list(
    length_q: int, length_k: int, block_q: int, keys: Callable[[int, int, int], Iterable[int]]
) -> BlockPlan:
    """A plan of full entries at multiples of BLOCK_K, the last one as short as the keys end."""
    tiles, blocks = -(-length_q // block_q), -(-length_k // BLOCK_K)
    offset, start = [0], []
    for tile in range(tiles):
        start += [BLOCK_K * j for j in keys(tile, tiles, blocks)]
        offset.append(len(start))
    q_start = torch.arange(tiles, dtype=torch.int32) * block_q
    starts = torch.tensor(start, dtype=torch.int32)
    none = torch.zeros(0, dtype=torch.int32)
    return BlockPlan(
        length_q=length_q, length_k=length_k, block_q=block_q, block_k=BLOCK_K,
        q_start=q_start, q_count=(length_q - q_start).clamp(max=block_q),
        full=Entries(offset=torch.tensor(offset, dtype=torch.int32), start=starts,
                     count=(length_k - starts).clamp(max=BLOCK_K)),
        partial=Entries(offset=torch.zeros(tiles + 1, dtype=torch.int32), start=none, count=none),
    )  # fmt: skip


def measure(case: Case, *, suite: str, seconds: float) -> list[Row]:
    """Rows of cuDNN, of the 16-bit kernel and of both 8-bit ones."""
    from ..kernels.attention import gluon_sm90, gluon_sm90_8bit
    from ..kernels.attention.prologue import EIGHT_BIT, reference

    generator = torch.Generator("cuda").manual_seed(0)
    shape = (1, case.length, case.heads, case.head_dim)
    q, k, v = (
        torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
        for _ in range(3)
    )
    scale = case.head_dim**-0.5
    plan = block_list(case.length, case.length, BLOCK_Q, case.keys).to("cuda")
    density = plan.visited_density
    calls: dict[str, Callable[[], Tensor]] = {
        "gluon_sm90": lambda: gluon_sm90.forward(q, k, v, plan, scale, False)[0]
    }
    reasons = {"gluon_sm90": gluon_sm90.unsupported(q, k, v, plan)}
    for precision, spec in EIGHT_BIT.items():
        x = reference(q.float(), k.float(), v.float(), spec)
        name = f"gluon_sm90_8bit, {precision}"
        reasons[name] = gluon_sm90_8bit.unsupported(x, plan)
        calls[name] = lambda x=x: gluon_sm90_8bit.forward(x, plan, scale, False)[0]
    torch.cuda.empty_cache()

    rows = {
        "dense": Row(
            suite=suite, case=case.name, impl="dense", density=1.0, note="SDPA, cuDNN, bf16"
        )
    }
    timed: dict[str, Callable[[], object]] = {"dense": _cudnn(q, k, v)}
    exact, sample = _exact(q, k, v, case)
    for name, call in calls.items():
        rows[name] = row = Row(
            suite=suite, case=case.name, impl=name, recipe=name.partition(", ")[2] or "bf16",
            baseline="dense", density=density, note="kernel alone, operands quantised beforehand"
            if ", " in name else "16-bit kernel",
        )  # fmt: skip
        if reasons[name]:
            row.note = "; ".join(reasons[name])
            continue
        out = call()[0, sample, :SAMPLED_HEADS].double().transpose(0, 1)
        row.rel_l1 = float((out - exact).abs().sum() / exact.abs().sum())
        row.cosine = float((out * exact).sum() / (out.norm() * exact.norm()))
        if row.rel_l1 <= MOST_ERROR:  # false for NaN
            timed[name] = call
        else:
            row.note = "WRONG, not timed"
    times = time_in_turns(timed, device="cuda", seconds=seconds, most=15)
    for name, timing in times.items():
        row = rows[name]
        row.ms, row.ms_p20, row.ms_p80 = timing.ms, timing.ms_p20, timing.ms_p80
        visited = 1.0 if name == "dense" else density
        if name != "dense":
            row.speedup = times["dense"].ms / timing.ms
        row.tflops_visited = (
            4e-9 * case.heads * case.head_dim * case.length**2 * visited / timing.ms
        )
    return list(rows.values())


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))

    def call() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(q, k, v)

    return call


def _exact(q: Tensor, k: Tensor, v: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    """float64 out [heads, queries, D] of sampled queries, the last one among them, and the sample."""
    generator = torch.Generator().manual_seed(1)
    sample = torch.randperm(case.length - 1, generator=generator)[:SAMPLED_QUERIES]
    sample[0] = case.length - 1
    tiles, blocks = -(-case.length // BLOCK_Q), -(-case.length // BLOCK_K)
    seen = torch.zeros(sample.numel(), blocks, dtype=torch.bool)
    for i, query in enumerate(sample.tolist()):
        seen[i, list(case.keys(query // BLOCK_Q, tiles, blocks))] = True
    seen = seen.repeat_interleave(BLOCK_K, 1)[:, : case.length].to(q.device)
    sample = sample.to(q.device)
    qd = q[0, sample, :SAMPLED_HEADS].double().transpose(0, 1)
    kd, vd = (x[0, :, :SAMPLED_HEADS].double().transpose(0, 1) for x in (k, v))
    scores = (qd @ kd.mT * case.head_dim**-0.5).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ vd, sample


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--csv", type=Path, default=Path("assets/bench/attention-8bit.csv"))
    parser.add_argument("--seconds", type=float, default=0.15, help="of measuring, a call")
    parser.add_argument(
        "--budget", type=float, default=33.0, help="seconds; no case starts after them"
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        parser.error("the 8-bit kernel needs a Hopper GPU, and there is none here")
    failed = False
    begin = time.perf_counter()
    rows: list[Row] = []
    for case in CASES:
        spent = time.perf_counter() - begin
        if spent > arguments.budget:
            print(f"Skipped after {spent:.0f} s: {case.name}")
            continue
        try:
            with torch.no_grad():
                rows += measure(case, suite=arguments.csv.stem, seconds=arguments.seconds)
        except Exception as error:  # one broken case must not cost the others their rows
            print(f"FAILED {case.name}: {type(error).__name__}: {error}")
            failed = True
            continue
        torch.cuda.empty_cache()
        update_csv(rows, arguments.csv)
        print(f"{time.perf_counter() - begin:.1f} s: {case.name}", flush=True)
    show_rows(rows, title="8-bit attention")
    if failed or any(row.note.startswith("WRONG") for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
