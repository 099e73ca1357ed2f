"""What `visionfuse bench sage` measures: `sage_attention` from bf16 to bf16, and the error of every precision.

The baseline is cuDNN in bf16 on the same tensors. Errors are of normal numbers, and with a channel of queries and one of
keys moved by 10 and 50 times their spread, as diffusion transformers have them (SageAttention2, arXiv 2411.10958,
section 3.1; facts of models: its figure 4).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from statistics import fmean

import torch
from torch import Tensor

from ..kernels.attention.api import select_implementation
from ..kernels.plan.layout import TokenLayout
from ..kernels.plan.neighborhood import Dense
from ..sage import sage_attention
from .accuracy import sampled_errors
from .cases import BASELINE, Case
from .peers import PEERS
from .suite import Candidate, Suite, Work
from .table import Row

RECIPES = ("int8_fp8+k_thread", "int8_fp8", "fp8", "int8", "int8_fp8+smooth_q")
PRECISIONS = (*RECIPES, "int8_fp8+k_token", "int8+smooth_q", "int4_fp8", "int4", "int4+smooth_q", "int8_fp8+smooth_v",
              "int8_fp8-smooth_k")  # fmt: skip
OFFSETS = (0, 10, 50)
# Errors of one head differ by 3% between draws: what rounding takes from its values on average is in all rows.
TOKENS, HEADS = 16384, 16


def candidates(work: Work, q: Tensor, k: Tensor, v: Tensor) -> Iterator[Candidate]:
    case = Case(name=work.name, layout=TokenLayout.joint(grids=[(1, work.tokens)]), spec=Dense(),
                heads=work.heads, head_dim=work.head_dim, impls=())  # fmt: skip
    peer = PEERS[BASELINE]
    yield Candidate(impl=BASELINE, recipe="", call=peer.make(case, q, k, v), reasons=[],
                    note=peer.note(q.device.type))  # fmt: skip
    for recipe in work.recipes:
        yield Candidate(
            impl=select_implementation(q.device, q.dtype, work.head_dim, recipe)[0], recipe=recipe,
            call=partial(_attend, q, k, v, recipe), reasons=[],
            note="from q, k, v to out",
        )  # fmt: skip


def _attend(q: Tensor, k: Tensor, v: Tensor, recipe: str) -> Tensor:
    out = sage_attention(q, k, v, "NHD", precision=recipe)
    assert isinstance(out, Tensor)
    return out


def accuracy_rows(device: torch.device, seconds: float) -> list[Row]:
    """Relative L1 error and cosine of every precision, without times."""
    return [row for offset in OFFSETS for row in errors(device, TOKENS, HEADS, offset)]


def errors(device: torch.device, tokens: int, heads: int, offset: int) -> list[Row]:
    g = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(1, tokens, heads, 128, generator=g, device=device) for _ in range(3))
    q[..., 1] += offset
    k[..., 0] += offset
    q, k, v = (x.bfloat16() for x in (q, k, v))
    rows = []
    for recipe in PRECISIONS:
        impl = select_implementation(device, q.dtype, 128, recipe)[0]
        out = _attend(q, k, v, recipe)
        found = [
            sampled_errors(out[:, :, h], q[:, :, h], k[:, :, h], v[:, :, h])
            for h in (slice(i, i + 1) for i in range(heads))
        ]
        rel_l1, cosine = (fmean(values) for values in zip(*found, strict=True))
        rows.append(Row(suite="sage", case=case_of(offset), impl=impl, recipe=recipe, rel_l1=rel_l1, cosine=cosine,
                        note=f"{tokens:,} tokens, {heads} heads of 128"))  # fmt: skip
    return rows


def case_of(offset: int) -> str:
    return (
        f"errors, a channel of q and one of k moved by {offset}"
        if offset
        else "errors, normal numbers"
    )


def _dense(key: str, tokens: int, heads: int, head_dim: int = 128) -> Work:
    return Work(key=key, name=f"{tokens:,} tokens, {heads} heads of {head_dim}", length=tokens, heads=heads,
                head_dim=head_dim, recipes=RECIPES)  # fmt: skip


WORKS = (_dense("4608", 4608, 24), _dense("16896", 16896, 24), _dense("32760", 32760, 12),
         _dense("75600", 75600, 12), _dense("d64", 16384, 32, 64))  # fmt: skip
TINY = (Work(key="tiny", name="tiny", length=300, heads=2, head_dim=64, recipes=("int8_fp8",)),)
SAGE = Suite(name="sage", works=WORKS, tiny=TINY, make=candidates, more={"accuracy": accuracy_rows})
