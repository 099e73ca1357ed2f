"""The attention backend "visionfuse" of diffusers: routed layers come here from their stock processors.

The name is added to diffusers' closed enumeration once, when a pipeline is first enabled. The global
active backend never changes, and without a plan in `ACTIVE` the function is the model's own attention.
"""

from __future__ import annotations

import torch

from .context import ACTIVE

NAME = "visionfuse"


def install():
    """Register the backend with diffusers and return its enumeration member. Idempotent."""
    try:
        from diffusers.models import attention_dispatch

        names = attention_dispatch.AttentionBackendName
        registry = attention_dispatch._AttentionBackendRegistry
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            "This version of diffusers has no attention backends that visionfuse can join "
            f"({error}). Install diffusers 0.36 or newer."
        ) from error
    if NAME in names._value2member_map_:
        return names(NAME)
    member = str.__new__(names, NAME)
    member._name_, member._value_ = NAME.upper(), NAME
    type.__setattr__(names, NAME.upper(), member)
    names._member_map_[NAME.upper()] = member
    names._member_names_.append(NAME.upper())
    names._value2member_map_[NAME] = member
    registry.register(member)(visionfuse_attention)
    return member


def own_backend(value):
    """The backend that diffusers would use for a processor whose `_attention_backend` is `value`."""
    from diffusers.models.attention_dispatch import (
        AttentionBackendName,
        _AttentionBackendRegistry,
    )

    backend = _AttentionBackendRegistry.get_active_backend()[0] if value is None else value
    return AttentionBackendName.NATIVE if backend == NAME else AttentionBackendName(backend)


# diffusers passes exactly the arguments that a backend names, so all of them stand here.
def visionfuse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    _parallel_config=None,
) -> torch.Tensor:
    """q, k, v (B, S, H, D) -> (B, S, H, D): the active plan where it fits, else the model's own attention."""
    from .kernels.attention import block_sparse_attention

    plan = ACTIVE.plan
    reason = None
    if plan is not None:
        reason = _why_not(
            query, key, plan, attn_mask, dropout_p, is_causal, enable_gqa, _parallel_config
        )
    if plan is not None and reason is None:
        out = block_sparse_attention(
            query, key, value, plan, scale=scale, impl=ACTIVE.impl, precision=ACTIVE.precision
        )
        return out  # pyright: ignore[reportReturnType]  (a pair only with return_lse)
    if reason is not None:
        _note(reason)
    return _own_attention(
        query, key, value, _ordered_mask(attn_mask, query.shape[1], key.shape[1]), dropout_p,
        is_causal, scale, enable_gqa, _parallel_config,
    )  # fmt: skip


def _why_not(query, key, plan, attn_mask, dropout_p, is_causal, enable_gqa, parallel) -> str | None:
    if query.shape[1] != plan.length_q or key.shape[1] != plan.length_k:
        return "an attention between other tokens than the plan's (IP-Adapter or cross attention)"
    if attn_mask is not None:
        return "an attention mask was given"
    if is_causal or enable_gqa or dropout_p:
        return f"is_causal={is_causal}, enable_gqa={enable_gqa}, dropout_p={dropout_p}"
    if parallel is not None:
        return "context parallelism splits the sequence"
    return None


def _own_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, gqa, parallel):
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    return dispatch_attention_fn(
        query,
        key,
        value,
        attn_mask=attn_mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=gqa,
        backend=ACTIVE.own_backend or AttentionBackendName.NATIVE,
        parallel_config=parallel,
    )


def _ordered_mask(mask: torch.Tensor | None, length_q: int, length_k: int) -> torch.Tensor | None:
    """A mask is given in the model's order; the tokens may lie in another."""
    order = ACTIVE.permutation
    if mask is None or order is None:
        return mask
    if length_k == order.shape[0] and mask.shape[-1] == length_k:
        mask = mask.index_select(-1, order)
    if length_q == order.shape[0] and mask.ndim >= 2 and mask.shape[-2] == length_q:
        mask = mask.index_select(-2, order)
    return mask


@torch.compiler.assume_constant_result
def _note(reason: str) -> None:
    # In a compiled graph this runs once, while it is traced: counting there would be a side effect
    # on a guarded object, hence a recompilation for every count.
    ACTIVE.notes[reason] = ACTIVE.notes.get(reason, 0) + 1
