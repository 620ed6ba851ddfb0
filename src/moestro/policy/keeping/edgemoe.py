"""EdgeMoE's statistics: how likely an expert is given what the two layers before it used, times what it matters.

Source: Yi et al., "EdgeMoE: Empowering Sparse Large Language Models on Mobile Devices", arXiv 2308.14352 (from its
abstract): experts are preloaded by the statistics of the previous two layers, bits are given by sensitivity. The
paper's model routes a token to one expert and has a table of pairs; with K experts the mean over them is taken, and the
two layers' conditional frequencies are averaged.
Shapes: N rows, L MoE layers, E experts per layer, K experts per row.
"""

from __future__ import annotations

import numpy as np

from moestro.errors import RequestError
from moestro.policy.keeping.keeper import Keeper
from moestro.policy.observation import Routing, Shape
from moestro.policy.predictors.flight import any_of
from moestro.policy.predictors.popularity import Rates
from moestro.policy.predictors.successors import Successors
from moestro.policy.predictors.trail import Trail


class EdgeMoE(Keeper):
    """Worth is sensitivity x P(used): given the layers before for the two layers to come, frequency for the others.

    `sensitivity_L`: how much an error in the layer's output matters, any unit; None: all alike.
    """

    def __init__(self, shape: Shape, *, sensitivity_L: np.ndarray | None = None) -> None:
        super().__init__(shape)
        sensitivity_L = np.ones(shape.layers) if sensitivity_L is None else np.asarray(sensitivity_L, np.float64)
        if sensitivity_L.shape != (shape.layers,) or not np.isfinite(sensitivity_L).all() or sensitivity_L.min() < 0:
            raise RequestError(
                f"edgemoe needs a sensitivity for each of the {shape.layers} MoE layers, finite and not negative; it "
                f"got an array of shape {sensitivity_L.shape}."
            )
        self._sensitivity_L = sensitivity_L
        self._lags = range(1, min(2, shape.layers - 1) + 1)
        self._first_J1 = np.arange(2)[:, None] * shape.experts
        self._rates = Rates(shape)
        self._trail = Trail(shape)
        self._counts = Successors(2 * shape.layers, shape.experts)
        self._worth_LE += self._rates.all() * sensitivity_L[:, None]

    def begin(self, request: int, /) -> None:
        """Nothing is known of it."""
        self._trail.begin(request)

    def end(self, request: int, /) -> None:
        """Forgets the request."""
        self._trail.end(request)

    def observe(self, routing: Routing, /) -> None:
        """O(K^2 + K E) per request."""
        layer = routing.layer
        self._rates.add(routing)
        rows = self._trail.rows(routing)
        lags = self._lags[:layer]
        known = self._trail.before(rows, layer, lags) if lags else None
        if known:
            places_NJK = known[0] + self._first(layer, lags)
            self._counts.add(places_NJK.reshape(len(known[1]), -1), known[1])
        self._trail.step(routing, rows)
        self._worth_LE[layer] = self._rates.of(layer) * self._sensitivity_L[layer]
        for ahead in self._lags:
            if layer + ahead < self.shape.layers:
                self._worth_LE[layer + ahead] = self._chance(layer, ahead) * self._sensitivity_L[layer + ahead]

    def _chance(self, layer: int, ahead: int) -> np.ndarray:
        """[E] of the layer `ahead` of `layer`, from `layer` and, for the next one, the layer before too."""
        target = layer + ahead
        prior_E = self._rates.of(target)
        lags = self._lags[ahead - 1 : target]
        ids_RJK, weights_RJK = self._trail.last(self._trail.sources(target, lags))
        if not weights_RJK.any():
            return prior_E
        places_RJK = ids_RJK + self._first(target, lags)
        return any_of(self._counts.mean(places_RJK.reshape(len(ids_RJK), -1), prior_E))

    def _first(self, layer: int, lags: range) -> np.ndarray:
        """[J, 1] the place of expert 0 before, for pairs with `layer`."""
        return self._first_J1[lags.start - 1 : lags.stop - 1] + 2 * layer * self.shape.experts
