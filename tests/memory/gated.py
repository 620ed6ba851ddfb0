"""A disk that waits for a test, and reads for it."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from memory.plane_file import PAGE, PlaneFile
from moestro.memory.direct import preadv
from moestro.memory.pages import HostBuffer
from moestro.memory.planes import read_of as planes_read
from moestro.memory.tickets import Read


class Gate:
    """A disk that waits until it is opened, and notes which offsets are read in which order."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.offsets: list[int] = []
        self.reading = threading.Semaphore(0)

    def read_at(self, descriptor: int, destinations: Sequence[memoryview], offset: int) -> int:
        self.offsets.append(offset)
        self.reading.release()
        self.open.wait()
        return preadv(descriptor, destinations, offset)


def read_of(planes: PlaneFile, expert: int, buffer: HostBuffer, slot: int | None = None) -> Read:
    extent = planes.extents[(0, expert, 0)]
    offset = (expert if slot is None else slot) * 3 * PAGE
    view = buffer.view(offset, extent.nbytes)
    return planes_read((0, expert, 0), [extent], view)
