"""HOBBIT's rule: on a miss, experts that the router weighs little are loaded at few bits, or not at all.

Experts of a row are taken by falling weight; what counts is the weight of those before. Below the first threshold an
expert is worth its exact level, below the second its lowest, beyond that nothing (arXiv 2411.01433). What is in memory
is used as it is.

Shapes: T rows, K experts per row.
"""

from __future__ import annotations

import numpy as np

from moestro.errors import RequestError
from moestro.policy.levels.base import LevelAsk, LevelTable
from moestro.policy.levels.quality import QUALITIES

THRESHOLDS = {"high": (0.8, 1.0), "balanced": (0.6, 0.9), "fast": (0.4, 0.8)}
"""Those of "balanced" are the published ones for Mixtral."""


class Gate:
    """Residency and router weights are all it looks at, so it needs no table of errors."""

    def __init__(self, table: LevelTable) -> None:
        self._exact = table.exact
        self._thresholds = {QUALITIES[name]: pair for name, pair in THRESHOLDS.items()}

    def step(self, _budget_T: np.ndarray) -> None:
        pass

    def choose(self, ask: LevelAsk) -> np.ndarray:
        weights_TK, held_TK = ask.routing.weights_TK, ask.held_E[ask.routing.experts_TK]
        order_TK = np.argsort(-weights_TK, axis=1, kind="stable")
        ordered_TK = np.take_along_axis(weights_TK, order_TK, 1) / np.maximum(weights_TK.sum(1, keepdims=True), 1e-30)
        before_TK = np.empty_like(weights_TK)
        np.put_along_axis(before_TK, order_TK, np.cumsum(ordered_TK, axis=1) - ordered_TK, 1)
        first_T1, second_T1 = self._limits(ask.budget_T)
        loaded_TK = np.where(before_TK <= first_T1, self._exact, np.where(before_TK <= second_T1, 1, 0))
        return np.where(ask.budget_T[:, None] > 0, np.maximum(loaded_TK, held_TK), self._exact)

    def gains(self) -> None:
        return None

    def _limits(self, budget_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        limits_T2 = np.array([self._thresholds.get(float(one), (1.0, 1.0)) for one in budget_T])
        return limits_T2[:, :1], limits_T2[:, 1:]


def check_named(policy: str, nats: float) -> None:
    """Raises RequestError for a budget of nats, which a policy with thresholds by name cannot keep."""
    if nats not in QUALITIES.values():
        raise RequestError(
            f"The level policy {policy!r} knows the qualities {', '.join(QUALITIES)}, not a number ({nats:g}): "
            "use the level policy 'ledger' for that."
        )
