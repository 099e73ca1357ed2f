"""Choice: which implementation runs attention on a device, in which precision, and why no other does."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import torch

from .exact import failed_check
from .kernels.attention import Precision, select_implementation, unsupported_reasons
from .kernels.attention.dispatch import is_emulated
from .kernels.attention.precision import MODEL
from .kernels.plan import compress


@dataclass(frozen=True)
class Choice:
    """What runs, why no faster implementation does, and why the recipe's precision does not, if so."""

    impl: str
    impl_reasons: list[str]
    precision: Precision = MODEL
    precision_reasons: list[str] = field(default_factory=list)


@lru_cache(maxsize=64)
def choose(
    impl: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    precision: Precision = MODEL,
) -> Choice:
    """The implementation and the precision to use. Raises ValueError with all reasons where a named
    implementation cannot run.

    Where "auto" finds a GPU without a kernel for a precision, the model's own stays: an emulation there only
    costs time. On a CPU, where every precision is emulated, the picture is what one wants to see.
    """
    if impl != "auto":
        reasons = refusals(impl, device, dtype, head_dim, precision)
        if reasons:
            raise ValueError(refusal(impl, {str(device): reasons}, precision))
        return Choice(impl, [], precision)
    refused: list[str] = []
    if not precision.is_model:
        name, reasons = select_implementation(device, dtype, head_dim, precision)
        if is_emulated(name, precision):
            if device.type == "cpu":
                return Choice(name, reasons, precision)
            refused = reasons or [f"no kernel has it on {device.type!r}"]
        elif why := failed_check(name, device, dtype, head_dim, precision):
            refused = [f"{name}: {why}"]
        else:
            return Choice(name, reasons, precision)
    name, reasons = select_implementation(device, dtype, head_dim)
    return Choice(name, reasons, MODEL, refused)


@lru_cache(maxsize=64)
def refusals(
    impl: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    precision: Precision = MODEL,
) -> list[str]:
    """Every reason why a named implementation cannot run on a device."""
    q = torch.empty(1, 1, 1, head_dim, device=device, dtype=dtype)
    plan = compress(torch.ones(1, 1, dtype=torch.bool, device=device))
    return unsupported_reasons(impl, q, q, q, plan, precision)


def refusal(impl: str, reasons: dict[str, list[str]], precision: Precision = MODEL) -> str:
    lines = "\n".join(f"  - on {device}: {r}" for device, rs in reasons.items() for r in rs)
    what = "" if precision.is_model else f" with precision={str(precision)!r}"
    return (
        f"impl={impl!r}{what} cannot run here:\n{lines}\nUse impl='auto' to let visionfuse choose."
    )
