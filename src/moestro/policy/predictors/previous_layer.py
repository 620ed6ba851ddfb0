"""What a row used at the layers before says what it will use next: counts per pair of layers.

The layer before is the best single witness of routing (fetching as many experts as are used, it finds .62 of them on
gpt-oss-20b, the previous token .48, popularity .29).
Shapes: R requests in flight, L MoE layers, E experts per layer.
"""

from __future__ import annotations

import numpy as np

from moestro.policy.observation import Shape
from moestro.policy.predictors.flight import Rows, any_of
from moestro.policy.predictors.successors import Successors, log_odds, odds_of_any
from moestro.policy.predictors.witness import Witness


class PreviousLayer(Witness):
    """Naive Bayes over the experts of the nearest layers that have routed.

    A pair of layers at most `reach` apart has a table. Of a layer that is `a` visits ahead the layers `a`, `a + 1`, ...
    before it bear witness, up to `trusts` of them, each believed in part; beyond the reach popularity is all there is.
    Layers follow each other in a circle: the first layer's predecessor is the last one, of the token before.
    """

    def __init__(self, shape: Shape, *, reach: int = 4, trusts: tuple[float, ...] = (0.4, 0.25, 0.15)) -> None:
        super().__init__(shape)
        self._shape = shape
        self._lags = range(1, min(reach, shape.layers - 1) + 1)
        self._factors_J1 = np.array([[trust * shape.picks] for trust in trusts], np.float32)
        self._first_J1 = np.arange(len(self._lags))[:, None] * (shape.layers * shape.experts)
        self._counts = Successors(max(1, len(self._lags)) * shape.layers, shape.experts)

    def odds(self, layer: int, /) -> np.ndarray:
        """[E] log-odds that the next visit uses an expert."""
        prior_E = self._rates.of(layer)
        ahead = self._trail.ahead(layer)
        lags = self._lags[ahead - 1 :][: len(self._factors_J1)]
        if not lags:
            return log_odds(any_of(np.repeat(prior_E[None], len(self._trail.flight.in_flight), 0)))
        ids_RJK, weights_RJK = self._trail.last(self._trail.sources(layer, lags))
        weights_RJK = weights_RJK * self._factors_J1[: len(lags)]
        before_RJK = ids_RJK + self._first(layer, lags)
        requests = len(ids_RJK)
        weights_RX, before_RX = weights_RJK.reshape(requests, -1), before_RJK.reshape(requests, -1)
        return odds_of_any(self._counts.log_odds(before_RX, weights_RX, prior_E))

    def _learn(self, layer: int, rows: Rows) -> None:
        """A prompt teaches of its own pass only."""
        lags = self._lags if rows.decode else self._lags[:layer]
        if known := self._trail.before(rows, layer, lags) if lags else None:
            before_NJK, after_NK = known
            places_NJK = before_NJK + self._first(layer, lags)
            self._counts.add(places_NJK.reshape(len(after_NK), -1), after_NK)

    def _first(self, layer: int, lags: range) -> np.ndarray:
        """[J, 1] the place of expert 0 before, for pairs with `layer`."""
        return self._first_J1[lags.start - 1 : lags.stop - 1] + layer * self._shape.experts
