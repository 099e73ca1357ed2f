"""The page of a recipe on the Hugging Face Hub.

recipe.push_to_hub("you/flux-2k-fast")
card(recipe, base_model="black-forest-labs/FLUX.1-dev").push_to_hub("you/flux-2k-fast")
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .recipe import Recipe
from .reporting import describe

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

TEXT = """# {name}

{note}

A recipe of visionfuse: {words}.

```python
import visionfuse
from visionfuse import Recipe

pipe.enable_visionfuse(Recipe.from_pretrained("OWNER/NAME"))
print(visionfuse.report(pipe))   # what runs where, and what was skipped and why
pipe.disable_visionfuse()        # everything as before
```

{figures}
"""


def card(
    recipe: Recipe,
    *,
    base_model: str | None = None,
    license: str | None = None,
    figures: str = "",
) -> ModelCard:
    """What the repository of a recipe says of it, to be pushed with `push_to_hub` or saved with `save`.

    base_model: the model on the Hub that it was made for. license: by its name there, "mit" for example. figures:
    Markdown with what was measured; a recipe that loses something is not complete without.
    """
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(
        library_name="visionfuse", tags=["visionfuse", "recipe"], base_model=base_model, license=license
    )  # fmt: skip
    text = TEXT.format(name=recipe.name, note=recipe.note, words=describe(recipe), figures=figures)
    lines = f"---\n{data.to_yaml()}\n---\n\n{text}".splitlines()
    kept = [line for i, line in enumerate(lines) if line or lines[i - 1]]  # no two empty ones
    return ModelCard("\n".join(kept).rstrip() + "\n")
