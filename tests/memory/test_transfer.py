from __future__ import annotations

import errno
import os
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from memory.gated import Gate, read_of
from memory.plane_file import PAGE, PlaneFile
from moestro.errors import PlaneReadError
from moestro.memory.direct import CHECK_EVERY, preadv
from moestro.memory.pages import HostBuffer
from moestro.memory.tickets import Read, Ticket
from moestro.memory.transfer import TransferEngine


def test_bytes_arrive_in_place_and_are_counted(uniform_planes: PlaneFile, buffer: HostBuffer) -> None:
    engine = TransferEngine()
    tickets = [engine.submit(read_of(uniform_planes, expert, buffer), urgent=True) for expert in range(16)]
    for expert, ticket in enumerate(tickets):
        ticket.wait()
        assert ticket.done()
        assert ticket.error is None
        assert bytes(buffer.view(expert * 3 * PAGE, 2 * PAGE)) == uniform_planes.contents[(0, expert, 0)]
    stats = engine.stats
    assert (stats.reads, stats.failed, stats.bytes_read) == (16, 0, 16 * 2 * PAGE)
    assert stats.check_seconds > 0
    assert stats.busy_seconds > 0
    engine.close()


def test_threads_start_with_the_first_read_and_end_with_close(uniform_planes: PlaneFile, buffer: HostBuffer) -> None:
    def threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    before = threads()
    engine = TransferEngine(threads=2)
    assert threads() == before
    for expert in range(4):
        engine.submit(read_of(uniform_planes, expert, buffer), urgent=True).wait()
    assert threads() == before + 3  # two that read, one that puts down what they have read
    engine.close()
    engine.close()
    assert threads() == before
    TransferEngine().close()


def test_urgent_before_speculative_first_come_first_served(
    gate: Gate, gated: TransferEngine, uniform_planes: PlaneFile, buffer: HostBuffer
) -> None:
    order = [(0, True), (1, False), (2, False), (3, True), (4, True)]
    tickets = []
    for expert, urgent in order:
        tickets.append(gated.submit(read_of(uniform_planes, expert, buffer), urgent=urgent))
        if expert == 0:
            gate.reading.acquire()
    gate.open.set()
    for ticket in tickets:
        ticket.wait()
    assert [offset // (2 * PAGE) for offset in gate.offsets] == [0, 3, 4, 1, 2]


def test_a_promoted_read_overtakes(
    gate: Gate, gated: TransferEngine, uniform_planes: PlaneFile, buffer: HostBuffer
) -> None:
    tickets = [gated.submit(read_of(uniform_planes, 0, buffer), urgent=True)]
    gate.reading.acquire()
    tickets += [gated.submit(read_of(uniform_planes, expert, buffer), urgent=False) for expert in (1, 2, 3)]
    gated.promote(tickets[3])
    gated.promote(tickets[3])
    gated.promote(tickets[0])  # begun: nothing left to promote
    gate.open.set()
    for ticket in tickets:
        ticket.wait()
    gated.promote(tickets[1])
    assert [offset // (2 * PAGE) for offset in gate.offsets] == [0, 3, 1, 2]


def test_an_extent_in_flight_is_read_once(
    gate: Gate, gated: TransferEngine, uniform_planes: PlaneFile, buffer: HostBuffer
) -> None:
    calls: list[Ticket] = []
    first = gated.submit(read_of(uniform_planes, 0, buffer), urgent=True)
    gate.reading.acquire()
    again = gated.submit(read_of(uniform_planes, 0, buffer), urgent=True, on_done=calls.append)
    queued = gated.submit(read_of(uniform_planes, 1, buffer), urgent=False)
    assert again is first
    assert gated.submit(read_of(uniform_planes, 1, buffer), urgent=True) is queued
    assert queued.urgent
    with pytest.raises(AssertionError, match="another destination"):
        gated.submit(read_of(uniform_planes, 1, buffer, slot=9), urgent=True)
    gate.open.set()
    queued.wait()
    assert len(gate.offsets) == 2
    assert calls == [first]
    gated.submit(read_of(uniform_planes, 0, buffer), urgent=True).wait()  # no longer in flight: read afresh
    assert len(gate.offsets) == 3


def test_a_queued_read_can_be_cancelled_a_begun_one_cannot(
    gate: Gate, gated: TransferEngine, uniform_planes: PlaneFile, buffer: HostBuffer
) -> None:
    calls: list[Ticket] = []
    begun = gated.submit(read_of(uniform_planes, 0, buffer), urgent=True)
    gate.reading.acquire()
    for urgent in (True, False):
        queued = gated.submit(read_of(uniform_planes, 1, buffer), urgent=urgent, on_done=calls.append)
        assert gated.cancel(queued)
        assert not gated.cancel(queued)
        with pytest.raises(PlaneReadError, match="cancelled"):
            queued.wait()
    assert not gated.cancel(begun)
    gate.open.set()
    begun.wait()
    assert not gated.cancel(begun)
    gated.submit(read_of(uniform_planes, 1, buffer), urgent=True).wait()
    assert len(gate.offsets) == 2
    assert calls == []


def test_an_unreadable_block_fails_its_read_only(uniform_planes: PlaneFile, buffer: HostBuffer) -> None:
    bad = uniform_planes.extents[(0, 3, 0)]

    def failing(descriptor: int, destinations: Sequence[memoryview], offset: int) -> int:
        if offset <= bad.offset < offset + sum(map(len, destinations)):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(descriptor, destinations, offset)

    engine = TransferEngine(read_at=failing)
    tickets = [engine.submit(read_of(uniform_planes, expert, buffer), urgent=True) for expert in range(6)]
    for expert, ticket in enumerate(tickets):
        if expert == 3:
            with pytest.raises(PlaneReadError, match="Input/output error") as error:
                ticket.wait()
            assert isinstance(error.value.__cause__, OSError)
            for part in ("Plane 0 of expert 3", str(bad.file), f"offset {bad.offset}", f"{bad.nbytes} bytes"):
                assert part in str(error.value)
            assert "\n" not in str(error.value)
        else:
            ticket.wait()
    assert (engine.stats.reads, engine.stats.failed, engine.stats.bytes_read) == (6, 1, 5 * 2 * PAGE)
    engine.close()


def test_a_flipped_bit_is_found(uniform_planes: PlaneFile, buffer: HostBuffer, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.bin"
    content = bytearray(uniform_planes.contents[(0, 4, 0)])
    content[5000] ^= 1
    damaged.write_bytes(content)
    checksum = uniform_planes.extents[(0, 4, 0)].checksum
    engine = TransferEngine()
    view = buffer.view(0, len(content))
    with pytest.raises(PlaneReadError, match=f"checksum is [0-9a-f]{{16}}, expected {checksum:016x}"):
        engine.submit(Read(damaged, 0, len(content), view, ((len(content), checksum),), "Plane 0"), urgent=True).wait()
    with pytest.raises(PlaneReadError, match="checksum is"):  # and every time from then on
        engine.submit(Read(damaged, 0, len(content), view, ((len(content), checksum),), "Plane 0"), urgent=True).wait()
    engine.submit(Read(damaged, 0, len(content), view, (), "Plane 0"), urgent=True).wait()
    assert bytes(view) == content
    engine.close()


def test_what_was_right_is_looked_at_again_now_and_then(
    uniform_planes: PlaneFile, buffer: HostBuffer, tmp_path: Path
) -> None:
    file, content = tmp_path / "turning.bin", uniform_planes.contents[(0, 4, 0)]
    file.write_bytes(content)
    checksum = uniform_planes.extents[(0, 4, 0)].checksum
    engine = TransferEngine()
    read = Read(file, 0, len(content), buffer.view(0, len(content)), ((len(content), checksum),), "Plane 0")
    engine.submit(read, urgent=True).wait()
    with file.open("r+b") as turning:
        turning.write(bytes([content[0] ^ 1]))
    for _ in range(CHECK_EVERY):
        engine.submit(read, urgent=True).wait()
    for _ in range(2):
        with pytest.raises(PlaneReadError, match="checksum is"):
            engine.submit(read, urgent=True).wait()
    engine.close()


@pytest.mark.parametrize("kind", ["missing", "truncated", "folder"])
def test_what_is_no_whole_file_is_named(buffer: HostBuffer, tmp_path: Path, kind: str) -> None:
    file = tmp_path / kind
    if kind == "truncated":
        file.write_bytes(bytes(PAGE))
    elif kind == "folder":
        file.mkdir()
    engine = TransferEngine()
    with pytest.raises(PlaneReadError, match=str(file)):
        engine.submit(Read(file, 0, 2 * PAGE, buffer.view(0, 2 * PAGE), (), "Plane 0"), urgent=True).wait()
    engine.close()


@pytest.mark.parametrize("surprise", [RuntimeError("no such thing"), SystemExit(3), MemoryError()])
def test_a_thread_survives_surprises(uniform_planes: PlaneFile, buffer: HostBuffer, surprise: BaseException) -> None:
    surprises = [surprise]

    def surprising(descriptor: int, destinations: Sequence[memoryview], offset: int) -> int:
        if surprises:
            raise surprises.pop()
        return preadv(descriptor, destinations, offset)

    engine = TransferEngine(threads=1, read_at=surprising)
    with pytest.raises(PlaneReadError, match=type(surprise).__name__):
        engine.submit(read_of(uniform_planes, 0, buffer), urgent=True).wait()
    engine.submit(read_of(uniform_planes, 0, buffer), urgent=True).wait()
    engine.close()


def test_a_failing_callback_is_logged_and_harms_nothing(
    uniform_planes: PlaneFile, buffer: HostBuffer, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(ticket: Ticket) -> None:
        raise KeyError("a bug")

    engine = TransferEngine(threads=1)
    engine.submit(read_of(uniform_planes, 0, buffer), urgent=True, on_done=broken).wait()
    engine.submit(read_of(uniform_planes, 1, buffer), urgent=True).wait()
    engine.close()
    assert "a bug" in caplog.text
    assert "expert 0" in caplog.text


def test_what_is_not_aligned_is_a_bug(uniform_planes: PlaneFile, buffer: HostBuffer) -> None:
    engine = TransferEngine()
    for offset, start, nbytes in ((512, 0, PAGE), (0, 512, PAGE), (0, 0, 512)):
        with pytest.raises(AssertionError, match="not aligned"):
            engine.submit(
                Read(uniform_planes.path, offset, nbytes, buffer.view(start, nbytes), (), "Plane"), urgent=True
            )
    with pytest.raises(AssertionError):
        engine.submit(Read(uniform_planes.path, 0, 2 * PAGE, buffer.view(0, PAGE), (), "Plane"), urgent=True)


def test_busy_seconds_are_wall_time_not_thread_time(uniform_planes: PlaneFile, buffer: HostBuffer) -> None:
    def slow(descriptor: int, destinations: Sequence[memoryview], offset: int) -> int:
        time.sleep(0.05)
        return preadv(descriptor, destinations, offset)

    engine = TransferEngine(threads=4, request_bytes=2 * PAGE, read_at=slow)
    start = time.perf_counter()
    tickets = [engine.submit(read_of(uniform_planes, expert, buffer), urgent=True) for expert in range(8)]
    for ticket in tickets:
        ticket.wait()
    engine.close()
    assert 0.1 <= engine.stats.busy_seconds <= time.perf_counter() - start
