"""What `visionfuse info` prints: versions, device, and which implementations run here or why not."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from .kernels.attention import implementations, unsupported_reasons
from .kernels.plan import compress

PACKAGES = (
    "visionfuse", "torch", "triton", "diffusers", "transformers", "accelerate", "timm", "peft",
    "natten", "numpy", "opencv-python-headless", "gradio",
)  # fmt: skip


def collect(head_dim: int = 64) -> dict[str, Any]:
    """Everything as plain values (JSON). Implementations are asked about an input of `head_dim`."""
    device = default_device()
    dtype = default_dtype(device)
    return {
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": _device_facts(device),
        "dtype": str(dtype).removeprefix("torch."),
        "attention": {
            name: {"runs": not reasons, "reasons": reasons}
            for name in implementations()
            for reasons in [_reasons(name, device, dtype, head_dim)]
        },
    }


def default_device() -> torch.device:
    """An NVIDIA or AMD GPU, Apple's, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU; float32 on a CPU, where few have fast half precision."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "Apple GPU" if device.type == "mps" else f"CPU, {torch.get_num_threads()} threads"


def _device_facts(device: torch.device) -> dict[str, Any]:
    facts: dict[str, Any] = {"type": device.type, "name": device_name(device)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["capability"] = f"{properties.major}.{properties.minor}"
        facts["memory_gib"] = round(properties.total_memory / 2**30, 1)
        facts["count"] = torch.cuda.device_count()
    facts["cpu"] = platform.processor() or platform.machine()
    facts["cores"] = os.cpu_count()
    facts["threads"] = torch.get_num_threads()
    return facts


def _reasons(impl: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
    q = torch.empty(1, 1, 1, head_dim, device=device, dtype=dtype)
    plan = compress(torch.ones(1, 1, dtype=torch.bool, device=device))
    return unsupported_reasons(impl, q, q, q, plan)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
