"""What the plane cache keeps about its planes: one record per plane held, the counters, the policy's view."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from moestro.keys import FIRST_DELTA, PlaneExtent, PlaneKey
from moestro.memory.arena import Arena, Slot
from moestro.memory.tickets import Notice, Read, Ticket

Chain = tuple[PlaneKey, ...]
"""The planes of one expert that are needed together, base first."""


@dataclass(frozen=True, slots=True)
class MissingChain:
    """A chain that a stream has to wait for: its index among those asked for, and the bytes that have to be read."""

    index: int
    nbytes: int


Arrange = Callable[[Sequence[MissingChain]], list[int]]
"""The positions of missing chains in the order in which they are to be read, each once."""


@dataclass(slots=True)
class CacheStats:
    """Counts since the cache was made.

    `hits` + `misses` is the number of distinct chains that streams asked for; a chain of which a plane is missing is a
    miss. `late_prefetches`: planes whose read was under way when they were asked for; `cancelled_prefetches`: those
    whose read had not begun when their layer asked for other experts. `evictions`: planes that left to
    make room; `wasted_prefetches`: of these, the prefetched ones that nothing had asked for. `stall_seconds`: time a
    consumer waited for data with no chain at hand; `late_stall_seconds`: of it, waits that ended with the arrival of a
    plane whose read had been begun ahead. `bytes_read` counts the bytes of planes that arrived, `prefetched_bytes`
    those of planes that had been asked for ahead, `wasted_bytes` those of wasted prefetches.
    """

    hits: int = 0
    misses: int = 0
    late_prefetches: int = 0
    prefetches: int = 0
    cancelled_prefetches: int = 0
    wasted_prefetches: int = 0
    failed_prefetches: int = 0
    evictions: int = 0
    bytes_read: int = 0
    prefetched_bytes: int = 0
    wasted_bytes: int = 0
    stall_seconds: float = 0.0
    late_stall_seconds: float = 0.0


class Buffer(Protocol):
    """Memory that planes are read into."""

    def view(self, offset: int, nbytes: int, /) -> memoryview: ...


class Watch(Protocol):
    """Is told, in seconds of the transfer engine's clock, of waits, by the thread that waited and with the cache's lock
    held, and of reads, by the thread that read."""

    def waited(self, start: float, begun: float, end: float, /, *, late: bool) -> None:
        """For a read that began at `begun`, and was queued ahead of the demand if `late`."""

    def read(self, key: PlaneKey, nbytes: int, submitted: float, begun: float, ended: float, /, *, ahead: bool) -> None:
        """A plane; 0 bytes where it could not be read."""


class Told(Protocol):
    """Is told of the chains of a stream, in whichever thread finds out and with the cache's lock held; must not
    block."""

    def whole(self, index: int, offsets: tuple[int, ...], /) -> None:
        """The chain at `index` of those asked for is in memory, its planes at these byte offsets of the buffer."""

    def failed(self) -> None:
        """One cannot be read."""

    def notice(self, index: int, offsets: tuple[int, ...], /) -> Notice:
        """What a read gives that makes a chain whole by itself; `whole` may follow."""


NEVER = -1
"""The step of a plane that was prefetched and that no stream has asked for."""


@dataclass(slots=True, eq=False)
class HeldPlane:
    """A plane that has a slot: loading while it has a ticket, else resident. Leases count who may not lose it.

    `step` is the number of the last stream that asked for it; `ahead` says that it was read before any did. `inner` is
    where its bytes begin in the slot, and those of the planes that share it.
    """

    key: PlaneKey
    slot: Slot
    nbytes: int
    step: int
    inner: tuple[int, ...] = (0,)
    ahead: bool = False
    leases: int = 0
    ticket: Ticket | None = None

    @property
    def evictable(self) -> bool:
        return self.leases == 0 and self.ticket is None

    def offsets(self) -> tuple[int, ...]:
        """Where the planes of the slot lie in the arena."""
        offset = self.slot.offset
        return tuple([offset + inner for inner in self.inner])


@dataclass(slots=True, eq=False)
class WantedChain:
    """A chain on its way through a stream: its planes leased so far, and how many of these are still being read."""

    index: int
    keys: Chain
    leased: list[HeldPlane]
    missing: int = 0

    def offsets(self) -> tuple[int, ...]:
        """Where the planes lie in the arena."""
        return tuple([offset for plane in self.leased for offset in plane.offsets()])


class Planes:
    """All planes held, by key and by place."""

    def __init__(self, arena: Arena) -> None:
        self.by_key: dict[PlaneKey, HeldPlane] = {}
        self._arena = arena
        self._by_offset: dict[int, HeldPlane] = {}

    def add(self, plane: HeldPlane) -> None:
        self.by_key[plane.key] = plane
        self._by_offset[plane.slot.offset] = plane

    def remove(self, plane: HeldPlane) -> None:
        del self.by_key[plane.key], self._by_offset[plane.slot.offset]

    def slot_bytes(self, nbytes: int) -> int:
        """Size of the slot class that serves planes of `nbytes`."""
        return self._arena.slot_bytes(nbytes)

    def sharing_extent(self, plane: HeldPlane) -> list[HeldPlane]:
        """The planes in the extent of this plane, itself among them."""
        return [self._by_offset[slot.offset] for slot in self._arena.taken(plane.slot.extent)]

    def to_evict_for(self, nbytes: int, victim: HeldPlane) -> list[HeldPlane]:
        """What must leave so that the victim's place can serve a plane of `nbytes`; empty when that cannot be.

        A victim of the same slot class leaves alone; of another class, its whole extent must leave, to be reassigned.
        """
        if not victim.evictable:
            return []
        if victim.slot.nbytes == self._arena.slot_bytes(nbytes):
            return [victim]
        if not self._arena.slots_per_extent(victim.slot.extent, nbytes):
            return []
        neighbours = self.sharing_extent(victim)
        return neighbours if all(plane.evictable for plane in neighbours) else []


@dataclass(frozen=True, slots=True)
class Either:
    """What is in one or the other."""

    one: Container[PlaneKey]
    other: Container[PlaneKey]

    def __contains__(self, key: object) -> bool:
        return key in self.one or key in self.other


class EvictableView:
    """`policy.Evictable` for a need of `nbytes`; keys in `keep` are withheld.

    `any_class` false leaves only planes that free one slot of the class in need: a plane of another class costs all its
    extent, and a policy looks at one plane at a time.
    """

    def __init__(self, planes: Planes, nbytes: int, keep: Container[PlaneKey], *, any_class: bool = True) -> None:
        self._planes = planes
        self._nbytes = nbytes
        self._keep = keep
        self._only_class = None if any_class else planes.slot_bytes(nbytes)

    def __contains__(self, key: object) -> bool:
        plane = self._planes.by_key.get(key)  # type: ignore[call-overload]
        return plane is not None and not self._kept(plane)

    def __iter__(self) -> Iterator[PlaneKey]:
        return (plane.key for plane in tuple(self._planes.by_key.values()) if not self._kept(plane))

    def nbytes(self, key: PlaneKey) -> int:
        return self._planes.by_key[key].slot.nbytes

    def _kept(self, plane: HeldPlane) -> bool:
        if self._only_class is not None and plane.slot.nbytes != self._only_class:
            return True
        leaving = self._planes.to_evict_for(self._nbytes, plane)
        return not leaving or any(other.key in self._keep for other in leaving)


class RecentLoads:
    """Bytes loaded of late, by slot class."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._loaded: Counter[int] = Counter()

    def is_short(self, nbytes: int) -> bool:
        """Whether the class of planes of `nbytes` has less than half of what its part of the loads suggests."""
        arena, size = self._arena, self._arena.slot_bytes(nbytes)
        loaded = self._loaded[size] + size
        return 2 * arena.used_by(size) * (self._loaded.total() + size) < loaded * arena.nbytes

    def count(self, size: int) -> None:
        """A slot of this size is being loaded."""
        self._loaded[size] += size
        if self._loaded.total() > 4 * self._arena.nbytes:
            for each in self._loaded:
                self._loaded[each] //= 2


def read_of(
    key: PlaneKey, extents: Sequence[PlaneExtent], destination: memoryview, notice: Notice | None = None
) -> Read:
    """Of the planes in the slot of `key`, which lie one after another."""
    first, last, nbytes = extents[0], extents[-1], sum([extent.nbytes for extent in extents])
    layer, expert, plane = key
    what = f"Plane {plane}" if plane < FIRST_DELTA else "The variant's plane"
    if len(extents) > 1:
        what = f"Planes 0 to {len(extents) - 1}"
        assert last.file == first.file, key
        assert last.offset + last.nbytes - first.offset == nbytes, key
    label = f"{what} of expert {expert} of MoE layer {layer}"
    checksums = tuple([(extent.nbytes, extent.checksum) for extent in extents])
    return Read(first.file, first.offset, nbytes, destination, checksums, label, notice)
