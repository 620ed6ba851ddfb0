"""One pass of a consumer over chains of planes: what is there first, the rest as it arrives.

Part of the plane cache (`PlaneCache.stream` makes it) and under its lock, in a file of its own for its length.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

from moestro.errors import BudgetError, PlaneReadError
from moestro.keys import PlaneKey
from moestro.memory.planes import NEVER, Arrange, Chain, HeldPlane, MissingChain, Told, WantedChain

if TYPE_CHECKING:
    from moestro.memory.plane_cache import PlaneCache
    from moestro.memory.tickets import Ticket


class PlaneStream:
    """One pass over chains (see `PlaneCache.stream`); used as a context manager, once, by one thread.

    Chains get their slots one after another, whole, in the order asked. So at most one chain, the head of `pending`, is
    held in part, and there is always one that can be finished without the slots of another.
    """

    def __init__(self, cache: PlaneCache, chains: Sequence[Chain], arrange: Arrange | None, told: Told | None) -> None:
        self._cache = cache
        self._chains = chains
        self._arrange = arrange
        self._told = told
        self.pending: deque[WantedChain] = deque()  # not all planes have a slot
        self.loading: dict[HeldPlane, list[WantedChain]] = {}  # leased, on the way, with the chains that wait for it
        self._kept: set[PlaneKey] = set()  # planes of pending chains: the last to make room for others
        self._under_way: dict[int, WantedChain] = {}  # by index: all planes have slots, some are loading
        self._ready: list[WantedChain] = []  # leased, in memory, not yet handed out
        self._handed_out: list[WantedChain] = []
        self._error: PlaneReadError | None = None
        self._came: dict[int, tuple[Ticket, bool]] = {}  # by index: the read that made a chain whole, if it was ahead
        self.last_arrival = 0.0  # by the engine's clock; 0: nothing that had to be read has come

    def __enter__(self) -> PlaneStream:
        with self._cache._lock:
            self._cache._streams.append(self)
            try:
                self._begin()
                if self.pending:
                    self._issue_pending()
            except BaseException:
                self._end()
                raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with self._cache._lock:
            self._end()

    @property
    def reading(self) -> bool:
        """Whether some planes asked for are not in memory yet."""
        return bool(self._under_way or self.pending)

    @property
    def has_news(self) -> bool:
        """Whether it could go on if it waits: a chain is whole, a read failed, or a slot may be had."""
        return bool(self._ready or self.pending or self._error is not None or not self._cache._loading)

    def __iter__(self) -> Iterator[list[tuple[int, tuple[int, ...]]]]:
        return self

    def __next__(self) -> list[tuple[int, tuple[int, ...]]]:
        with self._cache._lock:
            self._release(self._handed_out)
            self._handed_out = []
            if self.pending:
                self._issue_pending()
            if not self._ready and self._error is None and (self._under_way or self.pending):
                self._wait()
            if self._error is not None:
                raise self._error
            if not self._ready:
                raise StopIteration
            batch = self._handed_out = self._ready
            self._ready = []
            return [(chain.index, chain.offsets()) for chain in batch]

    def settle(self) -> None:
        """Wait until all that has come, of which who is told has heard from those that read, is put down as well.

        Raises PlaneReadError as the iteration.
        """
        with self._cache._lock:
            while self._under_way and self._error is None:
                self._cache._changed.wait()
            if self._error is not None:
                raise self._error

    def fail(self) -> NoReturn:
        """Raise what a chain could not be read for."""
        assert self._error is not None
        raise self._error

    def waited(self, start: float, end: float, index: int, begun: float) -> None:
        """Who is told of chains waited from `start` to `end`, by the engine's clock, until the one at `index` came, the
        read of which began at `begun` (0: not known)."""
        with self._cache._lock:
            self.last_arrival = max(self.last_arrival, end)
            self._count_wait(start, end, index, begun)

    def arrived(self, plane: HeldPlane, ticket: Ticket) -> None:
        """The read of a plane in `loading` ended. The cache's lock is held."""
        waiting = self.loading.pop(plane)
        if ticket.error is not None:
            ticket.error.key = plane.key
            self._error = ticket.error
            if self._told is not None:
                self._told.failed()
            return
        self.last_arrival = ticket.ended
        for chain in waiting:
            chain.missing -= 1
            if chain.missing == 0 and len(chain.leased) == len(chain.keys):
                del self._under_way[chain.index]
                self._came[chain.index] = ticket, plane.ahead
                self._make_ready(chain)

    def _begin(self) -> None:
        cache, kept = self._cache, self._kept
        get, on_use, given_up = cache._planes.by_key.get, cache._policy.on_use, cache.given_up
        step = cache._step = cache._step + 1
        distinct: dict[Chain, int] = {}
        for index, keys in enumerate(self._chains):
            distinct.setdefault(cache.slots_of(keys), index)
        for keys, index in distinct.items():
            held = []
            for key in keys:
                plane = get(key)
                if plane is not None:
                    held.append(plane)
                    if plane.step == step:
                        continue
                    if plane.step == NEVER:
                        del cache._ahead[key[0]][key]
                    plane.step = step
                    if plane.ticket is not None:
                        cache._stats.late_prefetches += 1
                        cache._engine.promote(plane.ticket)
                elif key in kept:
                    continue
                on_use(key)
                given_up.keep(key)
            if len(held) == len(keys):
                chain = WantedChain(index, keys, held)
                for plane in held:
                    self._lease(chain, plane)
                self._slotted(chain)
            else:
                self.pending.append(WantedChain(index, keys, []))
                kept.update(keys)
        cache._stats.hits += len(self._ready)
        cache._stats.misses += len(distinct) - len(self._ready)
        if cache._loading:
            cache._cancel_unwanted({keys[0][0] for keys in distinct})
        if self._arrange is not None and len(self.pending) > 1:
            order = self._arrange([MissingChain(chain.index, self._missing_bytes(chain)) for chain in self.pending])
            assert len(order) == len(self.pending)
            self.pending = deque([self.pending[position] for position in order])

    def _missing_bytes(self, chain: WantedChain) -> int:
        cache = self._cache
        missing = (cache.extents(key) for key in chain.keys if key not in cache._planes.by_key)
        return sum(extent.nbytes for extents in missing for extent in extents)

    def _lease(self, chain: WantedChain, plane: HeldPlane) -> None:
        """Keep a plane of `chain.leased` in place."""
        plane.leases += 1
        if plane.ticket is not None:
            chain.missing += 1
            self.loading.setdefault(plane, []).append(chain)

    def _slotted(self, chain: WantedChain) -> None:
        """All planes of the chain have a slot and are leased."""
        if chain.missing:
            self._under_way[chain.index] = chain
        else:
            self._make_ready(chain)

    def _make_ready(self, chain: WantedChain) -> None:
        self._ready.append(chain)
        if self._told is not None:
            self._told.whole(chain.index, chain.offsets())

    def _issue_pending(self) -> None:
        """Queue reads, chain after chain in the order asked, for as many as slots can be had."""
        while self.pending and self._complete(self.pending[0]):
            chain = self.pending.popleft()
            self._kept.difference_update(chain.keys)
            self._slotted(chain)

    def _complete(self, chain: WantedChain) -> bool:
        """Lease the rest of the head chain, queueing reads of what is not there; False when room is wanting."""
        with self._cache._engine.together():  # planes of an expert lie one after another on disk
            while len(chain.leased) < len(chain.keys):
                key = chain.keys[len(chain.leased)]
                plane = self._cache._planes.by_key.get(key) or self._issue(key, chain)
                if plane is None:
                    return False
                chain.leased.append(plane)
                self._lease(chain, plane)
            return True

    def _issue(self, key: PlaneKey, chain: WantedChain) -> HeldPlane | None:
        cache, told = self._cache, self._told
        notice = None if told is None or len(chain.keys) > 1 else partial(told.notice, chain.index)
        plane = cache._issue(key, urgent=True, keep=self._kept, notice=notice)
        if plane is None and not (self._ready or self._under_way or self._handed_out):
            # Nothing to wait for: the planes that later chains could have used must go as well.
            plane = cache._issue(key, urgent=True, any_class=True, notice=notice)
        return plane

    def _wait(self) -> None:
        """Until a chain is ready or a read failed; waiting counts as stall."""
        cache = self._cache
        start = cache._engine.clock()
        while not self._ready and self._error is None:
            if not cache._loading:  # nothing will arrive, so nothing would ever wake us
                self._start_over()
            else:
                cache._engine.wait(cache._changed)
            if self.pending:
                self._issue_pending()
        self._count_wait(start, cache._engine.clock(), self._ready[-1].index if self._ready else -1)

    def _count_wait(self, start: float, end: float, index: int, begun: float = 0.0) -> None:
        """It ended as the chain at `index` was whole (-1: for another reason)."""
        cache = self._cache
        ticket, late = self._came.get(index, (None, False))
        if ticket is not None:
            begun = ticket.begun
        cache.count_wait(start, begun, end, late=late)

    def _start_over(self) -> None:
        """Give the head chain an arena without anything else in it, its own planes included.

        They may lie so scattered over extents that no extent is left for a class that the chain still lacks.
        """
        cache, chain = self._cache, self.pending[0]
        self._release([chain])
        chain.leased.clear()
        cache._evict_all()
        if not self._complete(chain):
            raise BudgetError(
                f"No slot of the expert arena ({cache._arena.nbytes} bytes) can be freed for one of the"
                f" {len(self.pending)} experts needed now: give more memory, at least enough for one expert."
            )

    @staticmethod
    def _release(chains: Iterable[WantedChain]) -> None:
        for chain in chains:
            for plane in chain.leased:
                plane.leases -= 1

    def _end(self) -> None:
        """Give back every lease; reads that have not begun and that nobody else wants are cancelled."""
        self._cache._streams.remove(self)
        loading = tuple(self.loading)
        self._release([*self._handed_out, *self._ready, *self._under_way.values(), *self.pending])
        for plane in loading:
            if plane.leases == 0:
                self._cache._cancel(plane)
        self.pending.clear()
        self.loading.clear()
        self._under_way.clear()
        self._ready = []
        self._handed_out = []
