"""What each request routed last, layer by layer.

Shapes: S places of requests, N rows looked at, R requests, L MoE layers, J layers looked back at, K experts per row.
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
        self._sources: dict[tuple[int, int, int], np.ndarray] = {}
        self.at = -1

    def begin(self, request: int) -> None:
        """Nothing is known of it."""
        place = self.flight.begin(request)
        self._ids_SLK = grown(self._ids_SLK, self.flight.size)
        self._weights_SLK = grown(self._weights_SLK, self.flight.size)
        self._known_SL = grown(self._known_SL, self.flight.size)
        self._known_SL[place] = False
        self._weights_SLK[place] = 0

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
        if len(rows.ids_NK) == 1:
            self._step_one(int(rows.places_N[0]), layer, rows)
            return
        self._ids_SLK[rows.places_R, layer] = rows.ids_NK[rows.last_R]
        weights_RK = rows.weights_NK[rows.last_R]
        total_R1 = weights_RK.sum(1, keepdims=True)
        if not total_R1.all():
            weights_RK, total_R1 = (
                np.where(total_R1 > 0, weights_RK, 1),
                np.where(total_R1 > 0, total_R1, weights_RK.shape[1]),
            )
        self._weights_SLK[rows.places_R, layer] = weights_RK / total_R1
        self._known_SL[rows.places_R, layer] = True

    def _step_one(self, place: int, layer: int, rows: Rows) -> None:
        weights_K = rows.weights_NK[0]
        total = float(weights_K.sum())
        self._ids_SLK[place, layer] = rows.ids_NK[0]
        self._weights_SLK[place, layer] = weights_K / total if total > 0 else 1 / len(weights_K)
        self._known_SL[place, layer] = True

    def sources(self, layer: int, lags: range) -> np.ndarray:
        """[J] the layers `lags` before `layer`, in a circle."""
        key = layer, lags.start, lags.stop
        if key not in self._sources:
            self._sources[key] = (layer - np.arange(lags.start, lags.stop)) % self._layers
        return self._sources[key]

    def before(self, rows: Rows, layer: int, lags: range) -> tuple[np.ndarray, np.ndarray] | None:
        """Rows as they were `lags` layers before: [N', J, K] ids and [N', K] of now; None: nothing is known.

        Called before `step`. Layers follow each other in a circle; lag 0 is the same layer in the pass before. Rows
        for which a lag is not known are left out; so, in a prompt, are lags of another pass than this.
        """
        if not len(rows.ids_NK):
            return None
        if rows.decode:
            sources_J = self.sources(layer, lags)
            if len(rows.places_N) == 1:
                place = rows.places_N[0]
                known = self._known_SL[place, sources_J].all()
                return (self._ids_SLK[place, sources_J][None], rows.ids_NK) if known else None
            places_N1 = rows.places_N[:, None]
            known_NJ = self._known_SL[places_N1, sources_J]
            ids_NJK = self._ids_SLK[places_N1, sources_J]
            if known_NJ.all():
                return ids_NJK, rows.ids_NK
            known_N = known_NJ.all(1)
            return (ids_NJK[known_N], rows.ids_NK[known_N]) if known_N.any() else None
        if layer <= self.at or lags.start < 1 or lags.stop > layer + 1:
            return None
        earlier_J = [self._pass_L[layer - lag] for lag in lags]
        same_J = [each.ids_NK for each in earlier_J if each is not None and len(each.ids_NK) == len(rows.ids_NK)]
        return (np.stack(same_J, 1), rows.ids_NK) if len(same_J) == len(lags) else None

    def last(self, layers_J: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of the R requests in flight: [R, J, K] ids and normalised weights, 0 where nothing is known."""
        places_R = self.flight.in_flight
        if len(places_R) == 1:
            place = places_R[0]
            return self._ids_SLK[place, layers_J][None], self._weights_SLK[place, layers_J][None]
        places_R1 = places_R[:, None]
        return self._ids_SLK[places_R1, layers_J], self._weights_SLK[places_R1, layers_J]

    def ahead(self, layer: int) -> int:
        """Visits from the one observed last to the next one of `layer`: 1 to L."""
        return (layer - self.at - 1) % self._layers + 1
