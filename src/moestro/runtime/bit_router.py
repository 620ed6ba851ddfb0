"""A store's bit router at work: what each level of each expert would cost the rows of a step.

Shapes: T rows of a step, H hidden width, K experts per row, L MoE layers, E experts, S levels below the exact one and
above leaving out, leaving out included, O = E x S outputs of a net.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from moestro.bit_router import BIT_ROUTER_FILE, BitRouter, load_bit_router
from moestro.errors import RequestError
from moestro.kernels.base import Kernels
from moestro.policy.levels import BY_NET
from moestro.store.reader import Store

_PER_OUTPUT = 12
"""Bytes of an output for each row of a step, with the copies that are made of it."""


class LevelScores:
    """The nets of all layers, on the kernels: a row's scores have the same bits whatever else is in the step."""

    def __init__(self, router: BitRouter, kernels: Kernels) -> None:
        self._kernels, self._levels = kernels, len(router.levels)
        self._layers = [
            tuple(torch.from_numpy(array[layer]) for array in router.arrays().values())
            for layer in range(len(router.inner_LRH))
        ]

    def of(self, layer: int, hidden_TH: torch.Tensor, experts_TK: np.ndarray) -> np.ndarray:
        """[T, K, S], fp32: as `BitRouter` has them."""
        inner_RH, inner_bias_R, outer_OR, outer_bias_O = self._layers[layer]
        inner_TR = self._kernels.linear(hidden_TH, inner_RH, inner_bias_R).clamp_min_(0)
        scores_TO = self._kernels.linear(inner_TR, outer_OR, outer_bias_O).numpy()
        scores_TES = scores_TO.reshape(len(scores_TO), -1, self._levels)
        return np.asarray(scores_TES[np.arange(len(experts_TK))[:, None], experts_TK])


def open_bit_router(store: Store, *, hidden: int, bits: Sequence[int]) -> BitRouter:
    """The router in a store that is served at the levels `bits`.

    Raises:
        RequestError: the store is served at a level that the router does not know.
        StoreError: it is missing or damaged, or of another model.
    """
    exact = store.manifest.exact_level
    if bits[-1] != exact:
        raise RequestError(
            f"The bit router of {store.path} was trained for level {exact}, its exact one, and level {bits[-1]} was "
            "asked for. Leave the level out, or use another level policy."
        )
    experts = max(layer.num_experts for layer in store.layers)
    return load_bit_router(
        store.path / BIT_ROUTER_FILE, layers=len(store.layers), hidden=hidden, experts=experts, levels=tuple(bits)
    )


def bit_router_bytes(level_policy: str, *, stored_bytes: int, experts: int, levels: int, rows: int) -> int:
    """Bytes that a router takes while it is used: its weights, and what it says of a step. 0 if another policy is."""
    if level_policy != BY_NET:
        return 0
    return stored_bytes + rows * _PER_OUTPUT * experts * levels
