"""Requests in flight: a place for each in arrays of state, and one forecast from those of all.

Shapes: S places, R requests, N rows looked at, K experts per row, E experts per layer, H horizons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from moestro.policy.observation import Routing
from moestro.policy.predictors.net import HORIZONS

# The state of a request that has not begun: what is forecast when none is in flight.
NOBODY = 0
assert HORIZONS[0] == 1
assert all(far == 2 * near for near, far in pairwise(HORIZONS)), "`within_each` squares"
# Of a prompt's chunk so many rows, the last ones, are learnt from: bounds the work of a visit.
LEARN_ROWS = 16


class Flight:
    """Which place of the state arrays each request has. Place 0 is nobody's and stays as a fresh request's."""

    def __init__(self) -> None:
        self._place_of: dict[int, int] = {}
        self._free: list[int] = []
        self.size = 1
        self._places_R = np.array([NOBODY])

    def begin(self, request: int) -> int:
        """Its place; `size` is larger than it from now on."""
        assert request not in self._place_of, f"request {request} began twice"
        if not self._free:
            self._free.append(self.size)
            self.size += 1
        self._place_of[request] = place = self._free.pop()
        self._note()
        return place

    def end(self, request: int) -> int:
        """The place that it had."""
        place = self._place_of.pop(request)
        self._free.append(place)
        self._note()
        return place

    def place(self, request: int) -> int:
        return self._place_of[request]

    @property
    def empty(self) -> bool:
        """Whether no request is in flight."""
        return not self._place_of

    @property
    def in_flight(self) -> np.ndarray:
        """[R] places of the requests in flight; [0] when there is none."""
        return self._places_R

    def _note(self) -> None:
        self._places_R = np.array(sorted(self._place_of.values()) or [NOBODY])


def grown(array: np.ndarray, size: int) -> np.ndarray:
    """With at least `size` places on the first axis, new ones like nobody's."""
    if len(array) >= size:
        return array
    more = np.repeat(array[NOBODY : NOBODY + 1], max(size, 2 * len(array)) - len(array), axis=0)
    return np.concatenate((array, more))


_FIRST = np.zeros(1, np.int64)


@dataclass(slots=True)
class Rows:
    """Rows of a visit to learn from, and where each request stands after it.

    `ids_NK` in the order of the requests, of place `places_N`; row `last_R` of them is the last one of the request at
    place `places_R`. `decode`: all rows are decoded ones, and so follow what their request routed the pass before.
    """

    places_N: np.ndarray
    ids_NK: np.ndarray
    weights_NK: np.ndarray
    places_R: np.ndarray
    last_R: np.ndarray
    decode: bool


def rows_of(routing: Routing, flight: Flight) -> Rows:
    """All decoded rows, and the last few of each prompt; the same rows at every layer of a pass."""
    # Numbers of places are made of ids, and would not fit into their type.
    experts_TK = routing.experts_TK.astype(np.int64, copy=False)
    if len(experts_TK) == 1 and len(routing.requests) == 1:
        only = routing.requests[0]
        places_1 = np.array([flight.place(only.request)])
        return Rows(places_1, experts_TK, routing.weights_TK, places_1, _FIRST, only.decode)
    requests = [rows for rows in routing.requests if rows.last > rows.first]
    places_R = np.array([flight.place(rows.request) for rows in requests], np.int64)
    if len(requests) == len(experts_TK):
        decode = all(rows.decode for rows in requests)
        ids_NK, weights_NK = experts_TK, routing.weights_TK
        return Rows(places_R, ids_NK, weights_NK, places_R, np.arange(len(requests)), decode)
    counts_R = [rows.last - rows.first if rows.decode else min(LEARN_ROWS, rows.last - rows.first) for rows in requests]
    picked = [np.arange(rows.last - count, rows.last) for rows, count in zip(requests, counts_R, strict=True)]
    index_N = np.concatenate(picked) if picked else np.zeros(0, np.int64)
    last_R = np.cumsum(counts_R, dtype=np.int64) - 1
    ids_NK, weights_NK = experts_TK[index_N], routing.weights_TK[index_N]
    return Rows(np.repeat(places_R, counts_R), ids_NK, weights_NK, places_R, last_R, decode=False)


def any_of(chance_RE: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
    """[E], or whatever shape follows R: that at least one of R requests uses it, each on its own."""
    if len(chance_RE) == 1:
        return np.asarray(chance_RE[0])
    return np.asarray(1 - np.prod(1 - np.asarray(chance_RE), axis=0))


def within(chance_E: np.ndarray, horizon: int) -> np.ndarray:
    """[E] that at least one of `horizon` visits uses it, when each does with `chance_E`, float32 in [0, 1]."""
    assert horizon >= 1
    if horizon > 1:
        chance_E = 1 - (1 - chance_E) ** horizon
    return np.asarray(np.minimum(np.maximum(chance_E, 0), 1), np.float32)


def within_each(chance_E: np.ndarray) -> np.ndarray:
    """[H, E] `within` each of `HORIZONS`."""
    unused_HE = np.empty((len(HORIZONS), len(chance_E)), np.float32)
    np.subtract(1, np.minimum(np.maximum(chance_E, 0), 1), out=unused_HE[0], casting="same_kind")
    for place in range(1, len(HORIZONS)):
        np.square(unused_HE[place - 1], out=unused_HE[place])
    return np.asarray(np.subtract(1, unused_HE, out=unused_HE))
