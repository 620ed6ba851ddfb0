"""How often each expert is used by any row: what is left to say when nothing else is known.

Shapes: R requests in flight, L MoE layers, E experts per layer.
"""

from __future__ import annotations

import numpy as np

from moestro.policy.observation import Routing, Shape
from moestro.policy.predictors.flight import LEARN_ROWS, within

# Counts are halved when a layer has so many rows: half the weight is on the last few thousand.
_FORGET_AT = 8192.0
# Where every row takes every expert: so that log-odds exist.
_MOST = 1 - 1e-4


class Rates:
    """Share of rows that use an expert, per layer. Starts at K/E, which counts as `strength` rows."""

    def __init__(self, shape: Shape, *, strength: float = 8.0) -> None:
        self._sum_LE = np.full((shape.layers, shape.experts), strength * shape.picks / shape.experts)
        self._rows_L = [strength] * shape.layers
        self._known_L: list[np.ndarray | None] = [None] * shape.layers

    def add(self, routing: Routing) -> None:
        """A prompt's rows together count as the few that other predictors learn from."""
        rows = len(routing.experts_TK)
        if rows == 0:
            return
        self._known_L[routing.layer] = None
        if rows == 1:
            sum_E = self._sum_LE[routing.layer]
            sum_E[routing.experts_TK[0]] += 1
            self._rows_L[routing.layer] += 1
            self._forget(routing.layer)
            return
        prompt = sum(part.last - part.first for part in routing.requests if not part.decode)
        weight = 1.0 if prompt <= LEARN_ROWS else (rows - prompt + LEARN_ROWS) / rows
        self._sum_LE[routing.layer] += weight * routing.counts_E
        self._rows_L[routing.layer] += weight * rows
        self._forget(routing.layer)

    def _forget(self, layer: int) -> None:
        if self._rows_L[layer] > _FORGET_AT:
            self._sum_LE[layer] *= 0.5
            self._rows_L[layer] *= 0.5

    def of(self, layer: int) -> np.ndarray:
        """[E] in (0, 1), float64; they add up to K. To be read only: the same until the layer's next visit."""
        known_E = self._known_L[layer]
        if known_E is None:
            known_E = self._known_L[layer] = np.minimum(self._sum_LE[layer] / self._rows_L[layer], _MOST)
        return known_E

    def all(self) -> np.ndarray:
        """[L, E]"""
        return np.asarray(self._sum_LE / np.array(self._rows_L)[:, None])


class Popularity:
    """Every request in flight takes an expert as often as requests did so far."""

    def __init__(self, shape: Shape) -> None:
        self._rates = Rates(shape)
        self._in_flight: set[int] = set()

    def begin(self, request: int, /) -> None:
        """Counts the request."""
        self._in_flight.add(request)

    def end(self, request: int, /) -> None:
        """Forgets the request."""
        self._in_flight.remove(request)

    def observe(self, routing: Routing, /) -> None:
        """O(E)."""
        self._rates.add(routing)

    def forecast(self, layer: int, horizon: int = 1, /) -> np.ndarray:
        """[E] float32: 1 - (1 - rate)^(R horizon)."""
        return within(self._rates.of(layer), horizon * max(1, len(self._in_flight)))

    def rates(self, layer: int) -> np.ndarray:
        """[E] share of rows that use the expert; they add up to K."""
        return self._rates.of(layer)
