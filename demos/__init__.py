"""The app of `visionfuse demo`: pictures, videos, classification and an explorer of plans, in a browser.

    from visionfuse.demos import Settings, build, launch

    launch(build(Settings.of(["assets/flux-micro"])))

It is safe to expose: it reads the models that it was started with and nothing else, recipes are data, weights are
safetensors, sizes and steps have limits, and it listens on this machine alone unless told otherwise. Needs Gradio
(`pip install "visionfuse[demo]"`).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what __getattr__ returns, for type checkers and editors
    from .app import build, launch
    from .settings import Settings

__all__ = ["Settings", "build", "launch"]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".settings" if name == "Settings" else ".app", __name__), name)
