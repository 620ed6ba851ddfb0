"""Slots of a plane cache, lent to compiled code that reads into them what a forward pass lacks.

Part of the plane cache (`PlaneCache.lending`) and under its lock, in a file of its own for its length. Between `lend`
and `take_back` nobody may ask the cache for planes; what was read is put down layer by layer, as policies hear of it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from moestro import _native
from moestro.errors import PlaneReadError
from moestro.keys import PlaneExtent, PlaneKey
from moestro.memory.arena import Slot
from moestro.memory.planes import NEVER, HeldPlane, read_of
from moestro.memory.transfer import TransferEngine

if TYPE_CHECKING:
    from moestro.memory.plane_cache import PlaneCache


_TAKEN_BACK = _native.FetchKind.TAKEN_BACK


class Fetched(NamedTuple):
    """An expert that was asked for, in the slot at `place` of those lent; times by the engine's clock, the last two 0
    where it was taken back or the read failed."""

    layer: int
    expert: int
    place: int
    kind: _native.FetchKind
    asked: float
    begun: float
    ended: float


class Visit(NamedTuple):
    """A layer that routed at a time: whether it had to wait for reads, and what the next router named, if asked."""

    layer: int
    routed: float
    reading: bool
    candidates: list[int]


@dataclass(frozen=True)
class Fetches:
    """What was asked for while slots were lent, in this order, the layers meanwhile, and how long they waited."""

    fetched: Sequence[Fetched] = ()
    visits: Sequence[Visit] = ()
    waited_s: float = 0.0

    def demand(self, layer: int) -> list[Fetched]:
        """What the layer lacked, and nobody had read ahead."""
        return [one for one in self.fetched if one.layer == layer and one.kind is _native.FetchKind.DEMAND]

    def ahead(self, layer: int) -> list[Fetched]:
        """What had been read ahead for the layer."""
        return [one for one in self.fetched if one.layer == layer and one.kind is not _native.FetchKind.DEMAND]

    @property
    def missed(self) -> int:
        """How many experts were not there when their layers were visited."""
        visited = {visit.layer for visit in self.visits}
        waited_for = (_native.FetchKind.DEMAND, _native.FetchKind.LATE)
        return sum(one.kind in waited_for and one.layer in visited for one in self.fetched)


class Lending:
    """Lends slots to `fetching`, each for all planes of an expert.

    Experts are read there that have been found right before. Those that are due to be checked again are when they are
    put down, if they still lie there: what has been computed with them meanwhile is to be thrown away when they are
    damaged.
    """

    def __init__(self, cache: PlaneCache, transfers: TransferEngine, experts: Sequence[int], address: int) -> None:
        """`experts`: how many each layer has; `address`: of the bytes in which planes are held."""
        self._cache, self._transfers, self._address = cache, transfers, address
        self._extents = [
            [cache.extents((layer, expert, 0)) for expert in range(count)] for layer, count in enumerate(experts)
        ]
        self._inner = [_inner_of(extents[0]) for extents in self._extents]
        self._nbytes = max(nbytes for *_, nbytes in self._inner)
        self._unread_LE = np.zeros((len(experts), max(experts)), dtype=np.uint8)
        self._lends = False
        self._lent: list[tuple[Slot, PlaneKey | None]] = []
        self._owed: dict[tuple[int, int, float], Fetched] = {}  # what has been taken back, and not been put down
        self._lasts: dict[int, Fetched] = {}  # by place, what was read there last
        self._gone: set[PlaneKey] = set()  # planes evicted since, by what was put down
        self.fetching = _native.Fetching(transfers.queue, self._unread_LE.ctypes.data, *self._unread_LE.shape)
        for layer in range(len(experts)):
            self._shelve(layer)

    @staticmethod
    def serves(cache: PlaneCache, chains: Sequence[Sequence[tuple[PlaneKey, ...]]]) -> bool:
        """Whether each expert of a model has one slot, and all have slots of one size."""
        if any(len(cache.slots_of(chain)) > 1 for layer in chains for chain in layer):
            return False
        sizes = {_inner_of(cache.extents(chain[0]))[-1] for layer in chains for chain in layer}
        return len({cache.slot_bytes(nbytes) for nbytes in sizes}) == 1

    def _shelve(self, layer: int) -> None:
        extents = self._extents[layer]
        file, (*inner, nbytes) = extents[0][0].file, self._inner[layer]
        assert all(one[0].file == file and _inner_of(one) == self._inner[layer] for one in extents), layer
        descriptor = self._transfers.reader.descriptor(file)
        self.fetching.shelve(layer, descriptor, nbytes, [one[0].offset for one in extents], inner)

    def left(self, key: PlaneKey) -> None:
        """A plane is not held any more."""
        layer, expert, plane = key
        if plane == 0:
            first = self._extents[layer][expert][0]
            self._unread_LE[layer, expert] = self._transfers.reader.is_known(first.file, first.offset)

    def held(self, key: PlaneKey) -> None:
        """A plane has a slot, or is about to have one."""
        layer, expert, plane = key
        if plane == 0:
            self._unread_LE[layer, expert] = 0

    def lend(self, limits: tuple[list[int], list[int]], *, begins: bool) -> bool:
        """Slots for what a forward pass, which `begins` or goes on, may lack; whether there are any.

        `limits`: as `_native.Fetching.lend` takes them, of what is read ahead.
        """
        assert not self._lends, "slots are lent already"
        cache, self._lent = self._cache, []
        if cache._loading or not self._transfers.direct:
            return False
        if begins:
            cache.give_up(self._nbytes)
        with cache._lock:
            wanted, alloc = cache.given_up.wanted, cache._arena.alloc
            lent = self._lent
            while len(lent) < wanted and (slot := alloc(self._nbytes)) is not None:
                lent.append((slot, None))
            slots = [(self._address + slot.offset, -1, -1, -math.inf) for slot, _ in lent]
            if not cache._loads.is_short(self._nbytes):
                planes = cache._planes.by_key
                # Compiled code knows experts, not what variants add to them.
                for key, worth in cache.given_up:
                    if key[2] == 0 and planes[key].evictable:
                        lent.append((planes[key].slot, key))
                        slots.append((self._address + planes[key].slot.offset, *key[:2], worth))
            given_up = cache.given_up
        self._lends = bool(slots)
        worths = 0 if given_up.worths_LE is None else given_up.worths_LE.ctypes.data
        self.fetching.lend(slots, *limits, worths=worths, rise=given_up.rise)
        return self._lends

    def take_back(self) -> Fetches:
        """Nothing more is read into what was lent; what was is to be `put_down`."""
        cache, fetching = self._cache, self.fetching
        fetched = [Fetched(*one) for one in fetching.fetched]
        visits = [Visit(*one) for one in fetching.visits]
        self._lasts = {one.place: one for one in fetched if one.kind is not _TAKEN_BACK}
        with cache._lock:
            for place, (slot, key) in enumerate(self._lent):
                if key is None and place not in self._lasts:
                    cache._arena.free(slot)
            waits = fetching.waits
            for start, end, begun, late in waits:
                cache.count_wait(start, begun, end, late=late)
        fetching.lend([])
        self._owed, self._gone, self._lends = {_name(one): one for one in fetched}, set(), False
        return Fetches(fetched, visits, waited_s=sum(end - start for start, end, _, _ in waits))

    def put_down(self, fetched: Sequence[Fetched]) -> PlaneReadError | None:
        """These are in memory from now on; their slots' owners are not. Returns what is wrong with one, if anything: it
        is not held then, and what was computed with it is worth nothing."""
        cache, damage = self._cache, None
        with cache._lock:
            cache._step += 1
            for one in fetched:
                del self._owed[_name(one)]
                self._count(one)
                if one.kind is _TAKEN_BACK:
                    continue
                slot, victim = self._lent[one.place]
                if victim is not None:
                    self._gone.add(victim)
                    cache._evict(cache._planes.by_key[victim], keeps_slot=True)
                if one.ended:
                    damage = self._hold(one, slot) or damage
                    self._lent[one.place] = slot, (one.layer, one.expert, 0)
                else:
                    cache._arena.free(slot)
        return damage

    def end(self) -> None:
        """The pass ended with an error: nothing is lent any more, and all that was read is put down."""
        if self._lends:
            self.take_back()
        self.put_down(tuple(self._owed.values()))

    def _count(self, one: Fetched) -> None:
        stats, kind = self._cache._stats, one.kind
        stats.prefetches += kind is not _native.FetchKind.DEMAND
        stats.cancelled_prefetches += kind is _TAKEN_BACK
        stats.late_prefetches += kind is _native.FetchKind.LATE
        stats.failed_prefetches += kind is _native.FetchKind.AHEAD and not one.ended

    def _hold(self, one: Fetched, slot: Slot) -> PlaneReadError | None:
        cache, extents = self._cache, self._extents[one.layer][one.expert]
        key, (*inner, nbytes) = (one.layer, one.expert, 0), self._inner[one.layer]
        ahead = one.kind is not _native.FetchKind.DEMAND
        unused = one.kind is _native.FetchKind.AHEAD
        plane = HeldPlane(key, slot, nbytes, NEVER if unused else cache._step, tuple(inner), ahead=ahead)
        if unused:
            cache._ahead.setdefault(one.layer, {})[key] = plane
        cache._hold(plane)
        read = read_of(key, extents, cache._buffer.view(slot.offset, nbytes))
        error = self._transfers.was_fetched(read, is_there=_name(one) == _name(self._lasts[one.place]))
        if cache.watch is not None:
            cache.watch.read(key, 0 if error else nbytes, one.asked, one.begun, one.ended, ahead=ahead)
        if error is not None:
            error.key = key
            cache._drop(plane)
            return error
        cache._stats.bytes_read += nbytes
        cache._stats.prefetched_bytes += nbytes if ahead else 0
        if key in self._gone and cache.on_ahead is not None:
            cache.on_ahead(key)  # it left and came back: where it was was forgotten after where it is was known
        return None


def _name(one: Fetched) -> tuple[int, int, float]:
    return one.layer, one.expert, one.asked


def _inner_of(extents: Sequence[PlaneExtent]) -> list[int]:
    """Where planes begin in a slot, and where the last one ends."""
    return list(itertools.accumulate([extent.nbytes for extent in extents], initial=0))
