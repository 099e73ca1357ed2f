"""State dicts of MedViTV2's own code, into the names of `medvit.MedViT` and back.

There all blocks are one list `features`, the classifier is `proj_head.0`, the centres of KANs are a
parameter, and global blocks have a feed-forward network `conv` that no forward reads.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from .kan import CENTRES, HIGH, LOW

# The network that global blocks have and never use: channels as multiples of the block's and of its hidden ones.
_UNUSED = {
    "0.weight": ("hidden", "dim", 1, 1), "3.weight": ("hidden", 1, 3, 3), "7.weight": ("dim", "hidden", 1, 1),
    "6.fc.0.weight": (2, "hidden"), "6.fc.0.bias": (2,), "6.fc.2.weight": ("hidden", 2), "6.fc.2.bias": ("hidden",),
}  # fmt: skip
_UNUSED_NORMS = {"1": "hidden", "4": "hidden", "8": "dim"}


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Published weights as `model` wants them; a state dict of timm's form as it is."""
    state_dict = state_dict.get("model", state_dict)  # type: ignore[assignment]
    if not any(key.startswith("features.") for key in state_dict):
        return state_dict
    names = _places(model)
    out = {}
    for key, value in state_dict.items():
        if key.endswith("rbf.grid"):
            if not torch.allclose(value.float().cpu(), _centres()):
                raise ValueError(
                    f"{key} must be {CENTRES} centres from {LOW} to {HIGH}, got {value.tolist()}."
                )
            continue
        found = re.match(r"features\.(\d+)\.(.*)", key)
        if found:
            place, rest = names[int(found[1])], found[2]
            if (
                rest.startswith("conv.")
                and f"features.{found[1]}.kan.layers.0.layernorm.bias" in state_dict
            ):
                continue  # the unused network
            key = f"{place}.{rest}"
        out[re.sub(r"^proj_head\.0\.", "head.fc.", key)] = value
    return out


def published_state_dict(model: Any) -> dict[str, Tensor]:
    """The weights of a `MedViT` in the names of its own code; the network that it never uses is zeros."""
    indices = {place: i for i, place in enumerate(_places(model))}
    out = {}
    for key, value in model.state_dict().items():
        found = re.match(r"(stages\.\d+\.blocks\.\d+)\.(.*)", key)
        if found:
            prefix, rest = f"features.{indices[found[1]]}", found[2]
            key = f"{prefix}.{rest}"
            if layer := re.match(r"(kan\.layers\.\d+)\.layernorm\.weight", rest):
                out[f"{prefix}.{layer[1]}.rbf.grid"] = _centres().to(value)
            if rest == "norm2.weight" and hasattr(model.get_submodule(found[1]), "kan"):
                out |= {f"{prefix}.conv.conv.{k}": v for k, v in _unused(value).items()}
        out[re.sub(r"^head\.fc\.", "proj_head.0.", key)] = value
    return out


def _places(model: Any) -> list[str]:
    return [
        f"stages.{s}.blocks.{b}"
        for s, stage in enumerate(model.stages)
        for b in range(len(stage.blocks))
    ]


def _centres() -> Tensor:
    return torch.linspace(LOW, HIGH, CENTRES)


def _unused(like: Tensor) -> dict[str, Tensor]:
    """like: [dim]. A fresh, unused network of a global block."""
    sizes = {"dim": len(like), "hidden": 2 * len(like)}
    out = {
        name: like.new_zeros([n if isinstance(n, int) else sizes[n] for n in shape])
        for name, shape in _UNUSED.items()
    }
    for name, size in _UNUSED_NORMS.items():
        for part, start in (
            ("weight", 1.0),
            ("bias", 0.0),
            ("running_mean", 0.0),
            ("running_var", 1.0),
        ):
            out[f"{name}.{part}"] = like.new_full((sizes[size],), start)
        out[f"{name}.num_batches_tracked"] = torch.zeros((), dtype=torch.int64, device=like.device)
    return out
