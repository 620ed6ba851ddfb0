"""Planes that a policy has given up before anybody needs their slots.

So that a forward pass can take slots without asking for each, where asking takes as long as computing an expert. What
the pass itself loads may be worth less than what would leave for it: so it can be given up in turn, once its layer has
passed. Its worth is taken to be what it was before the pass, and what loading it added to others on average in the one
before: without that, a pass that needs nearly as many slots as there are would leave nothing of what is used often.

Shapes: L layers, E experts per layer.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Iterator

import numpy as np

from moestro.keys import PlaneKey
from moestro.policy.base import Evictable, EvictionPolicy

_LEAST, _MOST = 8, 128
_MEMORY = 1 / 8


class GivenUp:
    """The next victims, as many as passes took of late and half as many again, and what the pass loads.

    Attributes:
        worths_LE: what experts were worth when the pass began; None: what is loaded stays.
        rise: what loading one adds to that.
    """

    def __init__(self) -> None:
        self.worths_LE: np.ndarray | None = None
        self.rise = 0.0
        self._of_late = 0.0
        self._loaded: list[PlaneKey] = []
        self._numbers: dict[PlaneKey, int] = {}
        self._by_worth: list[tuple[float, int, PlaneKey]] = []  # those without their number in `_numbers` are void
        self._named = 0  # numbers from here on are of what has been loaded

    @property
    def wanted(self) -> int:
        """How many slots a pass may need."""
        return min(_LEAST + int(1.5 * self._of_late), _MOST)

    def renew(self, policy: EvictionPolicy, evictable: Evictable) -> None:
        """A pass begins that takes slots from here."""
        self._of_late += _MEMORY * (len(self._loaded) - self._of_late)
        before_LE, worths_LE = self.worths_LE, policy.worths()
        if before_LE is not None and worths_LE is not None and self._loaded:
            layers, experts, _ = zip(*self._loaded, strict=True)
            self.rise = float((worths_LE[layers, experts] - before_LE[layers, experts]).mean())
        self.forget()
        self.worths_LE = worths_LE
        for key in policy.victims(self.wanted, evictable):
            self._offer(key, -math.inf if worths_LE is None else float(worths_LE[key[:2]]))
        self._named = len(self._numbers)

    def forget(self) -> None:
        """A pass begins that asks for each slot."""
        self.worths_LE, self._loaded, self._numbers, self._by_worth = None, [], {}, []

    def loaded(self, key: PlaneKey) -> None:
        """A plane was given a slot."""
        self._loaded.append(key)
        if self.worths_LE is not None:
            self._offer(key, float(self.worths_LE[key[:2]]) + self.rise)

    def _offer(self, key: PlaneKey, worth: float) -> None:
        number = len(self._by_worth)
        self._numbers[key] = number
        insort(self._by_worth, (worth, number, key))

    def __iter__(self) -> Iterator[tuple[PlaneKey, float]]:
        """Planes and their worths, in rising order."""
        return ((key, worth) for worth, number, key in self._by_worth if self._numbers.get(key) == number)

    def take(self, evictable: Evictable, layer: int) -> PlaneKey | None:
        """The next one that may go for a plane of this layer."""
        key = next((key for key, _ in self if self._may_go(key, layer) and key in evictable), None)
        if key is not None:
            self.keep(key)
        return key

    def _may_go(self, key: PlaneKey, layer: int) -> bool:
        """Whether this is not loaded for a layer that is still to be computed."""
        return self._numbers[key] < self._named or key[0] < layer

    def keep(self, key: PlaneKey) -> None:
        """This one is not given up any more: it has been used, or taken."""
        self._numbers.pop(key, None)

    def used(self, first: int, counts_LE: np.ndarray) -> None:
        """Experts of layers from `first` on, those with a count, have been used: of what was named, they stay."""
        for layer, expert, plane in [key for key, number in self._numbers.items() if number < self._named]:
            if first <= layer < first + len(counts_LE) and counts_LE[layer - first, expert]:
                self.keep((layer, expert, plane))
