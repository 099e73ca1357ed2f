"""Where a step of a model goes, on random weights at full size, and what each recipe would save.

>>> from visionfuse.profile import named, subject
>>> subject(named("wan2.1-1.3b"), (64, 96, 9), layers=1, device="cpu").layout.length
72

Names are imported on first use, so that `visionfuse --help` loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what __getattr__ returns, for type checkers and editors
    from .measure import Profile, profile
    from .models import NAMED, Architecture, Subject, named, subject
    from .predict import Saving, savings

_MODULES = {
    "NAMED": "models",
    "Architecture": "models",
    "Profile": "measure",
    "Saving": "predict",
    "Subject": "models",
    "named": "models",
    "profile": "measure",
    "savings": "predict",
    "subject": "models",
}
__all__ = [
    "NAMED",
    "Architecture",
    "Profile",
    "Saving",
    "Subject",
    "named",
    "profile",
    "savings",
    "subject",
]


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
