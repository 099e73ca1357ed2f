"""What our kernels are compared with, each as `call()` -> (B, S, H, D): PyTorch's SDPA backends, NATTEN, SageAttention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ..kernels.plan.neighborhood import Dense, Neighborhood
from .cases import BASELINE, Case

# Relative L1 error above which a row is refused: 16-bit attention has 2e-3 on normal data, fp32 3e-7.
MOST_ERROR = {torch.bfloat16: 8e-3, torch.float32: 1e-5}
_LOSSY = 8e-2  # INT8 scores and FP8 values: 0.038 was measured
Make = Callable[[Case, Tensor, Tensor, Tensor], Callable[[], Tensor]]


@dataclass(frozen=True, kw_only=True)
class Peer:
    """make: q, k, v (B, S, H, D) -> call. refuse: reasons why a case cannot run on a device type.

    lossy: it rounds the operands, and gets a wider budget. dense: it computes all pairs whatever the
    rule says, and is checked against that.
    """

    make: Make
    refuse: Callable[[Case, str], list[str]]
    note: Callable[[str], str]
    lossy: bool = False
    dense: bool = False

    def most_error(self, dtype: torch.dtype) -> float:
        return max(_LOSSY, MOST_ERROR[dtype]) if self.lossy else MOST_ERROR[dtype]


def _sdpa(backend: SDPBackend | None) -> Make:
    def make(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # heads first

        def call() -> Tensor:
            if backend is None or not q.is_cuda:
                return scaled_dot_product_attention(q, k, v).transpose(1, 2)
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v).transpose(1, 2)

        return call

    return make


def _natten(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    import natten

    grid = case.layout.segments[0].shape
    assert isinstance(case.spec, Neighborhood)
    rule = case.spec.resolve(grid)
    attend = {1: natten.na1d, 2: natten.na2d, 3: natten.na3d}[len(grid)]
    q, k, v = (x.unflatten(1, grid) for x in (q, k, v))

    def call() -> Tensor:
        out = attend(
            q, k, v, kernel_size=rule.window, stride=rule.stride, dilation=rule.dilation,
            is_causal=rule.causal,
        )  # fmt: skip
        return out.flatten(1, len(grid))

    return call


def _sage(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    from sageattention import sageattn  # pyright: ignore[reportMissingImports]

    return lambda: sageattn(q, k, v, tensor_layout="NHD")


def _needs_dense_gpu(case: Case, device: str) -> list[str]:
    return _needs_dense(case) + ([] if device == "cuda" else ["it needs a GPU"])


def _needs_dense(case: Case) -> list[str]:
    return [] if isinstance(case.spec, Dense) else ["it computes all pairs; see the dense case"]


def _natten_refuses(case: Case, device: str) -> list[str]:
    reasons = [] if find_spec("natten") else ["natten is not installed"]
    if isinstance(case.spec, Dense):
        reasons.append("the case has no window")
    if len(case.layout.segments) > 1:
        reasons.append("it takes one grid, without text")
    return reasons


def _sage_refuses(case: Case, device: str) -> list[str]:
    missing = [] if find_spec("sageattention") else ["sageattention is not installed"]
    return missing + _needs_dense_gpu(case, device)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version"


PEERS = {
    BASELINE: Peer(
        make=_sdpa(SDPBackend.CUDNN_ATTENTION),
        refuse=lambda case, device: [],
        note=lambda device: f"SDPA, {'cuDNN' if device == 'cuda' else 'CPU'}",
        dense=True,
    ),
    "flash": Peer(
        make=_sdpa(SDPBackend.FLASH_ATTENTION),
        refuse=_needs_dense_gpu,
        note=lambda device: "SDPA, FlashAttention-2",
    ),
    "efficient": Peer(
        make=_sdpa(SDPBackend.EFFICIENT_ATTENTION),
        refuse=_needs_dense_gpu,
        note=lambda device: "SDPA, memory-efficient",
    ),
    "natten": Peer(
        make=_natten,
        refuse=_natten_refuses,
        note=lambda device: (
            f"NATTEN {_version('natten')}, its default tiles, its token permutation included; "
            "TFLOP/s of visible pairs"
        ),
    ),
    "sage": Peer(
        make=_sage,
        refuse=_sage_refuses,
        note=lambda device: (
            f"SageAttention {_version('sageattention')}, quantization included, lossy"
        ),
        lossy=True,
    ),
}
