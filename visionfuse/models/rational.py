"""Layers with rational activations: a trainable activation, and the MLP of GR-KAN."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ..kernels.rational import Fit, coefficients
from ..kernels.rational.api import NOISE
from .recompute import recomputed


class RationalActivation(nn.Module):
    """P(x) / Q(x) with trainable coefficients, one Q for each group of channels, see `kernels.rational`.

    init: the activation to imitate at first, by name ("silu", "gelu", "identity", ...), or a `Fit`.
    shared_numerator: all groups have one P, as in GR-KAN (Yang & Wang, arXiv 2409.10594).
    channel_dim: -1 for channels last, 1 for NCHW. Any shape and memory order.

    Names in a state dict are those of the published checkpoints: weight_numerator (1 or groups, m + 1),
    weight_denominator (groups, n). Under autocast the result has autocast's dtype.
    """

    def __init__(
        self,
        init: str | Fit = "silu",
        *,
        num_groups: int = 8,
        version: str = "A",
        channel_dim: int = -1,
        shared_numerator: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.init = init
        self.noise = NOISE if version == "D" else 0.0
        self.version = "B" if version == "D" else version
        self.channel_dim = channel_dim
        numerator, denominator = self._initial()
        of_a = 1 if shared_numerator else num_groups
        dd = {"device": device, "dtype": dtype}
        self.weight_numerator = nn.Parameter(torch.empty(of_a, len(numerator), **dd))
        self.weight_denominator = nn.Parameter(torch.empty(num_groups, len(denominator), **dd))
        self.reset_parameters()

    def _initial(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Coefficients of a fit of version A in this version, where they mean the same function."""
        fit = coefficients(self.init) if isinstance(self.init, str) else self.init
        a, b = fit.numerator, fit.denominator
        if self.version != "A" and any(b[::2]):
            raise ValueError(
                f"The fit to {self.init!r} has odd powers of |x| in its denominator, which version "
                f"{self.version!r} has not. Use version 'A', or a fit whose denominator is even."
            )
        return a, (0.9, *b) if self.version == "C" else b

    def reset_parameters(self) -> None:
        with torch.no_grad():
            for weight, values in zip(
                (self.weight_numerator, self.weight_denominator), self._initial(), strict=True
            ):
                weight.copy_(torch.tensor(values, dtype=torch.float64).expand(weight.shape))

    def forward(self, x: Tensor) -> Tensor:
        numerator = self.weight_numerator
        if self.training and self.noise > 0:
            spread = torch.empty_like(numerator).uniform_(1 - self.noise, 1 + self.noise)
            numerator = numerator * spread
        return torch.ops.visionfuse.rational(
            x, numerator, self.weight_denominator, self.version, self.channel_dim
        )

    def extra_repr(self) -> str:
        m, n = self.weight_numerator.shape[1] - 1, self.weight_denominator.shape[1]
        init = self.init if isinstance(self.init, str) else "fit"
        return (
            f"{init}, {m}/{n}, num_groups={self.weight_denominator.shape[0]}, "
            f"version={'D' if self.noise else self.version!r}, channel_dim={self.channel_dim}"
        )


class GRKANMlp(nn.Module):
    """The MLP of the Kolmogorov-Arnold Transformer, in place of timm's `Mlp` (`mlp_layer=GRKANMlp`).

    activation 1 (identity at first), linear 1, activation 2, linear 2: two GR-KAN layers (Yang & Wang,
    arXiv 2409.10594), which have the activation before the linear map. Parameters of timm's `Mlp` keep
    their names.

    act_layer: what activation 2 imitates at first, by name or as a class of a known activation.
    num_groups: of in_features and hidden_features, both of which it must divide.
    recompute: keep only the input of each activation for the backward, and compute its output again
        there: 2 bytes an element less in 16 bit, for one more pass over these elements.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: str | Callable[[], nn.Module] | None = "silu",
        norm_layer: Callable[..., nn.Module] | None = None,
        bias: bool | tuple[bool, bool] = True,
        drop: float | tuple[float, float] = 0.0,
        use_conv: bool = False,
        num_groups: int = 8,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        from .rationalize import imitated

        dd = {"device": device, "dtype": dtype}
        hidden_features = hidden_features or in_features
        if in_features % num_groups or hidden_features % num_groups:
            raise ValueError(
                f"num_groups must divide the channels, got {num_groups=}, {in_features=}, "
                f"{hidden_features=}."
            )
        bias1, bias2 = bias if isinstance(bias, tuple) else (bias, bias)
        drop1, drop2 = drop if isinstance(drop, tuple) else (drop, drop)
        linear = partial(nn.Conv2d, kernel_size=1) if use_conv else nn.Linear
        rational = partial(
            RationalActivation, num_groups=num_groups, channel_dim=1 if use_conv else -1, **dd
        )
        init = act_layer if isinstance(act_layer, str) else imitated((act_layer or nn.SiLU)())

        self.recompute = recompute
        self.act1 = rational("identity")
        self.drop1 = nn.Dropout(drop1)
        self.fc1 = linear(in_features, hidden_features, bias=bias1, **dd)
        self.act2 = rational(init)
        self.norm = norm_layer(hidden_features, **dd) if norm_layer else nn.Identity()
        self.drop2 = nn.Dropout(drop2)
        self.fc2 = linear(hidden_features, out_features or in_features, bias=bias2, **dd)

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute and not torch.jit.is_scripting():
            return recomputed(self.second, recomputed(self.first, x, self), self)
        return self.second(self.first(x))

    def first(self, x: Tensor) -> Tensor:
        return self.fc1(self.drop1(self.act1(x)))

    def second(self, x: Tensor) -> Tensor:
        return self.fc2(self.drop2(self.norm(self.act2(x))))

    @torch.jit.ignore()
    def preserve_variance(self) -> None:
        """Weights from N(0, gain / fan_in), with the gain of the activation before them; biases 0."""
        for act, fc in ((self.act1, self.fc1), (self.act2, self.fc2)):
            fit = coefficients(act.init) if isinstance(act.init, str) else act.init
            fan_in = fc.weight[0].numel()
            nn.init.normal_(fc.weight, std=(fit.gain / fan_in) ** 0.5)
            if fc.bias is not None:
                nn.init.zeros_(fc.bias)
