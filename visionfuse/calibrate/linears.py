"""Which linear layers run in 8 bits beside the calibrated attention: as many as the budget allows.

Half of the squared error of the budget is for attention, so that it may be 3 dB below the whole (errors of both are not
in line: their squares add up). Every layer that pays is rounded once, and its error measured on the tokens of a run; then
the layers of least error are rounded for good, as many as the output stays inside the budget with, found by halving.
"""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import fmean

from ..linears import Linears, errors_on
from ..patching import get
from .run import Calibrated, Calibration

HALF_DB = 10 * math.log10(2.0)


def run_with_linears(
    calibration: Calibration, linears: Linears, budget: float, name: str, *, in_order: bool = False
) -> tuple[Calibrated, str]:
    """`Calibration.run` with a budget for attention and linear layers together, and a line on what they do.

    Raises ValueError where no linear layer can be rounded.
    """
    found = calibration.run(budget + HALF_DB, name, in_order=in_order)
    asked = replace(found.recipe, linear=linears)
    errors = calibration.journal.do(
        f"errors of linear layers {asked.to_dict()['linear']}", lambda: measured(calibration, asked)
    )
    by_error = sorted(errors, key=errors.__getitem__)

    def with_least(count: int) -> Linears:
        return replace(linears, skip=(*linears.skip, *by_error[count:]))

    def psnr(count: int) -> float:
        recipe = replace(asked, linear=with_least(count)) if count else found.recipe
        return fmean(
            calibration.compare(recipe, prompt, f"prompt-{i}", i)
            for i, prompt in enumerate(calibration.task.prompts)
        )

    kept, too_many = 0, len(by_error) + 1
    count = len(by_error)  # all of them first
    while too_many - kept > 1:
        if psnr(count) >= budget:
            kept = count
        else:
            too_many = count
        count = (kept + too_many) // 2
    recipe = replace(asked, linear=with_least(kept)) if kept else found.recipe
    chosen = replace(found.chosen, recipe=recipe, psnr=psnr(kept))
    found = replace(found, recipe=recipe, budget=budget, chosen=chosen,
                    held_out=calibration.check(recipe))  # fmt: skip
    worst = f", relative error at most {errors[by_error[kept - 1]]:.3f} each" if kept else ""
    return found, f"Linear layers: {kept} of {len(by_error)} in {linears.format}{worst}"


def measured(calibration: Calibration, recipe) -> dict[str, float]:
    """The largest relative L1 error of every linear layer that was rounded, in a run of the first prompt."""
    pipe, task = calibration.pipe, calibration.task
    pipe.enable_visionfuse(recipe, impl=task.impl)
    try:
        errors: dict[str, float] = {}
        enabled = get(pipe)
        assert enabled is not None
        for made in enabled.rounded.values():
            found = errors_on(made, lambda: calibration.draw(task.prompts[0], 0, "linear layers"))
            errors |= {layer: max(error, errors.get(layer, 0.0)) for layer, error in found.items()}
        notes = [line for made in enabled.rounded.values() for line in made.lines()]
    finally:
        pipe.disable_visionfuse()
    if not errors:
        raise ValueError(f"No linear layer can be rounded here: {'; '.join(notes)}.")
    return errors
