"""The least of many values that change little from one asking to the next.

Shapes: X values.
"""

from __future__ import annotations

import numpy as np

_SPARE, _MOST = 4, 8
"""So many times the values wanted lie below a new limit; and more than so many times as many ask for a new one."""
_LARGEST = float(np.finfo(np.float64).max)


class Lowest:
    """Keeps a limit below which a few values lie: what was low stays low, and not all need be put in order again."""

    def __init__(self) -> None:
        self._limit = -np.inf

    def places(self, values_X: np.ndarray, wanted: int) -> list[int]:
        """Of so many of the least values, if there are, rising; of equals the first. inf is no value."""
        low = np.flatnonzero(values_X <= self._limit)
        if not wanted <= len(low) <= _MOST * wanted:
            rank = min(_SPARE * wanted, len(values_X)) - 1
            self._limit = min(float(np.partition(values_X, rank)[rank]), _LARGEST)
            low = np.flatnonzero(values_X <= self._limit)
        places: list[int] = low[np.argsort(values_X[low], kind="stable")[:wanted]].tolist()
        return places
