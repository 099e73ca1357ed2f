"""Recipe "auto": which exact kernel beats the model's own attention, and whether it computes the same here.
Kernels that round are checked in the same way.

A kernel is taken where it was measured to win, never by a trial in a user's first call; before its
first use in a process, a small random example must agree with the model's own attention.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F

from .kernels.attention import Precision, block_sparse_attention, unsupported_reasons
from .kernels.plan import Dense, TokenLayout, plan_attention

KERNEL = "gluon_sm90"
# Time of cuDNN, which PyTorch takes there, over that of KERNEL on one H200 (the lowest of several runs of the
# dense bf16 rows of assets/bench/engine.csv), by head size and least number of tokens.
GAINS = {128: {16_384: 1.10}, 64: {16_384: 1.22}}
LEAST_GAIN = 1.03  # less could be noise, and "auto" must never be slower than stock
TOLERANCE = 0.05  # relative L1 error of the self-check; bf16 kernels differ by 0.002
# The same of kernels that round, by the format of queries and keys: twice the error of the emulation and more.
ROUNDED_TOLERANCE = {"int8": 0.1, "fp8": 0.15, "int4": 0.4, "model": 0.1}
# No whole number of blocks, and on a GPU so many that the softmax of long lists is checked too (`score_bound`).
CHECKED_TOKENS, CHECKED_TOKENS_GPU = 1_000, 4_500


def has_faster_kernels() -> bool:
    """True if a GPU of this machine has an exact kernel that can beat the model's own attention."""
    return torch.cuda.is_available() and any(
        torch.cuda.get_device_capability(i) == (9, 0) for i in range(torch.cuda.device_count())
    )


def predicted_gain(head_dim: int, tokens: int) -> float:
    """Speed-up of self-attention by KERNEL that was measured at this length or the next below."""
    reached = [gain for least, gain in sorted(GAINS.get(head_dim, {}).items()) if least <= tokens]
    return reached[-1] if reached else 1.0


def faster_kernel(
    device: torch.device, dtype: torch.dtype, head_dim: int, tokens: int
) -> tuple[str | None, str]:
    """The exact kernel to take instead of the model's own attention, or None and the reason."""
    gain = predicted_gain(head_dim, tokens)
    if gain < LEAST_GAIN:
        return None, (
            f"no exact kernel is known to be faster for {tokens} tokens and head size {head_dim}; "
            "PyTorch picks its own (cuDNN on Hopper)"
        )
    error, why = self_check(KERNEL, device, dtype, head_dim)
    if why:
        return None, f"{KERNEL} would be {gain:.2f}x faster, but {why}"
    if not error <= TOLERANCE:
        return None, (
            f"{KERNEL} failed its self-check: relative L1 error {error:.3g}, allowed {TOLERANCE}"
        )
    return KERNEL, ""


def failed_check(
    impl: str, device: torch.device, dtype: torch.dtype, head_dim: int, precision: Precision
) -> str:
    """Why a kernel that rounds is not trusted here; empty if its self-check went well."""
    error, why = self_check(impl, device, dtype, head_dim, str(precision))
    allowed = ROUNDED_TOLERANCE[precision.qk]
    if why or error <= allowed:
        return why
    return f"it failed its self-check: relative L1 error {error:.3g}, allowed {allowed}"


@lru_cache(maxsize=64)
def self_check(
    impl: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    precision: str = "model",
) -> tuple[float, str]:
    """Relative L1 difference to PyTorch's attention on random numbers, and why it cannot run, if so."""
    tokens = CHECKED_TOKENS_GPU if device.type == "cuda" else CHECKED_TOKENS
    with torch.inference_mode(False), torch.no_grad():
        plan = plan_attention(
            TokenLayout.joint(text=0, grids=[(1, tokens)]),
            Dense(),
            impl=impl,
            head_dim=head_dim,
            precision=Precision.parse(precision).name,
            device=device,
        ).blocks
        generator = torch.Generator(device).manual_seed(0)
        shape = (3, 1, tokens, 2, head_dim)
        q, k, v = torch.randn(shape, generator=generator, device=device, dtype=dtype)
        reasons = unsupported_reasons(impl, q, k, v, plan, precision)
        if reasons:
            return float("nan"), "; ".join(reasons)
        try:
            ours = block_sparse_attention(q, k, v, plan, impl=impl, precision=precision).float()
        except Exception as failure:  # "auto" may not break a pipeline that works without it
            return float("nan"), f"it stopped with {type(failure).__name__}: {failure}"
        own = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        )
        own = own.transpose(1, 2).float()
        return ((ours - own).abs().sum() / own.abs().sum()).item(), ""
