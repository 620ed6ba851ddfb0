"""What a request used lately it will use again: an average over its rows, the older the lighter.

Shapes: S places of requests, R requests in flight, L MoE layers, E experts per layer.
"""

from __future__ import annotations

import numpy as np

from moestro.policy.observation import Routing, Shape
from moestro.policy.predictors.flight import Flight, any_of, grown, within
from moestro.policy.predictors.popularity import Rates


class Recency:
    """Share of a request's rows that used the expert, a row `half_life` rows ago counting half.

    A new request starts with the shares of all before it.
    """

    def __init__(self, shape: Shape, *, half_life: float = 9.0) -> None:
        assert half_life > 0
        self._keep = 0.5 ** (1 / half_life)
        self._rates = Rates(shape)
        self._flight = Flight()
        self._share_SLE = np.zeros((1, shape.layers, shape.experts), np.float32)

    def begin(self, request: int, /) -> None:
        """O(L E)."""
        place = self._flight.begin(request)
        self._share_SLE = grown(self._share_SLE, self._flight.size)
        self._share_SLE[place] = self._rates.all()

    def end(self, request: int, /) -> None:
        """Its place becomes free."""
        self._flight.end(request)

    def observe(self, routing: Routing, /) -> None:
        """O(R E)."""
        self._rates.add(routing)
        for rows in routing.requests:
            count = rows.last - rows.first
            share_E = self._share_SLE[self._flight.place(rows.request), routing.layer]
            if count == 1:
                share_E *= self._keep
                share_E[routing.experts_TK[rows.first]] += 1 - self._keep
            elif count:
                keep = self._keep**count
                counts_E = np.bincount(routing.experts_TK[rows.first : rows.last].ravel(), minlength=len(share_E))
                share_E *= keep
                share_E += (1 - keep) / count * counts_E

    def forecast(self, layer: int, horizon: int = 1, /) -> np.ndarray:
        """[E] float32."""
        if self._flight.empty:
            return within(self._rates.of(layer), horizon)
        return within(any_of(self._share_SLE[self._flight.in_flight, layer]), horizon)
