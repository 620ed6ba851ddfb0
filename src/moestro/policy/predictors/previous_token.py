"""The next token uses what this one does, or what follows it: counts per layer of token after token.

Shapes: R requests in flight, E experts per layer.
"""

from __future__ import annotations

import numpy as np

from moestro.policy.observation import Shape
from moestro.policy.predictors.flight import Rows
from moestro.policy.predictors.successors import Successors, odds_of_any
from moestro.policy.predictors.witness import Witness

# The layer itself, in the pass before.
_SAME = range(1)


class PreviousToken(Witness):
    """Naive Bayes over the experts of the request's last row at the same layer.

    `trust` is how much of their evidence counts: independent witnesses would be believed wholly (K), one voice 1.
    """

    def __init__(self, shape: Shape, *, trust: float = 0.5) -> None:
        super().__init__(shape)
        self._experts = shape.experts
        self._factor = trust * shape.picks
        self._counts = Successors(shape.layers, shape.experts)

    def odds(self, layer: int, /) -> np.ndarray:
        """[E] log-odds that the next visit uses an expert."""
        prior_E = self._rates.of(layer)
        ids_R1K, weights_R1K = self._trail.last(self._trail.sources(layer, _SAME))
        before_RK = ids_R1K[:, 0] + layer * self._experts
        return odds_of_any(self._counts.log_odds(before_RK, self._factor * weights_R1K[:, 0], prior_E))

    def _learn(self, layer: int, rows: Rows) -> None:
        first = layer * self._experts
        if known := self._trail.before(rows, layer, _SAME):
            self._counts.add(known[0][:, 0] + first, known[1])
        elif not rows.decode and len(rows.ids_NK) > 1:
            same_N = rows.places_N[1:] == rows.places_N[:-1]
            self._counts.add(rows.ids_NK[:-1][same_N] + first, rows.ids_NK[1:][same_N])
