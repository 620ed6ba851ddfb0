"""However the transfer engine ends, or is interrupted, nothing is left behind and nobody waits for ever."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from memory.gated import Gate, read_of
from memory.plane_file import PAGE, PlaneFile
from moestro.errors import PlaneReadError
from moestro.memory.pages import HostBuffer
from moestro.memory.tickets import Ticket
from moestro.memory.transfer import TransferEngine


def test_close_lets_begun_reads_finish_and_fails_the_others(
    gate: Gate, gated: TransferEngine, uniform_planes: PlaneFile, buffer: HostBuffer
) -> None:
    ended: list[Ticket] = []
    begun = gated.submit(read_of(uniform_planes, 0, buffer), urgent=True, on_done=ended.append)
    gate.reading.acquire()
    queued = [
        gated.submit(read_of(uniform_planes, expert, buffer), urgent=expert == 1, on_done=ended.append)
        for expert in (1, 2)
    ]
    closing = threading.Thread(target=gated.close)
    closing.start()
    for ticket in queued:
        with pytest.raises(PlaneReadError, match="closed before its read began"):
            ticket.wait()
    assert not begun.done()
    gate.open.set()
    closing.join()
    begun.wait()
    assert sorted(ended, key=id) == sorted([begun, *queued], key=id)
    assert not gated.cancel(queued[0])
    with pytest.raises(RuntimeError, match="closed"):
        gated.submit(read_of(uniform_planes, 3, buffer), urgent=True)


def test_a_read_that_close_drops_can_no_longer_be_cancelled(
    gate: Gate, gated: TransferEngine, uniform_planes: PlaneFile, buffer: HostBuffer
) -> None:
    cancelled: list[bool] = []
    tickets = [gated.submit(read_of(uniform_planes, 0, buffer), urgent=True)]
    gate.reading.acquire()
    for expert in (1, 2):
        read = read_of(uniform_planes, expert, buffer)
        tickets.append(gated.submit(read, urgent=True, on_done=lambda _: cancelled.append(gated.cancel(tickets[2]))))
    threading.Timer(0.05, gate.open.set).start()
    gated.close()
    assert cancelled == [False, False]


def test_a_forked_child_is_told(uniform_planes: PlaneFile, buffer: HostBuffer) -> None:
    engine = TransferEngine()
    engine.submit(read_of(uniform_planes, 0, buffer), urgent=True).wait()
    child = os.fork()
    if child == 0:  # pragma: no cover - runs in the child
        try:
            engine.submit(read_of(uniform_planes, 1, buffer), urgent=True)
        except RuntimeError as error:
            os._exit(7 if "fork" in str(error) else 8)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    engine.close()


class InterruptedOnce(list[Ticket]):
    """As if the user pressed Ctrl-C just before the list is cleared."""

    interrupted = False

    def clear(self) -> None:
        if not self.interrupted:
            self.interrupted = True
            raise KeyboardInterrupt
        super().clear()


def test_an_interrupt_while_reads_are_handed_over_leaves_nothing_behind(
    gate: Gate, gated: TransferEngine, uniform_planes: PlaneFile, buffer: HostBuffer
) -> None:
    gated.submit(read_of(uniform_planes, 0, buffer), urgent=True)
    gate.reading.acquire()
    gated._held = InterruptedOnce()
    with pytest.raises(KeyboardInterrupt):
        gated.submit(read_of(uniform_planes, 1, buffer), urgent=True)
    lost = gated._tickets[max(gated._tickets)]
    assert gated.cancel(lost)
    assert not gated.cancel(lost)
    again = gated.submit(read_of(uniform_planes, 1, buffer, slot=5), urgent=True)
    gate.open.set()
    again.wait()
    assert bytes(again.read.destination) == uniform_planes.contents[(0, 1, 0)]
    assert [offset // (2 * PAGE) for offset in gate.offsets] == [0, 1]


def test_what_an_interrupt_kept_back_is_read_when_somebody_waits(
    uniform_planes: PlaneFile, buffer: HostBuffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TransferEngine()

    def interrupted(_ticket: Ticket) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "_entry", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.submit(read_of(uniform_planes, 1, buffer), urgent=False)
    monkeypatch.undo()
    ticket = engine.submit(read_of(uniform_planes, 1, buffer), urgent=True)
    ticket.wait()
    assert bytes(ticket.read.destination) == uniform_planes.contents[(0, 1, 0)]
    engine.close()


def test_a_program_may_end_while_it_reads(uniform_planes: PlaneFile) -> None:
    extent = uniform_planes.extents[(0, 1, 0)]
    program = f"""
from pathlib import Path
from moestro.memory.pages import HostBuffer
from moestro.memory.tickets import Read
from moestro.memory.transfer import TransferEngine
size, file = {extent.nbytes}, Path({str(extent.file)!r})
engine, buffer = TransferEngine(), HostBuffer(16 * size)
for number in range(16):
    engine.submit(Read(file, number * size, size, buffer.view(number * size, size), (), "A plane"), urgent=True)
"""
    for _ in range(3):
        ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert (ended.returncode, ended.stderr) == (0, "")
