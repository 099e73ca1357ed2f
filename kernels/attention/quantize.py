"""Rounding of queries, keys and values, in plain torch and in float64: codes, scales, and means taken before.

The definition of what a `Precision` says, written to be read. `emulation` multiplies what it makes,
`quantized` has the same done by the prologue's kernels. Rounding is to the nearest code, ties to the even one,
with the largest magnitude of a group on the largest code (SageAttention2, Zhang et al., arXiv 2411.10958,
sections 3.1 to 3.3; its Triton kernels round ties away from zero and add 1e-7 to scales).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..plan.block_plan import BlockPlan
from ..plan.runs import cut
from .key_slots import slot_width
from .precision import SCALES, TILE, Groups, Precision
from .prologue import FORMATS, TINY, mean_step


class Rounded(NamedTuple):
    """What a kernel multiplies, as numbers: float64.

    q (B, S_q, H, D) without q_mean, k and v (B, S_k, H_kv, D) without k_mean and v_mean. q_mean (B, tiles, H, D)
    of the tiles of the plan, k_mean and v_mean (B, 1, H_kv, D); zero where the precision does not smooth.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_mean: Tensor
    k_mean: Tensor
    v_mean: Tensor


def rounded(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, precision: Precision, key_order: Tensor | None
) -> Rounded:
    """The numbers that q (B, S_q, H, D), k and v (B, S_k, H_kv, D) become.

    key_order: int [S'], the key at every position of the slots in which keys share scales, -1 for padding
    (`key_slots`); then k and v are S' long. Finite inputs make finite numbers, those of float64 excepted.
    """
    dtype, zero = q.dtype, torch.zeros((), dtype=torch.float64, device=q.device)
    q_mean, k_mean, v_mean = zero, zero, zero
    if precision.smooth_q:
        q_mean = tile_means(q, plan)
        q = without_tile_means(q, q_mean, plan)
    x, y, z = q.double(), k.double(), v.double()
    if precision.smooth_k:
        k_mean = y[:, :: mean_step(y.shape[1])].mean(1, keepdim=True)
        y = y - k_mean
    if precision.smooth_v:
        # The prologue reads the model's format, which rounds numbers of one exponent to one side: the mean that
        # is added in the end is of what was taken.
        z = saturated(z - z.mean(1, keepdim=True), dtype).double()
        v_mean = (v.double() - z).mean(1, keepdim=True)
    z = _rounded_channels(z, precision.pv)
    y, z = ordered(y, key_order), ordered(z, key_order)
    if precision.qk != "model":
        if precision.q_scale == TILE:
            x = dequantized(*quantized_tiles(x, precision.qk, plan), Groups(1))
        else:
            groups = SCALES[precision.q_scale][0]
            x = dequantized(*quantized_tokens(x, precision.qk, groups), groups)
        # In slots, a slot holds the keys of one entry.
        by_entry = precision.k_scale == TILE
        groups = Groups(slot_width(plan.block_k)) if by_entry else SCALES[precision.k_scale][1]
        y = dequantized(*quantized_tokens(y, precision.qk, groups), groups)
    return Rounded(x, y, z, q_mean.double(), k_mean, v_mean)


def group_of(groups: Groups, length: int, device: torch.device) -> Tensor:
    """The group of every token, int64 [length], counted in the order in which scales are stored."""
    token = torch.arange(length, device=device)
    if groups.tile is None:
        return torch.zeros_like(token)
    return token // groups.tile * groups.groups + token % 8 // (8 // groups.groups)


def quantized_tokens(x: Tensor, format: str, groups: Groups) -> tuple[Tensor, Tensor]:
    """Codes and scales of x (B, S, H, D), tokens sharing scales by `groups`.

    Codes (B, S, H, D) are int8 ("int8", "int4": -7 .. 7) or float8_e4m3fn; scales (B, H, groups) are above
    zero and in x's dtype. A group of zeros has codes of zero.
    """
    tiles = 1 if groups.tile is None else -(-x.shape[1] // groups.tile)
    scale = _scales(x, format, group_of(groups, x.shape[1], x.device), tiles * groups.groups)
    return _codes(x, format, _by_token(scale, groups, x.shape[1])), scale


def quantized_tiles(x: Tensor, format: str, plan: BlockPlan) -> tuple[Tensor, Tensor]:
    """The same of queries x (B, S_q, H, D) that share the scale of their tile of the plan; scales are (B, H, S_q),
    that of its tile for every query. Those in no tile share one."""
    tile = _tile_members(plan)[2]
    scale = _scales(x, format, tile, plan.tiles + 1)[..., tile]
    return _codes(x, format, scale.transpose(1, 2)[..., None]), scale


def _scales(x: Tensor, format: str, group: Tensor, groups: int) -> Tensor:
    """Of x (B, S, H, D) in groups of tokens, int64 [S]: (B, H, groups)."""
    top = x.abs().amax(-1).transpose(1, 2)  # [B, H, S]
    empty = top.new_zeros(*top.shape[:2], groups)
    return (
        empty.scatter_reduce(2, group.expand_as(top), top, "amax").clamp(min=TINY)
        / FORMATS[format][1]
    )


def _codes(x: Tensor, format: str, scale: Tensor) -> Tensor:
    dtype = FORMATS[format][0]
    codes = x / scale
    return (codes.round() if dtype == torch.int8 else codes).to(dtype)


def dequantized(codes: Tensor, scale: Tensor, groups: Groups) -> Tensor:
    """The numbers that codes (B, S, H, D) stand for, in the dtype of the scales."""
    return codes.to(scale.dtype) * _by_token(scale, groups, codes.shape[1])


def _by_token(scale: Tensor, groups: Groups, length: int) -> Tensor:
    """(B, H, groups) -> (B, S, H, 1)."""
    return scale[..., group_of(groups, length, scale.device)].transpose(1, 2)[..., None]


def _rounded_channels(v: Tensor, format: str) -> Tensor:
    """v (B, S, H, D) through e4m3 with a scale per channel, or through float16."""
    if format == "model":
        return v
    top = v.abs().amax(1, keepdim=True)
    if format == "fp16":
        scale = fp16_scale(top)
        return (v / scale).half().double() * scale
    scale = top.clamp(min=TINY) / FORMATS[format][1]
    return (v / scale).to(FORMATS[format][0]).double() * scale


def fp16_scale(top: Tensor) -> Tensor:
    """What values of channels with the maximum `top` are divided by before they become float16: the power of
    two that brings the maximum to 2^14 .. 2^15, so that neither end of float16 is near."""
    exponent = torch.frexp(top)[1]
    return torch.ldexp(torch.ones_like(top), (exponent - 15).clamp(min=-126))


def token_mean(x: Tensor) -> Tensor:
    """(B, S, H, D) -> (B, 1, H, D) in fp32, finite where x is: no sum passes the largest number."""
    return saturated((x.float() / x.shape[1]).sum(1, keepdim=True), torch.float32)


def saturated(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in dtype, numbers past its end at its end: finite ones stay finite."""
    largest = torch.finfo(dtype).max
    return x.clamp(-largest, largest).to(dtype)


def ordered(x: Tensor, order: Tensor | None) -> Tensor:
    """Row i of the result is row order[i] of x (B, S, H, D), and zeros where order[i] is -1."""
    if order is None:
        return x
    return x[:, order.long().clamp(min=0)].masked_fill((order < 0)[None, :, None, None], 0.0)


# Means ---------------------------------------------------------------------------------------------

# (tokens of every tile, their weights in its mean, tile of every token), by the tensor that identifies a plan.
_members: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _tile_members(plan: BlockPlan) -> tuple[Tensor, Tensor, Tensor]:
    """int64 [tiles, block_q], fp32 [tiles, block_q], int64 [S_q] (`tiles` for tokens in no tile). The first
    call for a plan waits for the device, once."""
    if plan.q_start not in _members:
        with torch.inference_mode(False), torch.no_grad():
            start, count = plan.q_start.long()[:, None], plan.q_count.long()[:, None]
            column = torch.arange(plan.block_q, device=plan.device)
            inside = column < count
            token = (start + column).clamp(max=plan.length_q - 1)
            owner = torch.full((plan.length_q,), plan.tiles, device=plan.device)
            tile = torch.arange(plan.tiles, device=plan.device)[:, None]
            owner[token[inside]] = tile.expand_as(token)[inside]
            _members[plan.q_start] = token, inside / count.clamp(min=1), owner
    return _members[plan.q_start]


def tile_means(q: Tensor, plan: BlockPlan) -> Tensor:
    """The mean of the queries of every tile, (B, tiles, H, D) in q's dtype, for q (B, S_q, H, D). What is added
    to the scores is its product, so it need not be exact."""
    token, weight, _ = _tile_members(plan)
    return saturated(torch.einsum("btmhd,tm->bthd", q[:, token], weight.to(q.dtype)), q.dtype)


def without_tile_means(q: Tensor, means: Tensor, plan: BlockPlan) -> Tensor:
    """q (B, S_q, H, D) less the mean of each token's tile, in q's dtype; tokens in no tile as they are."""
    means = torch.nn.functional.pad(means, (0, 0, 0, 0, 0, 1))
    return saturated(q - means[:, _tile_members(plan)[2]], q.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Sequences:
    """Which sequence the tokens of a packed line belong to, for a mean of the keys of each.

    of_query, of_key: int64 [S_q], [S_k]. token, weight: int64 and fp32 [pieces, 128], what a piece adds to the
    mean of its sequence; pieces: int64 [sequences], of every sequence.
    """

    of_query: Tensor
    of_key: Tensor
    token: Tensor
    weight: Tensor
    pieces: Tensor

    @classmethod
    def of(cls, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, device: torch.device) -> Sequences:
        """Of n + 1 increasing numbers from 0 each, int64 on the host."""
        of_query, of_key = (
            torch.repeat_interleave(torch.arange(ends.numel() - 1), ends.diff())
            for ends in (cu_seqlens_q, cu_seqlens_k)
        )
        length = cu_seqlens_k.diff()
        cuts, column = cut(of_key, of_key, 128), torch.arange(128)
        token = (cuts.start[:, None] + column).clamp(max=of_key.numel() - 1)
        weight = (column < cuts.count[:, None]) / length[cuts.segment][:, None]
        pieces = torch.bincount(cuts.segment, minlength=length.numel())
        return cls(*(x.to(device) for x in (of_query, of_key, token, weight, pieces)))

    def means(self, k: Tensor) -> Tensor:
        """(B, S_k, H, D) -> (B, sequences, H, D) fp32, 0 of empty ones. Sums have a fixed order."""
        parts = torch.einsum("bpmhd,pm->pbhd", k[:, self.token].float(), self.weight)
        means = torch.segment_reduce(parts, "sum", lengths=self.pieces, axis=0, unsafe=True)
        return saturated(means.transpose(0, 1), torch.float32)


def mean_rows(q_mean: Tensor, k: Tensor, scale: float) -> Tensor:
    """What scores lack after queries lost the mean of their tile: scale * q_mean k.

    q_mean (B, tiles, H, D), k (B, S, H_kv, D) without its mean -> (B, H, tiles, S) in the dtype of k.
    (SageAttention2, section 3.2, eq. 6, in fp32 as there.)
    """
    group = q_mean.shape[2] // k.shape[2]
    q_mean = (
        (q_mean.to(k.dtype) * scale).permute(0, 2, 1, 3).unflatten(1, (-1, group))
    )  # [B, Hk, g, T, D]
    rows = q_mean.flatten(2, 3) @ k.permute(0, 2, 3, 1)  # [B, Hk, g T, S]
    return rows.unflatten(2, (group, -1)).flatten(1, 2)


def smoothing_shift(q: Tensor, k_mean: Tensor, scale: float) -> Tensor:
    """What the log-sum-exp lacks after keys lost their mean: scale * (q . k_mean), [B, H, Sq].

    q [B, Sq, H, D], k_mean [B, Hk, D] in the dtype of the result.
    """
    mean = k_mean.repeat_interleave(q.shape[2] // k_mean.shape[1], 1)[..., None]  # [B, H, D, 1]
    return (scale * (q.to(mean.dtype).transpose(1, 2) @ mean))[..., 0]
