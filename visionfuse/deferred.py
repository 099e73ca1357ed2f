"""Deferred: norms and rotary embedding of queries and keys, left to the attention kernel's own pass.

A processor norms and rotates queries and keys and calls attention, where a kernel reads them again to round them.
Here it runs, with its own byte code, on views of itself and of its module in which norms hand on what they get, and
without rotary tables, which every such processor may lack. What it left out arrives at attention as its `backend`.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .kernels.attention.dispatch import ON_GPU
from .kernels.attention.projected import Prelude

if TYPE_CHECKING:
    from .session import Way
    from .sites import Deferral, Site


# Of modules whose call does more than their forward: accelerate's, and diffusers' offloading.
HOOKED = {"forward", "_hf_hook", "_diffusers_hook"}


class Backend(NamedTuple):
    """What a deferring processor hands to attention: what it left out, and its own backend."""

    prelude: Prelude
    own: Any


class View:
    """An object of which some attributes are others."""

    def __init__(self, whole: Any, **others: Any):
        self.whole, self.others = whole, others

    def __getattr__(self, name: str) -> Any:
        others = self.others
        return others[name] if name in others else getattr(self.whole, name)


def same(x: Tensor) -> Tensor:
    """A norm that is left out."""
    return x


def norms_of(attn: Any) -> dict[str, Any]:
    """The norms of queries and keys, where they see all tokens; text with norms of its own joins the image after both."""
    alone = getattr(attn, "norm_added_q", None) is not None
    return {} if alone else {name: getattr(attn, name, None) for name in ("norm_q", "norm_k")}


@dataclass
class Deferrals:
    """What the processors of a denoiser leave to the kernel, by their ids. wanted: always, never, or (None) where a
    kernel rounds and it pays. refused: why layers do not, with counts. used: processors that did.

    Norms over all heads need a pass of their own. Compiled, the model's are as fast (Wan2.1-1.3B at 720p on an H200: a
    step of 452 ms, fused 454); uncompiled they are many kernels.
    """

    wanted: bool | None = None
    compiled: bool = False
    known: dict[int, Deferral] = field(default_factory=dict)
    refused: Counter[str] = field(default_factory=Counter)
    used: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, site: Site, model: Any, layers: list[Any], wanted: bool | None) -> Deferrals:
        found = cls(wanted, any(m._compiled_call_impl is not None for m in model.modules()))
        alone: set[int] = set()
        for layer in layers if site.deferrals else ():
            key, deferral = id(layer.processor), site.deferrals.get(type(layer.processor).__name__)
            if why := refusal(layer, deferral):
                found.refused[why] += 1
                alone.add(key)  # several layers may share a processor: all of them can, or none
            elif deferral is not None:
                found.known[key] = deferral
        found.known = {key: way for key, way in found.known.items() if key not in alone}
        return found

    def get(self, processor: Any, way: Way | None) -> Deferral | None:
        """How it leaves norms and rotary embedding to what runs; None: it does not. The pass has no gradient."""
        if way is None or torch.is_grad_enabled():
            return None
        deferral = self.known.get(id(processor))
        pays = deferral is None or not (deferral.across_heads and self.compiled)
        rounds = not way.choice.precision.is_model and way.choice.impl in ON_GPU
        if not (rounds and pays if self.wanted is None else self.wanted):
            return None
        self.used.add(id(processor))
        return deferral

    def lines(self) -> list[str]:
        """For the report: nothing where no run asked for it, or no processor of the family could."""
        if not self.used or not (self.known or self.refused):
            return []
        done = f"norms and rotary embedding in {len(self.used & set(self.known))} processors"
        return [done, *(f"{reason} ({count}x)" for reason, count in self.refused.items())]


def refusal(layer: Any, deferral: Deferral | None) -> str:
    """Why a layer norms and rotates by itself; empty if the kernel can do it."""
    if deferral is None:
        return f"{type(layer.processor).__name__} norms and rotates queries and keys itself"
    norms = norms_of(layer)
    for name, norm in norms.items():
        if type(norm).__name__ != "RMSNorm" or getattr(norm, "bias", None) is not None:
            return f"{name} is no plain RMSNorm but {type(norm).__name__}, of an adapter perhaps"
        if norm._forward_hooks or norm._forward_pre_hooks or HOOKED & set(vars(norm)):
            return f"{name} has hooks, which bring its weights when it is called perhaps"
        if norm.weight is None or norm.eps is None or norm.eps != norms["norm_q"].eps:
            return f"{name} has no weight, or another eps than norm_q"
    return ""


def deferring(function: Callable, deferral: Deferral) -> Callable:
    """The method of a processor that leaves norms and rotary embedding to the attention that it calls."""
    names = tuple(inspect.signature(function).parameters)[2:]  # behind self and attn

    @wraps(function)
    def __call__(self, attn, *args, **kwargs):
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        rotary, text = arguments.get(deferral.rotary), arguments.get("encoder_hidden_states")
        cos, sin = (None, None) if rotary is None else deferral.tables(rotary, text)
        prelude, norms = Prelude(cos=cos, sin=sin), norms_of(attn)
        if norms:
            weights = {name: norm.weight for name, norm in norms.items()}
            prelude = Prelude(**weights, cos=cos, sin=sin, eps=norms["norm_q"].eps)
        backend = Backend(prelude, self._attention_backend)
        arguments[deferral.rotary] = None
        bare = View(attn, **dict.fromkeys(norms, same))
        return function(View(self, _attention_backend=backend), bare, **arguments)

    own: Any = __call__
    own.__code__ = own.__code__.replace()  # by which torch.compile keeps graphs
    return own
