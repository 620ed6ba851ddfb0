"""Which experts each token of a request was routed to, for those who ask.

Shapes: T tokens, L MoE layers, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class RoutedExperts:
    """Ids `experts_TLK` (int16) of the tokens of prompt and answer from number `first` on, but for the last token, from
    which nothing was computed. Those before `first` had been computed for another request."""

    first: int
    experts_TLK: np.ndarray

    def as_json(self) -> dict[str, Any]:
        """`first`, and `experts` as lists by token, layer and rank."""
        return {"first": self.first, "experts": self.experts_TLK.tolist()}


class RoutingLog:
    """What is known so far. Tokens may come again, when a request gave up its place."""

    def __init__(self) -> None:
        self._first = 0
        self._steps: list[np.ndarray] = []

    def __call__(self, start: int, ids_TLK: np.ndarray) -> None:
        """Tokens from number `start` on were routed so."""
        known = self._first + sum(map(len, self._steps))
        if not self._steps or start < self._first:
            self._first, self._steps = start, []
        elif start < known:
            self._steps = [np.concatenate(self._steps)[: start - self._first]]
        self._steps.append(ids_TLK.astype(np.int16))

    def taken(self) -> RoutedExperts | None:
        """Everything; None where no token was computed."""
        return RoutedExperts(self._first, np.concatenate(self._steps)) if self._steps else None
