"""Block-sparse attention against dense attention and its peers: `visionfuse bench attention`.

Every implementation is first compared with an exact result on sampled queries, from the rule itself
and not from the plan; a wrong one gets a row without a time. On a GPU the shapes are those of image and
video models and the baseline is cuDNN; on a CPU it is one shape and PyTorch's dense attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import torch
from torch import Tensor

from ..kernels.attention.api import block_sparse_attention, implementations, unsupported_reasons
from ..kernels.plan.neighborhood import Dense
from ..kernels.plan.planner import AttentionPlan, plan_attention
from .accuracy import sampled_errors
from .cases import BASELINE, Case, cpu_shapes, gpu_shapes, tiles
from .peers import MOST_ERROR, PEERS
from .table import Row
from .timing import time_in_turns

SECONDS = {"cuda": 0.15, "cpu": 0.5}  # of measurement per implementation and case
LEAST, MOST = 3, 50  # runs
# What an implementation or a peer of another version may raise; the run goes on.
_ERRORS = (RuntimeError, ImportError, ValueError, TypeError, AttributeError, AssertionError)
# Before the first result, and per implementation and case (planning, compilation, the check): guesses.
_START_S = {"cuda": 12.0, "cpu": 0.0}
_EACH_S = {"cuda": 0.7, "cpu": 0.2, "flex": 25.0}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """repeats: runs of each, instead of as many as fit. impls: instead of the case's own; the baseline
    runs in any case. seconds: a case that is not expected to end by then is left out."""

    device: torch.device
    impls: tuple[str, ...] = ()
    flex: bool = False
    repeats: int | None = None
    seconds: float | None = None

    def of(self, case: Case) -> tuple[str, ...]:
        named = self.impls or case.impls
        names = (BASELINE, *named, *(["flex"] if self.flex else []))
        return tuple(dict.fromkeys(names))

    def runs(self, ms: float) -> int:
        if self.repeats:
            return self.repeats
        return min(MOST, max(LEAST, round(SECONDS[self.device.type] * 1e3 / max(ms, 1e-3))))


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What would run: a line of `--dry-run`."""

    case: Case
    impl: str
    reasons: list[str]
    ms: float
    runs: int
    seconds: float


def choose_cases(device: torch.device, names: list[str]) -> list[Case]:
    """The cases of the named shapes; without names all that a default run has."""
    shapes = gpu_shapes() if device.type == "cuda" else cpu_shapes()
    if unknown := [name for name in names if name not in shapes]:
        raise ValueError(
            f"Unknown shape {', '.join(map(repr, unknown))} on {device.type}. "
            f"Choose from {', '.join(shapes)}."
        )
    chosen = names or [name for name in shapes if name != "tiny"]
    return [case for name in chosen for case in shapes[name]]


def check_impls(names: list[str]) -> tuple[str, ...]:
    known = (*PEERS, *implementations())
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"Unknown implementation {', '.join(map(repr, unknown))}. Choose from {', '.join(known)}."
        )
    return tuple(names)


def expect(case: Case, settings: Settings) -> list[Expected]:
    """Everything that is known without running; nothing is allocated or planned."""
    kind = settings.device.type
    lines = []
    for impl in settings.of(case):
        reasons = PEERS[impl].refuse(case, kind) if impl in PEERS else []
        ms = case.expected_ms(impl, kind)
        runs = 0 if reasons else settings.runs(ms)
        # Besides the runs: the check, the memory, a warm-up and a first one. A millisecond lies between runs.
        around = 1.3 if kind == "cuda" else 0
        seconds = (runs + 4) * (ms + around) * 1e-3 + _EACH_S.get(impl, _EACH_S[kind])
        lines.append(
            Expected(case=case, impl=impl, reasons=reasons, ms=ms, runs=runs,
                     seconds=0.0 if reasons else seconds)
        )  # fmt: skip
    return lines


def start_seconds(device: torch.device) -> float:
    return _START_S[device.type]


def run(cases: list[Case], settings: Settings, *, suite: str) -> Iterator[tuple[Case, list[Row]]]:
    """(case, its rows) as they are measured; no rows for a case that time did not allow."""
    begin = perf_counter()
    for case in cases:
        needed = sum(line.seconds for line in expect(case, settings))
        late = settings.seconds is not None and perf_counter() - begin + needed > settings.seconds
        yield case, [] if late else measure(case, settings, suite=suite)


def measure(case: Case, settings: Settings, *, suite: str) -> list[Row]:
    """Rows of the dense baseline and of every implementation of the case."""
    device = settings.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    shape = (case.batch, case.layout.length, case.heads, case.head_dim)
    q, k, v = (
        torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(3)
    )
    rows: dict[str, Row] = {}
    candidates: dict[str, Candidate] = {}
    with torch.no_grad():
        for impl in settings.of(case):
            for found in _candidates(impl, case, q, k, v, settings):
                rows[found.name] = row = _row(found, case, suite)
                if found.reasons:
                    row.note = "; ".join(found.reasons)
                elif _passes(found, row, q, k, v, case):
                    candidates[found.name] = found
        calls: dict[str, Callable[[], object]] = {n: c.call for n, c in candidates.items()}
        times = time_in_turns(
            calls, device=device, seconds=SECONDS[device.type], least=settings.repeats or LEAST,
            most=settings.repeats or MOST,
        )  # fmt: skip
    for name, timing in times.items():
        row = rows[name]
        row.ms, row.ms_p20, row.ms_p80 = timing.ms, timing.ms_p20, timing.ms_p80
        flops = 4 * case.head_dim * case.pairs * candidates[name].visited
        row.tflops_visited = flops / timing.ms * 1e-9
        if name != BASELINE and BASELINE in times:
            row.baseline, row.speedup = BASELINE, times[BASELINE].ms / timing.ms
    return list(rows.values())


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """call() -> (B, S, H, D); `inverse` brings its tokens back into the model's order. visited: share
    of all pairs that it multiplies."""

    name: str
    call: Callable[[], Tensor]
    reasons: list[str]
    density: float
    visited: float
    most_error: float
    note: str
    sees_all: bool = False
    inverse: Tensor | None = None


def _nothing() -> Tensor:
    raise RuntimeError("a candidate with reasons against it is not called")


def _candidates(
    impl: str, case: Case, q: Tensor, k: Tensor, v: Tensor, settings: Settings
) -> Iterator[Candidate]:
    device, own = settings.device, impl not in PEERS
    try:
        if own:
            yield from _own(impl, case, q, k, v)
        else:
            peer = PEERS[impl]
            reasons = peer.refuse(case, device.type)
            density = 1.0 if peer.dense else case.density
            yield Candidate(
                name=impl, call=_nothing if reasons else peer.make(case, q, k, v), reasons=reasons,
                density=density, visited=density, most_error=peer.most_error(q.dtype),
                note=peer.note(device.type), sees_all=peer.dense,
            )  # fmt: skip
    except _ERRORS as error:
        _raise_if_device_is_lost(device)
        yield Candidate(
            name=impl, call=_nothing, reasons=[_failure(error)], density=case.density,
            visited=case.density, most_error=0.0, note="",
        )  # fmt: skip


def _own(impl: str, case: Case, q: Tensor, k: Tensor, v: Tensor) -> Iterator[Candidate]:
    """One of ours, on tokens in the plan's order; on a CPU also with the way there and back."""
    plan = plan_attention(
        case.layout, case.spec, impl=impl, head_dim=case.head_dim, device=q.device
    )
    q_o, k_o, v_o = (_moved(x, plan.permutation) for x in (q, k, v))
    tile = tiles(plan)
    first = Candidate(
        name=impl,
        call=lambda: block_sparse_attention(q_o, k_o, v_o, plan.blocks, impl=impl),
        reasons=unsupported_reasons(impl, q_o, k_o, v_o, plan.blocks),
        density=plan.density,
        visited=plan.blocks.visited_density,
        most_error=MOST_ERROR[q.dtype],
        note=f"blocks {plan.blocks.block_q}x{plan.blocks.block_k}" + (tile and f", tile {tile}"),
        inverse=plan.inverse,
    )
    yield first
    if q.device.type == "cpu" and plan.permutation is not None and not first.reasons:
        yield Candidate(
            name=f"{impl} with order", call=_with_order(q, k, v, plan, impl), reasons=[],
            density=first.density, visited=first.visited, most_error=first.most_error,
            note="q, k, v into the order and out back",
        )  # fmt: skip


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


def _row(found: Candidate, case: Case, suite: str) -> Row:
    recipe = "" if found.name == BASELINE else "dense" if isinstance(case.spec, Dense) else "gna"
    return Row(suite=suite, case=case.name, impl=found.name, recipe=recipe, density=found.density,
               note=found.note)  # fmt: skip


def _passes(found: Candidate, row: Row, q: Tensor, k: Tensor, v: Tensor, case: Case) -> bool:
    """Whether it may be timed. Its error goes into the row; what fails or is wrong is said there."""
    try:
        out = found.call()
        row.rel_l1, row.cosine = errors(
            _moved(out, found.inverse), q, k, v, case, sees_all=found.sees_all
        )
        del out
        if not row.rel_l1 <= found.most_error:  # NaN is not
            row.note = (
                f"REFUSED: relative L1 error {row.rel_l1:.3g} is above {found.most_error:.3g}"
            )
            return False
        if q.is_cuda:
            row.peak_gib = _peak_gib(found.call)
    except _ERRORS as error:
        _raise_if_device_is_lost(q.device)
        row.note = _failure(error)
        return False
    return True


def went_wrong(row: Row) -> bool:
    return row.note.startswith(("REFUSED", "FAILED"))


def is_result(row: Row) -> bool:
    """Whether it belongs into the CSV: not where an implementation does not apply."""
    return row.ms is not None or went_wrong(row)


def _failure(error: Exception) -> str:
    return f"FAILED: {type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def _raise_if_device_is_lost(device: torch.device) -> None:
    """An illegal memory access spoils every later call; this raises it again."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def errors(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, case: Case, *, sees_all: bool = False
) -> tuple[float, float]:
    """Relative L1 error and cosine, see `sampled_errors`. sees_all: of dense attention, whatever the rule
    of the case."""
    return sampled_errors(out, q, k, v, None if sees_all else partial(visible_keys, case))


def visible_keys(case: Case, rows: Tensor) -> Tensor:
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
