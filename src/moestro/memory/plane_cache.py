"""The planes held in an arena: who is resident, who is loading, who may not leave.

What a computation asks for are **chains**: the planes of an expert up to some level, which are of use together only.

One lock guards all of it. It is held while a policy is asked and while a read is queued, never during a read. Reads
end in the threads of the transfer engine, which call `_arrived`.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from moestro.keys import FIRST_DELTA, PlaneExtent, PlaneKey
from moestro.memory.arena import Arena
from moestro.memory.given_up import GivenUp
from moestro.memory.moves import resize
from moestro.memory.plane_stream import PlaneStream
from moestro.memory.planes import (
    NEVER,
    Arrange,
    Buffer,
    CacheStats,
    Chain,
    Either,
    EvictableView,
    HeldPlane,
    Planes,
    RecentLoads,
    Told,
    Watch,
    read_of,
)
from moestro.memory.tickets import Notice, Ticket, Transfers
from moestro.policy.base import EvictionPolicy, Need

if TYPE_CHECKING:
    from moestro.memory.lending import Lending


class PlaneCache:
    """Gives one consumer at a time the planes it asks for, from memory or from disk.

    `joined`: of each layer, so many planes of an expert, from the base on, share one slot and are read in one go, so
    that they come and go as one plane, the base: where they are always asked for together, three of everything that is
    done for a plane would be wasted. Empty: each has its own. They have to lie one after another on disk.
    """

    def __init__(
        self,
        *,
        arena: Arena,
        buffer: Buffer,
        engine: Transfers,
        policy: EvictionPolicy,
        locate: Callable[[PlaneKey], PlaneExtent],
        joined: Sequence[int] = (),
    ) -> None:
        self._arena = arena
        self._buffer = buffer
        self._engine = engine
        self._policy = policy
        self.locate = locate
        """Where a plane lies on disk."""
        self._joined = tuple(joined)
        self._planes = Planes(arena)
        self._loading: dict[PlaneKey, HeldPlane] = {}
        self._streams: list[PlaneStream] = []
        self._step = 0  # streams so far
        self._ahead: dict[int, dict[PlaneKey, HeldPlane]] = {}  # by layer: prefetched, not asked for yet
        self.on_gone: Callable[[PlaneKey], None] = lambda _key: None
        """Is told of each plane that leaves its slot, before anything else is put there; must not block."""
        self.on_ahead: Callable[[PlaneKey], None] | None = None
        """Is told, in a thread of the engine, of each plane that has arrived and was read ahead; must not block."""
        self.watch: Watch | None = None
        self._stats = CacheStats()
        self._loads = RecentLoads(arena)
        self.given_up = GivenUp()
        self.lending: Lending | None = None
        """Whoever reads into slots of its own accord; not once planes have a slot each."""
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)

    @property
    def stats(self) -> CacheStats:
        """A copy of the counters."""
        with self._lock:
            return replace(self._stats)

    def resident(self) -> set[PlaneKey]:
        """The keys whose bytes are in memory now."""
        with self._lock:
            return {plane.key for plane in self._planes.by_key.values() if plane.ticket is None}

    def stream(
        self, chains: Sequence[Chain], *, arrange: Arrange | None = None, told: Told | None = None
    ) -> PlaneStream:
        """Lease chains in batches: `with cache.stream(chains) as batches: for batch in batches: ...`.

        A batch is a list of (index in `chains`, byte offsets of the chain's planes in the buffer). Every distinct chain
        comes exactly once, at the index where it is first named: in the first batch all that are resident whole, in
        later ones what has arrived by then. The planes of a batch stay in place until the next step of the iteration,
        or the end. Of a chain that is resident in part only the rest is read.
        `told` hears of chains as they are whole: with no step of the iteration they stay in place until the end.
        Raises PlaneReadError when a plane cannot be read; the cache then is as good as before.
        """
        return PlaneStream(self, chains, arrange, told)

    def held(self, chains: Sequence[Chain]) -> list[int]:
        """How many planes of each chain, from its first on, are in memory or on their way there."""
        with self._lock:
            by_key = self._planes.by_key
            if self._joined:
                return [len(keys) * all(key in by_key for key in self.slots_of(keys)) for keys in chains]
            return [next((place for place, key in enumerate(keys) if key not in by_key), len(keys)) for keys in chains]

    def offsets(self, chain: Chain) -> tuple[int, ...] | None:
        """Where the planes of a chain lie in the buffer; None when some are not in memory."""
        (found,) = self.parts([chain])
        return found if len(found) == len(chain) else None

    def parts(self, chains: Sequence[Chain]) -> list[tuple[int, ...]]:
        """Where the planes of each chain lie in the buffer, from the first on, as far as they are in memory."""
        with self._lock:
            return [tuple(self._offsets_of(self.slots_of(keys))) for keys in chains]

    def _offsets_of(self, keys: Chain) -> Iterator[int]:
        for plane in map(self._planes.by_key.get, keys):
            if plane is None or plane.ticket is not None:
                return
            yield from plane.offsets()

    def used(self, first: int, counts_LE: np.ndarray, *, fetched: int = 0) -> None:
        """Experts of layers from `first` on, those with a count, were used without asking, because nothing of them has
        been dropped since it came; or, so many, because they were fetched into slots that were lent.

        What is queued for others of these layers, that nobody has asked for, is not wanted any more.
        """
        with self._lock:
            self._stats.hits += int(np.count_nonzero(counts_LE)) - fetched
            self._stats.misses += fetched
            self.given_up.used(first, counts_LE)
            for layer in [layer for layer, planes in self._ahead.items() if planes]:
                if not first <= layer < first + len(counts_LE):
                    continue
                ahead, counts_E = self._ahead[layer], counts_LE[layer - first]
                for plane in [plane for key, plane in ahead.items() if counts_E[key[1]] and plane.ticket is None]:
                    plane.step = self._step
                    del ahead[plane.key]
                self._cancel_unwanted([layer])

    def prefetch(self, keys: Sequence[PlaneKey], *, spare: Container[PlaneKey] = ()) -> int:
        """Queue reads of these planes, most wanted first, behind all demand; returns how many were queued.

        Never waits; stops at the first plane for which there is no room, which none of them nor any plane of `spare`
        makes. Does nothing while a stream still has planes to ask for, because those come first.
        """
        with self._lock:
            if any(stream.pending for stream in self._streams):
                return 0
            wanted = dict.fromkeys(self.slots_of(keys))
            keep = Either(wanted, spare) if spare else wanted
            issued = 0
            with self._engine.together():
                for key in wanted:
                    if key not in self._planes.by_key:
                        if self._issue(key, urgent=False, keep=keep) is None:
                            break
                        issued += 1
            self._stats.prefetches += issued
            return issued

    def give_up(self, nbytes: int) -> None:
        """A forward pass begins that may take slots for planes of so many bytes (0: it may not) without asking."""
        with self._lock:
            if nbytes:
                self.given_up.renew(self._policy, EvictableView(self._planes, nbytes, (), any_class=False))
            else:
                self.given_up.forget()

    def count_wait(self, start: float, begun: float, end: float, *, late: bool) -> None:
        """A consumer waited for a read that began at `begun` (0: not known). The lock is held."""
        self._stats.stall_seconds += end - start
        if late:
            self._stats.late_stall_seconds += end - start
        if self.watch is not None:
            self.watch.waited(start, begun or start, end, late=late)

    def settle(self) -> None:
        """Wait until no read is queued or under way."""
        with self._lock:
            while self._loading:
                self._changed.wait()

    def cancel_prefetches(self) -> None:
        """Take back the reads that nobody waits for and that have not begun."""
        with self._lock:
            while self._cancel_a_prefetch():
                pass

    def clear(self) -> None:
        """Forget every plane; waits for reads that have begun. No stream may be open. Not counted as evictions."""
        self.cancel_prefetches()
        with self._lock:
            assert not self._streams, "clear() within a stream"
            while self._loading:
                self._changed.wait()
            for plane in tuple(self._planes.by_key.values()):
                self._drop(plane)

    def drop(self, plane: int) -> None:
        """Forget the planes of this number, of all experts; waits for their reads. No stream may be open."""
        with self._lock:
            assert not self._streams, "drop() within a stream"
            for one in tuple(self._loading.values()):
                if one.key[2] == plane:
                    self._cancel(one)
            while any(key[2] == plane for key in self._loading):
                self._changed.wait()
            for one in [held for key, held in self._planes.by_key.items() if key[2] == plane]:
                self._drop(one)

    @property
    def nbytes(self) -> int:
        """Bytes of the arena that are in use."""
        return self._arena.nbytes

    @property
    def extent_bytes(self) -> int:
        """The size of the arena's extents."""
        return self._arena.extent_bytes

    @property
    def slot_sizes(self) -> tuple[int, ...]:
        """The sizes of the arena's slots, ascending."""
        return self._arena.slot_sizes

    @property
    def joined(self) -> bool:
        """Whether planes of an expert share a slot."""
        return bool(self._joined)

    def slot_bytes(self, nbytes: int) -> int:
        """The size of the slot that planes of so many bytes get."""
        return self._arena.slot_bytes(nbytes)

    def slots_of(self, chain: Sequence[PlaneKey]) -> Chain:
        """The planes of a chain that stand for a slot: all of them, where none share one."""
        return tuple([key for key in chain if not 0 < key[2] < FIRST_DELTA]) if self._joined else tuple(chain)

    def part(self, extent_bytes: int, slot_sizes: Sequence[int]) -> None:
        """Have a slot for each plane from now on. As `recut`, whose arguments these are."""
        self.recut(extent_bytes, slot_sizes)
        self._joined, self.lending = (), None

    def extents(self, key: PlaneKey) -> list[PlaneExtent]:
        """What is read into the slot of a plane."""
        layer, expert, plane = key
        if plane or not self._joined:
            return [self.locate(key)]
        return [self.locate((layer, expert, each)) for each in range(self._joined[layer])]

    def serve_planes_of(self, nbytes: int) -> None:
        """Have slots for planes of so many bytes, at most those of an extent."""
        with self._lock:
            self._arena.add_class(nbytes)

    def recut(self, extent_bytes: int, slot_sizes: Sequence[int]) -> None:
        """Forget every plane and cut the arena into other extents, for slots of these sizes. No stream may be open.

        Only whole extents are in use afterwards: `resize` says how many.
        """
        self.clear()
        with self._lock:
            nbytes = self._arena.nbytes
            self._arena = Arena(self._arena.reserved_bytes, extent_bytes, slot_sizes)
            self._planes, self._loads = Planes(self._arena), RecentLoads(self._arena)
            self._arena.resize(nbytes)

    def resize(self, nbytes: int) -> None:
        """Use the arena's first `nbytes` from now on; waits for reads into the rest. No stream may be open.

        Planes beyond move to where they may stay; for them the policy gives up what is worth least of all.
        """
        with self._lock:
            assert not self._streams, "resize() within a stream"
            resize(self, nbytes)

    def _issue(
        self,
        key: PlaneKey,
        *,
        urgent: bool,
        keep: Container[PlaneKey] = (),
        any_class: bool = False,
        notice: Callable[[tuple[int, ...]], Notice] | None = None,
    ) -> HeldPlane | None:
        """Give the plane a slot and queue its read; None when no slot can be had now.

        The read gives the `notice` that belongs to where planes will lie. The planes of `keep` stay. Planes of other
        slot classes stay too, unless `any_class` is set or this class has far less of the arena than its part of the
        recent loads.
        """
        extents = self.extents(key)
        *inner, nbytes = itertools.accumulate([extent.nbytes for extent in extents], initial=0)
        need = Need(key, nbytes, urgent)
        slot = self._arena.alloc(nbytes)
        while slot is None:
            if not self._make_room(need, keep, any_class=any_class or self._loads.is_short(nbytes)):
                return None
            slot = self._arena.alloc(nbytes)
        plane = HeldPlane(key, slot, nbytes, self._step if urgent else NEVER, tuple(inner), ahead=not urgent)
        given = None if notice is None else notice(plane.offsets())
        read = read_of(key, extents, self._buffer.view(slot.offset, nbytes), given)
        if not urgent:
            self._ahead.setdefault(key[0], {})[key] = plane
        self._hold(plane)
        try:
            plane.ticket = self._engine.submit(read, urgent=urgent, on_done=lambda ticket: self._arrived(plane, ticket))
        except BaseException:
            self._drop(plane)
            raise
        self._loading[key] = plane
        return plane

    def _hold(self, plane: HeldPlane) -> None:
        """It has a slot from now on."""
        self._planes.add(plane)
        if self.lending is not None:
            self.lending.held(plane.key)
        self._policy.on_load(plane.key, plane.slot.nbytes)
        self._loads.count(plane.slot.nbytes)
        self.given_up.loaded(plane.key)

    def _make_room(self, need: Need, keep: Container[PlaneKey], *, any_class: bool) -> bool:
        """Evict what the policy gives up for this need; False when nothing can go now."""
        evictable = EvictableView(self._planes, need.nbytes, keep, any_class=any_class)
        key = self.given_up.take(evictable, need.key[0]) if need.urgent else None
        key = key or self._policy.victim(need, evictable)
        if key is None:
            return need.urgent and self._cancel_a_prefetch(keep)
        assert key in evictable, f"the policy gave up {key}, which may not leave"
        for plane in self._planes.to_evict_for(need.nbytes, self._planes.by_key[key]):
            self._evict(plane)
        return True

    def _evict(self, plane: HeldPlane, *, keeps_slot: bool = False) -> None:
        self._drop(plane, keeps_slot=keeps_slot)
        self._stats.evictions += 1
        if plane.step == NEVER:
            self._stats.wasted_prefetches += 1
            self._stats.wasted_bytes += plane.nbytes

    def _evict_all(self) -> None:
        """Evict every plane that may leave, so that extents are free for any class."""
        for plane in tuple(self._planes.by_key.values()):
            if plane.evictable:
                self._evict(plane)

    def _cancel_a_prefetch(self, keep: Container[PlaneKey] = ()) -> bool:
        """Take back a slot from a read that nobody waits for and that has not begun: the last one queued."""
        return any(
            plane.leases == 0 and plane.key not in keep and self._cancel(plane)
            for plane in reversed(tuple(self._loading.values()))
        )

    def _cancel_unwanted(self, layers: Iterable[int]) -> None:
        """Take back the prefetches of these layers that have not begun and that no stream has asked for."""
        for layer in layers:
            for plane in tuple(self._ahead.get(layer, {}).values()):
                if plane.ticket is not None and self._cancel(plane):
                    self._stats.cancelled_prefetches += 1

    def _cancel(self, plane: HeldPlane) -> bool:
        if plane.ticket is None or not self._engine.cancel(plane.ticket):
            return False
        del self._loading[plane.key]
        self._drop(plane)
        return True

    def _drop(self, plane: HeldPlane, *, keeps_slot: bool = False) -> None:
        self.on_gone(plane.key)
        if plane.step == NEVER:
            del self._ahead[plane.key[0]][plane.key]
        self._planes.remove(plane)
        if not keeps_slot:
            self._arena.free(plane.slot)
        self._policy.on_evict(plane.key)
        self.given_up.keep(plane.key)
        if self.lending is not None:
            self.lending.left(plane.key)

    def _arrived(self, plane: HeldPlane, ticket: Ticket) -> None:
        """A read ended, well or not. Called in a thread of the engine."""
        if self.watch is not None:
            nbytes = plane.nbytes if ticket.error is None else 0
            self.watch.read(plane.key, nbytes, ticket.submitted, ticket.begun, ticket.ended, ahead=plane.ahead)
        with self._lock:
            plane.ticket = None
            del self._loading[plane.key]
            waiting = [stream for stream in self._streams if plane in stream.loading]
            if ticket.error is None:
                self._stats.bytes_read += plane.nbytes
                self._stats.prefetched_bytes += plane.nbytes if plane.ahead else 0
                if plane.ahead and self.on_ahead is not None:
                    self.on_ahead(plane.key)
            else:
                self._drop(plane)
                if not waiting:
                    self._stats.failed_prefetches += 1
                    logging.getLogger("moestro").warning("A prefetch failed. %s", ticket.error)
            for stream in waiting:
                stream.arrived(plane, ticket)
            if not waiting or any(stream.has_news for stream in waiting):
                self._changed.notify_all()
