"""The one checksum of the format: xxh3 with 64 bits, an int in memory and 16 hex digits in JSON."""

from __future__ import annotations

import os
from pathlib import Path

import xxhash

_CHUNK = 4 << 20


def checksum(data: bytes | bytearray | memoryview) -> int:
    """xxh3_64 of `data` with seed 0."""
    return xxhash.xxh3_64_intdigest(data)


def to_hex(value: int) -> str:
    """As written in JSON."""
    return f"{value:016x}"


class RunningChecksum:
    """xxh3_64 of bytes that come in pieces."""

    def __init__(self) -> None:
        self._state = xxhash.xxh3_64()

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Append `data`."""
        self._state.update(data)

    @property
    def value(self) -> int:
        """The checksum of everything so far."""
        return self._state.intdigest()


def checksum_range(descriptor: int, offset: int, nbytes: int) -> int:
    """xxh3_64 of `nbytes` bytes from `offset` of an open file, read in pieces.

    Raises:
        EOFError: the file ends before.
        OSError: the disk cannot read it.
    """
    running = RunningChecksum()
    end = offset + nbytes
    while offset < end:
        piece = os.pread(descriptor, min(_CHUNK, end - offset), offset)
        if not piece:
            raise EOFError(f"the file ends at byte {offset}, expected {end}")
        running.update(piece)
        offset += len(piece)
    return running.value


def checksum_file(path: Path) -> int:
    """xxh3_64 of a whole file. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return checksum_range(descriptor, 0, os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)
