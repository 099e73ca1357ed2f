"""NeighborhoodAttention1D, 2D, 3D: names, arguments and results of NATTEN's modules, old and new."""

from __future__ import annotations

import pytest
import torch

from visionfuse.neighborhood import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
)

MODULES = {1: NeighborhoodAttention1D, 2: NeighborhoodAttention2D, 3: NeighborhoodAttention3D}
GRIDS = {1: (17,), 2: (9, 11), 3: (5, 6, 7)}


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_state_dict(rank):
    module = MODULES[rank](32, 4, kernel_size=3, rel_pos_bias=True)
    shapes = {name: tuple(x.shape) for name, x in module.state_dict().items()}
    assert shapes == {
        "qkv.weight": (96, 32), "qkv.bias": (96,), "proj.weight": (32, 32), "proj.bias": (32,),
        "rpb": (4, *(5,) * rank),
    }  # fmt: skip
    plain = MODULES[rank](32, 4, 3, 1, 1, False, False)  # NATTEN's order of arguments
    assert set(plain.state_dict()) == {"qkv.weight", "proj.weight", "proj.bias"}


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"dilation": 2}, {"stride": 2, "is_causal": True}])
def test_forward_and_backward(rank, options):
    torch.manual_seed(0)
    module = MODULES[rank](
        32, 4, kernel_size=3 if options.get("dilation") is None else 2, **options
    )
    x = torch.randn(2, *GRIDS[rank], 32, requires_grad=True)
    out = module(x)
    assert out.shape == x.shape
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    # Tokens that no window of a query holds do not change it.
    changed = x.detach().clone()
    changed[(0, *(-1,) * rank)] += 1.0
    corner = (0, *(0,) * rank)
    assert torch.equal(module(changed)[corner], out[corner])


def start_and_bias(i: int, length: int, kernel: int, dilation: int) -> tuple[int, int]:
    """First key of query i and its column in rpb, as the CUDA code of NATTEN 0.14 to 0.17 computes them."""
    half = kernel // 2
    if dilation == 1:
        start = max(i - half, 0) + (length - i - half - 1 if i + half >= length else 0)
        bias = (
            half
            + (half - i if i < half else 0)
            + (length - i - 1 - half if i + half >= length else 0)
        )
        return start, bias
    if i - half * dilation < 0:
        return i % dilation, kernel - 1 - i // dilation
    if i + half * dilation >= length:
        residue = i % dilation
        aligned = length // dilation * dilation
        last = length - aligned
        bias = (length - i - 1) // dilation
        if residue < last:
            return length - last + residue - 2 * half * dilation, bias
        return aligned + residue - kernel * dilation, bias
    return i - half * dilation, half


@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (5, 1), (3, 2), (3, 3)])
def test_relative_positions_are_those_of_the_old_kernels(kernel, dilation):
    """Query by query, with the rules for borders written as they were."""
    torch.manual_seed(0)
    height, width = 11, 10
    module = NeighborhoodAttention2D(8, 2, kernel, dilation=dilation, rel_pos_bias=True).double()
    x = torch.randn(1, height, width, 8, dtype=torch.float64)
    q, k, v = module.qkv(x)[0].unflatten(-1, (3, 2, 4)).unbind(-3)  # [H, W, heads, 4]
    out = torch.zeros_like(q)
    for i in range(height):
        for j in range(width):
            (a, pa), (b, pb) = (start_and_bias(n, size, kernel, dilation)
                                for n, size in ((i, height), (j, width)))  # fmt: skip
            rows = torch.arange(kernel) * dilation + a
            columns = torch.arange(kernel) * dilation + b
            keys, values = (y[rows][:, columns] for y in (k, v))  # [K, K, heads, 4]
            scores = torch.einsum("hd,abhd->hab", q[i, j], keys) * module.scale
            scores = scores + module.rpb[:, pa : pa + kernel, pb : pb + kernel]
            weights = scores.flatten(1).softmax(-1).view_as(scores)
            out[i, j] = torch.einsum("hab,abhd->hd", weights, values)
    torch.testing.assert_close(module(x), module.proj(out.flatten(-2))[None])


def test_arguments_of_other_versions():
    torch.manual_seed(0)
    module = NeighborhoodAttention2D(
        32, kernel_size=[3, 5], num_heads=2, dilation=None, rel_pos_bias=True, attn_drop=0.0
    )
    assert (module.kernel_size, module.dilation, module.scale) == ((3, 5), (1, 1), 0.25)
    assert "kernel_size=(3, 5)" in repr(module)
    assert NeighborhoodAttention2D(32, 2, 3, qk_scale=0.5).scale == 0.5
    x = torch.randn(1, 8, 9, 32)
    torch.testing.assert_close(torch.jit.script(module)(x), module(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "must divide"),
        ({"attn_drop": 0.1}, "no dropout"),
        ({"kernel_size": None, "rel_pos_bias": True}, "for every axis"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        NeighborhoodAttention2D(**({"embed_dim": 32, "num_heads": 2, "kernel_size": 3} | options))


def test_wrong_rank_is_refused():
    with pytest.raises(ValueError, match="2 axes of tokens"):
        NeighborhoodAttention2D(32, 2, 3)(torch.zeros(1, 9, 32))
