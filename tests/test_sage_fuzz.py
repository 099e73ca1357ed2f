"""Ten thousand odd inputs: nothing finite may become NaN or infinite, and weighted means stay among the values.

Emulated and in Triton's interpreter one by one, and through the kernels of a GPU many at once. As a script, the
latter: `python tests/test_sage_fuzz.py`. Kernels, which cannot look at the numbers without waiting for the GPU,
promise it for scores up to 2^30 and values up to 2^60. A result may be NaN where PyTorch's
own attention, computed in fp32, is."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from visionfuse.kernels.attention.precision import NAMES, SCALES
from visionfuse.sage import sage_attention

KINDS = (
    "normal",
    "zeros",
    "constant",
    "huge",
    "tiny",
    "denormal",
    "one channel",
    "rows",
    "signs",
    "offset",
)
INTERPRETED = (
    "int8",
    "int4+smooth_q",
    "int8_fp16-smooth_k+smooth_q",
    "int8_fp16+smooth_v",
    "int8+k_token",
    "int8+k_thread",
)
LOSSY = [name for name in NAMES if name != "model"]


@dataclass
class Case:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None
    is_causal: bool
    precision: str
    kinds: tuple[str, ...]

    def __str__(self) -> str:
        mask = None if self.mask is None else tuple(self.mask.shape)
        return (
            f"{self.kinds}, q {tuple(self.q.shape)}, k {tuple(self.k.shape)}, {self.q.dtype}, mask {mask}, "
            f"causal {self.is_causal}, {self.precision}"
        )


KERNEL_MOST = 2.0**60
# Of queries and keys on a GPU: a score of 2^30 less the rounded largest one, in one instruction, is no longer near 0.
SCORED_MOST = 2.0**13


def numbers(kind: str, shape, dtype, g, most: float) -> torch.Tensor:
    x = torch.randn(shape, generator=g, device=g.device)
    top, least = min(most, torch.finfo(dtype).max), torch.finfo(dtype).smallest_normal
    size = x.new_ones(())
    match kind:
        case "zeros":
            x = torch.zeros_like(x)
        case "constant":
            x = torch.full_like(x, 3.7)
        case "huge":
            size = size * top
        case "tiny":
            size = size * (8 * least)
        case "denormal":
            size = size * (least / 16)
        case "one channel":
            x[..., 1:] = 0.0
        case "rows":  # of all magnitudes
            low, high = torch.tensor([least, top]).log2().tolist()
            exponent = torch.rand(shape[:-1], generator=g, device=g.device) * (high - low) + low
            size = torch.exp2(exponent)[..., None]
        case "signs":
            x, size = x.sign(), size * top
        case "offset":
            x[..., 0] += 1000.0
    unit = kind in ("huge", "tiny", "denormal", "rows", "signs")
    return (x.clamp(-1, 1) * size if unit else x).clamp(-top, top).to(dtype)


def case(seed: int, impl: str) -> Case:
    most = torch.inf if impl == "blocks" else KERNEL_MOST
    g = torch.Generator().manual_seed(seed)

    def one_of(choices):
        return choices[int(torch.randint(len(choices), (), generator=g))]

    dtype = one_of((torch.float32, torch.bfloat16, torch.float16))
    group, kv_heads, batch = one_of((1, 2)), one_of((1, 2)), one_of((1, 2))
    length_q, length_k = one_of((1, 2, 17, 40, 130)), one_of((1, 3, 16, 33, 129, 150))
    dim = one_of((16, 24, 64))
    kinds = tuple(one_of(KINDS) for _ in range(3))
    shape = (batch, kv_heads, length_k, dim)
    q = numbers(kinds[0], (batch, kv_heads * group, length_q, dim), dtype, g, most)
    k, v = (numbers(kind, shape, dtype, g, most) for kind in kinds[1:])
    if one_of((False, True)):  # a part of everything is zero
        for x in (q, k, v):
            x[:, :, int(torch.randint(x.shape[2], (), generator=g))] = 0.0
            x[..., int(torch.randint(dim, (), generator=g))] = 0.0
    mask = None
    match one_of(("none", "none", "random", "padding")):
        case "random":
            mask = torch.rand(length_q, length_k, generator=g) < 0.4
        case "padding":
            ends = torch.randint(0, length_k + 1, (batch, 1, 1, 1), generator=g)
            mask = torch.arange(length_k) < ends
    precision = one_of(LOSSY)
    if not precision.startswith("model"):
        precision += one_of(("", "-smooth_k")) + one_of(("", "+smooth_q"))
    if precision.split("+")[0].split("-")[0] not in ("fp8_model", "int8", "int4"):
        precision += one_of(("", "+smooth_v"))
    if impl == "triton":  # its interpreter cannot round to FP8
        return Case(q, k, v, mask, one_of((False, True)), one_of(INTERPRETED), kinds)
    if not precision.startswith("model") and impl == "blocks":
        precision += f"+q_{one_of(list(SCALES))}+k_{one_of(list(SCALES))}"
    return Case(q, k, v, mask, one_of((False, False, True)), precision, kinds)


def problem(x: Case, impl: str, device: str) -> str:
    """What is wrong with the attention of a case; empty if nothing is."""
    q, k, v = (t.to(device) for t in (x.q, x.k, x.v))
    mask = None if x.mask is None else x.mask.to(device)
    out, lse = sage_attention(
        q, k, v, attn_mask=mask, is_causal=x.is_causal, precision=x.precision, return_lse=True,
        impl=impl,
    )  # fmt: skip
    lost = ~out.isfinite()
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=device)
    seen = seen.tril(k.shape[2] - q.shape[2]) if x.is_causal else seen
    seen = seen if mask is None else seen & mask
    if impl != "blocks" and bool(lost.any() | lse.isnan().any()):
        stock = F.scaled_dot_product_attention(
            q.float(), k.float(), v.float(), attn_mask=seen, enable_gqa=q.shape[1] != k.shape[1]
        )
        wrong = ~stock.isfinite().all(-1)
        lost, lse = lost & ~wrong[..., None], lse.masked_fill(wrong, 0.0)
        out = out.masked_fill(wrong[..., None], 0.0)
    if bool(lost.any()):
        return f"{int(lost.sum())} of {lost.numel()} outputs are NaN or infinite"
    if bool(lse.isnan().any()):
        return "the lse is NaN"
    group = q.shape[1] // k.shape[1]
    most = v.double().abs().amax(2, keepdim=True).repeat_interleave(group, 1)
    # Rounding of smoothed values adds to them, and numbers below 2^-100 are zeros.
    if bool((out.double().abs() > 1.3 * most + 2.0**-90).any()):
        return "an output is larger than all values"
    blind = ~seen.any(-1).expand(lse.shape)
    if bool(out[blind].any()) or bool((lse[blind] != -torch.inf).any()):
        return "a query without keys has an output"
    return ""


def failures(seeds: range, impl: str, device: str = "cpu") -> list[str]:
    found = []
    for seed in seeds:
        x = case(seed, impl)
        try:
            wrong = problem(x, impl, device)
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
        if wrong:
            found.append(f"case {seed}: {wrong}: {x}")
    return found


def test_odd_inputs():
    assert not failures(range(300), "blocks")


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_many_odd_inputs(part):
    assert not failures(range(1000 * part, 1000 * (part + 1)), "blocks")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels themselves run")
def test_odd_inputs_of_interpreted_kernels():
    """The prologue and the Triton kernel in Triton's interpreter."""
    pytest.importorskip("triton")
    assert not failures(range(150), "triton")


# Many at once, on a GPU ----------------------------------------------------------------------------

# A case is one head of one batch entry, whose queries, keys, values and mask are odd in ways of their own. Cases of
# one shape go through one call, so that nothing is compiled for a case, and a case that spoils others is found.
CALLS, BATCH, HEADS = 4, 5, 50  # of every family: 1,000 cases
INFINITE = 20  # one of so many cases holds an infinity or a NaN


@dataclass(frozen=True)
class Family:
    """Calls that share their compiled kernels. mask: "none", "causal", "padding" (keys of a batch entry, none of some) or
    "random" (pairs of a head, no keys for some queries)."""

    impl: str
    precision: str
    dtype: torch.dtype
    dim: int
    length_q: int
    length_k: int
    mask: str = "none"
    group: int = 1

    def __str__(self) -> str:
        size = f"{self.length_q}x{self.length_k}x{self.dim}"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.impl}-{self.precision}-{dtype}-{size}-{self.mask}-{self.group}"


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FAMILIES = (
    Family("gluon_sm90", "int8_fp8+k_thread", BF16, 128, 250, 391),
    Family("gluon_sm90", "int8_fp8", FP16, 128, 300, 300, "causal"),
    Family("gluon_sm90", "int8_fp8+k_thread", BF16, 64, 130, 391, "padding"),
    Family("gluon_sm90", "int8_fp8+k_thread", BF16, 128, 1, 1),
    Family("gluon_sm90", "int8_fp8+smooth_q+k_thread", BF16, 128, 130, 391, "random"),
    Family("gluon_sm90", "int4_fp8+smooth_q+smooth_v", FP16, 64, 250, 391),
    Family("gluon_sm90", "int8+k_thread", BF16, 128, 250, 391, group=2),
    Family("gluon_sm90", "fp8", FP32, 128, 1, 391, "padding"),
    Family("triton", "int8_fp8", BF16, 128, 130, 391, "random"),
    Family("triton", "int4+smooth_q", FP16, 64, 300, 300, "causal"),
    Family("triton", "fp8", BF16, 64, 250, 391, "padding"),
    Family("triton", "int8_fp16+smooth_v+k_thread", FP32, 64, 40, 129, group=2),
)


@dataclass(frozen=True)
class Call:
    """One call of a family. kinds: of q, k and v of every case, [B][H]; infinite: bool [B, H], cases that hold an
    infinity or a NaN; seen: bool [B or 1, H or 1, S_q, S_k], whether a query sees a key."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    seen: Tensor
    kinds: list[list[tuple[str, str, str]]]
    infinite: Tensor


def make(family: Family, seed: int, device: str, batch: int = BATCH, heads: int = HEADS) -> Call:
    g = torch.Generator(device).manual_seed(seed)
    shape_q = (batch, heads, family.length_q, family.dim)
    shape_k = (batch, heads // family.group, family.length_k, family.dim)
    picks = [torch.randint(len(KINDS), s[:2], generator=g, device=device).tolist()
             for s in (shape_q, shape_k, shape_k)]  # fmt: skip
    made = []
    limits = (SCORED_MOST, SCORED_MOST, KERNEL_MOST)
    for shape, own, most in zip((shape_q, shape_k, shape_k), picks, limits, strict=True):
        cases = [
            numbers(KINDS[kind], shape[2:], family.dtype, g, most) for row in own for kind in row
        ]
        made.append(torch.stack(cases).view(shape))
    kinds = [
        [tuple(KINDS[x[b][h // (1 if i == 0 else family.group)]] for i, x in enumerate(picks))
         for h in range(heads)] for b in range(batch)
    ]  # fmt: skip
    infinite = _spoil(made, family.group, g)
    mask, seen = _mask(family, batch, heads, g)
    return Call(*made, mask, seen, kinds, infinite)


def _spoil(made: list[Tensor], group: int, g: torch.Generator) -> Tensor:
    """Puts an infinity or a NaN into a token of some heads of keys, values or queries."""
    q = made[0]
    infinite = torch.zeros(q.shape[:2], dtype=torch.bool, device=q.device)
    heads = torch.rand(infinite.shape, generator=g, device=q.device) < 1 / INFINITE
    for i, (b, h) in enumerate(heads.nonzero().tolist()):
        x = made[i % 3]
        own = h if i % 3 == 0 else h // group
        x[b, own, i % x.shape[2], i % x.shape[3]] = (torch.inf, -torch.inf, torch.nan)[i // 3 % 3]
        first = h if i % 3 == 0 else own * group
        infinite[b, first : first + (1 if i % 3 == 0 else group)] = True
    return infinite


def _mask(
    family: Family, batch: int, heads: int, g: torch.Generator
) -> tuple[Tensor | None, Tensor]:
    device, lengths = g.device, (family.length_q, family.length_k)
    if family.mask == "padding":
        ends = torch.randint(0, family.length_k + 1, (batch, 1, 1, 1), generator=g, device=device)
        ends[0] = 0
        mask = torch.arange(family.length_k, device=device) < ends
        return mask, mask.expand(batch, 1, *lengths)
    if family.mask == "random":
        share = torch.rand(batch, heads, 1, 1, generator=g, device=device)
        mask = torch.rand(batch, heads, *lengths, generator=g, device=device) < share
        mask[:, :, ::17] = False
        return mask, mask
    seen = torch.ones(1, 1, *lengths, dtype=torch.bool, device=device)
    if family.mask == "causal":
        seen = seen.tril(lengths[1] - lengths[0])
    return None, seen


def attend(family: Family, x: Call) -> tuple[Tensor, Tensor]:
    found = sage_attention(
        x.q, x.k, x.v, attn_mask=x.mask, is_causal=family.mask == "causal", precision=family.precision,
        return_lse=True, impl=family.impl,
    )  # fmt: skip
    assert isinstance(found, tuple)
    return found


def problems(family: Family, x: Call, out: Tensor, lse: Tensor) -> list[str]:
    """What is wrong with which case of a call; an infinity or a NaN may spoil its own head, and no other one."""
    finite = ~x.infinite[..., None]
    lost = (~out.isfinite()).any(-1) & finite  # [B, H, Sq]
    unknown = lse.isnan() & finite
    if bool((lost | unknown).any()):  # PyTorch's own attention in fp32 may have lost as much
        k, v = (t.float().repeat_interleave(family.group, 1) for t in (x.k, x.v))
        stock = F.scaled_dot_product_attention(x.q.float(), k, v, attn_mask=x.seen)
        excused = ~stock.isfinite().all(-1) & x.seen.any(-1)
        lost, unknown = lost & ~excused, unknown & ~excused
        finite = finite & ~excused
    most = x.v.double().abs().amax((2, 3)).repeat_interleave(family.group, 1)[..., None]
    # Rounding of smoothed values adds to them, and numbers below 2^-100 are zeros.
    large = (out.double().abs().amax(-1) > 1.3 * most + 2.0**-90) & finite
    blind = ~x.seen.any(-1).expand(lse.shape) & finite
    seeing = blind & (out.ne(0).any(-1) | (lse != -torch.inf))
    found = []
    for what, rows in (
        ("NaN or infinite", lost), ("an unknown lse", unknown), ("larger than all values", large),
        ("an output without keys", seeing),
    ):  # fmt: skip
        for b, h in rows.any(-1).nonzero().tolist():
            found.append(f"{what}: {x.kinds[b][h]}, batch entry {b}, head {h} of {family}")
    return found


def run(family: Family, device: str, calls: int = CALLS, **size: int) -> tuple[int, list[str]]:
    """How many cases there were, and what was wrong."""
    count, found = 0, []
    for seed in range(calls):
        x = make(family, seed, device, **size)
        found += problems(family, x, *attend(family, x))
        count += x.infinite.numel()
    return count, found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_odd_inputs_of_kernels(family):
    major, minor = torch.cuda.get_device_capability()
    if (family.impl == "gluon_sm90" and major != 9) or (major, minor) < (8, 9):
        pytest.skip("this GPU has no such kernel")
    count, found = run(family, "cuda")
    assert count == 1000
    assert not found


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels themselves run")
@pytest.mark.parametrize("mask", ["none", "causal", "padding", "random"])
def test_what_would_be_found(mask):
    """Exact attention has no problem; a NaN, a number from nowhere and an output without keys are told."""
    family = Family("blocks", "model", FP32, 16, 20, 20, mask, group=2)
    x = make(family, 0, "cpu", batch=2, heads=20)
    out, lse = attend(family, x)
    assert problems(family, x, out, lse) == []
    b, h = (~x.infinite).nonzero()[-1].tolist()
    row = int(x.seen.expand(2, 20, 20, 20)[b, h].any(-1).nonzero()[-1])
    for number, what in ((torch.nan, "NaN"), (1e30, "larger")):
        spoiled = out.clone()
        spoiled[b, h, row, 3] = number
        (found,) = problems(family, x, spoiled, lse)
        assert what in found
    if mask == "random":
        spoiled = out.clone()
        spoiled[b, h, 17, 3] = 1e-9
        assert "without keys" in " ".join(problems(family, x, spoiled, lse))


def main() -> int:
    if not torch.cuda.is_available():
        print("No GPU is here; tests/test_sage_fuzz.py has the emulation.")
        return 1
    total, wrong = 0, []
    for family in FAMILIES:
        count, found = run(family, "cuda")
        print(f"{count - len(found)} of {count}: {family}", flush=True)
        total, wrong = total + count, wrong + found
    print("\n".join(wrong[:40]))
    print(f"{total - len(wrong)} of {total} cases pass on {torch.cuda.get_device_name()}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
