"""From the worth of experts to the planes that leave: a `KeepPolicy` as the `EvictionPolicy` of a plane cache.

Shapes: L MoE layers, E experts per layer.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moestro.keys import PlaneKey
from moestro.policy.base import Evictable, Need
from moestro.policy.keeping.base import KeepPolicy
from moestro.policy.observation import Routing, Shape

_AT_ONCE = 32
"""Candidates that are put in order together: a layer of one row rarely needs more."""


class WorthEviction:
    """Of the experts held, the one of least worth gives its planes, the top one first.

    A chain is of use only whole, so an expert that has given a plane gives the others next: its worth is not looked at
    again before the next `observe`.
    """

    def __init__(self, policy: KeepPolicy, shape: Shape) -> None:
        self._policy = policy
        self._experts = shape.experts
        self._held_X = np.zeros(shape.layers * shape.experts, dtype=np.int64)  # a bit for each plane
        self._layer = 0
        self._candidates: list[int] = []

    def begin(self, request: int) -> None:
        """A request's first forward pass is about to run."""
        self._policy.begin(request)

    def end(self, request: int) -> None:
        """Nothing more comes of this request."""
        self._policy.end(request)

    def absent(self, layer: int) -> np.ndarray:
        """[E] bool: experts of which no plane is held or on its way."""
        held_E: np.ndarray = self._held_X[layer * self._experts : (layer + 1) * self._experts]
        return np.asarray(held_E == 0)

    def observe(self, routing: Routing) -> None:
        """A layer has routed: to be told before its planes are asked for."""
        self._layer = routing.layer
        self._candidates = []
        self._policy.observe(routing)

    def on_load(self, key: PlaneKey, _nbytes: int) -> None:
        layer, expert, plane = key
        index = layer * self._experts + expert
        if not self._held_X[index]:
            self._policy.loaded(layer, expert)
        self._held_X[index] |= 1 << plane

    def on_use(self, key: PlaneKey) -> None:
        """Uses are known from `observe`."""

    def on_evict(self, key: PlaneKey) -> None:
        layer, expert, plane = key
        index = layer * self._experts + expert
        self._held_X[index] &= ~(1 << plane)
        if not self._held_X[index]:
            self._policy.evicted(layer, expert)

    def victim(self, _need: Need, evictable: Evictable) -> PlaneKey | None:
        key = self._first(self._candidates, evictable)
        wanted = _AT_ONCE
        while key is None:
            self._candidates = self._in_order(wanted)
            key = self._first(self._candidates, evictable)
            if wanted >= np.count_nonzero(self._held_X):
                break
            wanted *= 8
        return key

    def _in_order(self, wanted: int) -> list[int]:
        """So many of the experts held, by rising worth; the lowest number first among equals."""
        held = np.flatnonzero(self._held_X)
        worth = self._policy.worth(self._layer).reshape(-1)[held]
        if wanted < len(held):
            least = np.argpartition(worth, wanted - 1)[:wanted]
            least.sort()
            held, worth = held[least], worth[least]
        order: list[int] = held[np.argsort(worth, kind="stable")].tolist()
        return order

    def _first(self, candidates: list[int], evictable: Evictable) -> PlaneKey | None:
        return next((key for index in candidates for key in self._planes(index) if key in evictable), None)

    def _planes(self, index: int) -> Iterator[PlaneKey]:
        layer, expert = divmod(index, self._experts)
        held = int(self._held_X[index])
        while held:
            plane = held.bit_length() - 1
            yield layer, expert, plane
            held &= ~(1 << plane)
