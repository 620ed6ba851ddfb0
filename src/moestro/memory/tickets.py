"""Reads on their way: what is to be read, what became of it, and the queue they wait in."""

from __future__ import annotations

import ctypes
import enum
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from moestro.errors import PlaneReadError

PIECE_BYTES = 2 << 20
"""What is read at once of what nobody waits for, unless a plane is larger."""


@dataclass(frozen=True, slots=True)
class Read:
    """Fill `destination` with `nbytes` from `offset` of `file`; offset, size and address are multiples of 4096.

    `checksums` are bytes and xxh3_64 of its planes, one after another (none: not checked); `label` begins errors:
    "Plane 0 of ...".
    """

    file: Path
    offset: int
    nbytes: int
    destination: memoryview
    checksums: tuple[tuple[int, int], ...]
    label: str

    def address(self) -> int:
        """Address of the first byte of the destination."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self.destination))

    def failed(self, reason: str) -> PlaneReadError:
        """The error that says why it has not been carried out."""
        return PlaneReadError(
            f"{self.label} ({self.nbytes} bytes at offset {self.offset} of {self.file}) could not be read:"
            f" {reason}. Check the disk, then pack the store again if `moestro inspect --verify` finds it damaged."
        )


class State(enum.Enum):
    """Of a ticket."""

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
        self.state = State.QUEUED
        self.callbacks: list[Callable[[Ticket], None]] = []
        self._unfinished = threading.Lock()  # an event would take as long to make as all the rest
        self._unfinished.acquire()

    def finish(self) -> None:
        """It was carried out, failed or was cancelled."""
        self.state = State.DONE
        self._unfinished.release()

    def done(self) -> bool:
        """Whether it was carried out, failed or was cancelled."""
        return not self._unfinished.locked()

    def wait(self) -> None:
        """Block until done; raises PlaneReadError when it failed."""
        with self._unfinished:
            pass
        if self.error is not None:
            raise self.error


class Transfers(Protocol):
    """What carries out reads: `TransferEngine`, or a link of a simulator with its own clock."""

    def together(self, *, hand_over: bool = True) -> AbstractContextManager[object]: ...

    def submit(self, read: Read, /, *, urgent: bool, on_done: Callable[[Ticket], None] | None) -> Ticket: ...

    def promote(self, ticket: Ticket, /) -> None: ...

    def cancel(self, ticket: Ticket, /) -> bool: ...

    def clock(self) -> float: ...

    def wait(self, changed: threading.Condition, /) -> None: ...


class TicketQueue:
    """Urgent tickets before the others, first come first served among equals. Not safe to use from several threads."""

    def __init__(self) -> None:
        # By where their bytes begin, in the order in which they came.
        self._urgent: dict[tuple[Path, int], Ticket] = {}
        self._speculative: dict[tuple[Path, int], Ticket] = {}

    def __len__(self) -> int:
        return len(self._urgent) + len(self._speculative)

    def push(self, ticket: Ticket) -> None:
        self._of(ticket)[_begin(ticket)] = ticket

    def remove(self, ticket: Ticket) -> None:
        del self._of(ticket)[_begin(ticket)]

    def promote(self, ticket: Ticket) -> None:
        """Make it urgent, behind those that are."""
        if not ticket.urgent:
            self.remove(ticket)
            ticket.urgent = True
            self.push(ticket)

    @property
    def urgent(self) -> bool:
        """Whether a computation waits for one of them."""
        return bool(self._urgent)

    def take(self, most_bytes: int) -> list[Ticket]:
        """The next ticket, and those after it on disk that are as urgent, as long as they have `most_bytes` together;
        those that are not, a piece of `PIECE_BYTES` at most, so that what becomes urgent soon has its turn.

        Only of equal urgency: a computation does not wait for the bytes of a neighbour that nobody has asked for.
        """
        queue = self._urgent or self._speculative
        if queue is self._speculative:
            most_bytes = min(most_bytes, PIECE_BYTES)
        ticket: Ticket | None = next(iter(queue.values()))
        taken: list[Ticket] = []
        total = 0
        while ticket is not None and (not taken or total + ticket.read.nbytes <= most_bytes):
            del queue[_begin(ticket)]
            taken.append(ticket)
            total += ticket.read.nbytes
            ticket = queue.get((ticket.read.file, ticket.read.offset + ticket.read.nbytes))
        return taken

    def clear(self) -> list[Ticket]:
        """All of them, which leave."""
        tickets = [*self._urgent.values(), *self._speculative.values()]
        self._urgent.clear()
        self._speculative.clear()
        return tickets

    def _of(self, ticket: Ticket) -> dict[tuple[Path, int], Ticket]:
        return self._urgent if ticket.urgent else self._speculative


def _begin(ticket: Ticket) -> tuple[Path, int]:
    return ticket.read.file, ticket.read.offset
