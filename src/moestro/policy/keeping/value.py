"""Value per byte: keep what will be used soonest, for what it is worth.

An expert that is exact or nothing costs the same time per byte whenever it is missed, so its worth is the foreseen use
alone: the sum over horizons of the probability of a use within them falls about with the logarithm of the time to the
next use, and so ranks by it. Where experts may also be computed at fewer bits, `importance_LE` weighs that loss.

Shapes: L MoE layers, E experts, H horizons.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np

from moestro.policy.observation import Routing, Shape
from moestro.policy.predictors.base import Predictor
from moestro.policy.predictors.net import HORIZONS


@runtime_checkable
class LooksFar(Protocol):
    """A predictor that has all horizons at once."""

    def outlook(self, layer: int, /) -> np.ndarray:
        """[H, E]: probabilities of use within each of `HORIZONS` visits."""
        ...


class Value:
    """Worth = importance x sum over horizons of P(use within the horizon)."""

    name = "value"
    proportional = True
    lasting = True

    def __init__(self, shape: Shape, *, predictor: Predictor, importance_LE: np.ndarray | None = None) -> None:
        self._predictor, self._importance_LE = predictor, importance_LE
        # Asked once: to look for a protocol's methods takes as long as half a forecast.
        self._far = predictor if isinstance(predictor, LooksFar) else None
        self._worth_LE = np.zeros((shape.layers, shape.experts), dtype=np.float32)

    def begin(self, request: int) -> None:
        self._predictor.begin(request)

    def end(self, request: int) -> None:
        self._predictor.end(request)

    def observe(self, routing: Routing) -> None:
        layer = routing.layer
        self._predictor.observe(routing)
        worth_E = self._outlook(layer)
        if self._importance_LE is not None:
            worth_E *= self._importance_LE[layer]
        self._worth_LE[layer] = worth_E

    def _outlook(self, layer: int) -> np.ndarray:
        """[E], the sum over horizons."""
        if self._far is not None:
            return np.asarray(np.add.reduce(self._far.outlook(layer)))
        return np.asarray(np.stack([self._predictor.forecast(layer, horizon) for horizon in HORIZONS]).sum(0))

    def loaded(self, _layer: int, _expert: int) -> None:
        pass

    def evicted(self, _layer: int, _expert: int) -> None:
        pass

    def worth(self, _layer: int) -> np.ndarray:
        return self._worth_LE
