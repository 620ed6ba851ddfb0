"""Links with a virtual clock, in the place of the transfer engine: reads take the time that their bytes take."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from moestro.memory.transfer import Read, Ticket

Done = Callable[[Ticket], None]


@dataclass(slots=True)
class LinkBytes:
    """Bytes that crossed the link, by cause: asked for by a computation when queued, or read ahead."""

    demand: int = 0
    prefetch: int = 0


@dataclass(slots=True, eq=False)
class _Transfer:
    ticket: Ticket
    on_done: Done | None
    urgent: bool


@dataclass(eq=False)
class VirtualLink:
    """One read at a time, urgent ones first, none interrupted: `latency_s`, then its bytes at `bytes_per_s`.

    Whoever computes calls `pass_time`; whoever waits for a read, `wait`. Nothing else moves the clock.
    """

    bytes_per_s: float
    latency_s: float = 0.0
    carried: LinkBytes = field(default_factory=LinkBytes)
    busy_s: float = 0.0

    def __post_init__(self) -> None:
        self._now = 0.0
        self._urgent: deque[_Transfer] = deque()
        self._speculative: deque[_Transfer] = deque()
        self._running: _Transfer | None = None
        self._ends = 0.0

    def clock(self) -> float:
        """Virtual seconds since the start."""
        return self._now

    def pass_time(self, seconds: float) -> None:
        """Somebody computes meanwhile: reads end that end by then."""
        until = self._now + seconds
        while self._running is not None and self._ends <= until:
            self._finish()
        self._now = until

    def submit(self, read: Read, *, urgent: bool, on_done: Done | None) -> Ticket:
        """Queue a read."""
        transfer = _Transfer(Ticket(read, urgent=urgent), on_done, urgent)
        (self._urgent if urgent else self._speculative).append(transfer)
        self._start()
        return transfer.ticket

    def promote(self, ticket: Ticket) -> None:
        """A computation waits for it by now."""
        for transfer in self._speculative:
            if transfer.ticket is ticket:
                self._speculative.remove(transfer)
                self._urgent.append(transfer)
                return

    def cancel(self, ticket: Ticket) -> bool:
        """Drop a read that has not begun."""
        for queue in (self._urgent, self._speculative):
            for transfer in queue:
                if transfer.ticket is ticket:
                    queue.remove(transfer)
                    return True
        return False

    def wait(self, changed: threading.Condition) -> None:
        """Time passes until the next read ends."""
        changed.release()
        try:
            assert self._running is not None, "nothing is under way that could end"
            self._finish()
        finally:
            changed.acquire()

    def _start(self) -> None:
        if self._running is not None or not (self._urgent or self._speculative):
            return
        self._running = (self._urgent or self._speculative).popleft()
        seconds = self.latency_s + self._running.ticket.read.nbytes / self.bytes_per_s
        self.busy_s += seconds
        self._ends = self._now + seconds

    def _finish(self) -> None:
        transfer = self._running
        assert transfer is not None
        self._now = max(self._now, self._ends)
        self._running = None
        if transfer.urgent:
            self.carried.demand += transfer.ticket.read.nbytes
        else:
            self.carried.prefetch += transfer.ticket.read.nbytes
        self._start()
        if transfer.on_done is not None:
            transfer.on_done(transfer.ticket)
