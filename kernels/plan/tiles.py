"""Tiles: which blocks an implementation may multiply, how it is launched with them, and what they cost.

One place answers for every implementation, GPU, precision and head dim. The defaults stand in `_defaults`,
each with what it was measured on. A table per GPU overrides them entry by entry: the packaged
`tuned/<gpu>.json`, and before it the user's own in `user_folder()`, which `visionfuse tune` writes. Nothing
is measured here: a user's first call never tunes.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

PACKAGED = Path(__file__).parent / "tuned"


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockShape:
    """What an implementation multiplies at once, and what that costs.

    block_q, block_k: most queries of a tile and most keys of an entry.
    padded: True where a short tile or entry costs as much as a whole block (tensor cores), False
        where it costs what it holds (a BLAS call).
    speed: pairs a second, relative to other shapes of the same implementation.
    The rest is counted in query-key pairs. Shares of a pair: `partial` extra under a mask, `ragged`
    extra in an unmasked entry that is shorter than the block. Pairs: `gather` for a key that a tile
    copies together, `entry` and `tile` for each entry and tile.
    launch: parameters of the kernel at this shape, where they differ from its own choice, as
        (name, value) pairs: num_warps, num_stages.
    """

    block_q: int
    block_k: int
    padded: bool
    speed: float = 1.0
    partial: float = 0.0
    ragged: float = 0.0
    gather: float = 0.0
    entry: float = 0.0
    tile: float = 0.0
    launch: tuple[tuple[str, int], ...] = ()


def block_shapes(
    impl: str,
    head_dim: int,
    *,
    precision: str = "model",
    device: torch.device | str = "cpu",
    gpu: str | None = None,
    target: tuple[str, int] | None = None,
) -> tuple[BlockShape, ...]:
    """The block shapes an implementation is fast with; the planner takes the one of least work.

    precision: "model" (16 bits and wider), "fp8", "int8_fp8" or another name of `Precision`. device: where
    the plan will be used; what a table says of its GPU comes before the defaults. gpu, target: instead of
    what is here, a GPU's name and ("cuda", compute capability).
    """
    name = gpu or gpu_name(torch.device(device))
    return _found(impl, head_dim, precision, name, target or _target())


def launch_options(
    impl: str, head_dim: int, block_q: int, block_k: int, *, precision: str = "model",
    device: torch.device | str = "cpu",
) -> dict[str, int]:  # fmt: skip
    """The tuned launch parameters of a block shape; empty where the implementation shall choose."""
    for shape in block_shapes(impl, head_dim, precision=precision, device=device):
        if (shape.block_q, shape.block_k) == (block_q, block_k):
            return dict(shape.launch)
    return {}


def _defaults(
    impl: str, head_dim: int, precision: str, target: tuple[str, int]
) -> tuple[BlockShape, ...]:
    if impl in ("blocks", "reference"):
        # Measured on two AVX-512 cores, head dim 64: copying a key and a value takes as long as 25
        # pairs, an entry 100, a call of SDPA 5,000; a kept mask adds a tenth.
        return (
            BlockShape(
                block_q=256, block_k=128, padded=False, partial=0.1, gather=25, entry=100, tile=5000
            ),
        )
    if impl == "flex":
        return (BlockShape(block_q=128, block_k=128, padded=True, partial=0.5, tile=4096),)
    if impl == "gluon_sm90":
        return _gluon_shapes(head_dim, precision)
    return _triton_shapes(target, head_dim, precision)


def _gluon_shapes(head_dim: int, precision: str) -> tuple[BlockShape, ...]:
    """Fitted to assets/bench/engine.csv (H200, head dim 128) with `visionfuse simulate --measured`.

    Two warpgroups, then three. In 16 bits a mask costs three nothing that can be told from noise, in 8 bits a third
    of a block. The costs of two are of an earlier run, in which they carried all windows.
    """
    if precision == "model":
        two = BlockShape(block_q=128, block_k=128, padded=True, speed=0.88, partial=0.11, ragged=0.25,
                         tile=100_000)  # fmt: skip
        partial, ragged, tile = 0.04, 0.5, 160_000
    else:
        two = BlockShape(block_q=128, block_k=128, padded=True, speed=0.82, partial=0.3, ragged=0.3,
                         tile=150_000)  # fmt: skip
        partial, ragged, tile = 0.45, 0.5, 180_000
    three = replace(two, block_q=192, speed=1.0, partial=partial, ragged=ragged, tile=tile)
    return (three, two) if head_dim <= 128 else (two,)


def _triton_shapes(
    target: tuple[str, int], head_dim: int, precision: str
) -> tuple[BlockShape, ...]:
    """Shapes for (backend, compute capability); one for dense attention first.

    Those of sm_90 were measured on an H200. For other GPUs: the largest that neither spills registers nor,
    in fp32, exceeds the shared memory (99 KiB a block on sm_86, sm_89 and sm_120).
    """
    small = BlockShape(block_q=64, block_k=64, padded=True, partial=0.35, ragged=0.1, tile=2048)
    if head_dim > 128:
        return (small,)
    if target == ("cuda", 90):
        # TFLOP/s of dense attention: FP8 629 against 417 in `small`, 531 against 482 at head dim 64.
        wide = replace(small, block_k=128, speed=1.1 if head_dim <= 64 else 1.45)
        if head_dim <= 64 or precision.endswith("fp8"):
            return (wide, small)
        if precision != "model":  # INT8 with values of 16 bits: 538 against 475
            return (replace(small, block_q=128, speed=1.13, tile=4096), small)
        # Whole entries run warp-specialised, 590 against 334; others would be slower than in `small`.
        whole = BlockShape(
            block_q=128, block_k=128, padded=True, speed=1.75, partial=1.4, ragged=1.2, tile=32768
        )
        return (whole, small)
    high = replace(small, block_q=128, speed=1.1, tile=4096)
    roomy = target in (("cuda", 80), ("cuda", 100), ("cuda", 103)) or target[0] == "hip"
    return (high, small) if roomy or (head_dim <= 64 and target[1] >= 80) else (small,)


def _target() -> tuple[str, int]:
    if not torch.cuda.is_available():
        return ("cpu", 0)
    major, minor = torch.cuda.get_device_capability()
    return ("hip" if torch.version.hip else "cuda", 10 * major + minor)


# Most queries and keys of a block, and what both must be multiples of.
_LIMITS = {
    "gluon_sm90": (192, 128, 64),
    "triton": (256, 256, 16),
}


def check_shape(impl: str, shape: BlockShape) -> None:
    """Raise ValueError where an implementation cannot run a block shape at any head dim."""
    most_q, most_k, step = _LIMITS.get(impl, (1 << 20, 1 << 20, 1))
    sides = (shape.block_q, shape.block_k)
    if not (0 < sides[0] <= most_q and 0 < sides[1] <= most_k) or any(n % step for n in sides):
        raise ValueError(
            f"{impl} takes blocks of at most {most_q} queries and {most_k} keys, multiples of {step}, "
            f"not {sides[0]} x {sides[1]}."
        )
    if not shape.speed > 0:
        raise ValueError(f"The speed of a block shape must be above zero, got {shape.speed}.")


# -- tables -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """The block shapes of one implementation, precision and head dim.

    pairs_per_ms: that the whole GPU multiplies of whole blocks in the fastest shape, mhz: at which clock of its
    multiprocessors; 0 if not known.
    """

    impl: str
    precision: str
    head_dim: int
    shapes: tuple[BlockShape, ...]
    pairs_per_ms: float = 0.0
    mhz: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        shapes = [asdict(shape) | {"launch": dict(shape.launch)} for shape in self.shapes]
        return {"impl": self.impl, "precision": self.precision, "head_dim": self.head_dim,
                "pairs_per_ms": self.pairs_per_ms, "mhz": self.mhz, "shapes": shapes}  # fmt: skip

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Entry:
        shapes = tuple(
            BlockShape(**s | {"launch": tuple(sorted(s.get("launch", {}).items()))})
            for s in values["shapes"]
        )
        for shape in shapes:
            check_shape(values["impl"], shape)
        if not shapes:
            raise ValueError(f"The entry of {values['impl']} has no shapes.")
        known = {name: values[name] for name in ("impl", "precision", "head_dim")}
        speed = {name: values.get(name, 0.0) for name in ("pairs_per_ms", "mhz")}
        return cls(**known, shapes=shapes, **speed)


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """What was measured on one GPU (or "cpu"), and when and with what.

    sms, capability: multiprocessors and compute capability (90 for sm_90); 0 where there is no GPU.
    """

    gpu: str
    entries: tuple[Entry, ...]
    sms: int = 0
    capability: int = 0
    torch: str = ""
    triton: str = ""
    date: str = ""
    version: int = 1

    def __post_init__(self):
        if self.version != 1:
            raise ValueError(f"A table of tiles has version 1, not {self.version}.")

    def find(self, impl: str, head_dim: int, precision: str) -> Entry | None:
        """The entry of the next head dim from this one up: kernels pad 48 channels to 64, and 72 to 128."""
        fits = [
            entry
            for entry in self.entries
            if (entry.impl, entry.precision) == (impl, precision) and entry.head_dim >= head_dim
        ]
        return min(fits, key=lambda entry: entry.head_dim, default=None)

    def to_dict(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return values | {"entries": [entry.to_dict() for entry in self.entries]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Table:
        facts = {name: value for name, value in values.items() if name != "entries"}
        return cls(**facts, entries=tuple(map(Entry.from_dict, values["entries"])))


def gpu_name(device: torch.device) -> str:
    """The GPU's name as its driver says it; "cpu" and the like for other devices."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def file_name(gpu: str) -> str:
    """NVIDIA H200 -> nvidia-h200.json."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


def user_folder() -> Path:
    """Beside PyTorch's own caches, hence moved by XDG_CACHE_HOME or TORCH_HOME: ~/.cache/torch/visionfuse."""
    return Path(torch.hub.get_dir()).parent / "visionfuse"


def read_table(path: Path) -> Table:
    """Raises ValueError, naming the file, where it is not a table."""
    try:
        return Table.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a table of tiles ({type(error).__name__}: {error}). Delete it, or write it "
            "anew with `visionfuse tune`."
        ) from error


_trials: list[Table] = []


@contextmanager
def using(table: Table) -> Iterator[None]:
    """Inside, `table` comes before all others, whatever GPU it names: how the tuner tries parameters."""
    _trials.append(table)
    _found.cache_clear()
    try:
        yield
    finally:
        _trials.pop()
        _found.cache_clear()


@lru_cache(maxsize=256)
def _found(
    impl: str, head_dim: int, precision: str, gpu: str, target: tuple[str, int]
) -> tuple[BlockShape, ...]:
    for table in [*reversed(_trials), *tables(gpu)]:
        if entry := table.find(impl, head_dim, precision):
            return entry.shapes
    return _defaults(impl, head_dim, precision, target)


@lru_cache(maxsize=16)
def tables(gpu: str) -> tuple[Table, ...]:
    """The user's table and the packaged one, where they exist. Read once in a process."""
    found = []
    for folder in (user_folder(), PACKAGED):
        path = folder / file_name(gpu)
        try:
            if path.is_file():
                found.append(read_table(path))
        except (OSError, ValueError) as error:  # a broken file must not stop a pipeline
            warnings.warn(f"Tuned tiles are left out: {error}", stacklevel=2)
    return tuple(found)


def forget_tables() -> None:
    """Read the files anew, after one was written."""
    tables.cache_clear()
    _found.cache_clear()
