"""What a binary of the Hopper kernel is built for, and what its partitions of warps get."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

from triton.experimental.gluon import language as gl


@dataclass(frozen=True, eq=False)
class Spec:
    """What a binary of the kernel is built for.

    HEAD_DIM: channels of a head. D: the same, padded to a width that tensor cores take.
    BM, BN: queries of a consumer, keys of a block. GROUPS: consumer warpgroups.
    STAGES: blocks of keys and values in flight.
    PARTIAL: there are entries with a mask. BY_GROUP: many of these are whole or empty for a consumer. BITS: some
    are neither. RAGGED: there are full entries of fewer than BN keys.
    SPLIT: some tiles are computed in parts, of some entries each, which `split` puts together.
    ORDERED: rows of the output have places of their own.
    SCALED: queries and keys have scales, keys one a block, K_GROUPS a block, with K_ROWS one a key or with K_HEAD one.
    OFFSET: sums are of INT8 products, see policies. BIAS: a row is added to the scores of every tile.
    VALUES_8BIT: e4m3, transposed, a scale a channel. VALUES_MEAN: outputs get a number a channel added. BOUNDED: there are bounds of the scores.
    LS, LO, LL: layouts of scores, output and sums of weights. LW: of the output as it is written.
    """

    HEAD_DIM: int
    D: int
    BM: int
    BN: int
    GROUPS: int
    STAGES: int
    PARTIAL: bool
    BY_GROUP: bool
    BITS: bool
    RAGGED: bool
    LSE: bool
    SPLIT: bool
    ORDERED: bool
    SCALED: bool
    K_ROWS: bool
    K_HEAD: bool
    K_GROUPS: int
    OFFSET: bool
    BIAS: bool
    VALUES_8BIT: bool
    VALUES_MEAN: bool
    BOUNDED: bool
    LS: gl.NVMMADistributedLayout
    LO: gl.NVMMADistributedLayout
    LL: gl.NVMMADistributedLayout
    LW: gl.DistributedLinearLayout
    REGISTERS: int
    PRODUCER_REGISTERS: int

    def __post_init__(self):
        for field in fields(self):  # device code takes constants only as constexpr
            object.__setattr__(self, field.name, gl.constexpr(getattr(self, field.name)))


class Boxes(NamedTuple):
    """TMA descriptors."""

    q: gl.tensor
    k: gl.tensor
    v: gl.tensor
    k_scale: gl.tensor
    bias: gl.tensor


class Queries(NamedTuple):
    buffer: gl.tensor
    full: gl.tensor
    empty: gl.tensor


class Ring(NamedTuple):
    k: gl.tensor
    v: gl.tensor
    k_full: gl.tensor
    k_empty: gl.tensor
    v_full: gl.tensor
    v_empty: gl.tensor
    ones: gl.tensor
    k_scale: gl.tensor
    bias: gl.tensor


class Lists(NamedTuple):
    """Pointers to the work of every program, the tiles, the lists of entries, their masks and the bits."""

    p_work_offset: gl.tensor
    p_work: gl.tensor
    p_q_start: gl.tensor
    p_q_count: gl.tensor
    p_full: gl.tensor
    p_whole_end: gl.tensor
    p_full_start: gl.tensor
    p_full_count: gl.tensor
    p_partial: gl.tensor
    p_partial_start: gl.tensor
    p_mask: gl.tensor
    p_bits: gl.tensor


class Scales(NamedTuple):
    """Of operands; p_v_mean: what is added to outputs; p_most_q, p_most_k: the largest |q|^2 and |k|^2 of every head."""

    p_q: gl.tensor
    p_k: gl.tensor
    p_v: gl.tensor
    p_v_mean: gl.tensor
    p_most_q: gl.tensor
    p_most_k: gl.tensor


class Sizes(NamedTuple):
    """group: query heads that share a key head; scales: of the keys of a head; block_q: rows of bits."""

    length_q: gl.tensor
    heads: gl.tensor
    group: gl.tensor
    tiles: gl.tensor
    variants: gl.tensor
    scales: gl.tensor
    block_q: gl.tensor


class Outputs(NamedTuple):
    """p_order: the row of the outputs of every query. p_part: of every work item what `work.Work` says; p_part_o,
    p_part_lse: results of parts."""

    p_o: gl.tensor
    p_lse: gl.tensor
    p_order: gl.tensor
    p_part: gl.tensor
    p_part_o: gl.tensor
    p_part_lse: gl.tensor


class Shared(NamedTuple):
    """What all partitions of a program get."""

    boxes: Boxes
    queries: Queries
    ring: Ring
    lists: Lists
    scales: Scales
    sizes: Sizes
    outputs: Outputs
    scale_log2: gl.tensor


class Tile(NamedTuple):
    """What the entries of one tile have in common. q_empty: the barrier that lets the queries go; o_row: [BM] numbers
    of the queries in the tile; o_kind: where `mask` says what an entry is to the consumer."""

    ring: Ring
    q_empty: gl.tensor
    p_count: gl.tensor
    p_mask: gl.tensor
    p_bits: gl.tensor
    block_q: gl.tensor
    o_row: gl.tensor
    o_kind: gl.tensor
    factor: gl.tensor
    p_k_scale: gl.tensor
