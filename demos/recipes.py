"""Recipes in the app: a form that writes JSON, and JSON from a stranger that becomes a recipe or an error."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

from visionfuse.recipe import Recipe
from visionfuse.recipes import RECIPES, build, options_of

DEFAULT = "gna"
LEAST_TILE = 16  # tokens
FORMATS = ("model", "fp8", "int8_fp8", "int8", "int4_fp8")
AUTO = "auto"  # the stride that follows the grid
STRIDES = (AUTO, "1", "2", "4", "8", "16")
# What the shipped recipes do, for who never read a paper; others say it in the first sentence of their docstring.
PLAIN = {
    "auto": "Exact: every token meets every other, by the fastest kernel here. The picture stays as it is.",
    "dense": "Exact: every token meets every other. With fewer bits as the number format, what rounding alone costs.",
    "gna": "A token meets only the tokens around it, and the text. Less work, and details may change.",
    "sta": "A tile of tokens meets only the tiles around it. Meant for videos.",
    "fps": "Windows of tiles and 8 bits together, in three phases. Meant for videos and models trained for it.",
    "scale_dit": "A picture in two stages: small, then large around it, where a token meets those around it.",
    "sage": "Every token meets every other, in 8 bits. Hardly a difference.",
}
# The controls of the form and what they begin with; a recipe shows those that it has.
CONTROLS: dict[str, Any] = {
    "density": 0.4, "stride": AUTO, "dense_start": 0.32, "precision": "model", "qk": "int8",
}  # fmt: skip


def written(name: str, **values: Any) -> str:
    """JSON of the named recipe with those of the values that it has an option for."""
    known = options_of(name)
    if "stride" in values:
        values["stride"] = None if values["stride"] == AUTO else int(values["stride"])
    return to_json(build(name, **{k: v for k, v in values.items() if k in known}))


def to_json(recipe: Recipe) -> str:
    return json.dumps(recipe.to_dict(), indent=2)


def parsed(text: str, *, at_most: int) -> Recipe:
    """A recipe from JSON that anybody may have written. Raises ValueError with what is wrong.

    at_most: characters. Nothing in it is run or opened: a recipe is numbers and names.
    """
    if len(text) > at_most:
        raise ValueError(f"A recipe may have {at_most:,} characters here, this has {len(text):,}.")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The recipe is no JSON: {error}.") from None
    if not isinstance(values, dict):
        raise ValueError(f"A recipe is a JSON object, not {type(values).__name__}.")
    try:
        recipe = Recipe.from_dict(values)
        _check_tiles(recipe)
        return recipe
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError) as error:
        raise ValueError(f"This is no recipe. {error}") from None


def _check_tiles(recipe: Recipe) -> None:
    """Tiles of a few tokens make lists of millions of blocks, which would keep others waiting."""
    for part in (recipe.order, *(way.plan for way in recipe.ways)):
        for name in ("tile", "subtile"):
            sizes = getattr(part, name, None)
            if isinstance(sizes, tuple) and prod(sizes) < LEAST_TILE:
                raise ValueError(f"Here a {name} has at least {LEAST_TILE} tokens, got {sizes}.")


def uploaded(path: str | None, *, at_most: int) -> str:
    """The JSON of a file that a visitor sent, once it is known to be a recipe."""
    if path is None:
        raise ValueError("No file came. Choose a recipe: a .json file.")
    file = Path(path)
    if file.stat().st_size > 4 * at_most:
        raise ValueError(f"A recipe may have {at_most:,} characters here; this file is larger.")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError("The file is no text, so it is no recipe.") from None
    return to_json(parsed(text, at_most=at_most))


def names() -> list[str]:
    return list(RECIPES)


def about(name: str) -> str:
    """What it does, on one line."""
    text = " ".join((RECIPES[name].__doc__ or "").split())
    return PLAIN.get(name) or text.split(". ")[0].rstrip(".") + "."
