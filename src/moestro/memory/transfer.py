"""Moves planes from disk into memory with a few threads; what a computation waits for goes first.

Bytes go straight to their destination and are checked there: the first time that they are read, and then now and
then, as checking what comes again and again takes the processor from computing. One or two reads at a time are enough
for the disks we measured; a second thread also reads while the first one checks. Planes that lie one after another on
disk and wait together are read in one request: small reads cost the disk and the processor as much as large ones. Of
what nobody waits for there is one request at a time, and a small one: another thread is there for what is asked for
meanwhile.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import xxhash

from moestro.errors import PlaneReadError
from moestro.memory.direct import FileReader, ReadAt, preadv
from moestro.memory.pages import PAGE
from moestro.memory.tickets import Read, State, Ticket, TicketQueue

THREADS = 2
REQUEST_BYTES = 4 << 20
"""What serves the disks that we measured, where nothing is known of this one."""

_HAND_OVER_S = 0.001


@dataclass(slots=True)
class TransferStats:
    """Of all reads so far, in `requests` to the disk (one may carry several reads).

    `busy_seconds`: at least one was running; `check_seconds`: checking, summed over threads; `slowest_seconds`: the
    request that took longest.
    """

    reads: int = 0
    requests: int = 0
    failed: int = 0
    bytes_read: int = 0
    busy_seconds: float = 0.0
    check_seconds: float = 0.0
    slowest_seconds: float = 0.0


class TransferEngine:
    """`threads` threads, started by the first read; a request carries up to `request_bytes`, or one larger read.

    `read_at` is the system call (tests make it slow or fail). `clock` tells seconds; waiting and the times of tickets
    go by it.
    """

    def __init__(
        self,
        threads: int = THREADS,
        *,
        request_bytes: int = REQUEST_BYTES,
        read_at: ReadAt = preadv,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        assert threads > 0, threads
        self._reader = FileReader(read_at)
        self._clock = clock
        self._thread_count, self._request_bytes = threads, request_bytes
        self._threads: list[threading.Thread] = []
        self._process = os.getpid()
        lock = threading.RLock()
        self._work_or_end, self._taken = threading.Condition(lock), threading.Condition(lock)
        self._idle = 0  # threads that wait for work
        self._held = 0  # callers within `together`: the lock's holder
        self._queue = TicketQueue()
        self._in_flight: dict[tuple[Path, int, int], Ticket] = {}
        self._closed = False
        self._stats = TransferStats()
        self._running = 0  # requests
        self._speculating: Ticket | None = None  # the first of the request that nobody waited for when it began
        self._busy_since = 0.0

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
        """A copy of the counters."""
        with self._work_or_end:
            running = time.perf_counter() - self._busy_since if self._running else 0.0
            return replace(self._stats, busy_seconds=self._stats.busy_seconds + running)

    @contextmanager
    def together(self, *, hand_over: bool = True) -> Iterator[None]:
        """While it is open nothing is taken from the queue, so that neighbours submitted meanwhile share a request.

        With `hand_over`, a thread that has nothing to do begins the request before the caller goes on. It would have to
        wait for the interpreter lock otherwise, up to 5 ms, while the caller asks for more and the disk does nothing
        (measured: 1.6 ms a layer).
        """
        with self._work_or_end:
            self._held += 1
            try:
                yield
            finally:
                self._held -= 1
            if self._idle and self._has_work() and not self._held:
                self._work_or_end.notify()
                if hand_over:
                    self._taken.wait(_HAND_OVER_S)

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
                ticket.callbacks.append(on_done)
            return ticket

    def promote(self, ticket: Ticket) -> None:
        """Make a queued read urgent: a computation waits for it by now."""
        with self._work_or_end:
            if ticket.state is State.QUEUED:
                self._queue.promote(ticket)
            ticket.urgent = True

    def cancel(self, ticket: Ticket) -> bool:
        """Drop a read that has not begun: True, and its `on_done` is never called. Else False and nothing changes."""
        with self._work_or_end:
            if ticket.state is not State.QUEUED:
                return False
            self._queue.remove(ticket)
            ticket.error = ticket.read.failed("it was cancelled before its read began")
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
            dropped = self._queue.clear()
            for ticket in dropped:
                ticket.state = State.DONE
            self._work_or_end.notify_all()
        for ticket in dropped:
            self._finish(ticket, ticket.read.failed("the transfer engine was closed before its read began"))
        for thread in self._threads:
            thread.join()
        self._reader.close()

    def _ticket_for(self, read: Read, urgent: bool) -> Ticket:
        extent = (read.file, read.offset, read.nbytes)
        ticket = self._in_flight.get(extent)
        if ticket is not None:
            assert ticket.read.address() == read.address(), f"{read.label} is in flight to another destination"
            if urgent:
                self.promote(ticket)
            return ticket
        ticket = self._in_flight[extent] = Ticket(read, urgent=urgent)
        ticket.submitted = self._clock()
        self._queue.push(ticket)
        if len(self._threads) < self._thread_count:
            self._start_thread()
        if not self._held:
            self._work_or_end.notify()
        return ticket

    def _start_thread(self) -> None:
        # Daemons: a program that forgets `close` must still be able to end.
        thread = threading.Thread(target=self._work, name=f"moestro-transfer-{len(self._threads)}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _work(self) -> None:
        while tickets := self._next():
            unread = self._read(tickets)
            for ticket, error in zip(tickets, unread, strict=True):
                self._finish(ticket, error or self._check(ticket.read))

    def _next(self) -> list[Ticket]:
        """The tickets of the next request; none when all is over."""
        with self._work_or_end:
            while not self._has_work():
                if self._closed:
                    return []
                self._idle += 1
                self._work_or_end.wait()
                self._idle -= 1
            tickets = self._queue.take(self._request_bytes)
            if not tickets[0].urgent:
                self._speculating = tickets[0]
            self._taken.notify()
            if self._has_work():
                self._work_or_end.notify()
            for ticket in tickets:
                ticket.state = State.RUNNING
                ticket.begun = self._clock()
            if self._running == 0:
                self._busy_since = time.perf_counter()
            self._running += 1
            return tickets

    def _has_work(self) -> bool:
        """Whether a thread that is free may begin a request."""
        return self._queue.urgent or (len(self._queue) > 0 and self._speculating is None)

    def _read(self, tickets: Sequence[Ticket]) -> list[PlaneReadError | None]:
        """Fill the destinations, in one request if that works; of each ticket what went wrong."""
        start = time.perf_counter()
        reads = [ticket.read for ticket in tickets]
        destinations = [read.destination for read in reads]
        together = len(reads) > 1 and self._reader.read_together(reads[0].file, reads[0].offset, destinations)
        errors = [None if together else self._read_one(read) for read in reads]
        end = time.perf_counter()
        with self._work_or_end:
            self._running -= 1
            if self._running == 0:
                self._stats.busy_seconds += end - self._busy_since
            self._stats.requests += 1 if together else len(reads)
            self._stats.slowest_seconds = max(self._stats.slowest_seconds, end - start)
            if self._speculating is tickets[0]:
                self._speculating = None
                if self._queue:
                    self._work_or_end.notify()
        return errors

    def _read_one(self, read: Read) -> PlaneReadError | None:
        try:
            self._reader.read(read.file, read.offset, read.destination)
        except (OSError, EOFError) as error:
            return _because(read, str(error), error)
        except BaseException as unforeseen:  # whatever happens, who waits for the ticket must hear of it
            return _because(read, f"{type(unforeseen).__name__}: {unforeseen}", unforeseen)
        return None

    def _check(self, read: Read) -> PlaneReadError | None:
        if not (read.checksums and self._reader.is_due(read.file, read.offset)):
            return None
        start, first, error = time.perf_counter(), 0, None
        for plane, (nbytes, expected) in enumerate(read.checksums):
            actual = xxhash.xxh3_64_intdigest(read.destination[first : first + nbytes])
            if actual != expected:
                which = f"the checksum of plane {plane}" if nbytes < read.nbytes else "its checksum"
                error = read.failed(f"{which} is {actual:016x}, expected {expected:016x}")
                break
            first += nbytes
        with self._work_or_end:
            self._stats.check_seconds += time.perf_counter() - start
        if error is None:
            self._reader.found_right(read.file, read.offset)
        return error

    def _finish(self, ticket: Ticket, error: PlaneReadError | None) -> None:
        with self._work_or_end:
            ticket.ended = self._clock()
            if ticket.state is State.RUNNING:
                self._stats.reads += 1
                self._stats.bytes_read += 0 if error else ticket.read.nbytes
            self._stats.failed += error is not None
            ticket.error = error
            self._leave(ticket)
        for callback in ticket.callbacks:
            try:
                callback(ticket)
            except BaseException:  # a bug in the caller must not take the thread, and all later reads, with it
                logging.getLogger("moestro").exception("The callback of the read of %s failed.", ticket.read.label)

    def _leave(self, ticket: Ticket) -> None:
        del self._in_flight[(ticket.read.file, ticket.read.offset, ticket.read.nbytes)]
        ticket.finish()


def _because(read: Read, reason: str, cause: BaseException) -> PlaneReadError:
    error = read.failed(reason)
    error.__cause__ = cause
    return error
