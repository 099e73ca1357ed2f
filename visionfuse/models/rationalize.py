"""Give a trained model rational activations that start as its own: `rationalize(model)`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.rational import Fit
from ..kernels.rational.fit import FUNCTIONS, INTERVAL, fit
from .rational import GRKANMlp, RationalActivation

# Where activations without parameters live. Elementwise ones are found by trying, not by name.
_HOMES = ("torch.nn.modules.activation", "timm.layers.activations", "diffusers.models.activations",
          "transformers.activations")  # fmt: skip
Initial = Callable[[Callable[[Tensor], Tensor]], str | Fit]


@dataclass(frozen=True, kw_only=True)
class Rationalized:
    """What `rationalize` did. names: of the modules that were replaced."""

    model: nn.Module
    names: tuple[str, ...]
    _replaced: dict[str, nn.Module]

    def undo(self) -> None:
        """Put the modules back that were there, with the weights of linear layers as they are now."""
        for name, module in self._replaced.items():
            self.model.set_submodule(name, module)


def rationalize(
    model: nn.Module,
    *,
    replace: str = "activations",
    include: str = "*",
    num_groups: int = 8,
    channel_dim: int = -1,
    interval: tuple[float, float] = INTERVAL,
) -> Rationalized:
    """Replace the activations of a model, in place, by rationals that imitate them.

    model: of timm, diffusers, transformers or torch.
    replace: "activations", or "mlps": timm's `Mlp` becomes a `GRKANMlp` with the same linear layers, with
        an identity in front of the first one.
    include: a pattern of module names (fnmatch), for example "blocks.*".
    num_groups: of channels that share coefficients; must divide the channels. 1 works in any layout.
    channel_dim: where the channels are, 1 for convolutional networks.
    interval: where the rationals have to be close. Another than (-3, 3) takes a fit of some seconds for
        each kind of activation.

    Between -3 and 3 a rational differs from a smooth activation by less than 2e-3, and by 1.4e-2 from one
    with a corner such as ReLU; further out it drifts away, so train the model after this. Raises
    ValueError, without any change, where nothing matches. The returned object can undo the change.
    """
    if replace not in ("activations", "mlps"):
        raise ValueError(f"replace must be 'activations' or 'mlps', got {replace!r}.")
    build = _mlp if replace == "mlps" else _activation
    options = {"num_groups": num_groups, "channel_dim": channel_dim}
    initial = partial(imitated, interval=interval)
    new: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{done}.") for done in new)
        if name and not inside and fnmatch(name, include):
            made = build(module, initial, options)
            if made is not None:
                new[name] = made.train(module.training)
    if not new:
        raise ValueError(
            f"No {replace} that can be replaced in {type(model).__name__} under {include!r}. Activations "
            "that a forward calls as functions cannot be seen from outside."
        )
    old = {name: model.get_submodule(name) for name in new}
    for name, module in new.items():
        model.set_submodule(name, module)
    return Rationalized(model=model, names=tuple(new), _replaced=old)


class ProjectedRational(nn.Module):
    """diffusers' GELU and GEGLU: a linear map, then the activation, of one half as a gate of the other."""

    def __init__(self, proj: nn.Module, act: nn.Module, *, gated: bool) -> None:
        super().__init__()
        self.proj, self.act, self.gated = proj, act, gated

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        if not self.gated:
            return self.act(x)
        x, gate = x.chunk(2, dim=-1)
        return x * self.act(gate)


def imitated(
    module: Callable[[Tensor], Tensor], interval: tuple[float, float] = INTERVAL
) -> str | Fit:
    """The name of the known activation that a module is, or a fit to it. ValueError if it is none at all."""
    x = torch.linspace(*INTERVAL, 301, device="cpu")
    with torch.no_grad():
        y = module(x.clone())  # some work in place
        if y.shape != x.shape or not torch.allclose(module(x[:7].clone()), y[:7]):
            raise ValueError(f"{type(module).__name__} is not an elementwise activation.")
        for name, function in FUNCTIONS.items():
            if torch.allclose(y, function(x), rtol=0, atol=1e-5):
                return name if interval == INTERVAL else _fitted(name, interval)
        return fit(lambda z: module(z.float().clone()).double(), interval=interval)


@cache
def _fitted(name: str, interval: tuple[float, float]) -> Fit:
    return fit(FUNCTIONS[name], interval=interval)


def _activation(module: nn.Module, initial: Initial, options: dict) -> nn.Module | None:
    """A rational in place of an elementwise activation, or of diffusers' activation with projection."""
    kind = type(module)
    if kind.__module__ not in _HOMES or isinstance(module, nn.Identity):
        return None
    weight = next(module.parameters(), None)
    if weight is None:
        try:
            return RationalActivation(initial(module), **options)
        except (ValueError, TypeError, IndexError, RuntimeError):
            return None  # softmax, gated units and the like
    where = {"device": weight.device, "dtype": torch.float32}
    proj = getattr(module, "proj", None)
    gelu = "gelu_tanh" if getattr(module, "approximate", "none") == "tanh" else "gelu"
    known = {
        "GELU": (gelu, False),
        "GEGLU": ("gelu", True),
        "ApproximateGELU": ("quick_gelu", False),
    }
    if proj is None or kind.__name__ not in known:
        return None
    name, gated = known[kind.__name__]
    act = RationalActivation(initial(FUNCTIONS[name]), **options, **where)
    return ProjectedRational(proj, act, gated=gated)


def _mlp(module: nn.Module, initial: Initial, options: dict) -> nn.Module | None:
    """A GRKANMlp with the layers of timm's Mlp."""
    timm_mlp = sys.modules.get("timm.layers.mlp")
    if timm_mlp is None or type(module) is not timm_mlp.Mlp:
        return None
    mlp: Any = module
    use_conv = isinstance(mlp.fc1, nn.Conv2d)
    first, second = mlp.fc1.weight, mlp.fc2.weight
    made = GRKANMlp(
        first.shape[1], first.shape[0], second.shape[0], act_layer="identity", use_conv=use_conv,
        num_groups=options["num_groups"], device=first.device,
    )  # fmt: skip
    made.act2 = RationalActivation(
        initial(mlp.act), num_groups=options["num_groups"], channel_dim=made.act1.channel_dim,
        device=first.device,
    )  # fmt: skip
    made.fc1, made.fc2, made.norm = mlp.fc1, mlp.fc2, mlp.norm
    made.drop2, made.drop1 = mlp.drop1, nn.Dropout(0.0)
    return made
