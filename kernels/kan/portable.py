"""The layer and its gradients in plain PyTorch, some rows at a time: CPU, MPS, anything.

What is kept for the backward is x alone; of the basis there is never more than `CHUNK` elements.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .reference import basis

CHUNK = 1 << 21  # elements of the basis at a time: 8 MB in float32, which caches hold in part


def forward(x: Tensor, weight: Tensor, low: float, high: float, width: float) -> Tensor:
    """x [rows, channels] -> [rows, outputs], in the dtype of the weight."""
    out = weight.new_empty(x.shape[0], weight.shape[0])
    for rows in _chunks(x, weight):
        phi = _basis(x[rows], weight, low, high, width)
        torch.mm(phi.flatten(1).to(weight.dtype), weight.mT, out=out[rows])
    return out


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, low: float, high: float, width: float,
    need_x: bool, need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of x and weight, None where not needed."""
    channels = x.shape[1]
    dx = torch.empty_like(x) if need_x else None
    wide = torch.promote_types(weight.dtype, torch.float32)
    dw = torch.zeros_like(weight, dtype=wide) if need_weight else None
    for rows in _chunks(x, weight):
        phi = _basis(x[rows], weight, low, high, width)
        if dw is not None:
            dw += grad[rows].mT @ phi.flatten(1).to(weight.dtype)
        if dx is not None:
            centres = torch.linspace(low, high, phi.shape[-1], dtype=phi.dtype, device=x.device)
            slope = torch.tanh((x[rows, :, None].to(phi.dtype) - centres) / width) * phi
            weighted = (grad[rows] @ weight).to(phi.dtype).unflatten(1, (channels, -1)) * slope
            dx[rows] = (weighted.sum(-1) * (-2 / width)).to(x.dtype)
    return dx, None if dw is None else dw.to(weight.dtype)


def _basis(x: Tensor, weight: Tensor, low: float, high: float, width: float) -> Tensor:
    wide = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    return basis(x.to(wide), low, high, weight.shape[1] // x.shape[1], width)


def _chunks(x: Tensor, weight: Tensor) -> Iterator[slice]:
    step = max(1, CHUNK // weight.shape[1])
    return (slice(start, start + step) for start in range(0, x.shape[0], step))
