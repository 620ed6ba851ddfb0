"""What a policy that chooses victims sees and says. Pure: no file, no clock, no thread, no tensor.

The cache tells what happens in the order of demand, not of arrival from disk, so a policy decides the same in the
runtime and in a simulator, however quick the disk is. "Time" is the count of `on_use` calls.

Shapes: L MoE layers, E experts per layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np

from moestro.keys import PlaneKey


class Need(NamedTuple):
    """The plane that wants a slot: `nbytes` of it; `urgent` when a computation waits for it, else a prefetch."""

    key: PlaneKey
    nbytes: int
    urgent: bool


class Evictable(Protocol):
    """The planes that may leave now: resident, not leased, and leaving would make room for the plane in need."""

    def __contains__(self, key: object, /) -> bool:
        """Cheap: a few dictionary look-ups."""
        ...

    def __iter__(self) -> Iterator[PlaneKey]:
        """All of them, in no particular order: linear in the number of planes held."""
        ...

    def nbytes(self, key: PlaneKey, /) -> int:
        """Bytes of the arena that this plane takes."""
        ...


class EvictionPolicy(Protocol):
    """Chooses which plane leaves when another needs room.

    A plane is *held* from `on_load` to `on_evict`; while it is being read, or leased, it is held but not evictable.
    """

    def on_load(self, key: PlaneKey, nbytes: int, /) -> None:
        """The plane was given a slot and its read was issued (demand or prefetch)."""
        ...

    def on_use(self, key: PlaneKey, /) -> None:
        """A computation asks for this plane, held or not: once per step, before the loads that the step causes."""
        ...

    def on_evict(self, key: PlaneKey, /) -> None:
        """The plane lost its slot: chosen as victim, cancelled, or its read failed."""
        ...

    def victim(self, need: Need, evictable: Evictable, /) -> PlaneKey | None:
        """A member of `evictable`, or None when it is empty.

        For a need that is not urgent None may also mean that no plane is worth giving up.
        """
        ...

    def victims(self, count: int, evictable: Evictable, /) -> list[PlaneKey]:
        """At most so many members of `evictable` that will be given up in the next forward pass, in this order.

        Empty where that cannot be said before its layers have routed.
        """
        ...

    def worths(self) -> np.ndarray | None:
        """[L, E] of experts, fp64, a copy: of two, that of less goes first. None where what came last goes last."""
        ...
