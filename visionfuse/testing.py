"""What tests of kernels share: error budgets, poisoned memory, saved tensors, arbitrary plans, compilation without a GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor, nn

from .kernels.attention.bias import Bias, BlockBias, RelativeBias
from .kernels.plan.block_plan import BitMask, BlockPlan, Entries, IntervalMask

# Error budgets -----------------------------------------------------------------------------------


def plan_mask(plan: BlockPlan, batch: int, heads: int) -> Tensor:
    """The visible pairs of every batch entry and head: bool [B, H, Sq, Sk]."""
    masks = torch.stack([plan.dense_mask(v) for v in range(plan.variants)])
    if plan.variant is None:
        return masks[:1, None].expand(batch, heads, -1, -1)
    return masks[plan.variant.expand(batch, heads).long()]


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, *, accumulate: torch.dtype,
    bias: Tensor | float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Dense masked attention that multiplies in q's dtype and sums in `accumulate`.

    q [B, Sq, H, D], k and v [B, Sk, Hk, D], mask and bias [B, H, Sq, Sk] -> out in q's dtype, lse [B, H, Sq].
    With accumulate=float64 and inputs in float64 this is the exact result; with 16-bit inputs and
    float32 it is what a careful dense kernel computes: the weights are rounded to q's dtype.
    """
    low, group = q.dtype, q.shape[2] // k.shape[2]
    q, k, v = (x.to(accumulate).transpose(1, 2) for x in (q, k, v))
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q @ k.mT * scale + bias).masked_fill(~mask, -torch.inf)
    top = scores.amax(-1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0.0)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    out = weights.to(low).to(accumulate) @ v / total.masked_fill(total == 0, 1.0)
    return out.transpose(1, 2).to(low), (top + total.log())[..., 0]


def assert_within_budget(actual: Tensor, exact: Tensor, low: Tensor, *, what: str = "out") -> None:
    """Worst error of `actual` at most twice that of `low`, the low-precision twin, plus two ulp.

    Infinities must agree exactly, and nothing may be NaN.
    """
    assert not actual.isnan().any(), f"{what} has {int(actual.isnan().sum())} NaN"
    finite = exact.isfinite()
    assert torch.equal(finite, actual.isfinite()), f"{what}: infinities differ from the reference"
    if not finite.any():
        return
    exact, low, got = exact[finite].double(), low[finite].double(), actual[finite].double()
    ulp = torch.finfo(actual.dtype).eps * exact.abs().max()
    budget = 2 * (low - exact).abs().max() + 2 * ulp
    worst = (got - exact).abs().max()
    assert worst <= budget, f"{what}: error {worst:.3g}, the budget is {budget:.3g}"


def dense_bias(bias: Bias, plan: BlockPlan) -> Tensor:
    """What is added to every score, [B or 1, H or 1, Sq, Sk] in fp64; 0 for queries in no tile."""
    blocks = []
    for tile, (q0, qn) in enumerate(zip(plan.q_start.tolist(), plan.q_count.tolist(), strict=True)):
        block = bias.block(tile, slice(q0, q0 + qn), slice(None)).double()
        blocks.append(block.expand(*block.shape[:2], qn, -1))
    dense = blocks[0].new_zeros(*blocks[0].shape[:2], plan.length_q, plan.length_k)
    for block, q0 in zip(blocks, plan.q_start.tolist(), strict=True):
        dense[:, :, q0 : q0 + block.shape[2]] = block
    return dense


def check_attention(
    forward, q, k, v, plan: BlockPlan, scale: float, bias: Bias | None = None
) -> None:
    """Compare `forward(q, k, v, plan, scale, return_lse[, bias])` with the exact result, NaN in fresh memory."""
    mask = plan_mask(plan, q.shape[0], q.shape[2])
    added = () if bias is None else (bias,)
    dense = dense_bias(bias, plan) if bias is not None else 0.0
    exact = dense_attention(
        q.double(), k.double(), v.double(), mask, scale, accumulate=torch.float64, bias=dense
    )
    dense = dense.float() if isinstance(dense, Tensor) else dense
    low = dense_attention(q, k, v, mask, scale, accumulate=torch.float32, bias=dense)
    with poisoned_memory():
        out, lse = forward(q, k, v, plan, scale, True, *added)
        alone, nothing = forward(q, k, v, plan, scale, False, *added)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    assert (lse.shape, lse.dtype) == ((q.shape[0], q.shape[2], q.shape[1]), torch.float32)
    assert_within_budget(out, exact[0], low[0])
    assert_within_budget(lse, exact[1], low[1], what="lse")
    assert nothing is None
    assert torch.equal(out, alone), "the output depends on whether the lse is asked for"


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Every torch.empty in the block holds NaN (or the largest integer), so that gaps show."""

    @torch.no_grad()  # compilers allocate leaves that require gradients
    def poison(x: Tensor) -> Tensor:
        if x.is_floating_point():
            return x.fill_(torch.nan)
        return x if x.dtype in (torch.bool, torch.uint8) else x.fill_(torch.iinfo(x.dtype).max)

    def poisoned(allocate):
        return lambda *args, **kwargs: poison(allocate(*args, **kwargs))

    with (
        mock.patch.object(torch, "empty", poisoned(torch.empty)),
        mock.patch.object(torch, "empty_like", poisoned(torch.empty_like)),
        mock.patch.object(Tensor, "new_empty", poisoned(Tensor.new_empty)),
    ):
        yield


def check_traced(how: str, module: nn.Module, x: Tensor) -> None:
    """The output and the gradients of parameters are those of the module itself.

    how: "aot_eager", "inductor" (torch.compile without a graph break), "script", "fx" or "export" (output alone).
    """
    if how == "script":
        traced = torch.jit.script(module)
    elif how == "fx":
        traced = torch.fx.symbolic_trace(module)
    elif how == "export":
        traced = torch.export.export(module, (x,)).module()
    else:
        traced = torch.compile(module, fullgraph=True, backend=how)
    torch.testing.assert_close(traced(x), module(x))
    if how != "export":
        weights = list(module.parameters())
        got, expected = (
            torch.autograd.grad(run(x).square().sum(), weights) for run in (traced, module)
        )
        torch.testing.assert_close(got, expected)


# What training keeps --------------------------------------------------------------------------------


@contextmanager
def saved_for_backward() -> Iterator[list[Tensor]]:
    """Yields a list that gets every tensor which autograd keeps in the block."""
    saved = []

    def keep(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        yield saved


def memory_of(tensors: list[Tensor]) -> int:
    """Bytes below these tensors, those that several of them share once."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


# Plans that no planner would make ------------------------------------------------------------------


def random_plan(
    seed: int,
    *,
    length_q: int,
    length_k: int,
    block_q: int,
    block_k: int,
    kind: str = "intervals",
    axes: int = 2,
    tables: int = 1,
    variants: int = 1,
    ragged: bool = True,
    full: float = 0.3,
    partial: float = 0.3,
    device: torch.device | str = "cpu",
) -> BlockPlan:
    """A plan with random cuts, lists and masks.

    kind: "intervals" or "bits". ragged: tiles and entries end anywhere, else only at whole blocks.
    full, partial: the shares of all key runs in either list; the rest is not visited.
    """
    g = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(low, high, shape, generator=g, dtype=torch.int32)

    def cut(length: int, block: int) -> tuple[list[int], list[int]]:
        starts, counts, at = [], [], 0
        while at < length:
            count = int(integers(1, block + 1, (1,))) if ragged else block
            starts.append(at)
            counts.append(min(count, length - at))
            at += counts[-1]
        return starts, counts

    q_start, q_count = cut(length_q, block_q)
    lists = {name: ([0], [], []) for name in ("full", "partial")}  # offset, start, count
    for _ in range(variants * len(q_start)):
        for start, count in zip(*cut(length_k, block_k), strict=True):
            draw = float(torch.rand((), generator=g))
            if draw < full + partial:
                entries = lists["full" if draw < full else "partial"]
                entries[1].append(start)
                entries[2].append(count)
        for offset, start, _ in lists.values():
            offset.append(len(start))
    n = len(lists["partial"][1])
    mask = None
    if n and kind == "intervals":
        lo = integers(-1, 5, (tables, axes, length_q))
        mask = IntervalMask(
            lo=lo,
            hi=lo + integers(0, 6, (tables, axes, length_q)),
            coord=integers(0, 6, (axes, length_k)),
            table=integers(0, tables, (n,)),
        )
    elif n:
        words = (n, block_q, -(-block_k // 32))
        mask = BitMask(
            bits=integers(-(2**31), 2**31 - 1, words) & integers(-(2**31), 2**31 - 1, words)
        )
    variant = None
    if variants > 1:
        variant = torch.arange(variants, dtype=torch.int32)[None]  # one for every head

    def entries_of(name: str) -> Entries:
        offset, start, count = (torch.tensor(x, dtype=torch.int32) for x in lists[name])
        return Entries(offset=offset, start=start, count=count)

    plan = BlockPlan(
        length_q=length_q, length_k=length_k, block_q=block_q, block_k=block_k,
        q_start=torch.tensor(q_start, dtype=torch.int32),
        q_count=torch.tensor(q_count, dtype=torch.int32),
        full=entries_of("full"), partial=entries_of("partial"),
        mask=mask, variant=variant, variants=variants,
    )  # fmt: skip
    return plan.to(device)


def group_plan(seed: int, mixed: bool) -> BlockPlan:
    """Entries of which every group of 64 queries sees all or nothing, `mixed`: some of them with random bits besides."""
    plan = random_plan(
        seed, length_q=700, length_k=896, block_q=192, block_k=128, kind="bits", ragged=False
    )
    assert isinstance(plan.mask, BitMask)
    g = torch.Generator().manual_seed(seed)
    kinds = torch.randint(2 + mixed, (plan.mask.bits.shape[0], 3), generator=g)
    kinds = kinds.repeat_interleave(64, 1)[..., None]  # [entries, 192, 1]
    bits = torch.where(kinds == 2, plan.mask.bits, -(kinds == 1).int())
    return replace(plan, mask=BitMask(bits=bits.int()))


def random_bias(
    kind: str,
    plan: BlockPlan,
    *,
    batch: int = 1,
    heads: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Bias:
    """A bias that outweighs the scores of random inputs. kind: "relative", where some pairs lie outside the
    table, or "block"."""
    g = torch.Generator().manual_seed(0)
    if kind == "block":
        rows = torch.randn(batch, heads, plan.tiles, plan.length_k, generator=g)
        return BlockBias((3 * rows).to(plan.device, dtype))
    q_index, k_index = (
        torch.randint(0, 40, (n,), generator=g, dtype=torch.int32)
        for n in (plan.length_q, plan.length_k)
    )
    k_index[::7] = 2**29  # tokens without a position
    table = 3 * torch.randn(heads, 50, generator=g)
    return RelativeBias(
        table.to(plan.device, dtype), q_index.to(plan.device), k_index.to(plan.device)
    )


# Compilation for a GPU that is not there -----------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class KernelReport:
    """registers, spills (bytes stored) are None where no assembler tells (AMD).

    serialized: the assembler gave up overlapping wgmma with other work.
    """

    shared: int
    registers: int | None
    spills: int | None
    serialized: bool = False
    assembly: str


@contextmanager
def compile_target(backend: str, arch: int | str) -> Iterator[None]:
    """Inside, `kernel.warmup(...)` of Triton compiles for this GPU, which need not be there.

    backend "cuda" with arch 80, 90, ...; "hip" with "gfx942", ...
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    target = GPUTarget(backend, arch, 64 if str(arch).startswith("gfx9") else 32)
    stand_in = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: f"{backend}:{arch}",  # kernels are cached by it
        get_current_stream=lambda device=None: 0,
        get_active_torch_device=lambda: torch.device("cpu"),
    )
    with mock.patch.object(driver, "_active", stand_in):
        yield


def kernel_report(kernel) -> KernelReport:
    """What a compiled Triton kernel needs; ptxas is the one that Triton brings along."""
    if "amdgcn" in kernel.asm:
        return KernelReport(
            shared=kernel.metadata.shared,
            registers=None,
            spills=None,
            assembly=kernel.asm["amdgcn"],
        )
    from triton.backends.nvidia.compiler import get_ptxas

    arch = _found(r"\.target (sm_\w+)", kernel.asm["ptx"])
    ptxas = get_ptxas(int(_found(r"sm_(\d+)", arch))).path  # newer GPUs have another
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(kernel.asm["ptx"])
        log = subprocess.run(
            [ptxas, "-v", f"--gpu-name={arch}", str(source), "-o", str(source.with_suffix(".cubin"))],
            capture_output=True, text=True, check=True,
        ).stderr  # fmt: skip
    return KernelReport(
        serialized="serialized" in log,
        shared=kernel.metadata.shared,
        registers=int(_found(r"Used (\d+) registers", log)),
        spills=int(_found(r"(\d+) bytes spill stores", log)),
        assembly=kernel.asm["ptx"],
    )


def _found(pattern: str, text: str) -> str:
    """The group of the first match; the message shows the text where a new ptxas writes another one."""
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"{pattern!r} does not occur in:\n{text[:2000]}")
    return match[1]
