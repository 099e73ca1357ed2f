"""neighborhood_attention against the rule, pair by pair, in float64: values, lse and gradients."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visionfuse.kernels.attention import UnsupportedError
from visionfuse.kernels.plan import Neighborhood, neighborhood_mask
from visionfuse.neighborhood import api, neighborhood_attention
from visionfuse.testing import assert_within_budget

pytestmark = pytest.mark.filterwarnings("ignore:window=:UserWarning")


def fitting(grid, window, stride=1, dilation=1, causal=False) -> Neighborhood:
    """What clamping makes of parameters that reach beyond the grid."""
    axes = [
        x if isinstance(x, tuple) else (x,) * len(grid) for x in (window, stride, dilation, causal)
    ]
    found = []
    for n, w, s, d, c in zip(grid, *axes, strict=True):
        d = min(d, n)
        w = n // d if w is None else min(w, n // d)
        found.append((w, min(s, w), d, c))
    window, stride, dilation, causal = zip(*found, strict=True)
    return Neighborhood(window=window, stride=stride, dilation=dilation, causal=causal)


def reference(q, k, v, specs, *, extra_kv=None, extra_q=None, bias=None, scale=None):
    """All pairs under the mask of every head; ((grid out, extra out), (grid lse, extra lse)) in q's dtype.

    specs: one neighborhood, or a list with one for every head.
    """
    _, *grid, heads, dim = q.shape
    tokens = q[0, ..., 0, 0].numel()
    specs = specs if isinstance(specs, list) else [specs] * heads
    mask = torch.stack([neighborhood_mask(s.resolve(tuple(grid))) for s in specs])  # [H, S, S]
    added = torch.zeros_like(mask, dtype=q.dtype)
    if bias is not None:
        relative = torch.zeros(tokens, tokens, dtype=torch.long)
        for axis, (n, size) in enumerate(zip(grid, bias.shape[1:], strict=True)):
            d = specs[0].resolve(tuple(grid)).dilation[axis]
            at = torch.arange(n).view([-1 if a == axis else 1 for a in range(len(grid))])
            at = at.expand(grid).flatten() // d
            relative = relative * size + (at[None] - at[:, None] + size // 2).clamp(0, size - 1)
        added = bias.flatten(1)[:, relative]
    q, k, v = (x.flatten(1, len(grid)) for x in (q, k, v))
    if extra_kv is not None:
        k, v = torch.cat([k, extra_kv[0]], 1), torch.cat([v, extra_kv[1]], 1)
        more = k.shape[1] - tokens
        added = torch.nn.functional.pad(added, (0, more))
        mask = torch.nn.functional.pad(mask, (0, more), value=True)
        if extra_q is not None:
            q = torch.cat([q, extra_q], 1)
            added = torch.nn.functional.pad(added, (0, 0, 0, more))
            mask = torch.nn.functional.pad(mask, (0, 0, 0, more), value=True)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    scores = (q @ k.mT * (dim**-0.5 if scale is None else scale) + added).masked_fill(
        ~mask, -torch.inf
    )
    out, lse = (scores.softmax(-1) @ v).transpose(1, 2), scores.logsumexp(-1).transpose(1, 2)
    pairs = [(x[:, :tokens].unflatten(1, grid), x[:, tokens:]) for x in (out, lse)]
    return pairs if extra_q is not None else [x[0] for x in pairs]


def random_call(seed: int, rank: int):
    """Parameters and options, everything that the function takes, on a grid small enough to write out."""
    g = torch.Generator().manual_seed(seed)
    pick = lambda low, high: int(torch.randint(low, high + 1, (), generator=g))
    draw = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)
    largest = {1: 60, 2: 14, 3: 7}[rank]
    grid = tuple(1 if pick(0, 9) == 0 else pick(2, largest) for _ in range(rank))

    def parameters(dilation):
        window = tuple(None if pick(0, 7) == 0 else pick(1, n + 2) for n in grid)
        stride = tuple(pick(1, w or n) for w, n in zip(window, grid, strict=True))
        return window, stride, dilation, tuple(pick(0, 2) == 0 for _ in grid)

    kv_heads, group = pick(1, 2), pick(1, 3)
    heads, dim, batch = kv_heads * group, (8, 24, 40)[pick(0, 2)], pick(1, 2)
    dilation = tuple(pick(1, max(n // 2, 1)) for n in grid)
    if heads > 1 and pick(0, 3) == 0:
        by_head = [parameters(dilation) for _ in range(heads)]
        arguments = [list(each) for each in zip(*by_head, strict=True)]
        specs = [fitting(grid, *each) for each in by_head]
    else:
        arguments = parameters(dilation)
        specs = fitting(grid, *arguments)
    options, extra = {}, pick(0, 3)
    if extra and pick(0, 1):
        options["extra_kv"] = (draw(batch, extra, kv_heads, dim), draw(batch, extra, kv_heads, dim))
        if pick(0, 1):
            options["extra_q"] = draw(batch, extra, heads, dim)
    if pick(0, 2) == 0:
        options["bias"] = draw(heads, *[2 * (n + 2) - 1 for n in grid])
    if pick(0, 3) == 0:
        options["scale"] = 0.3
    q, k, v = (draw(batch, *grid, h, dim) for h in (heads, kv_heads, kv_heads))
    return (q, k, v), arguments, specs, options


def leaves(tensors, options):
    found = [*tensors, options.get("extra_q"), options.get("bias"), *options.get("extra_kv", ())]
    return [x.requires_grad_() for x in found if x is not None]


def check(seed: int, rank: int, gradients: bool):
    tensors, arguments, specs, options = random_call(seed, rank)
    inputs = leaves(tensors, options) if gradients else []
    ours = neighborhood_attention(*tensors, *arguments, return_lse=True, **options)
    theirs = reference(*tensors, specs, **options)
    flat = lambda x: [y for z in x for y in (z if isinstance(z, tuple) else (z,))]
    for a, b, tolerance in zip(flat(ours[:1]), flat(theirs[:1]), (1e-10, 1e-10), strict=False):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=0, msg=f"{seed=} {arguments}")
    for a, b in zip(flat(ours[1:]), flat(theirs[1:]), strict=True):
        torch.testing.assert_close(
            a.double(), b, atol=1e-4, rtol=0, msg=f"lse of {seed=} {arguments}"
        )
    if gradients:
        weights = [torch.randn_like(x) for x in flat(theirs[:1])]
        grads = [
            torch.autograd.grad(
                sum((x * w).sum() for x, w in zip(flat(out), weights, strict=True)), inputs
            )
            for out in (ours[:1], theirs[:1])
        ]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(
                a, b, atol=1e-9, rtol=0, msg=f"gradient of {seed=} {arguments}"
            )


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_agrees_with_the_rule(rank):
    for seed in range(30):
        check(seed, rank, gradients=seed % 3 == 0)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_agrees_with_the_rule_in_500_cases(rank):
    for seed in range(1000, 1500):
        check(seed, rank, gradients=seed % 5 == 0)


@given(
    window=st.integers(1, 9), stride=st.integers(1, 4), dilation=st.integers(1, 3), causal=st.booleans(),
    grid=st.tuples(st.integers(1, 12), st.integers(1, 12)),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_weights_are_those_of_the_window(window, stride, dilation, causal, grid):
    """Keys that are orthogonal to all queries weigh the same, so values that count keys show the window."""
    stride = min(stride, window)
    tokens = grid[0] * grid[1]
    q = torch.zeros(1, *grid, 1, tokens, dtype=torch.float64)
    v = torch.eye(tokens, dtype=torch.float64).view(1, *grid, 1, tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out, lse = neighborhood_attention(
            q, q, v, window, stride, dilation, causal, return_lse=True
        )
    mask = neighborhood_mask(fitting(grid, window, stride, dilation, causal).resolve(grid))
    seen = mask.double() / mask.sum(1, keepdim=True)
    torch.testing.assert_close(out.reshape(tokens, tokens), seen)
    torch.testing.assert_close(lse.flatten().exp(), mask.sum(1).float())


@pytest.mark.parametrize("options", [{}, {"dilation": 2}, {"causal": (True, False), "stride": 2}])
def test_gradcheck(options):
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64, requires_grad=True)
    q, k, v = draw(1, 6, 7, 2, 3), draw(1, 6, 7, 1, 3), draw(1, 6, 7, 1, 3)
    extra, table = draw(1, 2, 1, 3), draw(2, 5, 5)

    def call(q, k, v, extra, table):
        return neighborhood_attention(q, k, v, 3, extra_kv=(extra, extra), bias=table, **options)

    assert torch.autograd.gradcheck(call, (q, k, v, extra, table), fast_mode=True)


def test_the_lse_has_a_gradient():
    tensors, arguments, specs, options = random_call(5, 2)
    inputs = leaves(tensors, options)
    grads = [
        torch.autograd.grad(lse.double().sin().sum(), inputs, allow_unused=True)
        for lse in (
            neighborhood_attention(*tensors, *arguments, return_lse=True, **options)[1],
            reference(*tensors, specs, **options)[1],
        )
    ]
    for a, b in zip(*grads, strict=True):
        if b is not None:  # values have none
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_budgets_in_low_precision(dtype):
    """Twice the error of a dense attention in that dtype, out and gradients."""
    g = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(2, 9, 10, 2, 32, generator=g).to(dtype).requires_grad_() for _ in range(3)
    ]
    grad = torch.randn(2, 9, 10, 2, 32, generator=g).to(dtype)
    spec = Neighborhood(window=5, dilation=(1, 2))

    def results(attend, cast):
        inputs = [x.detach().to(cast).requires_grad_() for x in tensors]
        out = attend(*inputs)
        return [out, *torch.autograd.grad(out, inputs, grad.to(cast))]

    ours = results(lambda q, k, v: neighborhood_attention(q, k, v, 5, dilation=(1, 2)), dtype)
    dense = lambda q, k, v: reference(q, k, v, spec)[0]
    exact, low = results(dense, torch.float64), results(dense, dtype)
    for got, right, budget in zip(ours, exact, low, strict=True):
        assert got.dtype == dtype
        assert_within_budget(got.detach(), right.detach(), budget.detach())


def test_any_strides():
    """q, k, v as one linear layer leaves them, and a transposed grid."""
    g = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, 8, 9, 3, 2, 16, generator=g)
    q, k, v = qkv.unbind(3)
    expected = neighborhood_attention(*(x.contiguous() for x in (q, k, v)), 3)
    assert torch.equal(neighborhood_attention(q, k, v, 3), expected)
    turned = neighborhood_attention(*(x.transpose(1, 2) for x in (q, k, v)), 3)
    torch.testing.assert_close(turned.transpose(1, 2), expected)


def test_a_full_window_is_dense_attention():
    q, k, v = torch.randn(3, 2, 6, 7, 2, 16)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
    )
    out = neighborhood_attention(q, k, v, None)
    torch.testing.assert_close(out.flatten(1, 2), expected.transpose(1, 2))
    torch.testing.assert_close(neighborhood_attention(q, k, v, (6, None)), out)


def test_an_axis_of_one_token_changes_nothing():
    q, k, v = torch.randn(3, 2, 1, 6, 7, 2, 16)
    flat = neighborhood_attention(q[:, 0], k[:, 0], v[:, 0], 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is lost, so nothing to warn of
        assert torch.equal(neighborhood_attention(q, k, v, 5)[:, 0], flat)


def test_windows_beyond_the_grid_are_clamped_with_a_warning():
    q, k, v = torch.randn(3, 1, 5, 12, 1, 8)
    with pytest.warns(UserWarning, match=r"window=\(7, 7\).*beyond the grid \(5, 12\).*\(5, 7\)"):
        out = neighborhood_attention(q, k, v, 7)
    assert torch.equal(out, neighborhood_attention(q, k, v, (5, 7)))


@pytest.mark.parametrize("precision", ["fp8", "int8_fp8"])
def test_eight_bits(precision):
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 12, 12, 2, 64, generator=g)
    exact = neighborhood_attention(q, k, v, 7)
    out = neighborhood_attention(q, k, v, 7, precision=precision)
    error = (out - exact).abs().sum() / exact.abs().sum()
    assert 0.001 < error < 0.08


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("extra", [0, 3])
def test_shapes_alone_on_the_meta_device(extra, return_lse):
    def call(device):
        q, k, v = (torch.ones(2, 4, 6, heads, 8, device=device) for heads in (4, 2, 2))
        more = [torch.ones(2, extra, heads, 8, device=device) for heads in (4, 2, 2)]
        options: dict = {"extra_q": more[0], "extra_kv": (more[1], more[2])} if extra else {}
        found = neighborhood_attention(q, k, v, 3, return_lse=return_lse, **options)
        return torch.utils._pytree.tree_map(lambda x: (x.shape, x.dtype), found)

    assert call("meta") == call("cpu")


def test_plans_are_made_once():
    q, k, v = torch.randn(3, 1, 10, 11, 2, 8)
    plan = lambda **changes: api._plan(
        api._Call((10, 11), 0, False, 2, (5, 1, 1, False), "blocks", 8, "model", q.device)._replace(
            **changes
        )
    )
    neighborhood_attention(q, k, v, 5)
    assert plan() is plan()
    assert plan() is not plan(head_dim=16)
    neighborhood_attention(q, k, v, [3, 7])
    neighborhood_attention(q, k, v, [(3, 3), 7])


@pytest.mark.parametrize("options", [{}, {"dilation": 2}, {"stride": 2, "causal": True}])
def test_compiles_whole(options):
    torch._dynamo.reset()  # every size is a graph of its own

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(q, k, v, extra, table):
        return neighborhood_attention(
            q, k, v, 5, extra_kv=(extra, extra), bias=table, return_lse=True, **options
        )

    table = torch.randn(2, 9, 9)
    for side in (10, 12, 13):  # the second change of a size makes it symbolic
        q, k, v = torch.randn(3, 1, side, 12, 2, 16)
        extra = torch.randn(1, 3, 2, 16)
        expected = neighborhood_attention(
            q, k, v, 5, extra_kv=(extra, extra), bias=table, return_lse=True, **options
        )
        for a, b in zip(compiled(q, k, v, extra, table), expected, strict=True):
            torch.testing.assert_close(a, b)


BAD = [
    ({"window": (3, 3, 3)}, "has 3 values"),
    ({"window": 0}, "at least 1"),
    ({"dilation": 0}, "at least 1"),
    ({"window": 3, "stride": 4}, "stride=.4, 4. is larger"),
    ({"window": [3, 5, 7]}, "a list of 3 values for 2 heads|list has one for every"),
    ({"extra_kv": (torch.zeros(1, 2, 2, 8), torch.zeros(1, 3, 2, 8))}, "extra_kv must be"),
    ({"extra_q": torch.zeros(1, 2, 2, 8)}, "extra_kv, which is None"),
    ({"bias": torch.zeros(2, 3, 5)}, r"at least \(2, 5, 5\)"),
    ({"bias": torch.zeros(2, 6, 5)}, "odd size"),
    ({"bias": torch.zeros(2, 5)}, "odd size"),
    ({"bias": torch.zeros(1, 5, 5)}, "bias has 1 heads"),
    ({"bias": torch.zeros(2, 9, 9), "dilation": [1, 2]}, "one dilation"),
    ({"impl": "magic"}, "magic"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_parameters_are_refused(options, message):
    q = torch.zeros(1, 8, 8, 2, 8)
    with pytest.raises(ValueError, match=message):
        neighborhood_attention(q, q, q, **({"window": 3} | options))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((1, 8, 2), (1, 8, 2)), "grids of 1 to 3 axes"),
        (((1, 8, 2, 8), (1, 9, 2, 8)), "share batch, grid and head dim"),
        (((1, 8, 3, 8), (1, 8, 2, 8)), "must divide"),
        (((1, 2, 2, 2, 2, 2, 8), (1, 2, 2, 2, 2, 2, 8)), "grids of 1 to 3 axes"),
    ],
)
def test_bad_shapes_are_refused(shapes, message):
    q, k = (torch.zeros(s) for s in shapes)
    with pytest.raises(ValueError, match=message):
        neighborhood_attention(q, k, k, 3)


def test_natten_by_name_says_all_that_is_missing():
    q = torch.zeros(1, 8, 8, 2, 8)
    with pytest.raises(UnsupportedError) as found:
        neighborhood_attention(
            q, q, q, (1, 9), impl="natten", bias=torch.zeros(2, 1, 17), precision="fp8"
        )
    for reason in ("position bias", "precision='fp8'", "are on 'cpu'", "at least 2", "do not fit"):
        assert reason in str(found.value)
