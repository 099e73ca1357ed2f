"""Sites: one small file of facts per model family.

A site says where the self-attention layers are, which tokens an attention call holds, and how the
tokens are permuted once per forward, where the sequence enters and leaves the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..kernels.plan import TokenLayout

Arguments = dict[str, Any]
# A denoiser of diffusers; the type checker cannot know the attributes that its site names.
Model = Any


class Unsupported(NamedTuple):
    """Why a forward keeps the model's own attention."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Site:
    """Facts about a denoiser class.

    grid_axes: axes of its token grid. grid_name: what they are, for messages.
    layers: its self-attention modules in the order in which they run; each has a `processor`.
    others: what else attends and stays as it is, for the report.
    head_dim: of the attention.
    layout: the tokens of this forward from its arguments. `memo` lasts as long as the pipeline call.
    permute: arguments with the grid tokens in a new order; `order` is int64 [S_grid].
    restore: the output with its tokens back in the model's order.
    inside: what has to change inside the model for the pipeline call, with its undoing on the stack.
    """

    grid_axes: int
    grid_name: str
    layers: Callable[[Model], list[Any]]
    others: str
    head_dim: Callable[[Model], int]
    layout: Callable[[Model, Arguments, dict], TokenLayout | Unsupported]
    permute: Callable[[Model, Arguments, Tensor, dict], Arguments]
    restore: Callable[[Model, Any, Tensor], Any]
    inside: Callable[[Model, ExitStack], None] = lambda model, stack: None


SITES: dict[str, Site] = {}


def site_of(model: Any) -> Site | None:
    """The site of a model, or of the class whose `forward` it inherits unchanged (FSDP subclasses)."""
    for cls in type(model).__mro__:
        if cls.__name__ in SITES:
            return SITES[cls.__name__]
        if "forward" in vars(cls):
            return None
    return None


class Denoiser(NamedTuple):
    """A component of a pipeline that has a site. `outer` is what the pipeline calls, `model` what it wraps."""

    name: str
    outer: nn.Module
    model: Model
    site: Site


def denoisers(pipe: Any) -> Iterator[Denoiser]:
    """The supported denoisers of a pipeline (Wan 2.2 has two)."""
    for name, outer in pipe.components.items():
        model = getattr(outer, "_orig_mod", outer)
        site = site_of(model)
        if site is not None:
            yield Denoiser(name, outer, model, site)


def take(x: Tensor, dim: int, order: Tensor) -> Tensor:
    """x with the tokens of `dim` in `order`, on x's device (models may be spread over several)."""
    return x.index_select(dim, order.to(x.device))


def map_output(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply `change` to the sample of a model output (a tuple or a diffusers output with `sample`)."""
    if isinstance(output, tuple):
        return (change(output[0]), *output[1:])
    return type(output)(sample=change(output.sample))


from . import flux, wan  # noqa: E402  (they register themselves)

__all__ = [
    "SITES",
    "Denoiser",
    "Model",
    "Site",
    "Unsupported",
    "denoisers",
    "flux",
    "map_output",
    "site_of",
    "take",
    "wan",
]
