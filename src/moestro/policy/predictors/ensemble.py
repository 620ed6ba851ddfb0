"""Several predictors as one, their weights learnt online: logistic stacking.

Forecast log-odds are b + sum of w_m x_m, x_m the log-odds of member m; for every layer and range of how far ahead it
looks the weights follow the truth by Newton steps with forgetting (a logistic regression fitted recursively). Taking a
single member as it is is one choice of weights (1 for it, else 0), so in the long run the log-loss is no worse than
that of the best member. Source of stacking: Wolpert, Neural Networks 5(2), 1992; the combination of log-odds is a
logarithmic opinion pool (Genest and Zidek, Statistical Science 1(1), 1986).
Shapes: M members, P = M + 1 parameters, L MoE layers, E experts per layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moestro.policy.observation import Routing, Shape
from moestro.policy.predictors.base import Predictor
from moestro.policy.predictors.flight import within
from moestro.policy.predictors.gate import LooksAhead
from moestro.policy.predictors.rehearsal import RANGES, Rehearsal
from moestro.policy.predictors.successors import chance_of, log_odds

# Log-odds are cut here: a member that says never may be wrong once in 3000.
_WIDEST = 8.0


class Ensemble:
    """Forecasts of all members, weighed. With several requests in flight the members' merged forecasts are weighed.

    `members` belong to the ensemble from now on: they are told of requests and routing through it.
    """

    def __init__(self, shape: Shape, members: Sequence[Predictor], *, memory: float = 2000.0) -> None:
        assert members
        self.members = tuple(members)
        self._keep = 1 - 1 / memory
        self._rehearsal = Rehearsal(shape)
        count = len(self.members) + 1
        self._weights_RLP = np.full((RANGES, shape.layers, count), 1 / len(self.members))
        self._weights_RLP[..., -1] = 0
        # As if a few visits had confirmed the equal weights; a little of it stays, for members that say the same.
        self._start_PP = np.eye(count) * (0.2 * shape.picks)
        self._curve_RLPP = np.tile(self._start_PP, (RANGES, shape.layers, 1, 1))
        self._ready: dict[int, np.ndarray] = {}

    def begin(self, request: int, /) -> None:
        """Told to all members."""
        self._ready.clear()
        for member in self.members:
            member.begin(request)

    def end(self, request: int, /) -> None:
        """Told to all members."""
        self._ready.clear()
        for member in self.members:
            member.end(request)

    def observe(self, routing: Routing, /) -> None:
        """Learns from the forecasts that now come true, then tells the members."""
        layer = routing.layer
        due = self._rehearsal.due(layer)
        if all(rows.decode for rows in routing.requests):
            used_E = (routing.counts_E > 0).astype(np.float64)
            if self._rehearsal.check_next():
                due[self._rehearsal.range_of(layer)] = self._odds(layer)
            for reach, odds_EP in due.items():
                self._learn(reach, layer, odds_EP, used_E)
        for other, reach in self._rehearsal.wanted():
            self._rehearsal.keep(other, reach, self._odds(other))
        self._rehearsal.step(layer)
        self._ready.clear()
        for member in self.members:
            member.observe(routing)

    def lookahead(self, layer: int, ahead: int, ids_TC: np.ndarray, scores_TC: np.ndarray | None = None, /) -> None:
        """Told to the members that take gates (`LooksAhead`)."""
        self._ready.clear()
        for member in self.members:
            if isinstance(member, LooksAhead):
                member.lookahead(layer, ahead, ids_TC, scores_TC)

    def forecast(self, layer: int, horizon: int = 1, /) -> np.ndarray:
        """[E] float32."""
        weights_P = self._weights_RLP[self._rehearsal.range_of(layer), layer]
        return within(chance_of(self._odds(layer) @ weights_P), horizon)

    def weights(self, layer: int) -> np.ndarray:
        """[3, M + 1] by range: the next layer, a few ahead, farther ones; the last of each is the constant."""
        return self._weights_RLP[:, layer]

    def _odds(self, layer: int) -> np.ndarray:
        """[E, P] what the members say now, and a one."""
        if layer not in self._ready:
            said_ME = np.stack([member.forecast(layer) for member in self.members]).astype(np.float64)
            odds_EP = np.ones((said_ME.shape[1], len(said_ME) + 1))
            odds_EP[:, :-1] = np.clip(log_odds(said_ME), -_WIDEST, _WIDEST).T
            self._ready[layer] = odds_EP
        return self._ready[layer]

    def _learn(self, reach: int, layer: int, odds_EP: np.ndarray, used_E: np.ndarray) -> None:
        weights_P, curve_PP = self._weights_RLP[reach, layer], self._curve_RLPP[reach, layer]
        chance_E = chance_of(odds_EP @ weights_P)
        slope_E = np.maximum(chance_E * (1 - chance_E), 1e-3)
        curve_PP *= self._keep
        curve_PP += (1 - self._keep) * self._start_PP
        curve_PP += (odds_EP * slope_E[:, None]).T @ odds_EP
        weights_P += np.linalg.solve(curve_PP, (used_E - chance_E) @ odds_EP)
