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

_HERE = range(1)


class EdgeMoE(Keeper):
    """Worth is sensitivity x P(used): given the layers before for the two layers to come, frequency for the others.

    `sensitivity_L`: how much an error in the layer's output matters, any unit; None: all alike.
    """

    lasting = False

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
        # The same for the layer that routes, with the next one and the one after it; from those of the next one.
        self._pairs_J1 = np.arange(2)[:, None] * (3 * shape.experts)
        # Of a layer to come: what the layer two before it said, per request.
        self._said: tuple[int, np.ndarray] | None = None
        self._rates = Rates(shape)
        self._trail = Trail(shape)
        self._counts = Successors(2 * shape.layers, shape.experts)
        self._worth_LE += self._rates.all() * sensitivity_L[:, None]

    def begin(self, request: int, /) -> None:
        """Nothing is known of it."""
        self._trail.begin(request)
        self._said = None

    def end(self, request: int, /) -> None:
        """Forgets the request."""
        self._trail.end(request)
        self._said = None

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
        self._foresee(layer)

    def _foresee(self, layer: int) -> None:
        """The two layers to come: the mean of what `layer` and, for the next one, the layer before it says."""
        targets = slice(layer + 1, layer + 1 + len(self._lags))
        said, self._said = self._said, None
        priors = [self._rates.of(target) for target in range(self.shape.layers)[targets]]
        if not priors:
            return
        chance_JE = np.stack(priors)
        ids_R1K, weights_R1K = self._trail.last(self._trail.sources(layer, _HERE))
        if weights_R1K.any():
            requests, pairs = len(ids_R1K), len(priors)
            places_RJK = ids_R1K + (self._pairs_J1[:pairs] + 2 * targets.start * self.shape.experts)
            prior_NE = chance_JE if requests == 1 else np.tile(chance_JE, (requests, 1))
            said_NE = self._counts.mean(places_RJK.reshape(requests * pairs, -1), prior_NE)
            said_RJE = said_NE.reshape(requests, pairs, -1)
            if said is not None and said[0] == targets.start:
                said_RJE[:, 0] += said[1]
                said_RJE[:, 0] *= 0.5
            if pairs > 1:
                self._said = targets.start + 1, said_RJE[:, 1]
            chance_JE = any_of(said_RJE)
        np.multiply(chance_JE, self._sensitivity_L[targets, None], out=self._worth_LE[targets])

    def _first(self, layer: int, lags: range) -> np.ndarray:
        """[J, 1] the place of expert 0 before, for pairs with `layer`."""
        return self._first_J1[lags.start - 1 : lags.stop - 1] + 2 * layer * self.shape.experts
