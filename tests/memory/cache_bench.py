"""A plane cache over a disk that can be held back and made to fail."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Sequence
from itertools import accumulate

from memory.plane_file import PAGE, PlaneFile
from moestro.keys import PlaneKey
from moestro.memory.arena import Arena
from moestro.memory.direct import preadv
from moestro.memory.pages import HostBuffer
from moestro.memory.plane_cache import PlaneCache
from moestro.memory.plane_stream import PlaneStream
from moestro.memory.transfer import TransferEngine
from moestro.policy import LRU


class Disk:
    """A real file whose reads can be held back, made to fail, and are counted."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.broken: set[int] = set()
        self.reads: list[int] = []
        self.begun = threading.Semaphore(0)

    def read_at(self, descriptor: int, destinations: Sequence[memoryview], offset: int) -> int:
        offsets = list(accumulate(map(len, destinations[:-1]), initial=offset))
        self.reads += offsets
        self.begun.release()
        self.open.wait()
        if self.broken.intersection(offsets):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(descriptor, destinations, offset)


class Bench:
    """A cache with `slots` slots of two pages over the uniform planes, read by one thread."""

    def __init__(self, planes: PlaneFile, slots: int, policy: LRU | None = None) -> None:
        self.planes = planes
        self.disk = Disk()
        # Every plane in a request of its own.
        self.engine = TransferEngine(threads=1, request_bytes=2 * PAGE, read_at=self.disk.read_at)
        self.buffer = HostBuffer(max(slots, 1) * 2 * PAGE)
        self.arena = Arena(slots * 2 * PAGE, 4 * PAGE, [2 * PAGE])
        self.cache = PlaneCache(
            arena=self.arena,
            buffer=self.buffer,
            engine=self.engine,
            policy=LRU() if policy is None else policy,
            locate=lambda key: planes.locate((0, *key[1:])),  # as many layers as one likes, of the same bytes
        )

    def run(self, *experts: int) -> list[int]:
        """Stream these experts, chains of one plane, check the bytes of each, return the experts as they came."""
        order = []
        with self.cache.stream([(plane(expert),) for expert in experts]) as batches:
            for batch in batches:
                for index, (offset,) in batch:
                    assert bytes(self.buffer.view(offset, 2 * PAGE)) == self.planes.contents[plane(experts[index])]
                    order.append(experts[index])
        return order

    def residents(self) -> set[int]:
        return {key[1] for key in self.cache.resident()}

    def read_experts(self) -> list[int]:
        return [offset // (2 * PAGE) for offset in self.disk.reads]

    def offset_of(self, expert: int) -> int:
        return self.planes.extents[plane(expert)].offset

    def settle(self) -> None:
        """Wait until no read is queued or running."""
        until(lambda: not self.engine._in_flight and not self.cache._loading)


def experts_of(stream: PlaneStream, experts: Sequence[int]) -> list[int]:
    """What is left of a stream of `experts`, as experts in the order in which they come."""
    return [experts[index] for batch in stream for index, _ in batch]


def plane(expert: int) -> PlaneKey:
    return (0, expert, 0)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "nothing happened for 30 seconds"
        time.sleep(0.001)


class Shelf:
    """A cache of `pages` pages in extents of four, over experts with planes of two, one and one page; the first
    `joined` of them share a slot."""

    def __init__(self, planes: PlaneFile, pages: int, *, joined: int = 0) -> None:
        self.planes = planes
        self.disk = Disk()
        self.engine = TransferEngine(threads=1, request_bytes=4 * PAGE, read_at=self.disk.read_at)
        self.buffer = HostBuffer(pages * PAGE)
        self.arena = Arena(pages * PAGE, 4 * PAGE, [4 * PAGE] if joined else [PAGE, 2 * PAGE])
        self.cache = PlaneCache(
            arena=self.arena,
            buffer=self.buffer,
            engine=self.engine,
            policy=LRU(),
            locate=planes.locate,
            joined=[joined] if joined else (),
        )

    def run(self, *chains: tuple[PlaneKey, ...]) -> list[list[int]]:
        """Stream chains, check their bytes, return the batches as lists of experts."""
        seen = []
        with self.cache.stream(chains) as batches:
            for batch in batches:
                for index, offsets in batch:
                    self.check(chains[index], offsets)
                seen.append([chains[index][0][1] for index, _ in batch])
        return seen

    def check(self, chain: tuple[PlaneKey, ...], offsets: tuple[int, ...] | None) -> None:
        """The planes of a chain lie at these places."""
        assert offsets is not None
        for key, offset in zip(chain, offsets, strict=True):
            content = self.planes.contents[key]
            assert bytes(self.buffer.view(offset, len(content))) == content

    def reads(self) -> list[PlaneKey]:
        """The planes read since the last call."""
        key_at = {extent.offset: key for key, extent in self.planes.extents.items()}
        keys = [key_at[offset] for offset in self.disk.reads]
        self.disk.reads.clear()
        return keys


def chain(expert: int, depth: int = 3) -> tuple[PlaneKey, ...]:
    return tuple((0, expert, plane) for plane in range(depth))


def flat(batches: list[list[int]]) -> list[int]:
    return [expert for batch in batches for expert in batch]
