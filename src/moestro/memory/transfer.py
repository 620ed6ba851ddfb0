"""Moves planes from disk into memory with a few threads; what a computation waits for goes first.

Bytes go straight to their destination and are checked there. One or two reads at a time are enough for the disks we
measured; a second thread also reads while the first one checks.
"""

from __future__ import annotations

import ctypes
import enum
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import xxhash

from moestro.errors import PlaneReadError
from moestro.memory.direct import FileReader, ReadAt, preadv
from moestro.memory.pages import PAGE


@dataclass(frozen=True, slots=True)
class Read:
    """Fill `destination` with `nbytes` from `offset` of `file`; offset, size and address are multiples of 4096.

    `checksum` is the xxh3_64 of the bytes (None: not checked); `label` begins errors: "Plane 0 of ...".
    """

    file: Path
    offset: int
    nbytes: int
    destination: memoryview
    checksum: int | None
    label: str

    def address(self) -> int:
        """Address of the first byte of the destination."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self.destination))


@dataclass(frozen=True, slots=True)
class TransferStats:
    """Of all reads so far. `busy_seconds`: at least one was running; `check_seconds`: checking, summed over threads."""

    reads: int = 0
    failed: int = 0
    bytes_read: int = 0
    busy_seconds: float = 0.0
    check_seconds: float = 0.0


class _State(enum.Enum):
    QUEUED = 0
    RUNNING = 1
    DONE = 2


class Ticket:
    """A read that was submitted. `submitted`, `begun` and `ended` are when, by the engine's clock (0: not yet)."""

    def __init__(self, read: Read, *, urgent: bool) -> None:
        self.read = read
        self.urgent = urgent
        self.error: PlaneReadError | None = None
        self.submitted = self.begun = self.ended = 0.0
        self._state = _State.QUEUED
        self._callbacks: list[Callable[[Ticket], None]] = []
        self._finished = threading.Event()

    def done(self) -> bool:
        """Whether it was carried out, failed or was cancelled."""
        return self._finished.is_set()

    def wait(self) -> None:
        """Block until done; raises PlaneReadError when it failed."""
        self._finished.wait()
        if self.error is not None:
            raise self.error


class TransferEngine:
    """`threads` threads, started by the first read. `read_at` is the system call (tests make it slow or fail).

    `clock` tells seconds; waiting and the times of tickets go by it.
    """

    def __init__(
        self, threads: int = 2, *, read_at: ReadAt = preadv, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        assert threads > 0, threads
        self._reader = FileReader(read_at)
        self._clock = clock
        self._thread_count = threads
        self._threads: list[threading.Thread] = []
        self._process = os.getpid()
        self._work_or_end = threading.Condition(threading.Lock())
        self._urgent: deque[Ticket] = deque()
        self._speculative: deque[Ticket] = deque()
        self._in_flight: dict[tuple[Path, int, int], Ticket] = {}
        self._closed = False
        self._reads = self._failed = self._bytes_read = self._running = 0
        self._busy_seconds = self._busy_since = self._check_seconds = 0.0

    @property
    def reader(self) -> FileReader:
        """What reads the files, for reads that nothing has to wait for or overtake."""
        return self._reader

    @property
    def direct(self) -> bool:
        """Whether every file read so far is read past the page cache."""
        return self._reader.direct

    @property
    def stats(self) -> TransferStats:
        with self._work_or_end:
            busy = self._busy_seconds + (time.perf_counter() - self._busy_since if self._running else 0.0)
            return TransferStats(self._reads, self._failed, self._bytes_read, busy, self._check_seconds)

    def submit(self, read: Read, *, urgent: bool, on_done: Callable[[Ticket], None] | None = None) -> Ticket:
        """Queue a read: urgent ones before the others, first come first served among equals.

        An extent already in flight is not read again: its ticket comes back, made urgent if this one is. `on_done` is
        called once with the ticket, in a thread of the engine, when the read is done or has failed. RuntimeError
        after `close`, or in a forked child, which has no threads.
        """
        assert read.nbytes == len(read.destination) > 0, read
        assert not (read.offset | read.nbytes | read.address()) % PAGE, f"not aligned to {PAGE} bytes: {read}"
        if self._process != os.getpid():
            raise RuntimeError("a TransferEngine does not survive a fork: make a new one in the child process")
        with self._work_or_end:
            if self._closed:
                raise RuntimeError("the TransferEngine is closed")
            ticket = self._ticket_for(read, urgent)
            if on_done is not None:
                ticket._callbacks.append(on_done)
            return ticket

    def promote(self, ticket: Ticket) -> None:
        """Make a queued read urgent: a computation waits for it by now."""
        with self._work_or_end:
            self._promote(ticket)

    def cancel(self, ticket: Ticket) -> bool:
        """Drop a read that has not begun: True, and its `on_done` is never called. Else False and nothing changes."""
        with self._work_or_end:
            if ticket._state is not _State.QUEUED:
                return False
            (self._urgent if ticket.urgent else self._speculative).remove(ticket)
            ticket.error = self._unread(ticket.read, "it was cancelled before its read began")
            self._leave(ticket)
            return True

    def clock(self) -> float:
        """Seconds by which waiting is measured."""
        return self._clock()

    @staticmethod
    def wait(changed: threading.Condition) -> None:
        """Until `changed`, whose lock is held, is notified: a callback of some read does so."""
        changed.wait()

    def close(self) -> None:
        """Finish the reads that have begun, fail those that wait, and end the threads."""
        with self._work_or_end:
            self._closed = True
            dropped = [*self._urgent, *self._speculative]
            for ticket in dropped:
                ticket._state = _State.DONE
            self._urgent.clear()
            self._speculative.clear()
            self._work_or_end.notify_all()
        for ticket in dropped:
            self._finish(ticket, self._unread(ticket.read, "the transfer engine was closed before its read began"))
        for thread in self._threads:
            thread.join()
        self._reader.close()

    def _ticket_for(self, read: Read, urgent: bool) -> Ticket:
        extent = (read.file, read.offset, read.nbytes)
        ticket = self._in_flight.get(extent)
        if ticket is not None:
            assert ticket.read.address() == read.address(), f"{read.label} is in flight to another destination"
            if urgent:
                self._promote(ticket)
            return ticket
        ticket = self._in_flight[extent] = Ticket(read, urgent=urgent)
        ticket.submitted = self._clock()
        (self._urgent if urgent else self._speculative).append(ticket)
        if len(self._threads) < self._thread_count:
            self._start_thread()
        self._work_or_end.notify()
        return ticket

    def _start_thread(self) -> None:
        # Daemons: a program that forgets `close` must still be able to end.
        thread = threading.Thread(target=self._work, name=f"moestro-transfer-{len(self._threads)}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _promote(self, ticket: Ticket) -> None:
        if ticket._state is _State.QUEUED and not ticket.urgent:
            self._speculative.remove(ticket)
            self._urgent.append(ticket)
        ticket.urgent = True

    def _work(self) -> None:
        while (ticket := self._next()) is not None:
            error: PlaneReadError | None = None
            try:
                self._carry_out(ticket.read)
            except PlaneReadError as unread:
                error = unread
            except BaseException as unforeseen:  # whatever happens, who waits for the ticket must hear of it
                error = self._unread(ticket.read, f"{type(unforeseen).__name__}: {unforeseen}")
                error.__cause__ = unforeseen
            self._finish(ticket, error)

    def _next(self) -> Ticket | None:
        with self._work_or_end:
            while not self._urgent and not self._speculative:
                if self._closed:
                    return None
                self._work_or_end.wait()
            ticket = (self._urgent or self._speculative).popleft()
            ticket._state = _State.RUNNING
            ticket.begun = self._clock()
            if self._running == 0:
                self._busy_since = time.perf_counter()
            self._running += 1
            return ticket

    def _carry_out(self, read: Read) -> None:
        try:
            self._reader.read(read.file, read.offset, read.destination)
        except (OSError, EOFError) as error:
            raise self._unread(read, str(error)) from error
        if read.checksum is None:
            return
        start = time.perf_counter()
        actual = xxhash.xxh3_64_intdigest(read.destination)
        with self._work_or_end:
            self._check_seconds += time.perf_counter() - start
        if actual != read.checksum:
            raise self._unread(read, f"its checksum is {actual:016x}, expected {read.checksum:016x}")

    def _finish(self, ticket: Ticket, error: PlaneReadError | None) -> None:
        with self._work_or_end:
            if ticket._state is _State.RUNNING:
                self._running -= 1
                if self._running == 0:
                    self._busy_seconds += time.perf_counter() - self._busy_since
                self._reads += 1
                self._bytes_read += 0 if error else ticket.read.nbytes
            ticket.ended = self._clock()
            self._failed += error is not None
            ticket.error = error
            self._leave(ticket)
        for callback in ticket._callbacks:
            try:
                callback(ticket)
            except BaseException:  # a bug in the caller must not take the thread, and all later reads, with it
                logging.getLogger("moestro").exception("The callback of the read of %s failed.", ticket.read.label)

    def _leave(self, ticket: Ticket) -> None:
        ticket._state = _State.DONE
        del self._in_flight[(ticket.read.file, ticket.read.offset, ticket.read.nbytes)]
        ticket._finished.set()

    @staticmethod
    def _unread(read: Read, reason: str) -> PlaneReadError:
        return PlaneReadError(
            f"{read.label} ({read.nbytes} bytes at offset {read.offset} of {read.file}) could not be read:"
            f" {reason}. Check the disk, then pack the store again if `moestro inspect --verify` finds it damaged."
        )
