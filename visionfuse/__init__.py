"""visionfuse makes vision and diffusion transformers faster with one line.

    import visionfuse
    pipe.enable_visionfuse("gna", density=0.3)
    print(visionfuse.report(pipe))
    pipe.disable_visionfuse()

Importing it loads neither diffusers nor Triton; every name below is imported on first use.
"""

from __future__ import annotations

from importlib import import_module

from .install import install as _install

__version__ = "0.1.0"

_EXPORTS = {
    "AttentionPlan": "kernels.plan",
    "Dense": "kernels.plan",
    "Neighborhood": "kernels.plan",
    "Order": "kernels.order",
    "Precision": "recipe",
    "RECIPES": "recipes",
    "Recipe": "recipe",
    "Report": "reporting",
    "Schedule": "schedule",
    "Segment": "kernels.plan",
    "TokenLayout": "kernels.plan",
    "block_sparse_attention": "kernels.attention",
    "disable_visionfuse": "patching",
    "enable_visionfuse": "patching",
    "plan_attention": "kernels.plan",
    "report": "reporting",
}

_MODULES = ("recipes",)

__all__ = sorted([*_EXPORTS, *_MODULES, "__version__"])


def __getattr__(name: str):
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    if name in _EXPORTS:
        value = getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_install()
