"""The op and its gradient as torch.compile sees them: opaque calls, tensors and numbers in, tensors out."""

from __future__ import annotations

import torch
from torch import Tensor, library

from ..order.permute import Orders
from ..plan.block_plan import BlockPlan
from . import bias as biases
from .dispatch import run, run_backward
from .precision import Precision


@library.custom_op("visionfuse::block_sparse_attention", mutates_args=())
def block_sparse_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: list[Tensor],
    numbers: list[int],
    bias: list[Tensor],
    scale: float,
    impl: str,
    return_lse: bool,
    precision: str,
    q_order: Tensor | None,
    k_order: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """out (B, S_q, H, D) and lse (B, H, S_q), the latter empty unless asked for. impl may be "auto"."""
    blocks, added = BlockPlan.from_tensors(plan, numbers), biases.from_tensors(bias)
    # Autocast ends at the op: what is inside has its formats from the precision.
    with torch.autocast(q.device.type, enabled=False):
        out, lse = run(
            impl, q, k, v, blocks, scale, return_lse, Precision.parse(precision), added,
            Orders(q_order, k_order),
        )  # fmt: skip
    return out, q.new_empty(0, dtype=torch.float32) if lse is None else lse


@block_sparse_attention_op.register_fake
def _(q, k, v, plan, numbers, bias, scale, impl, return_lse, precision, q_order, k_order):
    lse = (q.shape[0], q.shape[2], q.shape[1]) if return_lse else (0,)
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(
        lse, dtype=torch.float32
    )


@library.custom_op("visionfuse::block_sparse_attention_backward", mutates_args=())
def block_sparse_attention_backward_op(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    lse: Tensor | None,
    plan: list[Tensor],
    numbers: list[int],
    bias: list[Tensor],
    scale: float,
    impl: str,
    table_gradient: bool,
    q_order: Tensor | None,
    k_order: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of a relative bias' table, the latter empty unless asked for.

    out, lse: those of exact attention, or None.
    """
    blocks, added = BlockPlan.from_tensors(plan, numbers), biases.from_tensors(bias)
    with torch.autocast(q.device.type, enabled=False):
        d_q, d_k, d_v, d_table = run_backward(
            impl, grad, grad_lse, q, k, v, out, lse, blocks, scale, added, table_gradient,
            Orders(q_order, k_order),
        )  # fmt: skip
    return d_q, d_k, d_v, q.new_empty(0) if d_table is None else d_table


@block_sparse_attention_backward_op.register_fake
def _(grad, grad_lse, q, k, v, out, lse, plan, numbers, bias, scale, impl, table_gradient, q_order,
      k_order):  # fmt: skip
    gradients = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    table = torch.empty_like(bias[0]) if table_gradient else q.new_empty(0)
    return *gradients, table


def _save(ctx, inputs, output) -> None:
    q, k, v, plan, numbers, bias, scale, impl, return_lse, precision, *order = inputs
    # The gradient is that of exact attention: what a forward of rounded operands gave is of no use to it.
    found = output if return_lse and Precision.parse(precision).is_model else ()
    ctx.save_for_backward(q, k, v, *order, *plan, *bias, *found)
    ctx.counts = len(plan), len(bias), len(found)
    ctx.arguments = numbers, scale, impl
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad: Tensor | None, grad_lse: Tensor | None):
    numbers, scale, impl = ctx.arguments
    q, k, v, q_order, k_order, *rest = ctx.saved_tensors
    plans, biased, found = ctx.counts
    plan, bias, output = rest[:plans], rest[plans : plans + biased], rest[plans + biased :]
    out, lse = output if found else (None, None)
    wanted = ctx.needs_input_grad
    table_gradient = biased > 1 and wanted[5][0]
    d_q, d_k, d_v, d_table = block_sparse_attention_backward_op(
        torch.zeros_like(q) if grad is None else grad, grad_lse, q, k, v, out, lse, plan, numbers, bias,
        scale, impl, table_gradient, q_order, k_order,
    )  # fmt: skip
    biases_grad = [d_table if table_gradient else None, None, None][:biased]
    return d_q, d_k, d_v, [None] * plans, None, biases_grad, None, None, None, None, None, None


block_sparse_attention_op.register_autograd(_differentiate, setup_context=_save)
