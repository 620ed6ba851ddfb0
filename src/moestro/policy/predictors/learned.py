"""Forecasts of nets that were trained on recorded traces (`moestro.foresight`).

Shapes: R requests, T rows of one of them, K experts per row, E experts, F own features, W width, H horizons.
"""

from __future__ import annotations

import numpy as np

from moestro.policy.observation import Routing, Shape
from moestro.policy.predictors.flight import any_of
from moestro.policy.predictors.folded import FoldedNets, InnerSums
from moestro.policy.predictors.history import History
from moestro.policy.predictors.net import HORIZONS, Nets


class _Followed:
    """What one request did, for each role of nets. The sums for the layer ahead are kept once somebody asked."""

    def __init__(self, shape: Shape, after: FoldedNets, ahead: FoldedNets) -> None:
        self._history = History(shape)
        self._after, self._ahead = InnerSums(after), InnerSums(ahead)
        self._kept = [self._after]
        self._how_2K = np.ones((2, shape.picks), np.float32)

    def copy_from(self, other: _Followed) -> None:
        self._history.copy_from(other._history)
        self._after.copy_from(other._after)
        if len(other._kept) > 1:
            self._ahead.copy_from(other._ahead)
            self._kept = [self._after, self._ahead]

    def visit(self, layer: int, experts_TK: np.ndarray, weights_TK: np.ndarray) -> None:
        """Rows of the request went through the layer, one after another."""
        if len(experts_TK) == 1:
            experts_K, weights_K = experts_TK[0], weights_TK[0]
            np.divide(weights_K, max(sum(weights_K.tolist()), 1e-20), out=self._how_2K[1])
            self._history.step(layer, experts_K, self._how_2K[1])
            for sums in self._kept:
                sums.step(layer, experts_K, self._how_2K)
        elif len(experts_TK):
            self._history.steps(layer, experts_TK, weights_TK)
            for sums in self._kept:
                sums.rebuild(layer, self._history.own_LFE[layer])

    def after(self, layer: int, nets: FoldedNets) -> np.ndarray:
        """[H, E]"""
        own_FE = self._history.own_LFE[layer]
        return nets.chances(layer, self._after.inner(layer, own_FE), own_FE)

    def ahead(self, layer: int, nets: FoldedNets) -> np.ndarray:
        """[E]"""
        if len(self._kept) == 1:
            self._kept.append(self._ahead)
            for each, own_FE in enumerate(self._history.own_LFE):
                self._ahead.rebuild(each, own_FE)
        own_FE = self._history.own_LFE[layer]
        return np.asarray(nets.chances(layer, self._ahead.inner(layer, own_FE), own_FE)[0])


class Learned:
    """Each request's history goes through the nets by itself; uses by several requests are taken as independent.

    Args:
        after: nets with all of `HORIZONS`, for a layer that has just routed.
        ahead: nets with the horizon of one visit, for the layer after the one that has just routed.
    """

    name = "learned"

    def __init__(self, shape: Shape, *, after: Nets, ahead: Nets) -> None:
        self._shape, self._after, self._ahead = shape, FoldedNets(after), FoldedNets(ahead)
        self._followed: dict[int, _Followed] = {}
        self._latest = self._fresh()
        self._at = -1

    def begin(self, request: int) -> None:
        """A request starts from what the one observed last did: topics last longer than requests."""
        followed = self._followed[request] = self._fresh()
        followed.copy_from(self._latest)

    def end(self, request: int) -> None:
        self._latest = self._followed.pop(request)

    def observe(self, routing: Routing) -> None:
        layer = self._at = routing.layer
        if len(routing.requests) == 1:
            self._followed[routing.requests[0].request].visit(layer, routing.experts_TK, routing.weights_TK)
            return
        for rows in routing.requests:
            span = slice(rows.first, rows.last)
            self._followed[rows.request].visit(layer, routing.experts_TK[span], routing.weights_TK[span])

    def outlook(self, layer: int) -> np.ndarray:
        """[H, E]: probabilities of use within each of `HORIZONS` visits to come, after the layer has routed."""
        return any_of([one.after(layer, self._after) for one in self._in_flight()])

    def forecast(self, layer: int, horizon: int = 1) -> np.ndarray:
        if horizon == 1 and layer == (self._at + 1) % self._shape.layers:
            return any_of([one.ahead(layer, self._ahead) for one in self._in_flight()])
        return between(self.outlook(layer), horizon)

    def _in_flight(self) -> list[_Followed]:
        return list(self._followed.values()) or [self._latest]

    def _fresh(self) -> _Followed:
        return _Followed(self._shape, self._after, self._ahead)


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
