"""Moves planes from disk into memory with a few threads; what a computation waits for goes first.

Bytes go straight to their destination and are checked there: the first time that they are read, and then now and
then, as checking what comes again and again takes the processor from computing. One or two reads at a time are enough
for the disks we measured. Which reads share a request, and which come first, is decided where threads wait for them, in
`csrc/read_queue.h`: they read without the interpreter, whose lock has who asked for the read, and another thread checks
and puts down what they have read.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from weakref import WeakSet

import xxhash

from moestro import _native
from moestro.errors import PlaneReadError
from moestro.memory.direct import FileReader, ReadAt, preadv
from moestro.memory.pages import PAGE
from moestro.memory.tickets import PIECE_BYTES, Notice, Read, Ticket

THREADS = 2
REQUEST_BYTES = 4 << 20
"""What serves the disks that we measured, where nothing is known of this one."""

_LAST_WAIT_S = 1.0


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

    `read_at` is called instead of the system (tests make it slow or fail). `clock` tells seconds; waiting and the times
    of tickets go by it.
    """

    def __init__(
        self,
        threads: int = THREADS,
        *,
        request_bytes: int = REQUEST_BYTES,
        read_at: ReadAt | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        assert threads > 0, threads
        self._reader = FileReader(preadv if read_at is None else read_at)
        self._clock = clock
        # Times of what is read elsewhere are those of the system's clock.
        self._queue_reads = read_at is None and clock is time.perf_counter
        self._thread_count = threads
        self._threads: list[threading.Thread] = []
        self._started = 0
        self._process = os.getpid()
        self._queue = _native.ReadQueue(request_bytes, PIECE_BYTES)
        self._lock = threading.RLock()
        self._tickets: dict[int, Ticket] = {}  # by number: those that have not ended
        self._in_flight: dict[tuple[Path, int, int], Ticket] = {}
        self._submitted = 0
        self._holding = 0  # `together` that are open, all in the thread that has the lock
        self._held: list[Ticket] = []  # submitted in them
        self._closed = False
        self._stats = TransferStats()
        _ENGINES.add(self)

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
        queue = self._queue.stats()
        with self._lock:
            requests = self._stats.requests + queue.requests
            return replace(self._stats, requests=requests, busy_seconds=queue.busy, slowest_seconds=queue.slowest)

    @contextmanager
    def together(self) -> Iterator[None]:
        """No read that is submitted while it is open begins before its end, so that neighbours share a request."""
        with self._lock:
            self._holding += 1
            try:
                yield
            finally:
                self._holding -= 1
                if not self._holding:
                    self._hand_over()

    def _hand_over(self) -> None:
        """Put what has been submitted into the queue. Interrupted anywhere, it can be done again."""
        self._queue.push([self._entry(ticket) for ticket in self._held])
        self._held.clear()

    def _entry(self, ticket: Ticket) -> tuple[int, int, int, int, int, bool, Notice | None]:
        read, descriptor = ticket.read, self._reader.descriptor(ticket.read.file)
        unchecked = not read.checksums or (descriptor >= 0 and not self._reader.is_due(read.file, read.offset))
        notice = read.notice if unchecked else None
        return ticket.number, descriptor, read.offset, read.nbytes, read.address(), ticket.urgent, notice

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
        with self._lock:
            if self._closed:
                raise RuntimeError("the TransferEngine is closed")
            ticket = self._ticket_for(read, urgent)
            if on_done is not None:
                ticket.callbacks.append(on_done)
            return ticket

    def promote(self, ticket: Ticket) -> None:
        """Make a queued read urgent: a computation waits for it by now."""
        with self._lock:
            ticket.urgent = True
            self._queue.promote(ticket.number)
            if self._held and not self._holding:  # left by an interrupt
                self._hand_over()

    def cancel(self, ticket: Ticket) -> bool:
        """Drop a read that has not begun: True, and its `on_done` is never called. Else False and nothing changes."""
        with self._lock:
            if ticket.number > self._queue.newest() and ticket in self._held:
                self._held.remove(ticket)
            elif not self._queue.remove(ticket.number):
                return False
            ticket.error = ticket.read.failed("it was cancelled before its read began")
            self._leave(ticket)
            return True

    @property
    def queue(self) -> _native.ReadQueue:
        """What carries out reads, for who reads without the interpreter and says so (`was_fetched`)."""
        return self._queue

    @property
    def reads_by_queue(self) -> bool:
        """Whether threads of the queue read, and times are the system's."""
        return self._queue_reads

    def was_fetched(self, read: Read, *, is_there: bool = True) -> PlaneReadError | None:
        """Somebody has had the `queue` carry this out: check it if that is due, and it still `is_there`. What is wrong
        with it, if anything."""
        error = self._check(read) if is_there else None
        with self._lock:
            self._stats.reads += 1
            self._stats.failed += error is not None
            self._stats.bytes_read += 0 if error else read.nbytes
        return error

    def clock(self) -> float:
        """Seconds by which waiting is measured."""
        return self._clock()

    @staticmethod
    def wait(changed: threading.Condition) -> None:
        """Until `changed`, whose lock is held, is notified: a callback of some read does so."""
        changed.wait()

    def close(self) -> None:
        """Finish the reads that have begun, fail those that wait, and end the threads."""
        self._end_waiting()
        for thread in self._threads:  # these end after those of the queue, and can be interrupted
            thread.join()
        self._queue.join()
        self._reader.close()

    def _end_waiting(self) -> None:
        """Nothing more begins; what has not begun fails."""
        with self._lock:
            self._closed = True
            dropped = [self._tickets[number] for number in self._queue.close()]
            dropped += [ticket for ticket in self._held if ticket.number > self._queue.newest()]
            self._held.clear()
        for ticket in dropped:
            ticket.ended = self._clock()
            self._finish(ticket, ticket.read.failed("the transfer engine was closed before its read began"))

    def leave(self) -> None:
        """The program ends, and nobody has called `close`: a thread that came back to it later would abort it."""
        if self._process != os.getpid():
            return
        self._end_waiting()
        for thread in self._threads:
            thread.join(_LAST_WAIT_S)

    def _ticket_for(self, read: Read, urgent: bool) -> Ticket:
        extent = (read.file, read.offset, read.nbytes)
        ticket = self._in_flight.get(extent)
        if ticket is not None:
            assert ticket.read.address() == read.address(), f"{read.label} is in flight to another destination"
            if urgent:
                self.promote(ticket)
            return ticket
        if self._started < self._thread_count:
            self._start_thread()
        self._submitted = number = self._submitted + 1
        ticket = self._in_flight[extent] = self._tickets[number] = Ticket(read, urgent=urgent, number=number)
        ticket.submitted = self._clock()
        self._held.append(ticket)
        if not self._holding:
            self._hand_over()
        return ticket

    def _start_thread(self) -> None:
        if not (self._queue_reads and self._threads):  # one puts down what all threads of the queue have read
            # Daemons: a program that forgets `close` must still be able to end.
            work = self._put_down if self._queue_reads else self._work
            thread = threading.Thread(target=work, name=f"moestro-transfer-{len(self._threads)}", daemon=True)
            thread.start()
            self._threads.append(thread)
        if self._queue_reads:
            self._queue.start()
        self._started += 1

    def _put_down(self) -> None:
        """See to what the queue's threads have read."""
        while (request := self._queue.tried()) is not None:
            tickets = self._tickets_of(request)
            if not request.filled:
                self._read_here(request, tickets)
                continue
            for ticket in tickets:
                ticket.begun, ticket.ended = request.begun, request.ended
                self._carried_out(ticket, None, by_queue=True)

    def _work(self) -> None:
        while (request := self._queue.next()) is not None:
            self._read_here(request, self._tickets_of(request))

    def _tickets_of(self, request: _native.ReadRequest) -> list[Ticket]:
        with self._lock:
            return [self._tickets[number] for number in request.ids]

    def _read_here(self, request: _native.ReadRequest, tickets: Sequence[Ticket]) -> None:
        for ticket in tickets:
            ticket.begun = self._clock()
        unread = self._read(tickets)
        self._queue.done(request)
        for ticket, error in zip(tickets, unread, strict=True):
            ticket.ended = self._clock()
            self._carried_out(ticket, error, by_queue=False)

    def _carried_out(self, ticket: Ticket, error: PlaneReadError | None, *, by_queue: bool) -> None:
        read = ticket.read
        try:
            if by_queue:
                self._reader.was_read(read.file, read.offset, read.nbytes)
            error = error or self._check(read)
        except BaseException as unforeseen:  # whatever happens, who waits for the ticket must hear of it
            error = error or _because(read, f"{type(unforeseen).__name__}: {unforeseen}", unforeseen)
        with self._lock:
            self._stats.reads += 1
            self._stats.bytes_read += 0 if error else ticket.read.nbytes
        self._finish(ticket, error)

    def _read(self, tickets: Sequence[Ticket]) -> list[PlaneReadError | None]:
        """Fill the destinations, in one request if that works; of each ticket what went wrong."""
        reads = [ticket.read for ticket in tickets]
        destinations = [read.destination for read in reads]
        together = len(reads) > 1 and self._reader.read_together(reads[0].file, reads[0].offset, destinations)
        with self._lock:
            self._stats.requests += 1 if together else len(reads)
        return [None if together else self._read_one(read) for read in reads]

    def _read_one(self, read: Read) -> PlaneReadError | None:
        try:
            self._reader.read(read.file, read.offset, read.destination)
        except (OSError, EOFError) as error:
            return _because(read, str(error), error)
        except BaseException as unforeseen:  # whatever happens, who waits for the ticket must hear of it
            return _because(read, f"{type(unforeseen).__name__}: {unforeseen}", unforeseen)
        return None

    def _check(self, read: Read) -> PlaneReadError | None:
        if not read.checksums:
            return None
        if not self._reader.is_due(read.file, read.offset):
            self._reader.was_trusted(read.file, read.offset)
            return None
        start, first, error = time.perf_counter(), 0, None
        for plane, (nbytes, expected) in enumerate(read.checksums):
            actual = xxhash.xxh3_64_intdigest(read.destination[first : first + nbytes])
            if actual != expected:
                which = f"the checksum of plane {plane}" if nbytes < read.nbytes else "its checksum"
                error = read.failed(f"{which} is {actual:016x}, expected {expected:016x}")
                break
            first += nbytes
        with self._lock:
            self._stats.check_seconds += time.perf_counter() - start
        if error is None:
            self._reader.found_right(read.file, read.offset)
        return error

    def _finish(self, ticket: Ticket, error: PlaneReadError | None) -> None:
        with self._lock:
            self._stats.failed += error is not None
            ticket.error = error
            self._leave(ticket)
        for callback in ticket.callbacks:
            try:
                callback(ticket)
            except BaseException:  # a bug in the caller must not take the thread, and all later reads, with it
                logging.getLogger("moestro").exception("The callback of the read of %s failed.", ticket.read.label)

    def _leave(self, ticket: Ticket) -> None:
        del self._in_flight[(ticket.read.file, ticket.read.offset, ticket.read.nbytes)], self._tickets[ticket.number]
        ticket.finish()


_ENGINES: WeakSet[TransferEngine] = WeakSet()


@atexit.register
def _leave_all() -> None:
    for engine in tuple(_ENGINES):
        engine.leave()


def _because(read: Read, reason: str, cause: BaseException) -> PlaneReadError:
    error = read.failed(reason)
    error.__cause__ = cause
    return error
