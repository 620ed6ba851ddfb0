"""What predictors have in common that go by what each request routed last.

Shapes: E experts per layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from moestro.policy.observation import Routing, Shape
from moestro.policy.predictors.flight import Rows, within
from moestro.policy.predictors.popularity import Rates
from moestro.policy.predictors.successors import chance_of
from moestro.policy.predictors.trail import Trail


class Witness(ABC):
    """Follows requests; how a visit teaches and what follows from what was seen is for those that derive from it."""

    def __init__(self, shape: Shape) -> None:
        self._rates = Rates(shape)
        self._trail = Trail(shape)

    @abstractmethod
    def _learn(self, layer: int, rows: Rows) -> None:
        """From rows that the trail does not have yet."""

    @abstractmethod
    def odds(self, layer: int, /) -> np.ndarray:
        """[E] log-odds that the next visit uses an expert."""

    def begin(self, request: int, /) -> None:
        """Nothing is known of it yet: popularity."""
        self._trail.begin(request)

    def end(self, request: int, /) -> None:
        """Forgets the request."""
        self._trail.end(request)

    def observe(self, routing: Routing, /) -> None:
        """O(R K^2) for each layer that bears witness."""
        self._rates.add(routing)
        rows = self._trail.rows(routing)
        self._learn(routing.layer, rows)
        self._trail.step(routing, rows)

    def forecast(self, layer: int, horizon: int = 1, /) -> np.ndarray:
        """[E] float32."""
        return within(chance_of(self.odds(layer)), horizon)
