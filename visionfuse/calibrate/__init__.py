"""Calibration: which variant of attention runs in which layers and steps, inside an error budget.

`run` says how it goes: `measure` candidates beside stock runs, predict or take `times`, `choose`, check. `command`
is `visionfuse calibrate`, `show` and `compare` what it prints, and `journal` keeps what ran.
"""

from .command import calibrate

__all__ = ["calibrate"]
