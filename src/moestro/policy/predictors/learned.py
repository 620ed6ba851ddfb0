"""Forecasts of nets that were trained on recorded traces (`moestro.foresight`).

Shapes: S places of requests, T rows, K experts per row, E experts, L MoE layers, X state of a layer, H horizons.
"""

from __future__ import annotations

import numpy as np

from moestro.policy.observation import Routing, Shape
from moestro.policy.predictors.flight import NOBODY, Flight
from moestro.policy.predictors.folded import FoldedNets
from moestro.policy.predictors.net import HORIZONS, Nets

_AFTER, _AHEAD = 0, 1


class Learned:
    """Each request's history goes through the nets by itself; uses by several requests are taken as independent.

    Args:
        after: nets with all of `HORIZONS`, for a layer that has just routed.
        ahead: nets with the horizon of one visit, for the layer after the one that has just routed.
    """

    name = "learned"

    def __init__(self, shape: Shape, *, after: Nets, ahead: Nets) -> None:
        self._shape, self._nets = shape, FoldedNets(after, ahead)
        self._flight = Flight()
        self._places = [NOBODY]
        self._state_SLX = self._nets.state(1)  # nobody's place holds what the request observed last did
        self._kept = 1  # the sums for the layer ahead are kept once somebody asked
        self._at = -1

    def begin(self, request: int) -> None:
        """A request starts from what the one observed last did: topics last longer than requests."""
        place = self._flight.begin(request)
        if self._flight.size > len(self._state_SLX):
            # One more at a time: a place takes up to a MiB, and the most requests there are is soon reached.
            self._state_SLX = np.concatenate((self._state_SLX, self._nets.state(1)))
        self._state_SLX[place] = self._state_SLX[NOBODY]
        self._places = self._flight.in_flight.tolist()

    def end(self, request: int) -> None:
        self._state_SLX[NOBODY] = self._state_SLX[self._flight.end(request)]
        self._places = self._flight.in_flight.tolist()

    def observe(self, routing: Routing) -> None:
        layer = self._at = routing.layer
        spans = [(self._flight.place(rows.request), rows.first, rows.last) for rows in routing.requests]
        ids_TK = np.ascontiguousarray(routing.experts_TK, np.int64)
        weights_TK = np.ascontiguousarray(routing.weights_TK, np.float32)
        self._nets.follow(self._state_SLX, self._kept, layer, spans, ids_TK, weights_TK)

    def outlook(self, layer: int) -> np.ndarray:
        """[H, E]: probabilities of use within each of `HORIZONS` visits to come, after the layer has routed."""
        return self._nets.chances(self._state_SLX, _AFTER, layer, self._places)

    def forecast(self, layer: int, horizon: int = 1) -> np.ndarray:
        if horizon == 1 and layer == (self._at + 1) % self._shape.layers:
            if self._kept <= _AHEAD:
                self._nets.catch_up(self._state_SLX, _AHEAD)
                self._kept += 1
            return np.asarray(self._nets.chances(self._state_SLX, _AHEAD, layer, self._places)[0])
        return between(self.outlook(layer), horizon)


def between(outlook_HE: np.ndarray, horizon: int) -> np.ndarray:
    """[E], read off between the horizons that a net knows."""
    if horizon >= HORIZONS[-1]:
        return np.asarray(outlook_HE[-1])
    above = next(index for index, known in enumerate(HORIZONS) if known >= horizon)
    if HORIZONS[above] == horizon:
        return np.asarray(outlook_HE[above])
    low, high = HORIZONS[above - 1], HORIZONS[above]
    share = np.log(horizon / low) / np.log(high / low)
    return np.asarray(outlook_HE[above - 1] * np.float32(1 - share) + outlook_HE[above] * np.float32(share))
