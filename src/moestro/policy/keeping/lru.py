"""Least recently used, of experts: the twin of `policy/lru.py`, and what other policies are compared with."""

from __future__ import annotations

from moestro.policy.keeping.keeper import Keeper, used
from moestro.policy.observation import Routing, Shape


class LRU(Keeper):
    """Worth is the time of the last use or load, in layers visited. A prompt's rows count like any."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self._now = 0

    def observe(self, routing: Routing, /) -> None:
        """O(K)."""
        self._now += 1
        self._worth_LE[routing.layer, used(routing)] = self._now

    def loaded(self, layer: int, expert: int, /) -> None:
        """A prefetched expert is as young as a used one, or it would leave before its use."""
        self._worth_LE[layer, expert] = self._now
