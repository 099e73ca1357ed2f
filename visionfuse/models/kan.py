"""The feed-forward network of MedViTV2: two layers of FasterKAN."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from ..kernels.kan import rswaf_linear

LOW, HIGH, CENTRES, WIDTH = -2.0, 2.0, 8, 0.33  # of the published weights


class SwitchKANLayer(nn.Module):
    """LayerNorm, then a sum of bumps on every edge, see `kernels.kan.rswaf_linear`: (..., in) -> (..., out).

    Names in a state dict are those of FasterKAN: layernorm, spline_linear. impl: of the kernel.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.impl = impl
        self.low, self.high, self.width = LOW, HIGH, WIDTH
        dd = {"device": device, "dtype": dtype}
        self.layernorm = nn.LayerNorm(in_features, **dd)
        self.spline_linear = nn.Linear(CENTRES * in_features, out_features, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x, weight = self.layernorm(x), self.spline_linear.weight
        if torch.jit.is_scripting():
            return torch.ops.visionfuse.rswaf_linear(x, weight, self.low, self.high, self.width)
        return rswaf_linear(x, weight, self.low, self.high, self.width, impl=self.impl)


class FasterKAN(nn.Module):
    """Layers of these numbers of channels, one after the other."""

    def __init__(self, *channels: int, impl: str = "auto", device=None, dtype=None) -> None:
        super().__init__()
        options = {"impl": impl, "device": device, "dtype": dtype}
        self.layers = nn.ModuleList(SwitchKANLayer(a, b, **options) for a, b in pairwise(channels))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x
