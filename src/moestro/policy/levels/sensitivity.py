"""AdapMoE's rule: experts that can hardly change the result are left out, wherever they are.

An expert goes when its part of its layer's error, times the layer's sensitivity, is below a threshold; the likeliest
one of a row always stays. Published for two experts per token, as a threshold on the second's normalised weight
(arXiv 2408.10284); this is the same inequality for any number of them.

Shapes: T rows, K experts per row, L layers.
"""

from __future__ import annotations

import numpy as np

from moestro.policy.levels.base import LevelAsk, LevelTable, shares


class Sensitivity:
    """A row's budget is divided evenly over all experts that it uses: the threshold of each."""

    def __init__(self, table: LevelTable) -> None:
        assert table.sensitivity_L is not None
        self._exact, self._sensitivity_L = table.exact, table.sensitivity_L
        self._uses = len(table.sensitivity_L) * table.picks

    def step(self, _budget_T: np.ndarray) -> None:
        pass

    def choose(self, ask: LevelAsk) -> np.ndarray:
        routing = ask.routing
        cost_TK = self._sensitivity_L[routing.layer] * shares(routing.weights_TK)
        out_TK = cost_TK <= ask.budget_T[:, None] / self._uses
        out_TK &= ask.budget_T[:, None] > 0
        out_TK[np.arange(len(out_TK)), routing.weights_TK.argmax(1)] = False
        return np.where(out_TK, 0, self._exact)

    def gains(self) -> None:
        return None
