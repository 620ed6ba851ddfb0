"""Reads on their way: what is to be read, and what became of it."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from moestro import _native
from moestro.errors import PlaneReadError

Notice = tuple[_native.Arrivals, int, int, list[int]]
"""Whom to tell that an expert has come, for which of its turns, which one, and the addresses of its planes."""

PIECE_BYTES = 2 << 20
"""What is read at once of what nobody waits for, unless a plane is larger."""


@dataclass(frozen=True, slots=True)
class Read:
    """Fill `destination` with `nbytes` from `offset` of `file`; offset, size and address are multiples of 4096.

    `checksums` are bytes and xxh3_64 of its planes, one after another (none: not checked); `label` begins errors:
    "Plane 0 of ...". `notice`, if any, is given as soon as the bytes are there, unless they have to be checked first.
    """

    file: Path
    offset: int
    nbytes: int
    destination: memoryview
    checksums: tuple[tuple[int, int], ...]
    label: str
    notice: Notice | None = None

    def address(self) -> int:
        """Address of the first byte of the destination."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self.destination))

    def failed(self, reason: str) -> PlaneReadError:
        """The error that says why it has not been carried out."""
        return PlaneReadError(
            f"{self.label} ({self.nbytes} bytes at offset {self.offset} of {self.file}) could not be read:"
            f" {reason}. Check the disk, then pack the store again if `moestro inspect --verify` finds it damaged."
        )


class Ticket:
    """A read that was submitted, as the engine's `number`. `submitted`, `begun` and `ended` are when, by the engine's
    clock (0: not yet)."""

    def __init__(self, read: Read, *, urgent: bool, number: int = 0) -> None:
        self.read = read
        self.number = number
        self.urgent = urgent
        self.error: PlaneReadError | None = None
        self.submitted = self.begun = self.ended = 0.0
        self.callbacks: list[Callable[[Ticket], None]] = []
        self._unfinished = threading.Lock()  # an event would take as long to make as all the rest
        self._unfinished.acquire()

    def finish(self) -> None:
        """It was carried out, failed or was cancelled."""
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

    def together(self) -> AbstractContextManager[object]: ...

    def submit(self, read: Read, /, *, urgent: bool, on_done: Callable[[Ticket], None] | None) -> Ticket: ...

    def promote(self, ticket: Ticket, /) -> None: ...

    def cancel(self, ticket: Ticket, /) -> bool: ...

    def clock(self) -> float: ...

    def wait(self, changed: threading.Condition, /) -> None: ...
