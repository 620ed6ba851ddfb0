"""Every expert of every row at the exact level."""

from __future__ import annotations

import numpy as np

from moestro.policy.levels.base import LevelAsk, LevelTable


class Fixed:
    """What exact rows get from every policy, for all rows."""

    def __init__(self, table: LevelTable) -> None:
        self._exact = table.exact

    def step(self, _budget_T: np.ndarray) -> None:
        pass

    def choose(self, ask: LevelAsk) -> np.ndarray:
        return np.full(ask.routing.experts_TK.shape, self._exact)

    def gains(self) -> None:
        return None
