"""A file to measure reads with: a store's own planes, or random bytes that are removed afterwards."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moestro.errors import DiskError
from moestro.memory.budget import format_bytes
from moestro.store.disk import write_all
from moestro.store.reader import Store

SAMPLE_BYTES = 256 << 20
LEAST_BYTES = 32 << 20
"""A smaller file says more about a disk's own cache than about the disk."""

_PIECE = 8 << 20


def planes_file(store: Path) -> Path:
    """The file of a store that holds most planes.

    Raises:
        StoreError: `store` is no store.
        DiskError: its files are too small to measure with.
    """
    opened = Store.open(store)
    files = {opened.plane((layer, 0, 0)).file for layer in range(len(opened.layers))}
    largest = max(files, key=lambda file: file.stat().st_size)
    if largest.stat().st_size < LEAST_BYTES:
        raise DiskError(
            f"{largest} has {format_bytes(largest.stat().st_size)}, too little to measure a disk with: at least "
            f"{format_bytes(LEAST_BYTES)} are needed. Give --path {store} instead, which writes a file for the purpose."
        )
    return largest


@contextmanager
def temporary_file(folder: Path) -> Iterator[Path]:
    """A file of random bytes on the disk of `folder`, gone afterwards.

    Raises:
        DiskError: `folder` is no folder, may not be written or is too full.
    """
    if not folder.is_dir():
        raise DiskError(
            f"{folder} is no folder. Give the folder whose disk is to be measured, or a store with --store."
        )
    nbytes = SAMPLE_BYTES
    free = os.statvfs(folder)
    if free.f_bavail * free.f_frsize < nbytes + LEAST_BYTES:
        raise _full(folder, nbytes)
    try:
        descriptor, name = tempfile.mkstemp(dir=folder, prefix=".moestro-doctor-")
    except OSError as error:
        raise DiskError(
            f"No file can be made in {folder} ({error.strerror}). Give a folder on the same disk that may be written, "
            "or a store with --store, which is only read."
        ) from error
    try:
        try:
            for done in range(0, nbytes, _PIECE):
                write_all(descriptor, os.urandom(min(_PIECE, nbytes - done)))
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise _full(folder, nbytes) from error
        finally:
            os.close(descriptor)
        yield Path(name)
    finally:
        os.unlink(name)


def _full(folder: Path, nbytes: int) -> DiskError:
    return DiskError(
        f"{folder} has no room for the {format_bytes(nbytes)} that are written, read and removed again. Make room, or "
        "give a store on that disk with --store, which is only read."
    )
