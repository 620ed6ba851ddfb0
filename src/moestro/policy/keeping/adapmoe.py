"""AdapMoE's cache: as many slots for each layer as pay best there, and LRU within a layer.

Source: Zhong et al., "AdapMoE: Adaptive Sensitivity-based Expert Gating and Management for Efficient MoE Inference",
arXiv 2408.10284 and its code: slots per layer by dynamic programming over the layers' hits as a function of slots.
Here these hits are counted as the model runs: an LRU of c slots hits exactly the uses at a stack distance below c
(Mattson et al., IBM Systems Journal 9(2), 1970).
Shapes: L MoE layers, E experts per layer, B slots of the whole cache.
"""

from __future__ import annotations

import numpy as np

from moestro.errors import RequestError
from moestro.policy.keeping.keeper import Keeper, used
from moestro.policy.observation import Routing, Shape

_FIRST_PLAN, _LONGEST_PAUSE = 32, 4096


class AdapMoE(Keeper):
    """`slots` of the whole cache; None: as many as experts are held when it is planned.

    The first plan comes after 32 forward passes, the next ones after twice as long each, up to 4096. Before, and
    without any slot, the layers share alike.
    """

    def __init__(self, shape: Shape, *, slots: int | None = None) -> None:
        if slots is not None and slots < shape.layers * shape.picks:
            raise RequestError(
                f"adapmoe has {slots} slots; {shape.layers} layers with {shape.picks} experts per row need at least "
                f"{shape.layers * shape.picks}."
            )
        super().__init__(shape)
        self._slots = slots
        self._held = 0
        self.quota_L = np.zeros(shape.layers)
        self._order_LE = np.tile(np.arange(shape.experts), (shape.layers, 1))
        self._place_LE = self._order_LE.copy()
        self._seen_LE = np.zeros((shape.layers, shape.experts), bool)
        self._hits_LE = np.zeros((shape.layers, shape.experts))
        self._worth_LE -= self._place_LE
        self._passes, self._next_plan = 0, _FIRST_PLAN

    def loaded(self, _layer: int, _expert: int, /) -> None:
        """Counts the cache's slots."""
        self._held += 1

    def evicted(self, _layer: int, _expert: int, /) -> None:
        """Counts the cache's slots."""
        self._held -= 1

    def observe(self, routing: Routing, /) -> None:
        """O(E): moves what is used to the front of the layer's stack."""
        layer, ids_U = routing.layer, used(routing)
        if layer == self.shape.layers - 1:
            self._end_of_pass()
        known_U = ids_U[self._seen_LE[layer, ids_U]]
        self._hits_LE[layer, self._place_LE[layer, known_U]] += 1
        self._seen_LE[layer, ids_U] = True
        order_E, place_E = self._order_LE[layer], self._place_LE[layer]
        front_E = np.zeros(len(order_E), bool)
        front_E[place_E[ids_U]] = True
        order_E[:] = np.concatenate((order_E[front_E], order_E[~front_E]))
        place_E[order_E] = np.arange(len(order_E))
        np.subtract(self.quota_L[layer], place_E, out=self._worth_LE[layer])

    def _end_of_pass(self) -> None:
        self._passes += 1
        if self._passes < self._next_plan:
            return
        self._next_plan += min(self._passes, _LONGEST_PAUSE)
        slots = self._held if self._slots is None else self._slots
        if slots < self.shape.layers * self.shape.picks:
            return
        self.quota_L[:] = slots_per_layer(np.cumsum(self._hits_LE, 1), slots, least=self.shape.picks)
        self._hits_LE *= 0.5
        np.subtract(self.quota_L[:, None], self._place_LE, out=self._worth_LE)


def slots_per_layer(hits_LE: np.ndarray, slots: int, *, least: int) -> np.ndarray:
    """[L] slots of each layer, at least `least`, whose sum is `slots` (or L E) and whose hits are the most.

    `hits_LE[l, c - 1]` are the hits of layer l with c slots. O(L E B), less where more slots bring no more hits.
    """
    layers, experts = hits_LE.shape
    spare = min(slots, layers * experts) - layers * least
    assert spare >= 0
    gain_LX = hits_LE[:, least - 1 :] - hits_LE[:, least - 1 : least]
    best_B = np.zeros(spare + 1)
    choice_LB = np.zeros((layers, spare + 1), np.int32)
    for layer in range(layers):
        top_B = best_B.copy()
        useful = int(np.searchsorted(gain_LX[layer], gain_LX[layer, -1]))
        for extra in range(1, min(useful, spare) + 1):
            with_B = best_B[: spare + 1 - extra] + gain_LX[layer, extra]
            better_B = with_B > top_B[extra:]
            top_B[extra:][better_B] = with_B[better_B]
            choice_LB[layer, extra:][better_B] = extra
        best_B = top_B
    extra_L = np.zeros(layers, np.int64)
    left = spare
    for layer in reversed(range(layers)):
        extra_L[layer] = choice_LB[layer, left]
        left -= extra_L[layer]
    return _spread(extra_L, left, experts - least) + least


def _spread(extra_L: np.ndarray, left: int, most: int) -> np.ndarray:
    """What brings no hits so far goes where least is, one by one."""
    for _ in range(left):
        extra_L[np.argmin(np.where(extra_L < most, extra_L, most + 1))] += 1
    return extra_L
