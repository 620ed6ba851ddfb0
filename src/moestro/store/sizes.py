"""How many bits a store spends on a weight, counted from the bytes that are there."""

from __future__ import annotations

import math

from moestro.store.layout import RAW_LEVELS
from moestro.store.reader import Store

_FLAT_BITS = {"flat4": 4, "flat8": 8}


def is_raw(store: Store) -> bool:
    """Whether all weights are kept as they are, neither experts nor dense ones quantised."""
    kinds = {plane.kind for layer in store.layers for plane in layer.layout.planes}
    return kinds == {"raw"} and not any(tensor.dtype in _FLAT_BITS for tensor in store.dense.values())


def bits_per_weight(store: Store, level: int) -> float:
    """Bytes of the experts' planes up to `level`, scales and padding included, times 8, over the experts' weights."""
    nbytes = weights = 0
    for layer in store.layers:
        planes = layer.layout.planes
        nbytes += layer.num_experts * sum(plane.nbytes for plane in planes if plane.level <= level)
        weights += layer.num_experts * sum(math.prod(tensor.shape) for tensor in planes[0].tensors)
    return 8 * nbytes / weights


def dense_bits(store: Store) -> int:
    """Bits of a dense weight: 4 or 8 where the large ones are quantised, else those of the store's element type."""
    flat = [_FLAT_BITS[tensor.dtype] for tensor in store.dense.values() if tensor.dtype in _FLAT_BITS]
    return min(flat, default=RAW_LEVELS[store.manifest.dtype])
