"""NeighborhoodAttention1D, 2D and 3D: drop-in for the modules of NATTEN, of any version."""

# TorchScript reads the annotations of what it ignores, so they may not be strings here.
from typing import Any

import torch
from torch import Tensor, nn

from .api import neighborhood_attention


class _NeighborhoodAttention(nn.Module):
    """Linear layers around `neighborhood_attention`; in and out (B, *grid, embed_dim).

    Arguments and state dict are those of NATTEN 0.21: qkv and proj. With rel_pos_bias also those of
    NATTEN before 0.20: rpb, (num_heads, 2 k_0 - 1, ..). What NATTEN refuses runs: kernels of one token, None
    for a whole axis, kernels that reach beyond the grid (clamped, with a warning).

    attn_drop: of NATTEN before 0.20, accepted if it is 0. precision, impl: see `neighborhood_attention`.
    """

    na_dim: int

    def __init__(
        self, embed_dim: int, num_heads: int, kernel_size: Any, stride: Any = 1,
        dilation: Any = 1, is_causal: Any = False, qkv_bias: bool = True,
        qk_scale: float | None = None, proj_drop: float = 0.0, *, rel_pos_bias: bool = False,
        attn_drop: float = 0.0, precision: str = "model", impl: str = "auto",
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"num_heads must divide embed_dim, got {embed_dim=}, {num_heads=}.")
        if attn_drop:
            raise ValueError(f"There is no dropout of attention weights, got {attn_drop=}.")
        dd = {"device": device, "dtype": dtype}
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.head_dim = embed_dim // num_heads
        self.scale = qk_scale or self.head_dim**-0.5
        # A list of NATTEN's is a tuple of ours: for axes, not for heads.
        self.kernel_size: Any
        self.is_causal: Any
        self.kernel_size, self.stride, self.dilation, self.is_causal = (
            tuple(x) if isinstance(x, list | tuple) else (x,) * self.na_dim
            for x in (kernel_size, stride, 1 if dilation is None else dilation, is_causal)
        )
        self.precision, self.impl = precision, impl
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias, **dd)
        self.register_parameter("rpb", None)
        if rel_pos_bias:
            if None in self.kernel_size:
                raise ValueError("rel_pos_bias needs a kernel size for every axis, not None.")
            sizes = [2 * k - 1 for k in self.kernel_size]
            self.rpb = nn.Parameter(torch.empty(num_heads, *sizes, **dd))
            nn.init.trunc_normal_(self.rpb, std=0.02)
        self.proj = nn.Linear(embed_dim, embed_dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, *grid, embed_dim), and so the result. Raises ValueError for other shapes."""
        return self.proj_drop(self.proj(self._attend(x, self.qkv(x))))

    @torch.jit.ignore()
    def _attend(self, x: Tensor, qkv: Tensor) -> Tensor:
        axes = len(self.kernel_size)
        if x.dim() != axes + 2:
            raise ValueError(
                f"Expected tokens on {axes} axes, (batch, {axes} axes of tokens, channels), got {tuple(x.shape)}."
            )
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        out = neighborhood_attention(
            q, k, v, self.kernel_size, self.stride, self.dilation, self.is_causal, bias=self.rpb,
            scale=self.scale, precision=self.precision, impl=self.impl,
        )  # fmt: skip
        return out.flatten(-2)

    def extra_repr(self) -> str:
        names = ("head_dim", "num_heads", "kernel_size", "stride", "dilation", "is_causal")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


class NeighborhoodAttention1D(_NeighborhoodAttention):
    __doc__ = _NeighborhoodAttention.__doc__
    na_dim = 1


class NeighborhoodAttention2D(_NeighborhoodAttention):
    __doc__ = _NeighborhoodAttention.__doc__
    na_dim = 2


class NeighborhoodAttention3D(_NeighborhoodAttention):
    __doc__ = _NeighborhoodAttention.__doc__
    na_dim = 3
