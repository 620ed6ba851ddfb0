"""MoE-Infinity's activation-aware replacement.

Source: Xue et al., "MoE-Infinity", arXiv 2401.14361, expert cache: the victim has the least
    (pEAM[l][e] + eps) / sum_j pEAM[l][j] * (1 - l / L),
pEAM the sum of the collection's entries nearest to the request so far. Early layers are dearer: they have the least
time for prefetch. (The published code runs LFU instead: `lfu.py`.)
Shapes: L MoE layers, E experts per layer.
"""

from __future__ import annotations

import numpy as np

from moestro.policy.keeping.keeper import Keeper
from moestro.policy.observation import Routing, Shape
from moestro.policy.predictors.eamc import Matching
from moestro.policy.predictors.popularity import Rates
from moestro.trace.collection import EamCollection

# Not given; small enough not to change the order of what has a probability.
_EPSILON = 1e-6


class MoEInfinity(Keeper):
    """Several requests in flight: the sum of their worths. While a request has no match, shares over all rows so far.

    Among experts that no match ever used (all eps) the least recently used leaves first, which the paper leaves open.
    """

    def __init__(self, shape: Shape, *, collection: EamCollection | None = None, nearest: int = 1) -> None:
        super().__init__(shape)
        self._matching = Matching(shape, collection, nearest=nearest)
        self._rates = Rates(shape)
        self._decay_L1 = (1 - np.arange(shape.layers) / shape.layers)[:, None]
        self._part: dict[int, np.ndarray] = {}
        self._sum_LE = np.zeros((shape.layers, shape.experts))
        self._last_LE = np.zeros((shape.layers, shape.experts))
        self._now = 0

    def begin(self, request: int, /) -> None:
        """Nothing is known of it yet: popularity."""
        self._matching.begin(request)
        self._part[request] = self._rates.all() / self.shape.picks
        self._sum()

    def end(self, request: int, /) -> None:
        """Its part of the worth stays until another request runs, or the cache would forget all between two."""
        self._matching.end(request)
        del self._part[request]
        if self._part:
            self._sum()

    def observe(self, routing: Routing, /) -> None:
        """O(K n) for n entries, per request; O(L E) when a request's nearest entries change."""
        self._rates.add(routing)
        self._now += 1
        stale = False
        for request, other in self._matching.observe(routing):
            followed = self._matching.followed[request]
            if other and len(followed.entries_M):
                self._part[request] = self._matching.collection.probabilities(followed.entries_M)
                stale = True
        if stale:
            self._sum()
        used_U = np.flatnonzero(routing.counts_E)
        # Time counts for less than eps ever could: 1e-9 of it at most.
        self._last_LE[routing.layer, used_U] = self._now
        self._worth_LE[routing.layer, used_U] = self._sum_LE[routing.layer, used_U] + self._tie(self._now)

    def _sum(self) -> None:
        np.multiply(sum(self._part.values()) + _EPSILON, self._decay_L1, out=self._sum_LE)
        np.add(self._sum_LE, self._tie(self._last_LE), out=self._worth_LE)

    @staticmethod
    def _tie(time: np.ndarray | int) -> np.ndarray | float:
        """Rises with time, far below eps for ever."""
        return 1e-9 * (1 - 1 / (1 + 1e-6 * np.asarray(time, np.float64)))
