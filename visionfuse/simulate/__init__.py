"""What a window costs on a GPU before it runs: tiles, bounds, the predicted time, and the fastest windows.

>>> from visionfuse.simulate import Setting, simulate
>>> from visionfuse.kernels.plan import Neighborhood
>>> simulate(Neighborhood(window=(18, 24, 24), stride=(16, 8, 8)), Setting(grid=(30, 48, 80))).flop_bound > 11
True

Names are imported on first use, so that `visionfuse --help` loads no torch. `search` has the search, `measured`
the comparison with rows of assets/bench.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what __getattr__ returns, for type checkers and editors
    from .gpus import GPUS, H200, Gpu, find_gpu
    from .model import (
        Setting,
        Simulation,
        TileCount,
        box_tiles,
        cudnn_ms,
        dense_ms,
        planned,
        predicted_ms,
        simulate,
    )

__all__ = [
    "GPUS",
    "H200",
    "Gpu",
    "Setting",
    "Simulation",
    "TileCount",
    "box_tiles",
    "cudnn_ms",
    "dense_ms",
    "find_gpu",
    "planned",
    "predicted_ms",
    "simulate",
]
_OF_GPUS = ("GPUS", "H200", "Gpu", "find_gpu")


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".gpus" if name in _OF_GPUS else ".model", __name__), name)
