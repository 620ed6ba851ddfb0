"""Links with a virtual clock, in the place of the transfer engine: reads take the time that their bytes take."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from moestro.memory.tickets import Read, Ticket

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
    """Two stages in a row, each with one read at a time: disk to memory, and memory to a device where
    `device_bytes_per_s` is not 0. Urgent reads begin before the others; none is interrupted.

    Whoever computes calls `pass_time`; whoever waits for a read, `wait`. Nothing else moves the clock.
    """

    bytes_per_s: float
    latency_s: float = 0.0
    device_bytes_per_s: float = 0.0
    carried: LinkBytes = field(default_factory=LinkBytes)

    def __post_init__(self) -> None:
        self._now = 0.0
        self._urgent: deque[_Transfer] = deque()
        self._speculative: deque[_Transfer] = deque()
        self._reading: _Transfer | None = None
        self._read_ends = 0.0
        self._arriving: deque[tuple[float, _Transfer]] = deque()

    def clock(self) -> float:
        """Virtual seconds since the start."""
        return self._now

    def seconds_for(self, nbytes: int) -> float:
        """How long the slower stage is busy with a read of so many bytes."""
        onward_s = nbytes / self.device_bytes_per_s if self.device_bytes_per_s else 0.0
        return max(self.latency_s + nbytes / self.bytes_per_s, onward_s)

    def pass_time(self, seconds: float) -> None:
        """Somebody computes meanwhile: what ends by then ends."""
        until = self._now + seconds
        while self._next_event() <= until:
            self._happen()
        self._now = until

    def submit(self, read: Read, *, urgent: bool, on_done: Done | None) -> Ticket:
        """Queue a read."""
        transfer = _Transfer(Ticket(read, urgent=urgent), on_done, urgent)
        (self._urgent if urgent else self._speculative).append(transfer)
        self._start()
        return transfer.ticket

    def together(self) -> AbstractContextManager[object]:
        """Reads that are submitted together take as long as one after another."""
        return nullcontext()

    def promote(self, ticket: Ticket) -> None:
        """A computation waits for it by now."""
        transfer = next((one for one in self._speculative if one.ticket is ticket), None)
        if transfer is not None:
            self._speculative.remove(transfer)
            self._urgent.append(transfer)

    def cancel(self, ticket: Ticket) -> bool:
        """Drop a read that has not begun."""
        for queue in (self._urgent, self._speculative):
            for transfer in queue:
                if transfer.ticket is ticket:
                    queue.remove(transfer)
                    return True
        return False

    def wait(self, changed: threading.Condition) -> None:
        """Time passes until a read has arrived."""
        changed.release()
        try:
            while not self._happen():
                pass
        finally:
            changed.acquire()

    def _next_event(self) -> float:
        read_ends = self._read_ends if self._reading is not None else math.inf
        return min(read_ends, self._arriving[0][0] if self._arriving else math.inf)

    def _happen(self) -> bool:
        """The next event; True when a read has arrived by it."""
        at = self._next_event()
        assert at < math.inf, "nothing is under way that could end"
        self._now = max(self._now, at)
        if self._arriving and self._arriving[0][0] <= at:
            self._arrive(self._arriving.popleft()[1])
            return True
        transfer = self._reading
        assert transfer is not None
        self._reading = None
        self._start()
        if not self.device_bytes_per_s:
            self._arrive(transfer)
            return True
        begins = max(self._now, self._arriving[-1][0]) if self._arriving else self._now
        self._arriving.append((begins + transfer.ticket.read.nbytes / self.device_bytes_per_s, transfer))
        return False

    def _start(self) -> None:
        if self._reading is None and (self._urgent or self._speculative):
            self._reading = (self._urgent or self._speculative).popleft()
            self._read_ends = self._now + self.latency_s + self._reading.ticket.read.nbytes / self.bytes_per_s

    def _arrive(self, transfer: _Transfer) -> None:
        if transfer.urgent:
            self.carried.demand += transfer.ticket.read.nbytes
        else:
            self.carried.prefetch += transfer.ticket.read.nbytes
        if transfer.on_done is not None:
            transfer.on_done(transfer.ticket)
