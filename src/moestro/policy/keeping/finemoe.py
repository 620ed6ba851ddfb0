"""FineMoE: maps of single forward passes, found by the trajectory so far; probability times frequency decides.

Source: Yu et al., "Taming Latency-Memory Trade-Off in MoE-Based LLM Serving via Fine-Grained Expert Offloading",
arXiv 2502.05370. An expert map holds one token's router probabilities at each layer. The stored map whose rows up to
the present layer are the most like (cosine) the pass under way foretells the rest; the victim has the most
1 / (p x freq). A new map takes the place of the one most like it. Of a trace only the probabilities of the K chosen
experts are known, so the others count as 0; the search by prompt embedding, which needs the text, is left out.
Shapes: C maps stored, S requests, L MoE layers, E experts per layer, K experts per row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moestro.policy.keeping.keeper import Keeper, shares
from moestro.policy.observation import Routing, Shape

# Of a use by chance, so that frequency decides among experts that the map does not have.
_EPSILON = 1e-3


class MapStore:
    """Up to `capacity` expert maps; each layer's rows have length 1."""

    def __init__(self, shape: Shape, capacity: int) -> None:
        self.size = 0
        self.ids_LCK = np.zeros((shape.layers, capacity, shape.picks), np.int64)
        self.weights_LCK = np.zeros((shape.layers, capacity, shape.picks), np.float32)
        self._scratch_E = np.zeros(shape.experts, np.float32)

    def cosines(self, layer: int, ids_K: np.ndarray, weights_K: np.ndarray) -> np.ndarray:
        """[size] of a row with the stored rows of the layer."""
        scratch_E = self._scratch_E
        scratch_E[ids_K] = weights_K
        there_CK = scratch_E.take(self.ids_LCK[layer, : self.size])
        scratch_E[ids_K] = 0
        return np.asarray(np.einsum("ck,ck->c", there_CK, self.weights_LCK[layer, : self.size]))

    def put(self, ids_LK: np.ndarray, weights_LK: np.ndarray, similarity_C: np.ndarray) -> None:
        """A new map, in the place of the most similar one when there is no other."""
        if self.size < self.ids_LCK.shape[1]:
            index = self.size
            self.size += 1
        else:
            index = int(similarity_C.argmax())
        self.ids_LCK[:, index] = ids_LK
        self.weights_LCK[:, index] = weights_LK


@dataclass(slots=True)
class _Pass:
    """A request's forward pass under way: its rows so far and their similarity to each map."""

    ids_LK: np.ndarray
    weights_LK: np.ndarray
    sum_C: np.ndarray
    layers: int = 0
    match: int = -1


class FineMoE(Keeper):
    """`capacity` maps. Several requests in flight: the largest p of theirs counts. Of a prompt, its last row matches.

    A pass is stored when the next begins, if the request's rows were seen at all layers.
    """

    lasting = False

    def __init__(self, shape: Shape, *, capacity: int = 1000) -> None:
        super().__init__(shape)
        self._store = MapStore(shape, capacity)
        self._passes: dict[int, _Pass] = {}
        self._frequency_LE = np.zeros((shape.layers, shape.experts))
        self._chance_LE = np.full((shape.layers, shape.experts), _EPSILON)

    def begin(self, request: int, /) -> None:
        """An empty pass."""
        layers, picks = self.shape.layers, self.shape.picks
        capacity = self._store.ids_LCK.shape[1]
        ids_LK, weights_LK = np.zeros((layers, picks), np.int64), np.zeros((layers, picks), np.float32)
        self._passes[request] = _Pass(ids_LK, weights_LK, np.zeros(capacity, np.float32))

    def end(self, request: int, /) -> None:
        """Its last pass is stored; what was expected stays until another request's match."""
        self._finish(self._passes.pop(request))

    def observe(self, routing: Routing, /) -> None:
        """O(C K) per request; O(L K) where the match changes."""
        layer = routing.layer
        ids_U, share = shares(routing)
        self._frequency_LE[layer, ids_U] += share
        stale = False
        for rows in routing.requests:
            if rows.last > rows.first:
                ids_K, weights_K = routing.experts_TK[rows.last - 1], routing.weights_TK[rows.last - 1]
                stale |= self._follow(self._passes[rows.request], layer, ids_K, weights_K)
        if stale:
            self._expect()
        else:
            self._worth_LE[layer, ids_U] = self._chance_LE[layer, ids_U] * self._frequency_LE[layer, ids_U]

    def _follow(self, now: _Pass, layer: int, ids_K: np.ndarray, weights_K: np.ndarray) -> bool:
        """Whether the map that is most like the pass has changed."""
        if now.layers and layer == 0:
            self._finish(now)
        length = float(np.sqrt(weights_K @ weights_K))
        now.ids_LK[layer] = ids_K
        now.weights_LK[layer] = weights_K / length if length > 0 else len(weights_K) ** -0.5
        now.layers += 1
        size = self._store.size
        if not size:
            return False
        now.sum_C[:size] += self._store.cosines(layer, now.ids_LK[layer], now.weights_LK[layer])
        match = int(now.sum_C[:size].argmax())
        changed, now.match = match != now.match, match
        return changed

    def _finish(self, now: _Pass) -> None:
        if now.layers == self.shape.layers:
            self._store.put(now.ids_LK, now.weights_LK, now.sum_C)
        now.sum_C[:] = 0
        now.layers = 0

    def _expect(self) -> None:
        self._chance_LE[:] = _EPSILON
        for match in {now.match for now in self._passes.values() if now.match >= 0}:
            ids_LK, weights_LK = self._store.ids_LCK[:, match], self._store.weights_LCK[:, match]
            had_LK = np.take_along_axis(self._chance_LE, ids_LK, 1)
            np.put_along_axis(self._chance_LE, ids_LK, np.maximum(had_LK, weights_LK), 1)
        np.multiply(self._chance_LE, self._frequency_LE, out=self._worth_LE)
