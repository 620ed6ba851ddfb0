"""The planes held in an arena: who is resident, who is loading, who may not leave.

One lock guards all of it. It is held while a policy is asked and while a read is queued, never during a read. Reads
end in the threads of the transfer engine, which call `_arrived`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Protocol

from moestro.errors import BudgetError, PlaneReadError
from moestro.keys import PlaneExtent, PlaneKey
from moestro.memory.arena import Arena
from moestro.memory.planes import CacheStats, EvictableView, HeldPlane, Planes
from moestro.memory.transfer import Read, Ticket, TransferEngine
from moestro.policy.base import EvictionPolicy, Need


class Buffer(Protocol):
    """Memory that planes are read into."""

    def view(self, offset: int, nbytes: int, /) -> memoryview: ...


class PlaneCache:
    """Gives one consumer at a time the planes it asks for, from memory or from disk."""

    def __init__(
        self,
        *,
        arena: Arena,
        buffer: Buffer,
        engine: TransferEngine,
        policy: EvictionPolicy,
        locate: Callable[[PlaneKey], PlaneExtent],
    ) -> None:
        self._arena = arena
        self._buffer = buffer
        self._engine = engine
        self._policy = policy
        self._locate = locate
        self._planes = Planes(arena)
        self._loading: dict[PlaneKey, HeldPlane] = {}
        self._streams: list[PlaneStream] = []
        self._stats = CacheStats()
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

    def stream(self, keys: Sequence[PlaneKey]) -> PlaneStream:
        """Lease these planes one by one: `with cache.stream(keys) as arrivals: for key, offset in arrivals: ...`.

        Every distinct key comes exactly once, with the byte offset of its plane in the buffer: residents first, then
        the others as they arrive. The plane stays in place until the next step of the iteration, or the end.
        Raises PlaneReadError when a plane cannot be read; the cache then is as good as before.
        """
        return PlaneStream(self, keys)

    def prefetch(self, keys: Sequence[PlaneKey]) -> int:
        """Queue reads of these planes, most wanted first, behind all demand; returns how many were queued.

        Never waits; stops at the first plane for which there is no room. Does nothing while a stream still has planes
        to ask for, because those come first.
        """
        with self._lock:
            if any(stream.pending for stream in self._streams):
                return 0
            wanted = dict.fromkeys(keys)
            issued = 0
            for key in wanted:
                if key not in self._planes.by_key:
                    if self._issue(key, self._locate(key), urgent=False, keep=wanted) is None:
                        break
                    issued += 1
            self._stats.prefetches += issued
            return issued

    def clear(self) -> None:
        """Forget every plane; waits for reads that have begun. No stream may be open. Not counted as evictions."""
        with self._lock:
            assert not self._streams, "clear() within a stream"
            while self._cancel_a_prefetch():
                pass
            while self._loading:
                self._changed.wait()
            for plane in tuple(self._planes.by_key.values()):
                self._drop(plane)

    def _issue(
        self, key: PlaneKey, extent: PlaneExtent, *, urgent: bool, keep: Container[PlaneKey] = ()
    ) -> HeldPlane | None:
        """Give the plane a slot and queue its read; None when no slot can be had now."""
        need = Need(key, extent.nbytes, urgent)
        slot = self._arena.alloc(extent.nbytes)
        while slot is None:
            if not self._make_room(need, keep):
                return None
            slot = self._arena.alloc(extent.nbytes)
        plane = HeldPlane(key, slot, extent.nbytes, asked_for=urgent)
        destination = self._buffer.view(slot.offset, extent.nbytes)
        layer, expert, position = key
        label = f"Plane {position} of expert {expert} of MoE layer {layer}"
        read = Read(extent.file, extent.offset, extent.nbytes, destination, extent.checksum, label)
        self._planes.add(plane)
        self._policy.on_load(key, slot.nbytes)
        try:
            plane.ticket = self._engine.submit(read, urgent=urgent, on_done=lambda ticket: self._arrived(plane, ticket))
        except BaseException:
            self._drop(plane)
            raise
        self._loading[key] = plane
        return plane

    def _make_room(self, need: Need, keep: Container[PlaneKey]) -> bool:
        """Evict what the policy gives up for this need; False when nothing can go now."""
        evictable = EvictableView(self._planes, need.nbytes, keep)
        key = self._policy.victim(need, evictable)
        if key is None:
            return need.urgent and self._cancel_a_prefetch()
        assert key in evictable, f"the policy gave up {key}, which may not leave"
        for plane in self._planes.to_evict_for(need.nbytes, self._planes.by_key[key]):
            self._drop(plane)
            self._stats.evictions += 1
            if not plane.asked_for:
                self._stats.wasted_prefetches += 1
                self._stats.wasted_bytes += plane.nbytes
        return True

    def _cancel_a_prefetch(self) -> bool:
        """Take back a slot from a read that nobody waits for and that has not begun: the last one queued."""
        return any(plane.leases == 0 and self._cancel(plane) for plane in reversed(tuple(self._loading.values())))

    def _cancel(self, plane: HeldPlane) -> bool:
        if plane.ticket is None or not self._engine.cancel(plane.ticket):
            return False
        del self._loading[plane.key]
        self._drop(plane)
        return True

    def _drop(self, plane: HeldPlane) -> None:
        self._planes.remove(plane)
        self._arena.free(plane.slot)
        self._policy.on_evict(plane.key)

    def _arrived(self, plane: HeldPlane, ticket: Ticket) -> None:
        """A read ended, well or not. Called in a thread of the engine."""
        with self._lock:
            plane.ticket = None
            del self._loading[plane.key]
            waiting = [stream for stream in self._streams if plane in stream.loading]
            if ticket.error is None:
                self._stats.bytes_read += plane.nbytes
            else:
                self._drop(plane)
                if not waiting:
                    self._stats.failed_prefetches += 1
                    logging.getLogger("moestro").warning("A prefetch failed. %s", ticket.error)
            for stream in waiting:
                stream.arrived(plane, ticket.error)
            self._changed.notify_all()


class PlaneStream:
    """One pass over planes (see `PlaneCache.stream`); used as a context manager, once, by one thread."""

    def __init__(self, cache: PlaneCache, keys: Sequence[PlaneKey]) -> None:
        self._cache = cache
        self._keys = keys
        self.pending: dict[PlaneKey, None] = {}  # asked for, no slot yet
        self.loading: dict[HeldPlane, None] = {}  # leased, on the way
        self._ready: deque[HeldPlane] = deque()  # leased, in memory, not yet handed out
        self._handed_out: HeldPlane | None = None
        self._error: PlaneReadError | None = None

    def __enter__(self) -> PlaneStream:
        with self._cache._lock:
            self._cache._streams.append(self)
            try:
                self._begin(dict.fromkeys(self._keys))
                if self.pending:
                    self._issue_pending()
            except BaseException:
                self._end()
                raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with self._cache._lock:
            self._end()

    def __iter__(self) -> Iterator[tuple[PlaneKey, int]]:
        return self

    def __next__(self) -> tuple[PlaneKey, int]:
        with self._cache._lock:
            if self._handed_out is not None:
                self._handed_out.leases -= 1
                self._handed_out = None
            if self.pending:
                self._issue_pending()
            if not self._ready and self._error is None and (self.loading or self.pending):
                self._wait()
            if self._error is not None:
                raise self._error
            if not self._ready:
                raise StopIteration
            plane = self._handed_out = self._ready.popleft()
            return plane.key, plane.slot.offset

    def arrived(self, plane: HeldPlane, error: PlaneReadError | None) -> None:
        """The read of a plane in `loading` ended. The cache's lock is held."""
        del self.loading[plane]
        if error is None:
            self._ready.append(plane)
        else:
            error.key = plane.key
            self._error = error

    def _begin(self, keys: dict[PlaneKey, None]) -> None:
        cache = self._cache
        held = cache._planes.by_key
        for key in keys:
            cache._policy.on_use(key)
            plane = held.get(key)
            if plane is None:
                self.pending[key] = None
            else:
                self._lease(plane)
        hits = len(self._ready)
        cache._stats.hits += hits
        cache._stats.misses += len(keys) - hits
        cache._stats.late_prefetches += len(self.loading)

    def _lease(self, plane: HeldPlane) -> None:
        plane.leases += 1
        plane.asked_for = True
        if plane.ticket is None:
            self._ready.append(plane)
        else:
            self.loading[plane] = None
            self._cache._engine.promote(plane.ticket)

    def _issue_pending(self) -> None:
        """Queue reads, in the order asked, for as many planes as slots can be had."""
        cache = self._cache
        full: set[int] = set()  # slot classes that have no room now
        for key in tuple(self.pending):
            plane = cache._planes.by_key.get(key)
            if plane is None:
                extent = cache._locate(key)
                slot_bytes = cache._arena.slot_bytes(extent.nbytes)
                plane = None if slot_bytes in full else cache._issue(key, extent, urgent=True)
                if plane is None:
                    full.add(slot_bytes)
                    if len(full) == len(cache._arena.slot_sizes):
                        return
                    continue
            del self.pending[key]
            self._lease(plane)

    def _wait(self) -> None:
        """Until a plane is ready or a read failed; waiting counts as stall."""
        cache = self._cache
        start = time.perf_counter()
        while not self._ready and self._error is None:
            if not cache._loading:  # nothing will arrive, so nothing would ever wake us
                raise BudgetError(
                    f"No slot of the expert arena ({self._cache._arena.nbytes} bytes) can be freed for one of the"
                    f" {len(self.pending)} planes needed now: give more memory, at least enough for one expert."
                )
            cache._changed.wait()
            if self.pending:
                self._issue_pending()
        cache._stats.stall_seconds += time.perf_counter() - start

    def _end(self) -> None:
        """Give back every lease; reads that have not begun and that nobody else wants are cancelled."""
        self._cache._streams.remove(self)
        leased = [*self._ready, *self.loading]
        if self._handed_out is not None:
            leased.append(self._handed_out)
        for plane in leased:
            plane.leases -= 1
            if plane.leases == 0:
                self._cache._cancel(plane)
        self.pending.clear()
        self.loading.clear()
        self._ready.clear()
        self._handed_out = None
