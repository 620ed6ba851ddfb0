"""Reads that bypass the page cache where the file system allows, and say so once where it does not.

Buffered reads would charge every plane to the page cache as well, beside the budget, and cost 0.35 CPU-seconds per GB
against 0.01 (measured).
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PosixPath

from moestro.memory.pages import PAGE

ReadAt = Callable[[int, Sequence[memoryview], int], int]
"""(file descriptor, destinations one after another, offset in the file) -> bytes read, 0 at the end; raises OSError."""

REFUSED = (errno.EINVAL, errno.EOPNOTSUPP)

CHECK_EVERY = 8
"""Of reads of the same bytes so many are followed by one that is checked. A damaged store is found by the first read;
what is left for others to find is a disk that gives other bytes than before, and no error."""


def preadv(descriptor: int, destinations: Sequence[memoryview], offset: int) -> int:
    """One system call; it lets go of the interpreter lock while the disk works."""
    return os.preadv(descriptor, destinations, offset)


class KeptFile(PosixPath):
    """A file that is what it was when it was opened, whatever becomes of its name: no other is equal to it.

    `FileReader.keep` makes them.
    """

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


@dataclass(frozen=True, slots=True)
class _OpenFile:
    descriptor: int
    direct: bool
    device: int
    unchecked: dict[int, int] = field(default_factory=dict)  # by offset: reads since its bytes were last found right


def fill(
    read_at: ReadAt, descriptor: int, destination: memoryview, offset: int, wanted: int, *, direct: bool = False
) -> None:
    """Read the first `wanted` bytes of `destination` from `offset` of a file on, in as many calls as it takes.

    Raises OSError when a call fails, EOFError when the file ends too early.
    """
    filled = 0
    while filled < wanted:
        try:
            count = read_at(descriptor, [destination[filled:]], offset + filled)
        except InterruptedError:
            continue
        # A direct read may only go on from a whole page: at the end of a file it stops inside of one.
        if direct and filled + count < wanted:
            count -= count % PAGE
        if count == 0:
            raise EOFError(f"the file ends before byte {offset + wanted}")
        filled += count


def _leave_nothing(opened: _OpenFile, offset: int, nbytes: int) -> None:
    if not opened.direct:
        os.posix_fadvise(opened.descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)


class FileReader:
    """Fills memory from files, which stay open until `close`. Safe to use from many threads."""

    def __init__(self, read_at: ReadAt = preadv) -> None:
        self._read_at = read_at
        self._lock = threading.RLock()  # files may be let go of by whoever drops the last mention of them
        self._files: dict[Path, _OpenFile] = {}
        self._replaced: list[int] = []
        self._buffered_devices: set[int] = set()

    @property
    def direct(self) -> bool:
        """Whether every file read so far is read past the page cache."""
        return not self._buffered_devices

    def read(self, file: Path, offset: int, destination: memoryview) -> None:
        """Fill `destination` (address, length and `offset` multiples of 4096) from `offset` of the file.

        Raises OSError when the file cannot be opened or read, EOFError when it ends too early.
        """
        self._read(file, offset, destination, len(destination))

    def read_to_end(self, file: Path, size: int, destination: memoryview) -> None:
        """Fill the first `size` bytes, all that the file has; aligned as in `read`, where `size` need not be."""
        self._read(file, 0, destination, size)

    def read_together(self, file: Path, offset: int, destinations: Sequence[memoryview]) -> bool:
        """Fill these, one after another, from `offset` on in one system call; aligned as in `read`.

        False when that did not work out, for whatever reason: what `read` does with each of them will tell.
        """
        try:
            opened = self._open(file)
            count = self._read_at(opened.descriptor, destinations, offset)
        except Exception:
            return False
        wanted = sum(map(len, destinations))
        _leave_nothing(opened, offset, wanted)
        return count == wanted

    def descriptor(self, file: Path) -> int:
        """By which the file is read at present; -1 where it cannot be opened, and `read` says why."""
        try:
            return self._open(file).descriptor
        except OSError:
            return -1

    def was_read(self, file: Path, offset: int, nbytes: int) -> None:
        """Somebody has read so much by the `descriptor`: nothing of it stays in the page cache."""
        _leave_nothing(self._open(file), offset, nbytes)

    def is_due(self, file: Path, offset: int) -> bool:
        """Whether what is read from there is to be checked: the first time, and one time in a few."""
        return self._open(file).unchecked.get(offset, CHECK_EVERY) >= CHECK_EVERY

    def is_known(self, file: Path, offset: int) -> bool:
        """Whether what is read from there has ever been found right."""
        opened = self._files.get(file)
        return opened is not None and offset in opened.unchecked

    def was_trusted(self, file: Path, offset: int) -> None:
        """What was read from there has not been checked."""
        self._open(file).unchecked[offset] += 1

    def found_right(self, file: Path, offset: int) -> None:
        """What is read from there is not due for a while."""
        self._open(file).unchecked[offset] = 0

    def keep(self, file: Path) -> KeptFile:
        """Open the file now: reads of what is returned find its bytes also when it has been replaced or deleted.

        Raises OSError when it cannot be opened.
        """
        kept = KeptFile(file)
        self._open(kept)
        return kept

    def let_go(self, file: KeptFile) -> None:
        """Close a file that was kept; no read of it may be under way. Nothing happens after `close`."""
        with self._lock:
            opened = self._files.pop(file, None)
            if opened is not None:
                os.close(opened.descriptor)

    def close(self) -> None:
        """Close all files; no read may be under way."""
        with self._lock:
            for descriptor in [*self._replaced, *(opened.descriptor for opened in self._files.values())]:
                os.close(descriptor)
            self._files.clear()
            self._replaced.clear()

    def _read(self, file: Path, offset: int, destination: memoryview, wanted: int) -> None:
        opened = self._open(file)
        try:
            self._fill(opened, offset, destination, wanted)
        except OSError as error:
            if not opened.direct or error.errno not in REFUSED:
                raise
            opened = self._fall_back(file, opened)
            self._fill(opened, offset, destination, wanted)
        _leave_nothing(opened, offset, wanted)

    def _fill(self, opened: _OpenFile, offset: int, destination: memoryview, wanted: int) -> None:
        fill(self._read_at, opened.descriptor, destination, offset, wanted, direct=opened.direct)

    def _open(self, file: Path) -> _OpenFile:
        with self._lock:
            opened = self._files.get(file)
            if opened is None:
                opened = self._files[file] = self._open_direct(file) or self._open_buffered(file)
            return opened

    def _open_direct(self, file: Path) -> _OpenFile | None:
        if file.stat().st_dev in self._buffered_devices:
            return None
        try:
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        except OSError as error:
            if error.errno not in REFUSED:
                raise
            return None
        return _OpenFile(descriptor, True, os.fstat(descriptor).st_dev)

    def _open_buffered(self, file: Path) -> _OpenFile:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        device = os.fstat(descriptor).st_dev
        # Planes are read whole and far apart: read-ahead would fetch what nobody asked for.
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        if device not in self._buffered_devices:
            self._buffered_devices.add(device)
            logging.getLogger("moestro").warning(
                "The file system of %s refuses direct reads (O_DIRECT); planes are read through the page cache,"
                " which is slower and takes memory beside the budget until the kernel drops it.",
                file.parent,
            )
        return _OpenFile(descriptor, False, device)

    def _fall_back(self, file: Path, refused: _OpenFile) -> _OpenFile:
        """The file opened for direct reads, but a read was refused: read it through the page cache from now on."""
        with self._lock:
            if self._files[file] is refused:
                self._files[file] = replace(self._open_buffered(file), unchecked=refused.unchecked)
                self._replaced.append(refused.descriptor)  # other threads may be reading from it
            return self._files[file]
