"""A step's rows, grouped by the expert that they are routed to.

Shapes: T rows of the batch, K experts per row, P = T * K places of the output, E experts of the layer, J of them used.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moestro.kernels.base import ExpertJobs

Ints = NDArray[np.int64]


class Grouping:
    """Who goes where. `used` are the experts with rows, the busiest first, so that they load first.

    A place is a (row, k) pair: row of the batch times K plus k. Ids at or above the number of experts are the "no
    expert" marks of expert-parallel routers and have no group.
    """

    __slots__ = ("_ends_E", "_per_row", "_places_P", "counts_E", "used")

    def __init__(self, index_TK: Ints, experts: int) -> None:
        flat_P = index_TK.ravel()
        self._per_row = index_TK.shape[1]
        self._places_P = flat_P.argsort(kind="stable")
        self.counts_E = np.bincount(flat_P, minlength=experts)[:experts]
        self._ends_E = self.counts_E.cumsum()
        used_J = self.counts_E.nonzero()[0]
        if index_TK.shape[0] > 1:
            used_J = used_J[(-self.counts_E[used_J]).argsort(kind="stable")]
        self.used: list[int] = used_J.tolist()

    def covers(self, places: int) -> bool:
        """Whether every one of all `places` belongs to an expert."""
        return int(self._ends_E[-1]) == places

    def places_of(self, expert: int) -> Ints:
        """The places of one expert, ascending."""
        end = self._ends_E[expert]
        places: Ints = self._places_P[end - self.counts_E[expert] : end]
        return places

    def rows_of(self, expert: int) -> Ints:
        """The rows of the batch that are routed to one expert, ascending."""
        rows: Ints = self.places_of(expert) // self._per_row
        return rows

    def jobs(self, experts: Sequence[int], planes_JP: Ints, level: int) -> ExpertJobs:
        """Jobs for these experts, whose planes lie at the addresses `planes_JP`."""
        count = len(experts)
        if count == self._per_row == len(self._places_P) and experts == self.used:  # one row and all its experts
            places = self._places_P.astype(np.int32)
            starts = np.arange(count + 1, dtype=np.int32)
            rows = np.zeros(count, dtype=np.int32)
        else:
            places = np.concatenate([self.places_of(expert) for expert in experts], dtype=np.int32)
            starts = np.zeros(count + 1, dtype=np.int32)
            self.counts_E[list(experts)].cumsum(out=starts[1:])
            rows = places // np.int32(self._per_row)
        return ExpertJobs(planes_JP, np.full(count, level, dtype=np.int32), starts, rows, places)
