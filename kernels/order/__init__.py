"""Token orders and the permutations that realise them."""

from .curves import Order, OrderedGrid, hilbert_index, hilbert_path, inverse_permutation, order_grid

__all__ = [
    "Order",
    "OrderedGrid",
    "hilbert_index",
    "hilbert_path",
    "inverse_permutation",
    "order_grid",
]
