"""What `visionfuse info` prints: versions, device, which implementations run here or why not, and which one
takes each precision."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from .kernels.attention import implementations, select_implementation, unsupported_reasons
from .kernels.attention.dispatch import is_emulated
from .kernels.attention.precision import NAMES, Precision
from .kernels.plan import compress

PACKAGES = (
    "visionfuse", "torch", "triton", "diffusers", "transformers", "accelerate", "timm", "peft",
    "natten", "torchao", "numpy", "opencv-python-headless", "gradio",
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
        "precision": {
            name: {
                "impl": impl,
                "emulated": is_emulated(impl, Precision.parse(name)),
                "reasons": reasons,
            }
            for name in NAMES
            for impl, reasons in [select_implementation(device, dtype, head_dim, name)]
        },
    }


def tables(facts: dict[str, Any]) -> Iterator[Any]:
    """What `collect` found, as rich prints it."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("package", "version", box=None)
    for name, installed in {"python": facts["python"], **facts["packages"]}.items():
        table.add_row(name, installed or "[dim]not installed[/]")
    yield table
    device = facts["device"]
    details = [
        device["name"],
        f"{_count(device['threads'], 'thread')} on {_count(device['cores'], 'core')}",
    ]
    if "capability" in device:
        details[1:] = [f"sm_{device['capability'].replace('.', '')}", f"{device['memory_gib']} GiB"]
    yield f"\nDevice: {', '.join(details)}; default dtype {facts['dtype']}\n"
    table = Table("attention", "runs here", "why not", box=None)
    for name, state in facts["attention"].items():
        runs = "[green]yes[/]" if state["runs"] else "[red]no[/]"
        table.add_row(name, runs, escape("; ".join(state["reasons"])))
    yield table
    yield ""
    table = Table("precision", "runs in", "why not faster", box=None)
    for name, state in facts["precision"].items():
        how = f"{state['impl']}, emulated (slow)" if state["emulated"] else state["impl"]
        why = state["reasons"] if device["type"] == "cuda" else ["there is no GPU"]
        table.add_row(name, how, escape("; ".join(why)))
    yield table


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
    return (
        "Apple GPU" if device.type == "mps" else f"CPU, {_count(torch.get_num_threads(), 'thread')}"
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


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
