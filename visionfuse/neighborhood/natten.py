"""NATTEN's own CUDA kernels behind `neighborhood_attention`, where somebody asks for them by name."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from torch import Tensor

from ..kernels.attention import UnsupportedError


def natten_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Any,
    stride: Any,
    dilation: Any,
    causal: Any,
    *,
    extra_kv: tuple[Tensor, Tensor] | None,
    scale: float | None,
    return_lse: bool,
    refused: list[str],
) -> Any:
    """As `neighborhood_attention`. Raises UnsupportedError with `refused` and all reasons of its own."""
    grid = tuple(q.shape[1:-2])
    reasons = [*refused, *unsupported(q, grid, window, stride, dilation, causal)]
    if reasons:
        lines = "\n".join(f"  - {reason}" for reason in reasons)
        raise UnsupportedError(
            f"impl='natten' cannot run here:\n{lines}\nUse impl='auto' to let visionfuse choose."
        )
    import natten

    attend = {1: natten.na1d, 2: natten.na2d, 3: natten.na3d}[len(grid)]
    more_k, more_v = extra_kv or (None, None)
    return attend(
        q, k, v, kernel_size=_on_axes(window, grid), stride=stride, dilation=dilation,
        is_causal=causal, scale=scale, additional_keys=more_k, additional_values=more_v,
        return_lse=return_lse,
    )  # fmt: skip


def unsupported(q: Tensor, grid: tuple[int, ...], window, stride, dilation, causal) -> list[str]:
    """Every reason why NATTEN's CUDA kernels cannot run this; empty if they can."""
    missing = natten_kernels()
    reasons = [missing] if missing else []
    if not q.is_cuda:
        reasons.append(f"its kernels run on NVIDIA GPUs, the tensors are on {q.device.type!r}")
    if any(isinstance(value, list) for value in (window, stride, dilation, causal)):
        reasons.append("it has the same parameters for all heads")
    else:
        sides = _on_axes(window, grid)
        if any(w < 2 for w in sides):
            reasons.append(
                f"its windows have at least 2 tokens on every axis, not {sides} on {grid}"
            )
        steps = dilation if isinstance(dilation, tuple) else (dilation,) * len(grid)
        if any(w * d > n for w, d, n in zip(sides, steps, grid, strict=False)):
            reasons.append(f"windows {sides} with dilation {steps} do not fit the grid {grid}")
    return reasons


def natten_kernels() -> str:
    """Why NATTEN's CUDA kernels are not there; empty if they are."""
    if find_spec("natten") is None:
        return "natten is not installed"
    import natten

    return "" if natten.HAS_LIBNATTEN else "this build of natten has no CUDA kernels"


def _on_axes(window, grid: tuple[int, ...]) -> tuple[int, ...]:
    sides = window if isinstance(window, tuple) else (window,) * len(grid)
    return tuple(n if w is None else w for w, n in zip(sides, grid, strict=False))
