"""D2MoE's rule: a tiny net that was trained with the model says what each level would cost each token and expert.

Each (token, expert) takes the level at which what the net expects it to cost, plus the price of the level's bytes, is
least (arXiv 2504.15299; the net and its training are `moestro.bit_router` and `moestro.calibration.bit_router`, the
price of a quality is found when it is trained). What is in memory has no part in it, as published: so the tokens of a
request do not depend on how much memory there is, nor on what else is in flight.

Shapes: T rows, K experts per row, L MoE layers, E experts, D levels, 0 among them.
"""

from __future__ import annotations

import numpy as np

from moestro.policy.levels.base import LevelAsk, LevelTable, shares

_REWEIGH = 16
_FADE = 0.9


class Learned:
    """Also counts the levels that experts are used at, which is what their planes are worth in memory."""

    def __init__(self, table: LevelTable) -> None:
        assert table.prices is not None
        self._exact, self._prices = table.exact, dict(table.prices)
        self._parts_LD = table.bytes_LD / table.bytes_LD[:, -1].mean()
        layers, experts, levels = table.errors_LED.shape
        self._uses_LED = np.zeros((layers, experts, levels))
        self._steps = 0
        self._gains_LES: np.ndarray | None = None

    def step(self, _budget_T: np.ndarray) -> None:
        pass

    def choose(self, ask: LevelAsk) -> np.ndarray:
        layer, experts_TK = ask.routing.layer, ask.routing.experts_TK
        if layer == 0:
            self._settle(ask.budget_T)
        if not ask.budget_T.any():
            return np.full(experts_TK.shape, self._exact)
        assert ask.scores_TKS is not None
        cost_TKS = np.exp(ask.scores_TKS.astype(np.float64)) * shares(ask.routing.weights_TK)[:, :, None]
        cost_TKD = np.concatenate((cost_TKS, np.zeros((*experts_TK.shape, 1))), axis=2)
        price_T = np.array([self._prices.get(budget, 0.0) for budget in ask.budget_T.tolist()])
        levels_TK = (cost_TKD + price_T[:, None, None] * self._parts_LD[layer]).argmin(2)
        lossy_T = ask.budget_T > 0
        np.add.at(self._uses_LED[layer], (experts_TK[lossy_T], levels_TK[lossy_T]), 1)
        return np.where(lossy_T[:, None], levels_TK, self._exact)

    def gains(self) -> np.ndarray | None:
        return self._gains_LES

    def _settle(self, budget_T: np.ndarray) -> None:
        """A step begins: now and then, see what was used."""
        self._steps += 1
        if not budget_T.all():
            self._gains_LES = None
        elif self._gains_LES is None or self._steps % _REWEIGH == 0:
            above_LES = np.cumsum(self._uses_LED[:, :, :0:-1], axis=2)[:, :, ::-1]
            # An expert that has not been used is taken for one like the others of its layer.
            typical_L1S = (above_LES.sum(1, keepdims=True) + 1) / (self._uses_LED.sum((1, 2))[:, None, None] + 1)
            self._gains_LES = (above_LES + typical_L1S) / (self._uses_LED.sum(2, keepdims=True) + 1)
            self._uses_LED *= _FADE
