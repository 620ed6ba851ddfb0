"""Rows of a matrix that stays on disk: an embedding, of which a step needs no more than a row for each token.

Shapes: V rows of the matrix, K columns, C rows that have a place in memory, R ids.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from moestro.errors import PlaneReadError
from moestro.memory.direct import ReadAt, fill, preadv
from moestro.runtime.slots import DTYPES
from moestro.store.reader import DenseTensor

_ENTRY_BYTES = 256
"""What Python keeps for a row that is in memory (an entry of a dictionary and two numbers, generously)."""


def lookup_table_bytes(row_bytes: int, places: int) -> int:
    """Memory for `places` rows of a matrix whose other rows are on disk."""
    return places * (row_bytes + _ENTRY_BYTES)


class RowsOnDisk:
    """The rows used last, in their stored type, as `table_CK`; others are read when they are asked for.

    A row is small beside a page of the disk, so it goes through the page cache, which is told to let go of it at once.
    Not thread-safe. `read_at` is the system call (tests make it fail).
    """

    def __init__(self, name: str, tensor: DenseTensor, file: Path, *, places: int, read_at: ReadAt = preadv) -> None:
        self.name, self.shape = name, tensor.shape
        self.table_CK = torch.empty(places, tensor.shape[1], dtype=DTYPES[tensor.dtype])
        self._file, self._offset = file, tensor.offset
        self._row_bytes = tensor.nbytes // tensor.shape[0]
        self._bytes = self.table_CK.view(torch.uint8).numpy().reshape(-1).data
        self._place_of: dict[int, int] = {}  # by id, the last used last
        self._free = list(range(places))
        self._read_at = read_at
        self._descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def places(self, ids_R: torch.Tensor) -> torch.Tensor:
        """Where in the table the rows are, int64 [R], until the next call; at most C ids may be distinct.

        Raises:
            PlaneReadError: a row could not be read.
        """
        ids = ids_R.tolist()
        wanted = dict.fromkeys(ids)
        assert len(wanted) <= len(self.table_CK), (len(wanted), len(self.table_CK))
        for row in wanted:
            if row in self._place_of:
                self._place_of[row] = self._place_of.pop(row)
        for row in wanted:
            if row not in self._place_of:
                self._read(row)
        return torch.tensor([self._place_of[row] for row in ids], dtype=torch.int64)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def _read(self, row: int) -> None:
        assert 0 <= row < self.shape[0], row
        if not self._free:
            self._free.append(self._place_of.pop(next(iter(self._place_of))))
        place, start = self._free[-1], self._offset + row * self._row_bytes
        target = self._bytes[place * self._row_bytes : (place + 1) * self._row_bytes]
        try:
            fill(self._read_at, self._descriptor, target, start, len(target))
        except (OSError, EOFError) as error:
            raise PlaneReadError(
                f"Row {row} of {self.name} ({self._row_bytes} bytes at offset {start} of {self._file}) could not be "
                f"read: {error}. Check the disk, then pack the store again if `moestro inspect --verify` finds it "
                "damaged."
            ) from error
        os.posix_fadvise(self._descriptor, start, self._row_bytes, os.POSIX_FADV_DONTNEED)
        self._place_of[row] = self._free.pop()
