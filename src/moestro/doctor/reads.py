"""How fast a file is read: by block size, by how many reads are under way, past the page cache or through it."""

from __future__ import annotations

import mmap
import os
import random
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

from moestro.memory.direct import REFUSED
from moestro.memory.pages import PAGE, HostBuffer

BLOCKS = (64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20)
THREADS = (1, 2, 4, 8)
SECONDS = 0.12
"""Of one measurement: all of them take under ten seconds."""

_ROUNDS = 3
_GOOD_ENOUGH = 0.95


@dataclass(frozen=True)
class Reading:
    """Blocks of `block_bytes`, `threads` of them at a time: bytes per second, the median of some rounds."""

    block_bytes: int
    threads: int
    bytes_per_s: float


@dataclass(frozen=True)
class DiskReadings:
    """`grid`: into huge pages, past the page cache where the file system allows it (`direct`).

    The other two are of the block and threads that `choose` picks: through the page cache, and into 4 KiB pages.
    """

    direct: bool
    grid: tuple[Reading, ...]
    buffered_bytes_per_s: float
    small_pages_bytes_per_s: float


def choose(grid: Sequence[Reading]) -> Reading:
    """The least threads, and of these the least block, that come near the best: more would only be in the way.

    At least two threads, of which one can check what it has read while the other reads.
    """
    several = [one for one in grid if one.threads > 1] or list(grid)
    best = max(one.bytes_per_s for one in several)
    good = [one for one in several if one.bytes_per_s >= _GOOD_ENOUGH * best]
    return min(good, key=lambda one: (one.threads, one.block_bytes))


def measure_reads(
    file: Path, *, blocks: Sequence[int] = BLOCKS, threads: Sequence[int] = THREADS, seconds: float = SECONDS
) -> DiskReadings:
    """Random reads of a file; blocks that it does not hold several times are left out. Raises OSError."""
    size = file.stat().st_size // PAGE * PAGE
    cells = [(block, count) for block in blocks if 4 * block <= size for count in threads]
    most = max(block * count for block, count in cells)
    huge, small = HostBuffer(most), _SmallPages(most)
    huge.populate()
    try:
        with _Reader(file, size, direct=True) as reader:
            # Round after round over all, so that a disk that others use as well is not slow for one of them only.
            rounds = [[reader.speed(huge, block, count, seconds) for block, count in cells] for _ in range(_ROUNDS)]
            medians = [statistics.median(speeds) for speeds in zip(*rounds, strict=True)]
            grid = tuple(Reading(*cell, speed) for cell, speed in zip(cells, medians, strict=True))
            best, direct = choose(grid), reader.direct
            into_small = _median(reader, small, best, seconds)
        with _Reader(file, size, direct=False) as reader:
            buffered = _median(reader, huge, best, seconds)
        return DiskReadings(direct, grid, buffered, into_small)
    finally:
        huge.close()
        small.close()


def _median(reader: _Reader, memory: _Memory, like: Reading, seconds: float) -> float:
    return statistics.median(reader.speed(memory, like.block_bytes, like.threads, seconds) for _ in range(_ROUNDS))


class _Memory(Protocol):
    def view(self, offset: int, nbytes: int, /) -> memoryview: ...


class _SmallPages:
    """Memory in 4 KiB pages."""

    def __init__(self, nbytes: int) -> None:
        self._map = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            self._map.madvise(mmap.MADV_NOHUGEPAGE)
        for start in range(0, nbytes, PAGE):
            self._map[start] = 0

    def view(self, offset: int, nbytes: int) -> memoryview:
        return memoryview(self._map)[offset : offset + nbytes]

    def close(self) -> None:
        self._map.close()


class _Reader:
    """A file open for reads past the page cache, or through it where that is wanted or the other refused."""

    def __init__(self, file: Path, size: int, *, direct: bool) -> None:
        self._size = size
        self._descriptor, self.direct = _open(file, direct=direct)

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        os.close(self._descriptor)

    def speed(self, memory: _Memory, block: int, threads: int, seconds: float) -> float:
        """Bytes per second of random blocks, no block read twice before all have been."""
        if not self.direct:
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        offsets = list(range(0, self._size - block + 1, block))
        random.Random(block).shuffle(offsets)
        done = [0] * threads
        errors: list[OSError] = []
        start = time.perf_counter()

        def work(number: int) -> None:
            view, mine = memory.view(number * block, block), offsets[number::threads]
            place = 0
            try:
                # At least one, and of the page cache nothing twice.
                while place == 0 or (time.perf_counter() < start + seconds and (self.direct or place < len(mine))):
                    done[number] += os.preadv(self._descriptor, [view], mine[place % len(mine)])
                    place += 1
            except OSError as error:
                errors.append(error)
            view.release()

        workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if errors:
            raise errors[0]
        return sum(done) / (time.perf_counter() - start)


def _open(file: Path, *, direct: bool) -> tuple[int, bool]:
    if direct:
        try:
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        except OSError as error:
            if error.errno not in REFUSED:
                raise
        else:
            return descriptor, True
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    return descriptor, False
