"""GPUs whose speed is known to the simulator: the one measured here, those that `visionfuse tune` was run on, and
some that are derived from these measurements and published peaks, which say so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..kernels.plan import tiles
from ..kernels.plan.tiles import BlockShape, Table

CUDNN = "cudnn"  # PyTorch's dense attention on Hopper, the baseline
MEASURED = "measured"


@dataclass(frozen=True, kw_only=True, eq=False)
class Gpu:
    """rates: pairs that one SM multiplies in a clock, of whole blocks of a shape of speed 1, by (implementation,
    precision, head dim); of CUDNN all in, dense. A pair of head dim d is 4 d floating-point operations.
    mhz: the clock that long kernels hold. capability: 90 for sm_90. basis: MEASURED, or what the rates are
    derived from.
    """

    name: str
    sms: int
    mhz: float
    capability: int
    rates: Mapping[tuple[str, str, int], float] = field(default_factory=dict)
    basis: str = MEASURED

    @property
    def impl(self) -> str:
        """The fastest implementation there."""
        return next(impl for impl, _, _ in self.rates if impl != CUDNN)

    def rate(self, impl: str, precision: str, head_dim: int) -> float:
        """Of the next head dim from this one up, as kernels pad them. Raises ValueError where none is known."""
        fits = [d for i, p, d in self.rates if (i, p) == (impl, precision) and d >= head_dim]
        if not fits:
            known = ", ".join(f"{i} {p} at head dim {d}" for i, p, d in self.rates if i != CUDNN)
            raise ValueError(
                f"The speed of {impl} in precision {precision!r} at head dim {head_dim} is not known "
                f"on {self.name}. Known: {known or 'nothing'}. `visionfuse tune` there measures more."
            )
        return self.rates[impl, precision, min(fits)]

    def shapes(self, impl: str, precision: str, head_dim: int) -> tuple[BlockShape, ...]:
        return tiles.block_shapes(impl, head_dim, precision=precision, gpu=self.name,
                                  target=("cuda", self.capability))  # fmt: skip


# Fitted to assets/bench/engine.csv at the clocks that its rows note, see `measured`; head dim 64 to one
# row each. cuDNN's own speed varies by a tenth around its rate, with the length. mhz: the median of the rows.
H200 = Gpu(
    name="NVIDIA H200", sms=132, mhz=1785, capability=90,
    rates={
        (CUDNN, "model", 64): 7.46,
        (CUDNN, "model", 128): 5.2,
        ("gluon_sm90", "model", 64): 9.7,
        ("gluon_sm90", "model", 128): 6.6,
        ("gluon_sm90", "fp8", 64): 11.2,
        ("gluon_sm90", "fp8", 128): 9.12,
        ("gluon_sm90", "int8_fp8", 64): 10.5,
        ("gluon_sm90", "int8_fp8", 128): 9.1,
        ("triton", "model", 64): 6.3,
        ("triton", "model", 128): 2.75,
    },
)  # fmt: skip
# The same multiprocessors, clocks and power as an H200; 3.35 TB/s of its 4.8, which long attention does not ask for.
H100 = replace(
    H200, name="NVIDIA H100 80GB HBM3",
    basis="derived, not measured: an H100 SXM computes as an H200 does, with less bandwidth",
)  # fmt: skip

PEAK = 4096  # operations of the H200's tensor cores an SM and clock: its published 989 TFLOP/s


def portable_clocks(head_dim: int, peak: int) -> float:
    """That an SM takes for a pair in the portable kernel, in the fastest shape that is known for it there.

    peak: operations of its tensor cores a clock. The H200's two rates say what a channel costs, which goes with the
    peak, and what comes beside, mostly one exponential: an SM of all these GPUs makes 16 a clock.
    """
    short, long = (
        1 / (H200.rate("triton", "model", d) * _fastest(H200, d)) for d in (64, 128)
    )  # fmt: skip
    return (long - short) / 64 * head_dim * PEAK / peak + 2 * short - long


def _fastest(gpu: Gpu, head_dim: int) -> float:
    return max(shape.speed for shape in gpu.shapes("triton", "model", head_dim))


def _of_peak(name: str, sms: int, tflops: float, peak: int, capability: int) -> Gpu:
    """tflops: the published dense peak of bfloat16 with sums in fp32. peak: the same of an SM and clock."""
    gpu = Gpu(
        name=name, sms=sms, mhz=round(tflops * 1e6 / (sms * peak)), capability=capability,
        basis=f"derived, not measured: {tflops:g} TFLOP/s as published, the portable kernel's share as on an H200",
    )  # fmt: skip
    rates = {
        ("triton", "model", d): 1 / (portable_clocks(d, peak) * _fastest(gpu, d)) for d in (64, 128)
    }
    return replace(gpu, rates=rates)


GPUS = (
    H200,
    H100,
    _of_peak("NVIDIA A100-SXM4-80GB", 108, 312, 2048, 80),
    _of_peak("NVIDIA L40S", 142, 362, 1024, 89),
    _of_peak("NVIDIA GeForce RTX 4090", 128, 165.2, 512, 89),
    _of_peak("NVIDIA B200", 148, 2250, 8192, 100),
)


def find_gpu(name: str) -> Gpu:
    """By its name or a part of it (H100, RTX 4090), in any case; a table of `visionfuse tune` adds what it has.

    Raises ValueError for a GPU of which nothing is known.
    """
    wanted = _words(name)
    match = next((gpu for gpu in GPUS if wanted in _words(gpu.name)), None)
    tables = tiles.tables(match.name if match else name)
    timed = next((t for t in tables if t.sms and any(e.pairs_per_ms for e in t.entries)), None)
    if timed is not None:
        return _tuned(timed, match)
    if match is None:
        raise ValueError(
            f"Nothing is known of the GPU {name!r}. Known: {', '.join(g.name for g in GPUS)}. Run "
            "`visionfuse tune` on the GPU itself, or copy the table it writes into "
            f"{tiles.user_folder()}."
        )
    return match


def _words(name: str) -> str:
    """Whole words, so that one name can be looked for in another."""
    return f"-{tiles.file_name(name).removesuffix('.json')}-"


def _tuned(table: Table, gpu: Gpu | None) -> Gpu:
    """A measured GPU with the speeds of a table, or one that only the table knows: it replaces what was derived."""
    if gpu is not None and gpu.basis != MEASURED:
        gpu = None
    clocks = [entry.mhz for entry in table.entries if entry.mhz]
    mhz = gpu.mhz if gpu else clocks[0] if clocks else 1000.0  # the unit, where no clock is known
    rates = dict(gpu.rates) if gpu else {}
    for entry in table.entries:
        if entry.pairs_per_ms:
            rates[entry.impl, entry.precision, entry.head_dim] = entry.pairs_per_ms / (
                table.sms * (entry.mhz or mhz) * 1e3
            )
    return Gpu(
        name=table.gpu, sms=table.sms, mhz=mhz, rates=rates,
        capability=gpu.capability if gpu else table.capability,
    )  # fmt: skip
