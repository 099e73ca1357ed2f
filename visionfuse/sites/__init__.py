"""Sites: one small file of facts per model family.

A site says where the self-attention layers are, which tokens an attention call holds and which of them are
padding, and how the tokens are permuted once per forward, where the sequence enters and leaves the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn

from ..kernels.plan import TokenLayout
from ..kernels.plan.keys import KeyRanges

Arguments = dict[str, Any]
# A denoiser of diffusers; the type checker cannot know the attributes that its site names.
Model = Any
T = TypeVar("T")


class Unsupported(NamedTuple):
    """Why a forward keeps the model's own attention."""

    reason: str


class Deferral(NamedTuple):
    """How processors of a class leave norms and rotary embedding to the kernel; see `deferred`.

    rotary: the argument of their call that holds the rotary tables; without it they rotate nothing.
    tables: of it, and of the text (B, S_text, C) if there is one, cos and sin of all tokens of the attention: [S, D]
        or [1, S, 1, D], every angle at two neighbouring channels.
    across_heads: whether norms are over all heads of a token, which takes a pass before the one that rounds.
    """

    rotary: str
    tables: Callable[[Any, Tensor | None], tuple[Tensor, Tensor]] = lambda rotary, text: rotary
    across_heads: bool = False


def _stays(model: Model, arguments: Arguments, order: Tensor, memo: dict) -> Arguments:
    raise AssertionError("a site whose row_only says why is never asked to permute")


@dataclass(frozen=True, kw_only=True)
class Site:
    """Facts about a denoiser class.

    grid_axes: axes of its token grid. grid_name: what they are, for messages.
    layers: its self-attention modules in the order in which they run; each has a `processor`.
    others: what else attends and stays as it is, for the report.
    head_dim: of the attention; the largest where layers differ.
    layout: the tokens of this forward from its arguments. `memo` lasts as long as the pipeline call.
    levels: further layouts of layers that attend at coarser resolutions.
    keys: which keys are no padding, of every batch entry, in the model's order; None if all are.
    tokens: a tensor of this forward's device and dtype.
    row_only: why tokens cannot change places in this model; empty if they can.
    permute: arguments with the grid tokens in a new order; `order` is int64 [S_grid].
    restore: the output with its tokens back in the model's order.
    inside: what has to change inside the model for the pipeline call, with its undoing on the stack.
    deferrals: by the names of their classes, processors that can leave norms and rotary embedding to the kernel.
    """

    grid_axes: int
    grid_name: str
    layers: Callable[[Model], list[Any]]
    others: str
    head_dim: Callable[[Model], int] = lambda model: model.config.attention_head_dim
    layout: Callable[[Model, Arguments, dict], TokenLayout | Unsupported]
    levels: Callable[[Model, TokenLayout], tuple[TokenLayout, ...]] = lambda model, layout: ()
    keys: Callable[[Model, Arguments, dict], KeyRanges | None] = lambda model, arguments, memo: None
    tokens: Callable[[Arguments], Tensor] = lambda arguments: arguments["hidden_states"]
    row_only: Callable[[Model], str] = lambda model: ""
    permute: Callable[[Model, Arguments, Tensor, dict], Arguments] = _stays
    restore: Callable[[Model, Any, Tensor], Any] = lambda model, output, inverse: output
    inside: Callable[[Model, ExitStack], None] = lambda model, stack: None
    deferrals: Mapping[str, Deferral] = field(default_factory=dict)


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


def once(memo: dict, tensor: Tensor, read: Callable[[Tensor], T]) -> T:
    """`read(tensor)`, which waits for the GPU, once per tensor and pipeline call.

    The memo holds the tensor itself, since the address of a freed one may belong to another's data.
    """
    known = memo.setdefault("read", {})
    if id(tensor) not in known:
        known[id(tensor)] = tensor, read(tensor)
    return known[id(tensor)][1]


from . import (  # noqa: E402  (they register themselves)
    cogvideox,
    cogview4,
    cosmos,
    flux,
    hunyuan_image,
    hunyuan_video,
    ltx,
    lumina2,
    pixart,
    qwen_image,
    sd3,
    skyreels,
    unet,
    wan,
    z_image,
)

__all__ = [
    "SITES",
    "Deferral",
    "Denoiser",
    "Model",
    "Site",
    "Unsupported",
    "cogvideox",
    "cogview4",
    "cosmos",
    "denoisers",
    "flux",
    "hunyuan_image",
    "hunyuan_video",
    "ltx",
    "lumina2",
    "once",
    "pixart",
    "qwen_image",
    "sd3",
    "site_of",
    "skyreels",
    "unet",
    "wan",
    "z_image",
]
