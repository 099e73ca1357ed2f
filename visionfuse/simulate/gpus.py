"""GPUs whose speed is known to the simulator: those measured here, and those that `visionfuse tune` was run on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..kernels.plan import tiles
from ..kernels.plan.tiles import BlockShape, Table

CUDNN = "cudnn"  # PyTorch's dense attention on Hopper, the baseline


@dataclass(frozen=True, kw_only=True, eq=False)
class Gpu:
    """rates: pairs that one SM multiplies in a clock, of whole blocks of a shape of speed 1, by (implementation,
    precision, head dim); of CUDNN all in, dense. A pair of head dim d is 4 d floating-point operations.
    mhz: the clock that long kernels hold. capability: 90 for sm_90.
    """

    name: str
    sms: int
    mhz: float
    capability: int
    rates: Mapping[tuple[str, str, int], float] = field(default_factory=dict)

    def rate(self, impl: str, precision: str, head_dim: int) -> float:
        """Of the next head dim from this one up, as kernels pad them. Raises ValueError where none is known."""
        fits = [d for i, p, d in self.rates if (i, p) == (impl, precision) and d >= head_dim]
        if not fits:
            known = ", ".join(f"{i} {p} at head dim {d}" for i, p, d in self.rates if i != CUDNN)
            raise ValueError(
                f"The speed of {impl} in precision {precision!r} at head dim {head_dim} was not measured "
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
GPUS = (H200,)


def find_gpu(name: str) -> Gpu:
    """By its name, with or without the vendor, in any case; a table of `visionfuse tune` adds what it has.

    Raises ValueError for a GPU of which nothing is known.
    """
    wanted = tiles.file_name(name)
    known = {tiles.file_name(gpu.name): gpu for gpu in GPUS}
    match = next((f for f in known if f == wanted or f.endswith(f"-{wanted}")), None)
    tables = tiles.tables(known[match].name if match else name)
    timed = next((t for t in tables if t.sms and any(e.pairs_per_ms for e in t.entries)), None)
    if timed is not None:
        return _tuned(timed, known.get(match or ""))
    if match is None:
        raise ValueError(
            f"Nothing is known of the GPU {name!r}. Measured: {', '.join(g.name for g in GPUS)}. Run "
            "`visionfuse tune` on the GPU itself, or copy the table it writes into "
            f"{tiles.user_folder()}."
        )
    return known[match]


def _tuned(table: Table, gpu: Gpu | None) -> Gpu:
    """A measured GPU with the speeds of a table, or one that only the table knows."""
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
