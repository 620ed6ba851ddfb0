"""A step's rows, grouped by the expert that they are routed to and the level that it is applied at.

Shapes: T rows of the batch, K experts per row, P = T * K places of the output, E experts of the layer, G groups, J of
them used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from moestro.kernels.base import ExpertJobs

Ints = NDArray[np.int64]


class Grouping:
    """Who goes where. `used` are the groups with rows, the busiest first, so that they load first.

    A place is a (row, k) pair: row of the batch times K plus k. Ids at or above the number of experts are the "no
    expert" marks of expert-parallel routers and have no group. Without `levels_TK` there is one level and a group is an
    expert (`of_experts`); with it, `levels_TK` are numbers that start with 1 for the first of `bits`, and 0 leaves an
    expert out.
    """

    __slots__ = ("_counts_G", "_flat_P", "_per_row", "_sorted", "bits", "counts_E", "of_experts", "used")

    def __init__(
        self, index_TK: Ints, experts: int, *, bits: Sequence[int] = (0,), levels_TK: Ints | None = None
    ) -> None:
        flat_P = index_TK.ravel()
        self.counts_E = np.bincount(flat_P, minlength=experts)[:experts]
        self.of_experts = levels_TK is None
        self.bits = tuple(bits)
        if levels_TK is None:
            assert len(bits) == 1
            self._counts_G = self.counts_E
        else:
            groups, level_P = experts * len(bits), levels_TK.ravel()
            flat_P = np.where((level_P > 0) & (flat_P < experts), flat_P * len(bits) + level_P - 1, groups)
            self._counts_G = np.bincount(flat_P, minlength=groups)[:groups]
        self._per_row, self._flat_P = index_TK.shape[1], flat_P
        self._sorted: tuple[Ints, Ints] | None = None
        used_J = self._counts_G.nonzero()[0]
        if index_TK.shape[0] > 1:
            used_J = used_J[(-self._counts_G[used_J]).argsort(kind="stable")]
        self.used: list[int] = used_J.tolist()

    def covers(self, places: int) -> bool:
        """Whether every one of all `places` belongs to a group."""
        return int(self._counts_G.sum()) == places

    def by_place(self) -> Ints:
        """The group of each place [T, K], -1 of those that have none."""
        groups_P = np.where(self._flat_P < len(self._counts_G), self._flat_P, -1)
        return groups_P.reshape(-1, self._per_row)

    def _by_group(self) -> tuple[Ints, Ints]:
        """The places [P] by group, and where each group [G] ends among them. Not asked for in most small steps."""
        if self._sorted is None:
            self._sorted = self._flat_P.argsort(kind="stable"), self._counts_G.cumsum()
        return self._sorted

    def expert_of(self, group: int) -> int:
        """The expert of a group."""
        return group // len(self.bits)

    def level_of(self, group: int) -> int:
        """The number of a group's level, from 1."""
        return group % len(self.bits) + 1

    def bits_of(self, group: int) -> int:
        """The level of a group, in bits."""
        return self.bits[group % len(self.bits)]

    def places_of(self, group: int) -> Ints:
        """The places of one group, ascending."""
        places_P, ends_G = self._by_group()
        end = ends_G[group]
        return places_P[end - self._counts_G[group] : end]

    def rows_of(self, group: int) -> Ints:
        """The rows of the batch that are in one group, ascending."""
        rows: Ints = self.places_of(group) // self._per_row
        return rows

    def rows_of_expert(self, expert: int) -> Ints:
        """The rows of the batch that are computed with one expert, at whatever level."""
        first = expert * len(self.bits)
        return np.concatenate([self.rows_of(group) for group in range(first, first + len(self.bits))])

    def stretches(self, bounds: Ints) -> Iterator[tuple[int, int, int, int]]:
        """(group, number, first, end): rows `first` to `end` of a group are rows of the batch from `bounds[number]` to
        the next bound. Bounds ascend, and rows before the first of them are left out."""
        places_P, ends_G = self._by_group()
        total = int(ends_G[-1])
        number_P = np.searchsorted(bounds, places_P[:total] // self._per_row, side="right") - 1
        group_P = np.repeat(np.arange(len(self._counts_G)), self._counts_G)
        starts_S = np.flatnonzero(np.diff(group_P * (len(bounds) + 1) + number_P, prepend=-2))
        ends_S = np.append(starts_S[1:], total)
        group_S = group_P[starts_S]
        before_S = (ends_G - self._counts_G)[group_S]
        kept = number_P[starts_S] >= 0
        parts = (group_S, number_P[starts_S], starts_S - before_S, ends_S - before_S)
        return zip(*(part[kept].tolist() for part in parts), strict=True)

    def jobs(self, groups: Sequence[int], planes_JP: Ints) -> ExpertJobs:
        """Jobs for these groups, whose experts' planes lie at the addresses `planes_JP`."""
        count = len(groups)
        if count == self._per_row == len(self._flat_P) and groups == self.used:  # one row and all its experts
            places = self._by_group()[0].astype(np.int32)
            starts = np.arange(count + 1, dtype=np.int32)
            rows = np.zeros(count, dtype=np.int32)
        else:
            places = np.concatenate([self.places_of(group) for group in groups], dtype=np.int32)
            starts = np.zeros(count + 1, dtype=np.int32)
            self._counts_G[list(groups)].cumsum(out=starts[1:])
            rows = places // np.int32(self._per_row)
        levels = np.array([self.bits_of(group) for group in groups], dtype=np.int32)
        return ExpertJobs(planes_JP, levels, starts, rows, places)
