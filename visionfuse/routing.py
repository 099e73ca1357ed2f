"""Routing: the attention calls of a processor come to us, whichever way it makes them.

A processor (or an attention module of timm) computes queries, keys and values, calls diffusers'
`dispatch_attention_fn` or `F.scaled_dot_product_attention`, and projects the result. A routed one is the
same object with the same code, in which these two names mean ours: its class becomes a subclass whose
method has the stock byte code and other globals. So no processor is copied, nothing global changes, other
layers and threads never notice, and an eager call costs a few views more. Compiled graphs are guarded by the
class of the processor: stock and routed ones keep their own graphs, and every variant has its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import parallel
from .context import ACTIVE
from .deferred import Backend, deferring
from .kernels.attention import block_sparse_attention
from .kernels.attention.projected import Prelude, projected_attention

if TYPE_CHECKING:
    from .kernels.plan import BlockPlan
    from .sites import Deferral

ATTENTIONS = ("dispatch_attention_fn", "scaled_dot_product_attention")


def refusal(layer: Any) -> str:
    """Why a processor or module cannot be routed; empty if it can."""
    name = f"{type(layer).__name__} does not call {' or '.join(ATTENTIONS)} itself"
    if getattr(layer, "fused_attn", True) is False:  # timm without F.scaled_dot_product_attention
        return f"{type(layer).__name__} has fused_attn=False; call timm.layers.set_fused_attn(True) before"
    code = getattr(_method(type(layer)), "__code__", None) if callable(layer) else None
    return "" if code is not None and set(ATTENTIONS) & set(code.co_names) else name


def route(layer: Any, variant: int = 0, deferral: Deferral | None = None) -> Callable[[], None]:
    """Send the attention calls of a processor or module to `ACTIVE.variants[variant]`. Returns the undoing.

    deferral: how it leaves norms and rotary embedding to the kernel; None: it does not. A processor that several
    layers share is routed once; their other attention goes on as before.
    """
    return become(layer, lambda own: _routed(own, variant, deferral))


def become(layer: Any, subclass: Callable[[type], type]) -> Callable[[], None]:
    """Turn an object into one of `subclass(its class)`, unless it is routed already. Returns the undoing."""
    own = type(layer)
    if hasattr(own, "_visionfuse_stock"):
        return lambda: None
    object.__setattr__(layer, "__class__", subclass(own))
    return lambda: restore(layer)


def restore(layer: Any) -> None:
    """Give a routed object its own class back."""
    object.__setattr__(layer, "__class__", getattr(type(layer), "_visionfuse_stock", type(layer)))


def own_backend(processor: Any) -> str:
    """The name of the diffusers backend that the processor's own attention uses, "native" by default."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    chosen = getattr(processor, "_attention_backend", None)
    chosen = _AttentionBackendRegistry.get_active_backend()[0] if chosen is None else chosen
    return getattr(chosen, "value", chosen)


def _method(cls: type) -> Any:
    """What computes: `forward` of a module that keeps the `__call__` of nn.Module, else `__call__`."""
    plain = issubclass(cls, nn.Module) and cls.__call__ is nn.Module.__call__
    return cls.forward if plain else cls.__call__


# Kept, because a compiled graph is guarded by the very class and function it was made with.
@lru_cache(maxsize=256)
def _routed(cls: type, variant: int, deferral: Deferral | None = None) -> type:
    """The subclass of `cls` whose method calls our attention."""
    dispatch = "dispatch_attention_fn" in _method(cls).__globals__
    own = rebound(cls, _functional(variant), _dispatch(variant) if dispatch else None)
    if deferral is not None:
        own.__call__ = deferring(own.__call__, deferral)
    return own


def rebound(
    cls: type, sdpa: Callable[..., Tensor], dispatch: Callable[..., Tensor] | None = None
) -> type:
    """The subclass of `cls` whose method has the same code, in which F.scaled_dot_product_attention is `sdpa`
    and diffusers' dispatch_attention_fn is `dispatch`."""
    method = _method(cls)
    functional = ModuleType("functional")
    functional.__dict__.update(vars(F), scaled_dot_product_attention=sdpa)
    ours: dict[str, Any] = {"F": functional}
    if dispatch is not None:
        ours["dispatch_attention_fn"] = dispatch
    # Without __name__, or torch.compile would look the globals up in the module of that name. And with a
    # code object of its own, by which torch.compile keeps graphs.
    names = {k: v for k, v in method.__globals__.items() if k != "__name__"}
    code = method.__code__.replace()
    function = FunctionType(
        code, names | ours, method.__name__, method.__defaults__, method.__closure__
    )
    function.__kwdefaults__ = method.__kwdefaults__
    function.__qualname__ = method.__qualname__
    return type(cls)(
        cls.__name__,
        (cls,),
        {
            method.__name__: function,
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "_visionfuse_stock": cls,
            "__reduce_ex__": _stock_reduce,
        },
    )


def _stock_reduce(self, protocol):
    """Copies and pickles of a routed object are stock ones."""
    _, arguments, *rest = super(type(self), self).__reduce_ex__(protocol)
    # The usual `copyreg.__newobj__` insists on the object's own class.
    return (object.__new__, (self._visionfuse_stock, *arguments[1:]), *rest)


def _functional(variant: int) -> Callable[..., Tensor]:
    def scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=None,
        dropout_p=0.0,
        is_causal=False,
        scale=None,
        enable_gqa=False,
    ):
        """As in torch.nn.functional: q, k, v (..., H, S, D) -> (..., H, S, D)."""

        def own(mask):
            out = F.scaled_dot_product_attention(
                query, key, value, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
            return out.transpose(-2, -3)

        q, k, v = (x.transpose(-2, -3) for x in (query, key, value))
        call = Call(
            q, k, v, attn_mask, scale, plain=not is_causal and not dropout_p and q.ndim == 4
        )
        return _attend(variant, call, own).transpose(-2, -3)

    return scaled_dot_product_attention


def _dispatch(variant: int) -> Callable[..., Tensor]:
    from diffusers.models import attention_dispatch

    def dispatch_attention_fn(
        query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False,
        attention_kwargs=None, *, backend=None, parallel_config=None,
    ):  # fmt: skip
        """As in diffusers: q, k, v (B, S, H, D) -> (B, S, H, D)."""

        prelude = None
        if isinstance(backend, Backend):
            prelude, backend = backend

        def own(mask):
            q, k = (query, key) if prelude is None else prelude.applied(query, key, value)
            return attention_dispatch.dispatch_attention_fn(
                q, k, value, mask, dropout_p, is_causal, scale, enable_gqa, attention_kwargs,
                backend=backend, parallel_config=parallel_config,
            )  # fmt: skip

        plain = not is_causal and not dropout_p
        call = Call(query, key, value, attn_mask, scale, plain, parallel_config, prelude)
        return _attend(variant, call, own)

    return dispatch_attention_fn


class Call(NamedTuple):
    """One attention call: q, k, v (B, S, H, D). plain: neither causal nor with dropout. split: diffusers'
    ParallelConfig, where several GPUs share the sequence. prelude: what q and k still lack."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    scale: float | None
    plain: bool
    split: Any = None
    prelude: Prelude | None = None


def _attend(variant: int, call: Call, own: Callable[..., Tensor]) -> Tensor:
    """The call by the active plan where it fits, else `own(mask)`, the model's own attention."""
    q, k, v, mask, scale, plain, split, prelude = call
    asked = (split, ACTIVE.keys, ACTIVE.probe) != (None, None, None)  # by who else reads q and k
    if prelude is not None and (asked or torch.is_grad_enabled()):
        (q, k), prelude = prelude.applied(q, k, v), None
    # No variants: no pipeline call runs, or its present step is a dense one. None: this one is dense now.
    chosen = ACTIVE.variants[variant] if variant < len(ACTIVE.variants) else None
    if chosen is not None:
        if ACTIVE.keys is not None:
            k, v = ACTIVE.keys(k, v)
        plan = _fitting(chosen.plans, *parallel.lengths(q, k, split))
        hidden = mask is None or (ACTIVE.masked and ACTIVE.ring == 1)
        if plan is not None and plain and hidden:

            def ours(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> Tensor:
                how: Any = {"scale": scale, "impl": chosen.impl, "precision": chosen.precision}
                if prelude is not None:
                    return projected_attention(q, k, v, plan, prelude, **how)
                return block_sparse_attention(q, k, v, plan, **how)

            if split is not None:
                return parallel.attend(q, k, v, plan, split, ours)
            if torch.compiler.is_compiling():  # a block that fails runs again without its graph
                return ours(q, k, v, plan)
            try:
                return ours(q, k, v, plan)
            except torch.OutOfMemoryError as failure:
                capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
                if capturing or ACTIVE.keys is not None:
                    raise  # nothing runs in a failed capture, and no other attention has those keys
                _out_of_memory(failure)
            # Outside of the handler, whose traceback would keep the tensors of the failed call alive.
            torch.cuda.empty_cache()
        elif not plain:
            _note("a causal attention, or with dropout")
        elif plan is not None:
            _note("an attention mask was given")
        else:
            _note(
                "an attention between other tokens than the plan's (IP-Adapter or cross attention)"
            )
    out = own(_ordered_mask(mask, q.shape[1], k.shape[1]))
    if ACTIVE.probe is not None and plain and split is None:
        ACTIVE.probe(q, k, v, out, scale, mask is not None)
    return out


def _fitting(plans: tuple[BlockPlan, ...], length_q: int, length_k: int) -> BlockPlan | None:
    for plan in plans:
        if plan.length_q == length_q and plan.length_k == length_k:
            return plan
    return None


def _ordered_mask(mask: Tensor | None, length_q: int, length_k: int) -> Tensor | None:
    """A mask is given in the model's order; the tokens may lie in another."""
    order = ACTIVE.permutation
    if mask is None or order is None:
        return mask
    if length_k == order.shape[0] and mask.shape[-1] == length_k:
        mask = mask.index_select(-1, order)
    if length_q == order.shape[0] and mask.ndim >= 2 and mask.shape[-2] == length_q:
        mask = mask.index_select(-2, order)
    return mask


def _out_of_memory(failure: torch.OutOfMemoryError) -> None:
    reason = "out of memory, where the model's own attention needs less"
    if reason not in ACTIVE.notes:
        warnings.warn(f"The model's own attention runs: {failure}", stacklevel=2)
    _note(reason)


@torch.compiler.assume_constant_result
def _note(reason: str) -> None:
    # In a compiled graph this runs once, while it is traced: counting there would be a side effect
    # on a guarded object, hence a recompilation for every count.
    ACTIVE.notes[reason] = ACTIVE.notes.get(reason, 0) + 1
