"""Counted work of a rule in tiles, axis by axis: exact for boxes and cheap, so that every shape can be tried.

Two ways to cut a grid:

  boxes    tiles of queries, and inside each of them tiles of keys; a tile of 192 queries then holds no
           tile of 128 keys
  columns  the whole first axis of a box of the others, in row-major order: its line is cut into blocks of
           queries and of keys independently, so that 3x8x8 queries meet 2x8x8 keys
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import product
from math import prod
from typing import NamedTuple

from .neighborhood import NeighborhoodOnGrid
from .tiles import BlockShape


class AxisRule(NamedTuple):
    """A neighborhood on one axis of `n` tokens, as `NeighborhoodOnGrid` has it."""

    n: int
    window: int
    stride: int
    dilation: int
    causal: bool


def axis_rules(spec: NeighborhoodOnGrid) -> list[AxisRule]:
    return list(map(AxisRule, spec.grid, spec.window, spec.stride, spec.dilation, spec.causal))


@dataclass(frozen=True, slots=True)
class AxisCounts:
    """Counts of one axis for tiles of queries and of keys.

    visited, full: key tiles that each query tile visits, and those of them that need no mask. The rest are
    sums over the query tiles: entries and full_entries of these, whole: full ones that no border cuts short,
    pairs and full_pairs: query-key pairs in them, keys: keys in them.
    """

    visited: tuple[int, ...]
    full: tuple[int, ...]
    entries: int
    full_entries: int
    whole: int
    pairs: int
    full_pairs: int
    keys: int

    @property
    def tiles(self) -> int:
        return len(self.visited)


@lru_cache(maxsize=4096)
def _bounds(rule: AxisRule) -> tuple[list[int], list[int]]:
    """[start, end) of the visible keys of every query of the first residue class."""
    n, w, s, d, causal = rule
    start, end = NeighborhoodOnGrid((n,), (w,), (s,), (d,), (causal,)).axis_bounds(0)
    return start[::d].tolist(), end[::d].tolist()


@lru_cache(maxsize=1 << 17)
def axis_counts(rule: AxisRule, t: int, s: int) -> AxisCounts:
    """For tiles of `t` queries and of `s` keys, both from the start of the axis."""
    start, end = _bounds(rule)
    n = len(start)
    visited, full = [], []
    whole = pairs = full_pairs = keys = 0
    for a in range(0, n, t):
        b = min(a + t, n)
        first, last, inner, past = _range(start, end, a, b, 1, s)
        seen = min(last * s, n) - first * s
        seen_whole = min(past * s, n) - inner * s if past > inner else 0
        visited.append(last - first)
        full.append(max(past - inner, 0))
        whole += max(min(past, n // s) - inner, 0)
        pairs += (b - a) * seen
        full_pairs += (b - a) * seen_whole
        keys += seen
    return AxisCounts(
        tuple(visited), tuple(full), sum(visited), sum(full), whole, pairs, full_pairs, keys
    )


def _range(start, end, a: int, b: int, area: int, s: int) -> tuple[int, int, int, int]:
    """Of key blocks of `s` tokens, where a step of the axis has `area`: [first, last) are visited by the
    queries of steps [a, b), [inner, past) are full. Bounds never decrease along an axis."""
    lo_min, lo_max, hi_min, hi_max = start[a], start[b - 1], end[a], end[b - 1]
    n = len(start)
    past = -(-n * area // s) if hi_min == n else hi_min * area // s
    return lo_min * area // s, -(-hi_max * area // s), -(-lo_max * area // s), past


@dataclass(frozen=True, slots=True)
class Counts:
    """Counts of a grid. short: full entries with fewer keys than a block. See `AxisCounts`."""

    tiles: int
    entries: int
    full: int
    short: int
    pairs: int = 0
    full_pairs: int = 0
    keys: int = 0

    def cost(self, shape: BlockShape, others: int = 0) -> float:
        """Pairs that take as long. others: keys that every query sees besides its neighborhood."""
        other_entries = self.tiles * -(-others // shape.block_k)
        if shape.padded:
            block = shape.block_q * shape.block_k
            pairs = (self.entries + other_entries) * block
            masked = (self.entries - self.full) * block
            ragged = self.short * block
        else:
            ragged = 0
            pairs, masked = self.pairs, self.pairs - self.full_pairs
        return (
            pairs
            + shape.partial * masked
            + shape.ragged * ragged
            + shape.gather * (self.keys + self.tiles * others)
            + shape.entry * (self.entries + other_entries)
            + shape.tile * self.tiles
        )


class Cut(NamedTuple):
    """How a grid is cut: tiles of `tile`, keys inside in `subtile`; None: a column, in blocks of tokens."""

    tile: tuple[int, ...]
    subtile: tuple[int, ...] | None


def cuts(spec: NeighborhoodOnGrid, shape: BlockShape) -> Iterator[tuple[Cut, Counts]]:
    """Every cut worth trying, and its counts."""
    rules, classes = axis_rules(spec), prod(spec.dilation)
    for tile, sub in boxes(spec, shape):
        yield Cut(tile, sub), box_counts(rules, classes, tile, sub, shape.block_k)
    for base in columns(spec, shape):
        yield (
            Cut((len(_bounds(rules[0])[0]), *base), None),
            column_counts(rules, classes, base, shape),
        )


# -- boxes ------------------------------------------------------------------------------------------


def boxes(
    spec: NeighborhoodOnGrid, shape: BlockShape
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(tile, subtile) of boxes."""
    sides = [sides_of(-(-n // d), s) for n, d, s in zip(spec.grid, spec.dilation, spec.stride,
                                                       strict=True)]  # fmt: skip
    tiles = list(_boxes(sides, shape.block_q))
    most = max(map(prod, tiles))
    # A tile three quarters full at least: SDPA on a CPU and tensor cores alike are slow below.
    for tile in (t for t in tiles if 4 * prod(t) >= 3 * most):
        subtiles = [sub for sub in product(*map(_divisors, tile)) if prod(sub) <= shape.block_k]
        widest = max(map(prod, subtiles))
        for sub in (s for s in subtiles if 2 * prod(s) >= widest):
            yield tile, sub


def box_counts(
    rules: list[AxisRule], classes: int, tile: tuple[int, ...], sub: tuple[int, ...], block_k: int
) -> Counts:
    """classes: of residues modulo the dilation, which only meet themselves."""
    axes = [axis_counts(*each) for each in zip(rules, tile, sub, strict=True)]
    full = prod(a.full_entries for a in axes)
    whole = prod(a.whole for a in axes) if prod(sub) == block_k else 0
    return Counts(
        tiles=classes * prod(a.tiles for a in axes),
        entries=classes * prod(a.entries for a in axes),
        full=classes * full,
        short=classes * (full - whole),
        pairs=classes * prod(a.pairs for a in axes),
        full_pairs=classes * prod(a.full_pairs for a in axes),
        keys=classes * prod(a.keys for a in axes),
    )


def sides_of(n: int, stride: int) -> list[int]:
    """Tile sides worth trying on an axis: even splits, powers of two, multiples of the stride."""
    sides = {-(-n // parts) for parts in range(1, n + 1)}
    sides |= {1 << b for b in range(n.bit_length())}
    sides |= {m for m in range(stride, n + 1, stride) if m <= 8 * stride}
    return sorted(t for t in sides if t <= n)


def _boxes(sides: list[list[int]], volume: int) -> Iterator[tuple[int, ...]]:
    """All boxes with one of the given sides on every axis, of at most `volume` cells."""
    if not sides:
        yield ()
        return
    for t in sides[0]:
        if t <= volume:
            for rest in _boxes(sides[1:], volume // t):
                yield (t, *rest)


@cache
def _divisors(n: int) -> tuple[int, ...]:
    return tuple(d for d in range(1, n + 1) if n % d == 0)


# -- columns ----------------------------------------------------------------------------------------


def columns(spec: NeighborhoodOnGrid, shape: BlockShape) -> Iterator[tuple[int, ...]]:
    """Sides of columns on all axes but the first. Blocks of keys hold a whole step of the first axis."""
    if not shape.padded:
        return  # what a block holds is what it costs: nothing is gained, and pairs are not counted here
    length = -(-spec.grid[0] // spec.dilation[0])
    sides = [sides_of(-(-n // d), s) for n, d, s in zip(spec.grid[1:], spec.dilation[1:],
                                                       spec.stride[1:], strict=True)]  # fmt: skip
    most = min(shape.block_k, shape.block_q)
    for base in _boxes(sides, most):
        if 4 * length * prod(base) >= 3 * shape.block_q:
            yield base


def column_counts(
    rules: list[AxisRule], classes: int, base: tuple[int, ...], shape: BlockShape
) -> Counts:
    """Of blocks cut from columns. Exact but for a last block with less than a step of the first axis: it
    counts as the whole step."""
    # On every other axis: tiles of the full side and the one that the border cuts short.
    split = [_split(*each) for each in zip(rules[1:], base, strict=True)]
    tiles = entries = full = short = 0
    for queries in product(*split):
        area_q = prod(side for side, _, _ in queries)
        tiles += prod(n for _, n, _ in queries) * -(
            -len(_bounds(rules[0])[0]) * area_q // shape.block_q
        )
        for keys in product(*(met for _, _, met in queries)):
            many, many_full = prod(v for _, v, _ in keys), prod(f for _, _, f in keys)
            if not many:
                continue
            area_k = prod(side for side, _, _ in keys)
            line = _line_counts(rules[0], area_q, area_k, shape.block_q, shape.block_k)
            entries += many * line[0]
            full += many_full * line[1]
            short += many_full * line[2]
    return Counts(
        tiles=classes * tiles, entries=classes * entries, full=classes * full, short=classes * short
    )


@lru_cache(maxsize=1 << 15)
def _split(rule: AxisRule, t: int) -> tuple[tuple[int, int, tuple[tuple[int, int, int], ...]], ...]:
    """(side, tiles, met) of whole query tiles and of a short last one; met: (side, visited, full) of the
    whole and of the short key tiles that they visit, summed over the query tiles."""
    start, end = _bounds(rule)
    n = len(start)
    rest = n % t
    sides = [t] * (n // t) + [rest] * bool(rest)
    sums: dict[int, list[int]] = {}
    for index, side in enumerate(sides):
        a = index * t
        first, last, inner, past = _range(start, end, a, a + side, 1, t)
        ends, covers = rest and last * t > n, rest and past * t > n and past > inner
        total = sums.setdefault(side, [0] * 5)
        for i, value in enumerate(
            (1, last - first - ends, max(past - inner, 0) - covers, ends, covers)
        ):
            total[i] += value
    return tuple(
        (side, many, ((t, v, f), (rest, v_short, f_short)) if rest else ((t, v, f),))
        for side, (many, v, f, v_short, f_short) in sums.items()
    )


@lru_cache(maxsize=1 << 15)
def _line_counts(rule: AxisRule, area_q: int, area_k: int, block_q: int, block_k: int):
    """(entries, full, short full) along the first axis, of a column of queries and one of keys."""
    start, end = _bounds(rule)
    n = len(start)
    entries = full = short = 0
    for token in range(0, n * area_q, block_q):
        a, b = token // area_q, -(-min(token + block_q, n * area_q) // area_q)
        first, last, inner, past = _range(start, end, a, b, area_k, block_k)
        entries += last - first
        full += max(past - inner, 0)
        short += past > inner and past * block_k > n * area_k
    return entries, full, short
