"""From the worth of experts to the planes that leave: a `KeepPolicy` as the `EvictionPolicy` of a plane cache.

Shapes: L MoE layers, E experts per layer.
"""

from __future__ import annotations

import numpy as np

from moestro._native import lowest
from moestro.keys import FIRST_DELTA, PlaneKey
from moestro.policy.base import Evictable, Need
from moestro.policy.keeping.base import KeepPolicy
from moestro.policy.observation import Routing, Shape

_AT_ONCE = 8
"""Candidates that are put in order together: a layer of one row rarely needs more."""

_ALL_PLANES = -1
_BASE_PLANES = (1 << FIRST_DELTA) - 1


class WorthEviction:
    """Of the experts held, the one of least worth gives its planes, the top one first.

    Where a chain is of use only whole, an expert that has given a plane gives the others next: its worth is not looked
    at again before the next `observe`. Where its lower planes are of use without the higher ones, `gains_LEP` says what
    part of an expert's worth each plane has, and the plane of least worth goes.

    Planes of variants (from `FIRST_DELTA` on) have the worth of their expert, and are above its others. Those whose bit
    is in `idle`, because no request of their variant runs, go before all else.
    """

    def __init__(self, policy: KeepPolicy, shape: Shape) -> None:
        self._policy = policy
        self._experts = shape.experts
        self._held_X = np.zeros(shape.layers * shape.experts, dtype=np.int64)  # a bit for each plane
        self._absent_X = np.ones(shape.layers * shape.experts, dtype=bool)  # with no plane of the base
        self._bar_X = np.full(shape.layers * shape.experts, np.inf)  # 0 for experts held
        # The same numbers, of which one is read or written in a third of the time.
        self._held, self._absent = self._held_X.data, self._absent_X.data
        self._layer = 0
        self._candidates: list[tuple[int, int]] = []  # experts, and a bit for each plane that is meant
        self.gains_LEP: np.ndarray | None = None
        self.idle = 0

    def begin(self, request: int) -> None:
        """A request's first forward pass is about to run."""
        self._policy.begin(request)

    def end(self, request: int) -> None:
        """Nothing more comes of this request."""
        self._policy.end(request)

    def absent(self, layer: int) -> np.ndarray:
        """[E] bool: experts of which no plane of the base is held or on its way."""
        return self._absent_X[layer * self._experts : (layer + 1) * self._experts].copy()

    def observe(self, routing: Routing) -> None:
        """A layer has routed: to be told before its planes are asked for."""
        self._layer = routing.layer
        self._candidates = []
        self._policy.observe(routing)

    def on_load(self, key: PlaneKey, _nbytes: int) -> None:
        layer, expert, plane = key
        index = layer * self._experts + expert
        held = self._held[index]
        if not held:
            self._bar_X[index] = 0
            self._policy.loaded(layer, expert)
        self._hold(index, held | 1 << plane)

    def on_use(self, key: PlaneKey) -> None:
        """Uses are known from `observe`."""

    def on_evict(self, key: PlaneKey) -> None:
        layer, expert, plane = key
        index = layer * self._experts + expert
        held = self._held[index] & ~(1 << plane)
        self._hold(index, held)
        if not held:
            self._bar_X[index] = np.inf
            self._policy.evicted(layer, expert)

    def _hold(self, index: int, planes: int) -> None:
        self._held[index] = planes
        self._absent[index] = not planes & _BASE_PLANES

    def victim(self, _need: Need, evictable: Evictable) -> PlaneKey | None:
        key = self._first_idle(evictable) if self.idle else None
        if key is None:
            key = self._first(self._candidates, evictable)
        wanted = _AT_ONCE
        while key is None:
            self._candidates = self._in_order(wanted)
            key = self._first(self._candidates, evictable)
            if len(self._candidates) < wanted:
                break
            wanted *= 8
        return key

    def victims(self, count: int, evictable: Evictable) -> list[PlaneKey]:
        if self.idle or not self._lasts:
            return []
        keys = [self._first([candidate], evictable) for candidate in self._in_order(count)]
        return [key for key in keys if key is not None]

    def worths(self) -> np.ndarray | None:
        return self._policy.worth(self._layer).astype(np.float64) if self._lasts else None

    @property
    def _lasts(self) -> bool:
        """Whether what experts are worth changes little in a forward pass."""
        return self.gains_LEP is None and self._policy.lasting

    def _in_order(self, wanted: int) -> list[tuple[int, int]]:
        """So many of the experts held, or of planes, by rising worth; the lowest number first."""
        if self.gains_LEP is not None and self._policy.proportional:
            return self._planes_in_order(self.gains_LEP, wanted)
        own_X = self._policy.worth(self._layer).reshape(-1)
        if self._bar_X.dtype != own_X.dtype:
            self._bar_X = self._bar_X.astype(own_X.dtype)
        return [(index, _ALL_PLANES) for index in lowest(own_X, self._bar_X, wanted)]

    def _planes_in_order(self, gains_LEP: np.ndarray, wanted: int) -> list[tuple[int, int]]:
        """Among equals the top plane first. A variant's plane is of use as long as its expert's lowest is."""
        above = int(np.bitwise_or.reduce(self._held_X)).bit_length() - gains_LEP.shape[2]
        if above > 0:
            gains_LEP = np.concatenate([gains_LEP, np.repeat(gains_LEP[:, :, :1], above, axis=2)], axis=2)
        most = gains_LEP.shape[2]
        held_XP = (self._held_X[:, None] >> np.arange(most)[::-1]) & 1
        worth_XP = self._policy.worth(self._layer).reshape(-1, 1) * gains_LEP.reshape(-1, most)[:, ::-1]
        bar_XP = np.where(held_XP, 0.0, np.inf)
        places = (divmod(place, most) for place in lowest(worth_XP.reshape(-1), bar_XP.reshape(-1), wanted))
        return [(index, 1 << (most - 1 - below)) for index, below in places]

    def _first_idle(self, evictable: Evictable) -> PlaneKey | None:
        """Of the planes that no request needs, the first that may go, of the experts of least worth first."""
        found_J = np.flatnonzero(self._held_X & self.idle)
        if not len(found_J):
            return None
        order_J = self._policy.worth(self._layer).reshape(-1)[found_J].argsort(kind="stable")
        return self._first([(int(index), self.idle) for index in found_J[order_J]], evictable)

    def _first(self, candidates: list[tuple[int, int]], evictable: Evictable) -> PlaneKey | None:
        for index, meant in candidates:
            held = self._held[index] & meant
            while held:
                plane = held.bit_length() - 1
                key = index // self._experts, index % self._experts, plane
                if key in evictable:
                    return key
                held &= ~(1 << plane)
        return None
