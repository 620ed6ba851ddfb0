"""Several predictors as one, their weights learnt online: logistic stacking.

Forecast log-odds are b + sum of w_m x_m, x_m the log-odds of member m; for every layer and range of how far ahead it
looks the weights follow the truth by Newton steps with forgetting (a logistic regression fitted recursively). Taking a
single member as it is is one choice of weights (1 for it, else 0), so in the long run the log-loss is no worse than
that of the best member. Source of stacking: Wolpert, Neural Networks 5(2), 1992; the combination of log-odds is a
logarithmic opinion pool (Genest and Zidek, Statistical Science 1(1), 1986).
Shapes: M members, P = M + 1 parameters, L MoE layers, E experts per layer, H horizons.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from moestro.policy.observation import Routing, Shape
from moestro.policy.predictors.base import Predictor
from moestro.policy.predictors.flight import within, within_each
from moestro.policy.predictors.gate import LooksAhead
from moestro.policy.predictors.rehearsal import RANGES, Rehearsal
from moestro.policy.predictors.successors import chance_of, log_odds

# A layer's weights are solved for anew in each of so many visits, then in one of so many: the curve changes slowly.
_SOLVE_FIRST, _SOLVE_EVERY = 16, 8
# Log-odds are cut here: a member that says never may be wrong once in 3000.
_WIDEST = 8.0


@runtime_checkable
class SaysOdds(Protocol):
    """A member that has log-odds of the next visit at hand."""

    def odds(self, layer: int, /) -> np.ndarray:
        """[E], any width."""
        ...


class _Odds:
    """Log-odds of a member that has only probabilities."""

    def __init__(self, member: Predictor) -> None:
        self._forecast = member.forecast

    def __call__(self, layer: int, /) -> np.ndarray:
        return log_odds(self._forecast(layer))


class Ensemble:
    """Forecasts of all members, weighed. With several requests in flight the members' merged forecasts are weighed.

    `members` belong to the ensemble from now on: they are told of requests and routing through it.
    """

    def __init__(self, shape: Shape, members: Sequence[Predictor], *, memory: float = 2000.0) -> None:
        assert members
        self.members = tuple(members)
        self._odds_of = [one.odds if isinstance(one, SaysOdds) else _Odds(one) for one in members]
        self._looking = [one for one in members if isinstance(one, LooksAhead)]
        self._keep = 1 - 1 / memory
        self._rehearsal = Rehearsal(shape)
        count = len(self.members) + 1
        self._weights_RLP = np.full((RANGES, shape.layers, count), 1 / len(self.members))
        self._weights_RLP[..., -1] = 0
        # As if a few visits had confirmed the equal weights; a little of it stays, for members that say the same.
        self._start_PP = np.eye(count) * (0.2 * shape.picks)
        self._curve_RLPP = np.tile(self._start_PP, (RANGES, shape.layers, 1, 1))
        self._step_RLPP = np.zeros_like(self._curve_RLPP)
        self._learnt_RL = [[0] * shape.layers for _ in range(RANGES)]
        self._more_PP = self._start_PP * (1 - self._keep)
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
            for reach, odds_PE in due.items():
                self._learn(reach, layer, odds_PE, used_E)
        for other, reach in self._rehearsal.wanted():
            self._rehearsal.keep(other, reach, self._odds(other))
        self._rehearsal.step(layer)
        self._ready.clear()
        for member in self.members:
            member.observe(routing)

    def lookahead(self, layer: int, ahead: int, ids_TC: np.ndarray, scores_TC: np.ndarray | None = None, /) -> None:
        """Told to the members that take gates (`LooksAhead`)."""
        self._ready.clear()
        for member in self._looking:
            member.lookahead(layer, ahead, ids_TC, scores_TC)

    def forecast(self, layer: int, horizon: int = 1, /) -> np.ndarray:
        """[E] float32."""
        return within(self._chance(layer), horizon)

    def outlook(self, layer: int, /) -> np.ndarray:
        """[H, E] float32: `forecast` for each of `HORIZONS`."""
        return within_each(self._chance(layer))

    def weights(self, layer: int) -> np.ndarray:
        """[3, M + 1] by range: the next layer, a few ahead, farther ones; the last of each is the constant."""
        return self._weights_RLP[:, layer]

    def _chance(self, layer: int) -> np.ndarray:
        """[E] of use in the next visit."""
        weights_P = self._weights_RLP[self._rehearsal.range_of(layer), layer]
        return chance_of(weights_P @ self._odds(layer))

    def _odds(self, layer: int) -> np.ndarray:
        """[P, E] what the members say now, and ones."""
        if layer not in self._ready:
            said = [odds(layer) for odds in self._odds_of]
            odds_PE = self._ready[layer] = np.ones((len(said) + 1, len(said[0])))
            np.stack(said, out=odds_PE[:-1])
            np.clip(odds_PE, -_WIDEST, _WIDEST, out=odds_PE)
        return self._ready[layer]

    def _learn(self, reach: int, layer: int, odds_PE: np.ndarray, used_E: np.ndarray) -> None:
        weights_P, curve_PP = self._weights_RLP[reach, layer], self._curve_RLPP[reach, layer]
        chance_E = chance_of(weights_P @ odds_PE)
        slope_E = np.maximum(chance_E * (1 - chance_E), 1e-3)
        curve_PP *= self._keep
        curve_PP += self._more_PP
        curve_PP += (odds_PE * slope_E) @ odds_PE.T
        learnt = self._learnt_RL[reach][layer]
        self._learnt_RL[reach][layer] += 1
        if learnt < _SOLVE_FIRST or learnt % _SOLVE_EVERY == 0:
            self._step_RLPP[reach, layer] = np.linalg.inv(curve_PP)
        weights_P += self._step_RLPP[reach, layer] @ (odds_PE @ (used_E - chance_E))
