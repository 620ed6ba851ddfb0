"""What a row used at the layers before says what it will use next: counts per pair of layers.

The layer before is the best single witness of routing (fetching as many experts as are used, it finds .62 of them on
gpt-oss-20b, the previous token .48, popularity .29).
Shapes: R requests in flight, L MoE layers, E experts per layer.
"""

from __future__ import annotations

import numpy as np

from moestro.policy.observation import Routing, Shape
from moestro.policy.predictors.flight import any_of, within
from moestro.policy.predictors.popularity import Rates
from moestro.policy.predictors.successors import Successors, chance_of, log_odds
from moestro.policy.predictors.trail import Trail


class PreviousLayer:
    """Naive Bayes over the experts of the nearest layers that have routed.

    A pair of layers at most `reach` apart has a table. Of a layer that is `a` visits ahead the layers `a`, `a + 1`, ...
    before it bear witness, up to `trusts` of them, each believed in part; beyond the reach popularity is all there is.
    Layers follow each other in a circle: the first layer's predecessor is the last one, of the token before.
    """

    def __init__(self, shape: Shape, *, reach: int = 4, trusts: tuple[float, ...] = (0.4, 0.25, 0.15)) -> None:
        self._reach = min(reach, shape.layers - 1)
        self._factors = tuple(trust * shape.picks for trust in trusts)
        self._layers = shape.layers
        self._rates = Rates(shape)
        self._trail = Trail(shape)
        self._counts = Successors(max(1, self._reach) * shape.layers, shape.experts)

    def begin(self, request: int, /) -> None:
        """Nothing is known of it yet: popularity."""
        self._trail.begin(request)

    def end(self, request: int, /) -> None:
        """Forgets the request."""
        self._trail.end(request)

    def observe(self, routing: Routing, /) -> None:
        """O(R K^2) for each layer within reach."""
        self._rates.add(routing)
        rows = self._trail.rows(routing)
        for lag in range(1, self._reach + 1):
            before = self._trail.before(rows, routing.layer, lag)
            if before is not None and len(before[1]):
                self._counts.add(self._pair(routing.layer, lag), before[0], rows.ids_NK[before[1]])
        self._trail.step(routing, rows)

    def forecast(self, layer: int, horizon: int = 1, /) -> np.ndarray:
        """[E] float32."""
        prior_E = self._rates.of(layer)
        ahead = self._trail.ahead(layer)
        odds_RE = np.repeat(log_odds(prior_E)[None], len(self._trail.flight.in_flight), 0)
        for lag, factor in zip(range(ahead, self._reach + 1), self._factors, strict=False):
            known_R, ids_RK, weights_RK = self._trail.last((layer - lag) % self._layers)
            if known_R.any():
                evidence_RE = self._counts.evidence(self._pair(layer, lag), ids_RK, weights_RK, prior_E)
                odds_RE[known_R] += factor * evidence_RE
        return within(any_of(chance_of(odds_RE)), horizon)

    def _pair(self, layer: int, lag: int) -> int:
        return (lag - 1) * self._layers + layer
