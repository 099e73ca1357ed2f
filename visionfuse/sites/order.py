"""How tokens change places where a sequence enters and leaves a model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from ..context import ACTIVE

Tables = tuple[Tensor, ...]


def take(x: Tensor, dim: int, order: Tensor) -> Tensor:
    """x with the tokens of `dim` in `order`, on x's device (models may be spread over several)."""
    return x.index_select(dim, order.to(x.device))


def map_output(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply `change` to the sample of a model output (a tuple or a diffusers output with `sample`)."""
    if isinstance(output, tuple):
        return (change(output[0]), *output[1:])
    return type(output)(sample=change(output.sample))


def patch_grid(x: Tensor, patch: tuple[int, ...]) -> tuple[int, ...]:
    """Patches along the last axes of x. Incomplete ones do not count."""
    return tuple(n // p for n, p in zip(x.shape[-len(patch) :], patch, strict=True))


def permute_patches(x: Tensor, patch: tuple[int, ...], order: Tensor) -> Tensor:
    """x (B, C, ...) with its patches, counted row-major, in `order`. Incomplete patches are cut.

    An embedding whose stride is its patch makes a token of every patch, so this permutes tokens, and a
    latent has 64 numbers a token where the model has thousands.
    """
    grid, rank = patch_grid(x, patch), len(patch)
    x = x[(..., *(slice(n * p) for n, p in zip(grid, patch, strict=True)))]
    sides = [side for pair in zip(grid, patch, strict=True) for side in pair]
    axes = [0, *range(2, 2 + 2 * rank, 2), 1, *range(3, 3 + 2 * rank, 2)]  # B, grid, C, patch
    tokens = take(x.reshape(*x.shape[:2], *sides).permute(axes).flatten(1, rank), 1, order)
    back = sorted(range(len(axes)), key=axes.__getitem__)
    return tokens.unflatten(1, grid).permute(back).reshape(x.shape)


class OrderedRope(nn.Module):
    """Rotary tables that follow their tokens; the model's own when nothing moved.

    A module and not a hook, because compiled graphs are guarded by the types of submodules but not
    by hooks: a graph of the stock model would run on permuted tokens with tables that are not.
    """

    def __init__(self, stock: nn.Module):
        super().__init__()
        self.stock = stock

    def rope(self, *args, **kwargs) -> Tables:
        """The model's own tables, of all tokens also where context parallelism leaves this GPU a part."""
        if ACTIVE.streams:
            return type(self.stock).forward(self.stock, *args, **kwargs)
        return self.stock(*args, **kwargs)

    def forward(self, *args, **kwargs) -> Tables:
        if ACTIVE.rope is None:
            return self.stock(*args, **kwargs)
        tables = ACTIVE.rope
        registry = getattr(self.stock, "_diffusers_hook", None) if ACTIVE.streams else None
        for hook in registry.hooks.values() if registry else ():
            tables = hook.post_forward(self.stock, tables)
        return tables


def rope_in_order(name: str) -> Callable[[Any, ExitStack], None]:
    """A site's `inside`: the rotary module `name` of the model obeys `set_rope` for the pipeline call."""

    def inside(model: Any, stack: ExitStack) -> None:
        rope = getattr(model, name)
        stack.callback(setattr, model, name, rope)
        setattr(model, name, OrderedRope(rope))

    return inside


def set_rope(memo: dict, order: Tensor, key: Any, tables: Callable[[], Tables]) -> None:
    """Let the model use `tables()`: asked once per order and key, and outside of compiled graphs."""
    known = memo.setdefault("rope", {})
    if (id(order), key) not in known:
        known[id(order), key] = order, tables()  # the order stays alive, hence its id is its own
    ACTIVE.rope = known[id(order), key][1]
