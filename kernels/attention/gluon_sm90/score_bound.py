"""A bound of all scores of a head, |q| |k| <= max |q| max |k| (Cauchy-Schwarz), for a softmax without a maximum.

softmax is the same whatever is subtracted from the scores, the running maximum only keeps exponentials in
range. A bound does that as well where it is not far above the scores: then no maximum has to be found and
nothing rescaled. With bf16 weights, which have the exponents of fp32, a bound of 50 bits is safe, and
models that normalise queries and keys stay under 30. Where it is larger the kernel takes the maximum.

Measured on an H200: 0.26 ms of 5.27 ms at 16,896 tokens, for one reading of q and k, 0.05 ms; at 4,608 still
0.404 ms instead of 0.415. Where tokens move to the order of a plan it comes along whatever the plan (`order.move`):
0.620 ms for q, k and v of 65,536 tokens, and 0.619 without.
"""

from __future__ import annotations

from torch.utils.weak import WeakTensorKeyDictionary

from ...plan.block_plan import BlockPlan

# Keys that an average query must visit before a reading of its own pays.
LEAST_KEYS = 4096

_pays: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def pays(plan: BlockPlan) -> bool:
    """Whether the plan has enough work. The first call for a plan waits for the device, once."""
    if plan.full.offset not in _pays:
        entries = plan.full.start.numel() + plan.partial.start.numel()
        keys = entries * plan.block_k / (plan.tiles * plan.variants)
        _pays[plan.full.offset] = keys >= LEAST_KEYS
    return _pays[plan.full.offset]
