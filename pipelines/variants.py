"""Recipes as one writes them in a command: `"gna density=0.5 stride=8"`."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from visionfuse.cli import parse_options
from visionfuse.recipe import Recipe
from visionfuse.recipes import build

STOCK = "stock"
EXAMPLE = "'gna density=0.5 stride=8'"


class Variant(NamedTuple):
    """A recipe and its options as they were written: `Variant("gna", "density=0.5 stride=8")`."""

    recipe: str
    options: str = ""

    @classmethod
    def parse(cls, text: str) -> Variant:
        """Raises ValueError for what is no recipe with options, or "stock" alone."""
        name, *pairs = text.split() or [""]
        wrong = not name or "=" in name or any(not re.match(r"[^=]+=.", pair) for pair in pairs)
        if wrong or (name == STOCK and pairs):
            raise ValueError(
                f"A variant is a recipe and its options, such as {EXAMPLE}, or {STOCK!r} alone; "
                f"got {text!r}."
            )
        return cls(name, " ".join(pairs))

    def __str__(self) -> str:
        return f"{self.recipe} {self.options}".strip()

    def parsed(self) -> tuple[dict[str, Any], str]:
        """The recipe's options, and the implementation."""
        options = parse_options(self.options.split())
        impl = options.pop("impl", "auto")
        return options, impl

    def enable(self, pipe: Any) -> None:
        """On a pipeline; "stock" disables. Raises ValueError where the recipe or an option cannot work."""
        if self.recipe == STOCK:
            pipe.disable_visionfuse()
            return
        options, impl = self.parsed()
        try:
            if self.recipe.endswith(".json"):
                recipe = Recipe.load(self.recipe)
            else:
                recipe = build(self.recipe, **options)
        except TypeError as error:  # an unknown option is the user's mistake, as a wrong value is
            raise ValueError(str(error)) from error
        pipe.enable_visionfuse(recipe, impl=impl)
