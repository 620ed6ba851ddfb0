"""Planes that a policy has given up before anybody needs their slots.

So that a forward pass can take slots without asking for each, where asking takes as long as computing an expert.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moestro.keys import PlaneKey
from moestro.policy.base import Evictable, EvictionPolicy

_LEAST, _MOST = 8, 128
_MEMORY = 1 / 8


class GivenUp:
    """The next victims, as many as passes took of late and half as many again. `loads` counts planes given a slot."""

    def __init__(self) -> None:
        self.loads = 0
        self._of_late = 0.0
        self._keys: dict[PlaneKey, None] = {}

    @property
    def wanted(self) -> int:
        """How many slots a pass may need."""
        return min(_LEAST + int(1.5 * self._of_late), _MOST)

    def renew(self, policy: EvictionPolicy, evictable: Evictable) -> None:
        """A pass begins that takes slots from here."""
        self._of_late += _MEMORY * (self.loads - self._of_late)
        self.loads = 0
        self._keys = dict.fromkeys(policy.victims(self.wanted, evictable))

    def __iter__(self) -> Iterator[PlaneKey]:
        return iter(self._keys)

    def take(self, evictable: Evictable) -> PlaneKey | None:
        """The next one that may go."""
        key = next((key for key in self._keys if key in evictable), None)
        if key is not None:
            self.keep(key)
        return key

    def keep(self, key: PlaneKey) -> None:
        """This one is not given up any more: it has been used, or taken."""
        self._keys.pop(key, None)

    def used(self, first: int, counts_LE: np.ndarray) -> None:
        """Experts of layers from `first` on, those with a count, have been used."""
        for layer, expert, plane in tuple(self._keys):
            if first <= layer < first + len(counts_LE) and counts_LE[layer - first, expert]:
                self.keep((layer, expert, plane))
