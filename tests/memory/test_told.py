"""Who is told of the chains of a stream, by the cache or by the threads that read, hears of each, or of a failure."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from memory.cache_bench import Shelf, chain
from memory.plane_file import PlaneFile, write_plane_file
from moestro import _native
from moestro.errors import PlaneReadError
from moestro.memory.direct import CHECK_EVERY
from moestro.memory.tickets import Notice
from moestro.memory.transfer import TransferEngine

SIZES = (2, 1, 1)
PAGES = sum(SIZES)


class Told:
    """Keeps what it is told; gives notices that nobody hears."""

    def __init__(self) -> None:
        self.offsets: dict[int, tuple[int, ...]] = {}
        self.failures = 0
        self.noticed: dict[int, tuple[int, ...]] = {}
        self.arrivals = _native.Arrivals()
        self.turn = self.arrivals.begin()
        self.change = threading.Event()

    def whole(self, index: int, offsets: tuple[int, ...]) -> None:
        assert index not in self.offsets
        self.offsets[index] = offsets
        self.change.set()

    def failed(self) -> None:
        self.failures += 1
        self.change.set()

    def notice(self, index: int, offsets: tuple[int, ...]) -> Notice:
        self.noticed[index] = offsets
        return self.arrivals, self.turn, index, list(offsets)

    def wait(self, chains: int) -> None:
        while len(self.offsets) < chains and not self.failures:
            assert self.change.wait(10)
            self.change.clear()


@pytest.fixture(scope="module")
def planes(tmp_path_factory: pytest.TempPathFactory) -> PlaneFile:
    return write_plane_file(tmp_path_factory.mktemp("planes") / "chains.bin", 12, [SIZES])


@pytest.fixture(params=[len(SIZES), 0], ids=["joined", "apart"])
def shelf(planes: PlaneFile, request: pytest.FixtureRequest) -> Iterator[Shelf]:
    made = Shelf(planes, 4 * PAGES, joined=request.param)
    yield made
    made.engine.close()


def test_each_chain_is_told_of_where_it_lies(shelf: Shelf) -> None:
    shelf.run(chain(2))
    told, wanted = Told(), [chain(5), chain(2), chain(7)]
    with shelf.cache.stream(wanted, told=told) as stream:
        assert told.offsets.keys() >= {1}, "what is there is told of before anybody waits"
        told.wait(3)
        for index, offsets in told.offsets.items():
            shelf.check(wanted[index], offsets)
        assert not stream.pending
        assert sorted(index for batch in stream for index, _ in batch) == [0, 1, 2]
    assert told.failures == 0
    # Where a read makes a chain whole by itself, the reader may say so.
    assert told.noticed == ({index: told.offsets[index] for index in (0, 2)} if shelf.cache.joined else {})


def test_a_failure_is_told(shelf: Shelf) -> None:
    shelf.disk.broken.add(shelf.planes.extents[0, 3, 0].offset)
    told = Told()
    with shelf.cache.stream([chain(1), chain(3)], told=told) as stream:
        told.wait(2)
        while not told.failures:
            assert told.change.wait(10)
            told.change.clear()
        with pytest.raises(PlaneReadError, match="expert 3"):
            stream.fail()
    shelf.run(chain(1))


def test_who_waits_elsewhere_is_counted(shelf: Shelf) -> None:
    told = Told()
    with shelf.cache.stream([chain(1)], told=told) as stream:
        told.wait(1)
        stream.waited(3.0, 3.5, 0, 0.0)
        assert stream.last_arrival >= 3.5
    assert shelf.cache.stats.stall_seconds == 0.5


def test_readers_give_notice_of_bytes_that_need_no_check(planes: PlaneFile) -> None:
    """The first time, and one time in a few, planes are checked before anybody hears of them."""
    shelf = Shelf(planes, 4 * PAGES, joined=len(SIZES))
    shelf.cache._engine = engine = TransferEngine(threads=2)
    heard: list[bool] = []
    for _ in range(CHECK_EVERY + 2):
        told = Told()
        with shelf.cache.stream([chain(4)], told=told):
            told.wait(1)
        heard.append(told.arrivals.count() > 0)
        shelf.cache.clear()
    engine.close()
    shelf.engine.close()
    assert heard == [False, *[True] * CHECK_EVERY, False]
