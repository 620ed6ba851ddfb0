"""Neighbours on disk that wait together are read in one request, and fail one by one."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Sequence
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memory.plane_file import PAGE, PlaneFile
from moestro.errors import PlaneReadError
from moestro.memory.direct import preadv
from moestro.memory.pages import HostBuffer
from moestro.memory.planes import read_of as planes_read
from moestro.memory.tickets import Read
from moestro.memory.transfer import TransferEngine

SIZE = 2 * PAGE


class Requests:
    """Notes which experts each system call reads; may fail some of them, or end calls early."""

    def __init__(self, *, broken: set[int] | None = None, short: bool = False) -> None:
        self.calls: list[list[int]] = []
        self.broken, self.short = broken or set(), short
        self.lock = threading.Lock()

    def read_at(self, descriptor: int, destinations: Sequence[memoryview], offset: int) -> int:
        experts = [start // SIZE for start in accumulate(map(len, destinations[:-1]), initial=offset)]
        with self.lock:
            self.calls.append(experts)
        if self.broken.intersection(experts):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if self.short and len(experts) > 1:
            return preadv(descriptor, destinations[:1], offset)
        return preadv(descriptor, destinations, offset)


def read_of(planes: PlaneFile, expert: int, buffer: HostBuffer) -> Read:
    extent = planes.extents[(0, expert, 0)]
    view = buffer.view((15 - expert) * SIZE, extent.nbytes)  # slots lie anyhow
    return planes_read((0, expert, 0), [extent], view)


def run(
    planes: PlaneFile, requests: Requests, wanted: Sequence[tuple[int, bool]], *, most: int, threads: int = 1
) -> tuple[TransferEngine, list[int]]:
    """Submit (expert, urgent) together; the engine, closed, and the experts that failed. Bytes are compared."""
    buffer = HostBuffer(16 * SIZE)
    engine = TransferEngine(threads, request_bytes=most * SIZE, read_at=requests.read_at)
    ended: list[object] = []
    with engine.together():
        tickets = [
            engine.submit(read_of(planes, expert, buffer), urgent=urgent, on_done=ended.append)
            for expert, urgent in wanted
        ]
    failed = []
    for (expert, _), ticket in zip(wanted, tickets, strict=True):
        try:
            ticket.wait()
        except PlaneReadError:
            failed.append(expert)
        else:
            assert bytes(ticket.read.destination) == planes.contents[(0, expert, 0)]
    engine.close()
    assert sorted(map(id, ended)) == sorted(map(id, tickets))
    return engine, failed


def test_neighbours_share_a_request(uniform_planes: PlaneFile) -> None:
    requests = Requests()
    engine, failed = run(uniform_planes, requests, [(3, True), (4, True), (5, True), (9, True)], most=4)
    assert requests.calls == [[3, 4, 5], [9]]
    assert (engine.stats.reads, engine.stats.requests, engine.stats.bytes_read) == (4, 2, 4 * SIZE)
    assert failed == []


def test_a_request_has_a_largest_size(uniform_planes: PlaneFile) -> None:
    requests = Requests()
    run(uniform_planes, requests, [(expert, True) for expert in range(5)], most=2)
    assert requests.calls == [[0, 1], [2, 3], [4]]


def test_what_is_urgent_does_not_wait_for_a_speculative_neighbour(uniform_planes: PlaneFile) -> None:
    requests = Requests()
    run(uniform_planes, requests, [(2, False), (3, True), (4, False), (5, False)], most=4)
    assert requests.calls == [[3], [2], [4, 5]]


def test_an_unreadable_neighbour_fails_alone(uniform_planes: PlaneFile) -> None:
    requests = Requests(broken={4})
    engine, failed = run(uniform_planes, requests, [(3, True), (4, True), (5, True)], most=4)
    assert failed == [4]
    assert requests.calls == [[3, 4, 5], [3], [4], [5]]
    assert (engine.stats.failed, engine.stats.bytes_read) == (1, 2 * SIZE)


def test_a_short_request_is_read_again_one_by_one(uniform_planes: PlaneFile) -> None:
    requests = Requests(short=True)
    _, failed = run(uniform_planes, requests, [(3, True), (4, True)], most=4)
    assert failed == []
    assert requests.calls == [[3, 4], [3], [4]]


def test_a_flipped_bit_fails_its_own_read_only(uniform_planes: PlaneFile) -> None:
    buffer = HostBuffer(16 * SIZE)
    engine = TransferEngine(1)
    right, wrong = read_of(uniform_planes, 3, buffer), read_of(uniform_planes, 4, buffer)
    wrong = Read(wrong.file, wrong.offset, wrong.nbytes, wrong.destination, ((wrong.nbytes, 7),), wrong.label)
    with engine.together():
        tickets = [engine.submit(one, urgent=True) for one in (right, wrong)]
    tickets[0].wait()
    with pytest.raises(PlaneReadError, match="checksum"):
        tickets[1].wait()
    engine.close()
    assert engine.stats.requests == 1


def test_the_slowest_request_is_told(uniform_planes: PlaneFile) -> None:
    def stalling(descriptor: int, destinations: Sequence[memoryview], offset: int) -> int:
        time.sleep(0.2 if offset == 9 * SIZE else 0)
        return preadv(descriptor, destinations, offset)

    requests = Requests()
    requests.read_at = stalling  # type: ignore[method-assign]
    engine, _ = run(uniform_planes, requests, [(expert, True) for expert in (1, 9, 12)], most=1)
    assert engine.stats.slowest_seconds >= 0.2


@settings(max_examples=60, deadline=None)
@given(
    wanted=st.lists(st.tuples(st.integers(0, 15), st.booleans()), unique_by=lambda one: one[0], min_size=1),
    broken=st.sets(st.integers(0, 15), max_size=2),
    short=st.booleans(),
    most=st.integers(1, 6),
    threads=st.integers(1, 3),
)
def test_only_what_is_broken_fails(
    uniform_planes: PlaneFile,
    wanted: list[tuple[int, bool]],
    broken: set[int],
    short: bool,
    most: int,
    threads: int,
) -> None:
    requests = Requests(broken=broken, short=short)
    engine, failed = run(uniform_planes, requests, wanted, most=most, threads=threads)
    experts = {expert for expert, _ in wanted}
    assert set(failed) == experts & broken
    assert engine.stats.bytes_read == SIZE * len(experts - broken)
    for call in requests.calls:
        assert call == list(range(call[0], call[-1] + 1))
        assert len(call) <= most


def test_of_what_nobody_waits_for_one_piece_is_read_at_a_time(
    uniform_planes: PlaneFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a thread is free for what is asked for meanwhile."""
    monkeypatch.setattr("moestro.memory.transfer.PIECE_BYTES", 2 * SIZE)
    planes, buffer, held, begun = uniform_planes, HostBuffer(16 * SIZE), threading.Event(), threading.Semaphore(0)
    calls: list[list[int]] = []

    def read_at(descriptor: int, destinations: Sequence[memoryview], offset: int) -> int:
        calls.append([start // SIZE for start in accumulate(map(len, destinations[:-1]), initial=offset)])
        begun.release()
        held.wait()
        return preadv(descriptor, destinations, offset)

    engine = TransferEngine(2, request_bytes=8 * SIZE, read_at=read_at)
    with engine.together():
        ahead = [engine.submit(read_of(planes, expert, buffer), urgent=False) for expert in range(5)]
    begun.acquire()
    assert not begun.acquire(timeout=0.05)
    assert calls == [[0, 1]]
    urgent = engine.submit(read_of(planes, 7, buffer), urgent=True)
    begun.acquire()
    assert calls == [[0, 1], [7]]
    held.set()
    for ticket in [*ahead, urgent]:
        ticket.wait()
    engine.close()
    assert calls[2:] == [[2, 3], [4]]
