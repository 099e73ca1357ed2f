"""The fused prologue of attention: `python -m visionfuse.bench.prologue --csv assets/bench/prologue.csv`.

Rows are compared with a device copy that moves as many bytes in the same run: `speedup` of a row is its
share of the speed of that copy, and the notes have both in GB/s. Bytes are those that have to move, in
elements Nq = B S H D and Nk = B S Hk D of e = 2 bytes (bf16) and codes of c bytes (c = e, or 1 in 8 bits):

    Q, K        (e + c) (Nq + Nk)                   every element read once and written once
    rotary      8 S D, 8 S D / 2 with --halves      cos and sin in fp32, once
    order       8 S                                 int64
    scales      4 B (H ceil(S / q_rows) + Hk ceil(S / k_rows))
    smoothing   an eighth of e Nk + the table       the mean of every 8th key, before the first one is written
    V in fp8    (2 e + 1) Nk + 4 B Hk D             the scale of a channel needs all of V; S padded to 128
    V in order  2 e Nk                              0 without an order: V is not touched
    norm        e (Nq + Nk)                         over all heads: a token has to be read before its first head

That is 4 + 4 bytes for an element of Q and K in bf16, and in int8 with smoothing and fp8 V 3 for one of Q, 3.25
for one of K and 5 for one of V. Weights, means and partial results are below 1% and not counted.

rel_l1 and cosine compare what the operands of one head stand for with float64, the worst of q, k and v; an
error beyond what the formats allow stops the run. Times are of the GPU; the notes have the Python of a
call beside them, which a busy GPU hides. `torch` is the same in eager PyTorch, norm and rotation as in diffusers.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..kernels.attention.prologue import (
    EIGHT_BIT,
    Operands,
    PrologueSpec,
    dequantized,
    mean_step,
    prologue,
    reference,
)
from .table import Row, show_rows, update_csv
from .timing import time_in_turns

# Relative L1 error that stops the run, on normal data: twice what rounding costs.
MOST_ERROR = {"same": 4e-3, "int8": 2.5e-2, "fp8": 5e-2}


@dataclass(frozen=True, kw_only=True)
class Case:
    """kv_heads None: as many as heads."""

    name: str
    batch: int
    length: int
    heads: int
    head_dim: int
    kv_heads: int | None = None


CASES = [
    Case(name="FLUX 2K, 16896 tokens, 24 heads of 128", batch=1, length=16896, heads=24, head_dim=128),
    Case(name="Wan 720p 14B, 75600 tokens, 40 heads of 128", batch=1, length=75600, heads=40,
         head_dim=128),
    Case(name="FLUX 1K, 4608 tokens, 24 heads of 128", batch=1, length=4608, heads=24, head_dim=128),
    Case(name="16384 tokens, 16 heads of 64, batch 2", batch=2, length=16384, heads=16, head_dim=64),
]  # fmt: skip

_INT8 = replace(EIGHT_BIT["int8_fp8"], smooth_k=True)
ACROSS = "bf16, norm over all heads"
# name: (spec, with a token order)
RECIPES: dict[str, tuple[PrologueSpec, bool]] = {
    "bf16": (PrologueSpec(), False),
    "bf16, ordered": (PrologueSpec(), True),
    ACROSS: (PrologueSpec(), False),
    "int8, smooth K, fp8 V": (_INT8, False),
    "int8, smooth K, fp8 V, ordered": (_INT8, True),
    "int8 rows, V untouched": (PrologueSpec(qk="int8"), False),
    "fp8, fp8 V": (EIGHT_BIT["fp8"], False),
}


def required_bytes(
    case: Case, spec: PrologueSpec, *, ordered: bool, halves: bool, across: bool = False
) -> int:
    """Bytes that have to move, see the top of this file. bf16 inputs, norm and rotary embedding."""
    kv_heads = case.kv_heads or case.heads
    tokens, e = case.batch * case.length, 2
    code = e if spec.qk == "same" else 1
    n_q, n_k = (tokens * heads * case.head_dim for heads in (case.heads, kv_heads))
    table = 8 * case.length * case.head_dim // (2 if halves else 1)
    total = (e + code + e * across) * (n_q + n_k) + table + 8 * case.length * ordered
    if spec.qk != "same":
        blocks_q, blocks_k = -(-case.length // spec.q_rows), -(-case.length // spec.k_rows)
        total += 4 * case.batch * (case.heads * blocks_q + kv_heads * blocks_k)
    if spec.smooth_k:
        total += (e * n_k + table) // (1 if across else mean_step(case.length))
    if spec.v == "fp8":
        padded = case.length
        if spec.v_layout != "tokens":
            padded = -(-padded // spec.v_padding) * spec.v_padding
        channels = case.batch * kv_heads * case.head_dim
        total += 2 * e * n_k + channels * padded + 4 * channels
    elif ordered or spec.v_layout != "tokens":
        total += 2 * e * n_k
    return total


def measure(
    case: Case, *, suite: str, device: torch.device, seconds: float, halves: bool
) -> list[Row]:
    """Rows of a copy and of the prologue for every recipe, after a check of its result."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

    kv_heads = case.kv_heads or case.heads
    q, k, v = (
        normal(case.batch, case.length, heads, case.head_dim)
        for heads in (case.heads, kv_heads, kv_heads)
    )
    k += 3 * normal(kv_heads, case.head_dim)  # a mean, which keys of real models have
    weight = 1 + 0.1 * normal(case.head_dim)
    position = torch.arange(case.length, device=device)[:, None]
    angle = position * 1e4 ** -torch.linspace(0, 1, case.head_dim // 2, device=device)
    angle = angle if halves else angle.repeat_interleave(2, 1)
    rotary = (angle.cos(), angle.sin())
    order = torch.randperm(case.length, generator=generator, device=device)

    rows: list[Row] = []
    for name, (spec, ordered) in RECIPES.items():
        across = name == ACROSS
        options = {"norm_q": weight.repeat(case.heads) if across else weight,
                   "norm_k": weight.repeat(kv_heads) if across else weight,
                   "rotary": rotary, "order": order if ordered else None}  # fmt: skip
        moved = required_bytes(case, spec, ordered=ordered, halves=halves, across=across)
        row = Row(suite=suite, case=case.name, impl="prologue", recipe=name, baseline="copy")
        got = prologue(q, k, v, spec, **options)
        row.rel_l1, row.cosine = _errors(got, (q, k, v), spec, options, all_heads=across)
        del got
        most = MOST_ERROR["fp8" if spec.v == "fp8" else spec.qk]
        if not row.rel_l1 <= most:
            raise RuntimeError(
                f"The prologue is wrong on {case.name}, {name}: relative L1 error {row.rel_l1:.3g}, at "
                f"most {most} is expected."
            )
        if device.type == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            prologue(q, k, v, spec, **options)
            row.peak_gib = (torch.cuda.max_memory_allocated() - before) / 2**30
        calls: dict[str, Callable[[], object]] = {
            "copy": _copy(moved, device),
            "prologue": lambda spec=spec, options=options: prologue(q, k, v, spec, **options),
        }
        if name == "bf16" and not halves:
            calls["torch"] = lambda: _eager(q, k, weight, rotary)
        times = time_in_turns(calls, device=device, seconds=seconds)
        for impl, timing in times.items():
            out = row if impl == "prologue" else Row(
                suite=suite, case=case.name, impl=impl, recipe=name,
                baseline="" if impl == "copy" else "copy",
            )  # fmt: skip
            out.ms, out.ms_p20, out.ms_p80 = timing.ms, timing.ms_p20, timing.ms_p80
            out.note = f"{moved / timing.ms * 1e-6:.0f} GB/s of {moved / 1e6:.1f} MB required"
            if impl == "prologue":
                out.note += f", {_python_us(calls[impl], device):.0f} us of Python"
            if impl != "copy":
                out.speedup = times["copy"].ms / timing.ms
            rows.append(out)
    return rows


def _copy(moved: int, device: torch.device) -> Callable[[], Tensor]:
    """A copy that reads and writes `moved` bytes together."""
    source = torch.zeros(moved // 16, 2, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _python_us(call: Callable[[], object], device: torch.device) -> float:
    """Time until the call returns, with the GPU asleep: few enough calls that no queue fills up."""
    times = []
    for _ in range(10):
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda._sleep(2_000_000)
        start = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - start))
    return sorted(times)[len(times) // 2]


def _eager(q: Tensor, k: Tensor, weight: Tensor, rotary: tuple[Tensor, Tensor]) -> list[Tensor]:
    """RMSNorm and rotation as diffusers' FLUX computes them, step by step."""
    cos, sin = (table[None, :, None] for table in rotary)
    out = []
    for x in (q, k):
        x = torch.nn.functional.rms_norm(x, weight.shape, weight, 1e-6)
        real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((-imaginary, real), dim=-1).flatten(3)
        out.append((x.float() * cos + turned.float() * sin).to(x.dtype))
    return out


def _errors(
    got: Operands,
    tensors: tuple[Tensor, ...],
    spec: PrologueSpec,
    options: dict,
    *,
    all_heads: bool,
) -> tuple[float, float]:
    """The worst of q, k and v in head 0 of batch entry 0: relative L1 error and cosine.

    all_heads: the norm is over all of them; then of the first 512 tokens, which have to be in their places.
    """
    if all_heads:
        q, k, v = (x[:1, :512].double() for x in tensors)
        rotary = tuple(table[:512] for table in options["rotary"])
        first: dict[str, Any] = options | {"rotary": rotary}
        true = reference(q, k, v, spec, **first)
        worst = [
            _distance(x[:1, :512, :1].double(), y[:, :, :1])
            for x, y in zip(got[:3], true[:3], strict=True)
        ]
        return max(error for error, _ in worst), min(cosine for _, cosine in worst)
    q, k, v = (x[:1, :, :1].double() for x in tensors)
    true = reference(q, k, v, PrologueSpec(smooth_k=spec.smooth_k, eps=spec.eps), **options)
    q_scale, k_scale, v_scale = (
        None if scale is None else scale[:1, :1]
        for scale in (got.q_scale, got.k_scale, got.v_scale)
    )
    head_v = got.v[:1, :, :1] if spec.v_layout == "tokens" else got.v[:1, :1]
    head = Operands(got.q[:1, :, :1], got.k[:1, :, :1], head_v, q_scale, k_scale, v_scale, None)
    worst = [
        _distance(x.double(), y) for x, y in zip(dequantized(head, spec), true[:3], strict=True)
    ]
    return max(error for error, _ in worst), min(cosine for _, cosine in worst)


def _distance(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Relative L1 error of x and the cosine between both."""
    return (
        float((x - y).abs().sum() / y.abs().sum()),
        float((x * y).sum() / (x.norm() * y.norm())),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--csv", type=Path, default=Path("assets/bench/prologue.csv"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda",
                        help="cpu: one tiny case in Triton's interpreter, to try the script")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, the first case")
    parser.add_argument("--halves", action="store_true", help="rotary tables of one angle a pair")
    parser.add_argument("--commit", default="", help="where the tree is a copy without git")
    arguments = parser.parse_args()
    if arguments.csv.suffix != ".csv":
        parser.error(f"--csv must name a .csv file, got {arguments.csv}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; --device cpu tries the script")
    cases = CASES[:1] if arguments.quick else CASES
    if arguments.device == "cpu":
        cases = [Case(name="300 tokens, 2 heads of 64", batch=1, length=300, heads=2, head_dim=64)]
    rows: list[Row] = []
    for case in cases:
        measured = measure(
            case, suite=arguments.csv.stem, device=torch.device(arguments.device),
            seconds=0.05 if arguments.quick else 0.3, halves=arguments.halves,
        )  # fmt: skip
        update_csv(measured, arguments.csv, commit=arguments.commit)
        rows += measured
    show_rows(rows, title=f"Prologue on {arguments.device}")
    print(f"Wrote {arguments.csv}")


if __name__ == "__main__":
    main()
