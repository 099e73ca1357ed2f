"""The two blocks of MedViTV2 (Manzari et al., arXiv 2502.13693), with the names of its published weights.

`LocalBlock` (LFP there): neighborhood attention, then a convolutional feed-forward network. `GlobalBlock`
(GFP): attention to all, pooled keys beside a convolution of heads, then a KAN. What MedViTV2 shares with
Next-ViT comes from timm.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, register_notrace_module, trunc_normal_
from timm.models.nextvit import ConvAttention, EfficientAttention, PatchEmbed, _make_divisible
from torch import Tensor, nn

from ..neighborhood import neighborhood_attention
from .kan import FasterKAN
from .recompute import ConvSequence

HEAD_DIM, WINDOW, MIX = 32, 7, 0.75
# Up to 14 by 14 pixels a window is a quarter of all pairs or more, and a mask is cheap.
DENSE_TOKENS = 196


@register_notrace_module
class NeighborhoodAttention(nn.Module):
    """Every pixel attends to a window of at most 7 by 7 pixels around it, with relative biases: NHWC to NHWC.

    dilated: the window takes every d-th pixel only, d as large as the image allows (DiNAT, arXiv 2209.15001).
    Windows shift inwards at borders, as in NATTEN. rpb: (heads, 13, 13), of key minus query.
    """

    def __init__(
        self, dim: int, *, dilated: bool = False, qkv_bias: bool = True, device=None, dtype=None
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads, self.head_dim, self.window = dim // HEAD_DIM, HEAD_DIM, WINDOW
        self.dense_tokens = DENSE_TOKENS
        self.dilated = dilated
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.rpb = nn.Parameter(torch.empty(self.num_heads, 2 * WINDOW - 1, 2 * WINDOW - 1, **dd))
        self.proj = nn.Linear(dim, dim, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        trunc_normal_(self.rpb, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        q, k, v = self.qkv(x).reshape(B, H, W, 3, self.num_heads, self.head_dim).unbind(3)
        window = min(self.window, H, W)
        dilation = max(1, min(H, W) // window) if self.dilated else 1
        if torch.jit.is_scripting() or self.dense_tokens >= H * W:
            out = self.with_mask(q, k, v, window, dilation)
        else:
            out = neighborhood_attention(q, k, v, window, dilation=dilation, bias=self.rpb)
        return self.proj(out.reshape(B, H, W, C))

    def with_mask(self, q: Tensor, k: Tensor, v: Tensor, window: int, dilation: int) -> Tensor:
        """Dense attention with one bias for every pair: what TorchScript can have. [B, H, W, heads, head_dim]"""
        bias = relative_bias(self.rpb, q.shape[1], q.shape[2], window, dilation).to(q.dtype)
        q, k, v = q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2)
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=bias[None]
        )
        return out.transpose(1, 2)


def relative_bias(table: Tensor, height: int, width: int, window: int, dilation: int) -> Tensor:
    """Biases of all pairs, -inf outside of neighborhoods: (heads, height * width, height * width)."""
    sees_y, y = _axis(height, window, dilation, table.shape[1], table.device)
    sees_x, x = _axis(width, window, dilation, table.shape[2], table.device)
    bias = table[:, y[:, None, :, None], x[None, :, None, :]]  # [heads, H, W, H, W]
    sees = sees_y[:, None, :, None] & sees_x[None, :, None, :]
    return bias.masked_fill(~sees, float("-inf")).flatten(3, 4).flatten(1, 2)


def _axis(
    length: int, window: int, dilation: int, rows: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Which keys a query sees on an axis, and which of `rows` of the table is theirs: [length, length] each."""
    i = torch.arange(length, device=device)
    residue, place = i % dilation, torch.div(i, dilation, rounding_mode="floor")
    of_class = torch.div(length - residue + dilation - 1, dilation, rounding_mode="floor")
    start = torch.minimum((place - window // 2).clamp(min=0), of_class - window)
    same = residue[:, None] == residue[None, :]
    offset = place[None, :] - start[:, None]
    difference = place[None, :] - place[:, None]
    row = (difference + rows // 2).clamp(0, rows - 1)
    return same & (offset >= 0) & (offset < window), row


class LocalityFeedForward(nn.Module):
    """x + a narrow convolution between two pointwise ones, with squeeze and excitation to 3 channels (NCHW)."""

    def __init__(self, dim: int, kernel_size: int, ratio: int = 3, device=None, dtype=None) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden, options = dim * ratio, {"bias": False, **dd}
        self.conv = ConvSequence(
            nn.Conv2d(dim, hidden, 1, **options), nn.BatchNorm2d(hidden, **dd), nn.Hardswish(),
            nn.Conv2d(hidden, hidden, kernel_size, padding=kernel_size // 2, groups=hidden, **options),
            nn.BatchNorm2d(hidden, **dd), nn.Hardswish(),
            SqueezeExcitation(hidden, hidden // dim, **dd),
            nn.Conv2d(hidden, dim, 1, **options), nn.BatchNorm2d(dim, **dd),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class SqueezeExcitation(nn.Module):
    def __init__(self, dim: int, hidden: int, device=None, dtype=None) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.fc = nn.Sequential(
            nn.Linear(dim, hidden, **dd), nn.ReLU(), nn.Linear(hidden, dim, **dd), nn.Hardsigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x.mean((2, 3)))[:, :, None, None]


class LocalBlock(nn.Module):
    """NCHW. legacy_layout: see `medvit.MedViT`."""

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        *,
        stride: int = 1,
        kernel_size: int = 3,
        drop_path: float = 0.0,
        dilated: bool = False,
        legacy_layout: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.legacy_layout = legacy_layout
        self.patch_embed = PatchEmbed(in_chs, out_chs, stride, **dd)
        self.norm1 = nn.BatchNorm2d(out_chs, **dd)
        self.attn = NeighborhoodAttention(out_chs, dilated=dilated, **dd)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.BatchNorm2d(out_chs, **dd)
        self.conv = LocalityFeedForward(out_chs, kernel_size, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        out = from_channels_last(
            self.attn(channels_last(self.norm1(x), self.legacy_layout)), self.legacy_layout
        )
        x = x + self.drop_path(out)
        return x + self.conv(self.norm2(x))


class GlobalBlock(nn.Module):
    """NCHW. kan_impl: of the KAN's kernel. legacy_layout: see `medvit.MedViT`."""

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        *,
        stride: int = 1,
        sr_ratio: int = 1,
        drop_path: float = 0.0,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        kan_impl: str = "auto",
        legacy_layout: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.legacy_layout = legacy_layout
        attended = _make_divisible(int(out_chs * MIX), HEAD_DIM)
        if out_chs % HEAD_DIM or attended == out_chs:
            raise ValueError(
                f"A global block needs a multiple of {HEAD_DIM} channels, 128 at least, got {out_chs}."
            )
        self.patch_embed = PatchEmbed(in_chs, attended, stride, **dd)
        self.norm1 = nn.BatchNorm2d(attended, **dd)
        self.e_mhsa = EfficientAttention(
            attended, head_dim=HEAD_DIM, sr_ratio=sr_ratio, attn_drop=attn_drop,
            proj_drop=proj_drop, **dd,
        )  # fmt: skip
        self.mhsa_drop_path = DropPath(drop_path * MIX)
        self.projection = PatchEmbed(attended, out_chs - attended, **dd)
        self.mhca = ConvAttention(out_chs - attended, HEAD_DIM, **dd)
        self.mhca_drop_path = DropPath(drop_path * (1 - MIX))
        self.norm2 = nn.BatchNorm2d(out_chs, **dd)
        self.kan = FasterKAN(out_chs, 2 * out_chs, out_chs, impl=kan_impl, **dd)
        self.mlp_drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        B, C, H, W = x.shape
        out = self.e_mhsa(self.norm1(x).flatten(2).transpose(1, 2))
        x = x + self.mhsa_drop_path(out).transpose(1, 2).reshape(B, C, H, W)
        out = self.projection(x)
        x = torch.cat([x, out + self.mhca_drop_path(self.mhca(out))], dim=1)
        out = self.kan(channels_last(self.norm2(x), self.legacy_layout))
        return x + self.mlp_drop_path(from_channels_last(out, self.legacy_layout))


def channels_last(x: Tensor, legacy: bool) -> Tensor:
    """NCHW to NHWC; legacy: the numbers stay where they are, and other pixels and channels are read."""
    B, C, H, W = x.shape
    return x.reshape(B, H, W, C) if legacy else x.permute(0, 2, 3, 1)


def from_channels_last(x: Tensor, legacy: bool) -> Tensor:
    B, H, W, C = x.shape
    return x.reshape(B, C, H, W) if legacy else x.permute(0, 3, 1, 2)
