"""visionfuse makes vision and diffusion transformers faster with one line.

    import visionfuse
    pipe.enable_visionfuse("gna", density=0.3)
    print(visionfuse.report(pipe))
    pipe.disable_visionfuse()

Importing it loads neither diffusers nor Triton; every name below is imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from .install import install as _install

if TYPE_CHECKING:  # what __getattr__ returns, for type checkers and editors
    from . import recipes
    from .kernels.attention import block_sparse_attention
    from .kernels.order import Order
    from .kernels.plan import (
        AttentionPlan,
        Dense,
        Neighborhood,
        Segment,
        TileWindow,
        TokenLayout,
        plan_attention,
    )
    from .models.rationalize import rationalize
    from .neighborhood import (
        NeighborhoodAttention1D,
        NeighborhoodAttention2D,
        NeighborhoodAttention3D,
        neighborhood_attention,
    )
    from .patching import disable_visionfuse, enable_visionfuse
    from .recipe import Precision, Recipe
    from .recipes import RECIPES
    from .reporting import Report, report
    from .sage import sage_attention, sage_attention_varlen
    from .schedule import Schedule
    from .vision import disable, enable

__version__ = "0.1.0"

_EXPORTS = {
    "AttentionPlan": "kernels.plan",
    "Dense": "kernels.plan",
    "Neighborhood": "kernels.plan",
    "NeighborhoodAttention1D": "neighborhood",
    "NeighborhoodAttention2D": "neighborhood",
    "NeighborhoodAttention3D": "neighborhood",
    "Order": "kernels.order",
    "Precision": "recipe",
    "RECIPES": "recipes",
    "Recipe": "recipe",
    "Report": "reporting",
    "Schedule": "schedule",
    "Segment": "kernels.plan",
    "TileWindow": "kernels.plan",
    "TokenLayout": "kernels.plan",
    "block_sparse_attention": "kernels.attention",
    "disable": "vision",
    "disable_visionfuse": "patching",
    "enable": "vision",
    "enable_visionfuse": "patching",
    "neighborhood_attention": "neighborhood",
    "plan_attention": "kernels.plan",
    "rationalize": "models.rationalize",
    "report": "reporting",
    "sage_attention": "sage",
    "sage_attention_varlen": "sage",
}

_MODULES = ("recipes",)

# Literal for type checkers; tests/test_import.py compares it with the tables above.
__all__ = [
    "RECIPES",
    "AttentionPlan",
    "Dense",
    "Neighborhood",
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "Order",
    "Precision",
    "Recipe",
    "Report",
    "Schedule",
    "Segment",
    "TileWindow",
    "TokenLayout",
    "__version__",
    "block_sparse_attention",
    "disable",
    "disable_visionfuse",
    "enable",
    "enable_visionfuse",
    "neighborhood_attention",
    "plan_attention",
    "rationalize",
    "recipes",
    "report",
    "sage_attention",
    "sage_attention_varlen",
]


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
