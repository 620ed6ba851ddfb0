"""Which bytes of a tier's memory are whose. Pure bookkeeping: offsets only, whatever the device.

The memory is cut into extents. An empty extent belongs to nobody; the first slot taken from it gives it to one slot
class (all its slots have one size) until the last of them is freed. Bytes thus move between plane sizes without
fragmenting. The last extent may be shorter than the others, so no budget is lost to rounding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moestro.memory.pages import HUGE_PAGE, PAGE, round_up


@dataclass(frozen=True, slots=True)
class Slot:
    """`nbytes` bytes of the arena from `offset` (a multiple of 4096), in extent number `extent`."""

    offset: int
    nbytes: int
    extent: int


def extent_bytes_for(slot_sizes: Sequence[int]) -> int:
    """The extent size for these slot sizes: about 2 MiB, at least one slot of each, a multiple of 4096, least waste.

    With several sizes an extent is no more than about eight of the largest slots, so that few extents already serve all
    classes. Waste is the share of an extent that its slots leave over, for the worst class; among equals the smallest
    extent wins. Looks up to four times the least size: a larger extent is harder to empty.
    """
    sizes = _slot_classes(slot_sizes)
    least = max(HUGE_PAGE, sizes[-1]) if len(sizes) == 1 else max(min(HUGE_PAGE, 8 * sizes[-1]), sizes[-1])
    candidates = {round_up(least, PAGE)}
    for size in sizes:
        candidates.update(range(round_up(least, size), 4 * least + 1, size))
    return min(candidates, key=lambda extent: (max(extent % size / extent for size in sizes), extent))


def least_bytes_for(chain: Sequence[int], extent_bytes: int) -> int:
    """The least arena in which planes of all these sizes can be held at once, whatever else was held before.

    Several classes take whole extents of their own: the last, shorter extent of an arena is not counted on.
    """
    counts = Counter(chain)
    if len(counts) == 1:
        ((size, count),) = counts.items()
        full, rest = divmod(count, extent_bytes // size)
        return full * extent_bytes + rest * size
    return extent_bytes * sum(-(-count // (extent_bytes // size)) for size, count in counts.items())


class Arena:
    """Slots in `nbytes` bytes, each of one of `slot_sizes` (multiples of 4096, none above `extent_bytes`)."""

    def __init__(self, nbytes: int, extent_bytes: int, slot_sizes: Sequence[int]) -> None:
        assert nbytes >= 0, nbytes
        assert extent_bytes >= PAGE, extent_bytes
        assert extent_bytes % PAGE == 0, extent_bytes
        self.slot_sizes = _slot_classes(slot_sizes)
        assert self.slot_sizes[-1] <= extent_bytes, (self.slot_sizes, extent_bytes)
        self.nbytes = nbytes
        """Bytes of the extents in use, all at first."""
        self.extent_bytes = extent_bytes
        self.used_bytes = 0
        self._used = dict.fromkeys(self.slot_sizes, 0)
        self._extent_sizes = [min(extent_bytes, nbytes - start) for start in range(0, nbytes, extent_bytes)]
        self._open_extents = len(self._extent_sizes)
        self._empty = dict.fromkeys(range(len(self._extent_sizes)))
        self._free: dict[int, list[int]] = {}  # extent in use -> offsets of its free slots
        self._taken: dict[int, dict[int, Slot]] = {}  # extent in use -> its slots in use, by offset
        # class -> number of free slots -> extents: the fullest are filled first, so that others run empty
        self._open: dict[int, dict[int, dict[int, None]]] = {size: {} for size in self.slot_sizes}

    @property
    def reserved_bytes(self) -> int:
        """Bytes of all extents, in use or not."""
        return sum(self._extent_sizes)

    def add_class(self, slot_bytes: int) -> None:
        """Have slots of another size, too, at most `extent_bytes`."""
        if slot_bytes not in self.slot_sizes:
            self.slot_sizes = _slot_classes([*self.slot_sizes, slot_bytes])
            assert self.slot_sizes[-1] <= self.extent_bytes, (self.slot_sizes, self.extent_bytes)
            self._used[slot_bytes], self._open[slot_bytes] = 0, {}

    def resize(self, nbytes: int) -> None:
        """Use only as many whole extents, from the first on, as `nbytes` hold (all of them where that is no limit).

        Slots in use beyond stay until they are freed; no other is taken there.
        """
        count = min(len(self._extent_sizes), nbytes // self.extent_bytes)
        if nbytes >= sum(self._extent_sizes):
            count = len(self._extent_sizes)
        for extent in range(min(count, self._open_extents), max(count, self._open_extents)):
            opens = extent < count
            if extent in self._taken:
                size, free = next(iter(self._taken[extent].values())).nbytes, len(self._free[extent])
                self._move(size, extent, 0 if opens else free, free if opens else 0)
            elif opens:
                self._empty[extent] = None
            else:
                del self._empty[extent]
        self._open_extents = count
        self.nbytes = sum(self._extent_sizes[:count])

    def is_open(self, slot: Slot) -> bool:
        """Whether the slot lies in an extent that may be used."""
        return slot.extent < self._open_extents

    def slot_bytes(self, nbytes: int) -> int:
        """Size of the slot that a plane of `nbytes` gets: the smallest class that holds it."""
        for size in self.slot_sizes:
            if nbytes <= size:
                return size
        raise AssertionError(f"no slot class holds {nbytes} bytes: {self.slot_sizes}")

    def used_by(self, nbytes: int) -> int:
        """Bytes in use of the class that serves planes of `nbytes`."""
        return self._used[self.slot_bytes(nbytes)]

    def slots_per_extent(self, extent: int, nbytes: int) -> int:
        """How many planes of `nbytes` this extent holds when it is given to their class."""
        return self._extent_sizes[extent] // self.slot_bytes(nbytes)

    def capacity(self, nbytes: int) -> int:
        """How many planes of `nbytes` fit when every extent is given to their class."""
        return sum(size // self.slot_bytes(nbytes) for size in self._extent_sizes[: self._open_extents])

    def taken(self, extent: int) -> Iterator[Slot]:
        """The slots in use in this extent."""
        return iter(tuple(self._taken.get(extent, {}).values()))

    def alloc(self, nbytes: int) -> Slot | None:
        """A slot for `nbytes`, or None when its class has no free slot and no empty extent holds one."""
        size = self.slot_bytes(nbytes)
        extent = self._fullest(size)
        if extent is None and (extent := self._adopt(size)) is None:
            return None
        free = self._free[extent]
        self._move(size, extent, len(free), len(free) - 1)
        slot = Slot(free.pop(), size, extent)
        self._taken[extent][slot.offset] = slot
        self.used_bytes += size
        self._used[size] += size
        return slot

    def free(self, slot: Slot) -> None:
        """Give a slot back; an extent whose last slot is given back may then serve any class."""
        assert self._taken.get(slot.extent, {}).pop(slot.offset, None) == slot, f"{slot} is not in use"
        self.used_bytes -= slot.nbytes
        self._used[slot.nbytes] -= slot.nbytes
        free = self._free[slot.extent]
        free.append(slot.offset)
        used, opened = bool(self._taken[slot.extent]), self.is_open(slot)
        if opened:
            self._move(slot.nbytes, slot.extent, len(free) - 1, len(free) if used else 0)
        if used:
            return
        del self._free[slot.extent], self._taken[slot.extent]
        if opened:
            self._empty[slot.extent] = None

    def _fullest(self, size: int) -> int | None:
        by_free = self._open[size]
        return next(iter(by_free[min(by_free)])) if by_free else None

    def _adopt(self, size: int) -> int | None:
        """Give an empty extent to the class; None when none is empty and large enough."""
        extent = next((extent for extent in self._empty if self._extent_sizes[extent] >= size), None)
        if extent is None:
            return None
        del self._empty[extent]
        start, count = extent * self.extent_bytes, self._extent_sizes[extent] // size
        self._free[extent] = [start + index * size for index in reversed(range(count))]
        self._taken[extent] = {}
        self._move(size, extent, 0, count)
        return extent

    def _move(self, size: int, extent: int, before: int, now: int) -> None:
        """The extent had `before` free slots and has `now`; only those with free slots are listed."""
        by_free = self._open[size]
        if before:
            del by_free[before][extent]
            if not by_free[before]:
                del by_free[before]
        if now:
            by_free.setdefault(now, {})[extent] = None


def _slot_classes(slot_sizes: Sequence[int]) -> tuple[int, ...]:
    sizes = tuple(sorted(set(slot_sizes)))
    assert sizes, "no slot sizes"
    assert all(size > 0 and size % PAGE == 0 for size in sizes), slot_sizes
    return sizes
