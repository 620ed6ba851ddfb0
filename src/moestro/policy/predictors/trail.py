"""What each request routed last, layer by layer.

Shapes: S places of requests, N rows looked at, R requests, L MoE layers, K experts per row.
"""

from __future__ import annotations

import numpy as np

from moestro.policy.observation import Routing, Shape
from moestro.policy.predictors.flight import NOBODY, Flight, Rows, grown, rows_of


class Trail:
    """The last row of each request at each layer, and the rows of the pass under way."""

    def __init__(self, shape: Shape) -> None:
        self.flight = Flight()
        self._layers = shape.layers
        self._ids_SLK = np.zeros((1, shape.layers, shape.picks), np.int64)
        self._weights_SLK = np.zeros((1, shape.layers, shape.picks), np.float32)
        self._known_SL = np.zeros((1, shape.layers), bool)
        self._pass_L: list[Rows | None] = [None] * shape.layers
        self.at = -1

    def begin(self, request: int) -> None:
        """Nothing is known of it."""
        place = self.flight.begin(request)
        self._ids_SLK = grown(self._ids_SLK, self.flight.size)
        self._weights_SLK = grown(self._weights_SLK, self.flight.size)
        self._known_SL = grown(self._known_SL, self.flight.size)
        self._known_SL[place] = False

    def end(self, request: int) -> None:
        """Its place becomes free."""
        place = self.flight.end(request)
        assert place != NOBODY

    def rows(self, routing: Routing) -> Rows:
        """The rows to learn from, before `step` makes them the last."""
        return rows_of(routing, self.flight)

    def step(self, routing: Routing, rows: Rows) -> None:
        """The visit is over: its rows are the last."""
        layer = routing.layer
        if layer <= self.at:
            self._pass_L = [None] * self._layers
        self.at = layer
        self._pass_L[layer] = rows
        self._ids_SLK[rows.places_R, layer] = rows.ids_NK[rows.last_R]
        weights_RK = rows.weights_NK[rows.last_R]
        total_R1 = weights_RK.sum(1, keepdims=True)
        even = 1 / max(1, weights_RK.shape[1])
        self._weights_SLK[rows.places_R, layer] = np.where(total_R1 > 0, weights_RK / np.maximum(total_R1, 1e-12), even)
        self._known_SL[rows.places_R, layer] = True

    def before(self, rows: Rows, layer: int, lag: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Rows of `lag` layers before `layer` and the indices N of the rows that they belong to; None: not known.

        Called before `step`. Of a layer that comes later in the pass, the rows are those of the pass before.
        """
        source = (layer - lag) % self._layers
        if 0 < lag <= layer and layer > self.at:
            earlier = self._pass_L[source]
            if earlier is None or len(earlier.places_N) != len(rows.places_N):
                return None
            return earlier.ids_NK, np.arange(len(rows.places_N))
        if not rows.decode:
            return None
        known_N = self._known_SL[rows.places_N, source]
        return self._ids_SLK[rows.places_N[known_N], source], np.flatnonzero(known_N)

    def last(self, layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the requests in flight: [R] known, and ids [R', K] and normalised weights of those that are known."""
        places_R = self.flight.in_flight
        known_R = self._known_SL[places_R, layer]
        places = places_R[known_R]
        return known_R, self._ids_SLK[places, layer], self._weights_SLK[places, layer]

    def ahead(self, layer: int) -> int:
        """Visits from the one observed last to the next one of `layer`: 1 to L."""
        return (layer - self.at - 1) % self._layers + 1
