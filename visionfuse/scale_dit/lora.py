"""Which tokens the LoRA of Scale-DiT acts on: those of the guidance everywhere, those of the image only where
queries, keys and values are made. So the image stays what the base model knows.

The public code sets the scale of its LoRA to zero around single calls; here the layers that PEFT made split the
sequence themselves while a model is guided.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

SHARED = ("to_q", "to_k", "to_v")  # layers whose LoRA acts on all tokens
MODULATION = ("norm.linear", "norm1.linear")  # those of a stream, not of tokens: see `without_lora`


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """The layers of PEFT in a model, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "base_layer") and hasattr(module, "lora_A")
    }


def lora_on_guidance(
    model: nn.Module, present: Callable[[], int]
) -> Iterator[tuple[nn.Module, Callable]]:
    """Layers, and a `forward` of theirs whose LoRA leaves the tokens before the last `present()` alone."""
    for name, layer in lora_layers(model).items():
        if not name.endswith((*SHARED, *MODULATION)):
            yield layer, _split(layer, layer.forward, present)


def _split(layer: Any, tuned: Callable, present: Callable[[], int]) -> Callable:
    def forward(x: Tensor, *args, **kwargs) -> Tensor:
        out = layer.base_layer(x, *args, **kwargs)
        if count := present():
            out[:, -count:] = tuned(x[:, -count:], *args, **kwargs)
        return out

    return forward


def without_lora(norm: Any, forward: Callable) -> Callable:
    """`forward` of a norm layer with the base of its linear layer."""
    base = getattr(norm.linear, "base_layer", None)
    if base is None:
        return forward

    def run(*args, **kwargs):
        tuned, norm._modules["linear"] = norm._modules["linear"], base
        try:
            return forward(*args, **kwargs)
        finally:
            norm._modules["linear"] = tuned

    return run
