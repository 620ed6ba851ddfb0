"""Forecasts of nets that were trained on recorded traces (`moestro.foresight`)."""

from __future__ import annotations

import numpy as np

from moestro.policy.observation import Routing, Shape
from moestro.policy.predictors.history import History
from moestro.policy.predictors.net import HORIZONS, Nets


class Learned:
    """Each request's history goes through the nets by itself; uses by several requests are taken as independent.

    Args:
        after: nets with all of `HORIZONS`, for a layer that has just routed.
        ahead: nets with the horizon of one visit, for the layer after the one that has just routed.
    """

    name = "learned"

    def __init__(self, shape: Shape, *, after: Nets, ahead: Nets) -> None:
        self._shape, self._after, self._ahead = shape, after, ahead
        self._histories: dict[int, History] = {}
        self._latest = History(shape)
        self._at = -1

    def begin(self, request: int) -> None:
        """A request starts from what the one observed last did: topics last longer than requests."""
        history = self._histories[request] = History(self._shape)
        history.copy_from(self._latest)

    def end(self, request: int) -> None:
        self._latest = self._histories.pop(request)

    def observe(self, routing: Routing) -> None:
        layer = self._at = routing.layer
        for rows in routing.requests:
            span = slice(rows.first, rows.last)
            history = self._histories[rows.request]
            history.visit(layer, routing.experts_TK[span], routing.weights_TK[span])

    def outlook(self, layer: int) -> np.ndarray:
        """[H, E]: probabilities of use within each of `HORIZONS` visits to come, after the layer has routed."""
        return _any(self._after(layer, self._inputs(layer)))

    def forecast(self, layer: int, horizon: int = 1) -> np.ndarray:
        if horizon == 1 and layer == (self._at + 1) % self._shape.layers:
            soon_HE = _any(self._ahead(layer, self._inputs(layer)))
            return np.asarray(soon_HE[0])
        return between(self.outlook(layer), horizon)

    def _inputs(self, layer: int) -> np.ndarray:
        """[R, D]."""
        histories = self._histories.values() or (self._latest,)
        return np.stack([history.inputs(layer) for history in histories])


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


def _any(probabilities_RHE: np.ndarray) -> np.ndarray:
    if len(probabilities_RHE) == 1:
        return np.asarray(probabilities_RHE[0])
    return np.asarray(1 - np.prod(1 - probabilities_RHE, axis=0))
