"""Ten thousand odd inputs: nothing finite may become NaN or infinite, and weighted means stay among the values.

As a script, on whatever device there is: `python tests/test_sage_fuzz.py 1000`. Kernels, which cannot look at
the numbers without waiting for the GPU, promise it up to 2^60; past it sums of keys and products of scales leave
fp32. A result may be NaN where PyTorch's own attention, computed in fp32, is."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

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


def numbers(kind: str, shape, dtype, g, most: float) -> torch.Tensor:
    x = torch.randn(shape, generator=g)
    top, least = min(most, torch.finfo(dtype).max), torch.finfo(dtype).smallest_normal
    size = torch.ones(())
    match kind:
        case "zeros":
            x = torch.zeros(shape)
        case "constant":
            x = torch.full(shape, 3.7)
        case "huge":
            size = torch.tensor(top)
        case "tiny":
            size = torch.tensor(8 * least)
        case "denormal":
            size = torch.tensor(least / 16)
        case "one channel":
            x[..., 1:] = 0.0
        case "rows":  # of all magnitudes
            low, high = torch.tensor([least, top]).log2().tolist()
            size = torch.exp2(torch.rand(shape[:-1], generator=g) * (high - low) + low)[..., None]
        case "signs":
            x, size = x.sign(), torch.tensor(top)
        case "offset":
            x[..., 0] += 1000.0
    return (x.clamp(-1, 1) * size if size.dim() or size != 1 else x).clamp(-top, top).to(dtype)


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
def test_odd_inputs_of_kernels():
    """On the GPU that there is, or the prologue and the Triton kernel in Triton's interpreter."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        assert not failures(range(1000), "auto", "cuda")
    else:
        assert not failures(range(150), "triton")


if __name__ == "__main__":
    count, (impl, device) = int(sys.argv[1]), ("blocks", "cpu")
    if torch.cuda.is_available():
        impl, device = "auto", "cuda"
    wrong = failures(range(count), impl, device)
    print("\n".join(wrong[:40]))
    print(f"{count - len(wrong)} of {count} cases pass: impl {impl} on {device}")
    sys.exit(bool(wrong))
