"""Least recently used: the plane whose last use (or load) is the longest ago leaves first."""

from __future__ import annotations

from collections import OrderedDict
from itertools import islice

from moestro.keys import PlaneKey
from moestro.policy.base import Evictable, Need


class LRU:
    """O(1) per event; a choice skips the leased planes, which as the ones used last are at the far end."""

    def __init__(self) -> None:
        self._oldest_first: OrderedDict[PlaneKey, None] = OrderedDict()

    def on_load(self, key: PlaneKey, _nbytes: int) -> None:
        self._oldest_first[key] = None
        self._oldest_first.move_to_end(key)

    def on_use(self, key: PlaneKey) -> None:
        if key in self._oldest_first:
            self._oldest_first.move_to_end(key)

    def on_evict(self, key: PlaneKey) -> None:
        del self._oldest_first[key]

    def victim(self, _need: Need, evictable: Evictable) -> PlaneKey | None:
        return next((key for key in self._oldest_first if key in evictable), None)

    def victims(self, count: int, evictable: Evictable) -> list[PlaneKey]:
        return list(islice((key for key in self._oldest_first if key in evictable), count))

    def worths(self) -> None:
        return None
