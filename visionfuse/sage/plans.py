"""Plans for `sage_attention`: which one a call wants, and the ones that it has made before.

Masks and sequence lengths have to be read on the host. That is done once for a tensor, and remembered with it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..kernels.attention import Precision, dispatch, select_implementation
from ..kernels.attention.quantize import Sequences
from ..kernels.plan import BlockPlan, BlockShape, compress, sequences
from ..kernels.plan.keys import hide_keys, key_ranges
from ..kernels.plan.tiles import block_shapes

# By a mask or by cu_seqlens_k: what was made of it, by version and question.
_made: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_warned: set[str] = set()


@lru_cache(maxsize=64)
def choose(
    impl: str, device: torch.device, dtype: torch.dtype, head_dim: int, precision: Precision
) -> BlockShape:
    """The block shape of the implementation that will run."""
    if impl == "auto":
        impl, _ = select_implementation(device, dtype, head_dim, precision)
        if impl == dispatch.PORTABLE and device.type == "cuda":  # exact attention will run
            precision = Precision()
            impl, _ = select_implementation(device, dtype, head_dim)
    return block_shapes(impl, head_dim, precision=precision.name, device=device)[0]


def lacks_kernel(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, precision: Precision) -> bool:
    """Whether this GPU has no kernel for the precision; warns, once for every reason."""
    if precision.is_model:
        return False
    impl, reasons = dispatch.fastest(q, k, v, plan, precision)
    if impl != dispatch.PORTABLE:
        return False
    text = "; ".join(reasons)
    if text not in _warned:
        _warned.add(text)
        warnings.warn(
            f"No kernel runs precision={str(precision)!r} here, and exact attention takes its place: {text}. "
            'impl="blocks" emulates it, slowly.',
            stacklevel=2,
        )
    return True


# Masks ---------------------------------------------------------------------------------------------


def as_boolean(mask: Tensor) -> Tensor | None:
    """A float mask of 0 and -inf as a bool one, True where it is 0; None if it has other numbers.

    The most negative number of its dtype stands for -inf, as transformers writes it, where every row of
    the mask has a 0.
    """
    return _remembered(mask, "boolean", lambda: _as_boolean(mask))


def _as_boolean(mask: Tensor) -> Tensor | None:
    seen, hidden = mask == 0, mask == -torch.inf
    if bool((seen | hidden).all()):
        return seen
    lowest = mask == torch.finfo(mask.dtype).min
    if bool((seen | hidden | lowest).all()) and bool(seen.any(-1).all()):
        return seen
    return None


def plan_of_mask(
    q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool, shape: BlockShape
) -> BlockPlan:
    """For q (B, S_q, H, D), k (B, S_k, H_kv, D) and a mask that broadcasts to (B, H, S_q, S_k)."""
    lengths = q.shape[1], k.shape[1]
    if mask is None:
        return _whole_plan(*lengths, is_causal, shape.block_q, shape.block_k, q.device)
    question = *lengths, is_causal, shape.block_q, shape.block_k
    return _remembered(mask, question, lambda: _plan_of_mask(mask, *question))


@lru_cache(maxsize=64)
def _whole_plan(
    length_q: int, length_k: int, is_causal: bool, block_q: int, block_k: int, device: torch.device
) -> BlockPlan:
    """Every pair, or the right-aligned triangle."""
    with torch.inference_mode(False):
        blocks = {"block_q": block_q, "block_k": block_k, "device": device}
        if is_causal:
            return sequences.causal(length_q, length_k, **blocks)
        return sequences.padded([length_k], length_q, length_k, **blocks)


def _plan_of_mask(
    mask: Tensor, length_q: int, length_k: int, is_causal: bool, block_q: int, block_k: int
) -> BlockPlan:
    if mask.is_floating_point():  # under torch.compile; otherwise it was looked at before
        seen = as_boolean(mask)
        if seen is None:
            raise ValueError(
                "attn_mask adds other numbers than 0 and -inf to the scores, for which PyTorch's own attention runs, "
                "but not under torch.compile. Pass a bool mask, or call scaled_dot_product_attention."
            )
        mask = seen
    mask = mask[(None,) * (4 - mask.dim())]
    whole = _whole_plan(length_q, length_k, is_causal, block_q, block_k, mask.device)
    by_key = mask[:, 0, 0]  # [B or 1, S_k or 1], if all heads and queries see the same keys
    if bool((mask == by_key[:, None, None]).all()):
        ranges = key_ranges(by_key.expand(-1, length_k))
        if ranges is None:
            return whole
        if not is_causal:
            return hide_keys(whole, ranges)
        if all(row == () or (len(row) == 1 and row[0][0] == 0) for row in ranges):
            return sequences.padded(
                [row[0][1] if row else 0 for row in ranges], length_q, length_k, causal=True,
                block_q=block_q, block_k=block_k, device=mask.device,
            )  # fmt: skip
    if is_causal:
        mask = mask & mask.new_ones(length_q, length_k).tril(length_k - length_q)
    mask = mask.expand(-1, -1, length_q, length_k)
    return compress(mask, block_q=block_q, block_k=block_k)


# Packed sequences ----------------------------------------------------------------------------------


def plan_of_sequences(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, is_causal: bool, shape: BlockShape
) -> tuple[BlockPlan, Sequences]:  # fmt: skip
    """For q (1, S_q, H, D) and k (1, S_k, H_kv, D). Raises ValueError where the lengths do not add up."""

    def make() -> tuple[BlockPlan, Sequences]:
        ends = [x.detach().long().cpu() for x in (cu_seqlens_q, cu_seqlens_k)]
        plan = sequences.packed(
            ends[0],
            ends[1],
            causal=is_causal,
            block_q=shape.block_q,
            block_k=shape.block_k,
            device=q.device,
        )
        if (plan.length_q, plan.length_k) != (q.shape[1], k.shape[1]):
            raise ValueError(
                f"cu_seqlens_q and cu_seqlens_k are of {plan.length_q} queries and {plan.length_k} keys, got "
                f"{q.shape[1]} and {k.shape[1]}."
            )
        return plan, Sequences.of(ends[0], ends[1], q.device)

    question = q.shape[1], k.shape[1], is_causal, shape.block_q, shape.block_k, q.device
    by_queries = _remembered(cu_seqlens_k, question, WeakTensorKeyDictionary)
    return _remembered(cu_seqlens_q, None, make, by_queries)


def _remembered(tensor: Tensor, question, make: Callable, made: WeakTensorKeyDictionary = _made):
    """make(), or what it gave for this tensor since it was last written to."""
    version = 0 if tensor.is_inference() else tensor._version
    answers: dict = made.setdefault(tensor, {})  # pyright: ignore
    if answers.get("version") != version:
        answers.clear()
        answers["version"] = version
    if question not in answers:
        with torch.inference_mode(False), torch.no_grad():  # what is kept may meet autograd later
            answers[question] = make()
    return answers[question]
