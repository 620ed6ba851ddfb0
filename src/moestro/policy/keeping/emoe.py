"""eMoE: requests come in groups of p; what a group needs is predicted once, from the group before.

Source: Tairin et al., "eMoE: Task-aware Memory Efficient Mixture-of-Experts-Based (MoE) Model Inference",
arXiv 2503.06823: the predictor of experts runs every p prompts, since consecutive prompts use the same experts. Its
network is not published; here the experts that made up most of the last group's routing stand for its answer.
Shapes: L MoE layers, E experts per layer.
"""

from __future__ import annotations

import numpy as np

from moestro.errors import RequestError
from moestro.policy.keeping.keeper import Keeper, shares
from moestro.policy.observation import Routing, Shape

_PREDICTED = 1e15


class EMoE(Keeper):
    """Predicted experts stay before all others; among either kind the least recently used leaves first.

    `group` is p; `coverage` is which part of the last group's routing in a layer the predicted experts make up.
    """

    def __init__(self, shape: Shape, *, group: int = 4, coverage: float = 0.5) -> None:
        if group < 1 or not 0 < coverage <= 1:
            raise RequestError(f"emoe has group={group}, coverage={coverage}; they must be >= 1 and in (0, 1].")
        super().__init__(shape)
        self._group, self._coverage = group, coverage
        self._uses_LE = np.zeros((shape.layers, shape.experts))
        self._bonus_LE = np.zeros((shape.layers, shape.experts))
        self._begun = 0
        self._now = 0

    def begin(self, _request: int, /) -> None:
        """Every `group` requests: O(L E log E)."""
        if self._begun and self._begun % self._group == 0:
            self._predict()
        self._begun += 1

    def observe(self, routing: Routing, /) -> None:
        """O(K)."""
        self._now += 1
        ids_U, share = shares(routing)
        self._uses_LE[routing.layer, ids_U] += share
        self._worth_LE[routing.layer, ids_U] = self._now + self._bonus_LE[routing.layer, ids_U]

    def _predict(self) -> None:
        order_LE = np.argsort(-self._uses_LE, axis=1, kind="stable")
        sorted_LE = np.take_along_axis(self._uses_LE, order_LE, 1)
        before_LE = np.cumsum(sorted_LE, 1) - sorted_LE
        chosen_LE = (before_LE < self._coverage * sorted_LE.sum(1, keepdims=True)) & (sorted_LE > 0)
        last_LE = self._worth_LE - self._bonus_LE
        np.put_along_axis(self._bonus_LE, order_LE, np.where(chosen_LE, _PREDICTED, 0.0), 1)
        np.add(last_LE, self._bonus_LE, out=self._worth_LE)
        self._uses_LE[:] = 0
