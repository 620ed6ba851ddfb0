"""Durable writing: what is noted as done is on the disk, and two processes never write one store."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

from moestro.errors import StoreError


def write_all(descriptor: int, data: bytes | bytearray | memoryview, offset: int | None = None) -> None:
    """Write all of `data`, at `offset` or at the file's position. Raises OSError."""
    view = memoryview(data)
    done = 0
    while done < len(view):
        if offset is None:
            done += os.write(descriptor, view[done:])
        else:
            done += os.pwrite(descriptor, view[done:], offset + done)


def sync_file(path: Path) -> None:
    """Bring a file, or a folder's list of files, to the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, data: bytes | memoryview) -> None:
    """Make `path` hold `data`, or leave it as it was: never something in between. Raises OSError."""
    temporary = path.with_name(path.name + ".tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        write_all(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(temporary, path)
    sync_file(path.parent)


class FolderLock:
    """An exclusive lock on a folder, which it makes when it is missing. Released when closed or when the process ends.

    Raises:
        StoreError: another process holds it.
        OSError: the folder cannot be made or opened.
    """

    def __init__(self, folder: Path) -> None:
        while True:
            folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.close()
                raise StoreError(
                    f"Another process is writing {folder}. Wait until it is done, then run the command again."
                ) from None
            if self._is_still(folder):
                return
            # Between opening and locking, the one before us finished and renamed the folder.
            self.close()

    def close(self) -> None:
        """Let go."""
        os.close(self._descriptor)

    def _is_still(self, folder: Path) -> bool:
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(folder))
        except FileNotFoundError:
            return False


def check_free(folder: Path, needed: int, what: str) -> None:
    """Raise StoreError when the disk of `folder` (or of its nearest parent that exists) has fewer bytes free."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise StoreError(
            f"{what} needs {_gib(needed)} of free disk in {existing}, which has {_gib(free)}. "
            "Make room, or choose a destination on another disk (MOESTRO_CACHE moves the cache folder)."
        )


def allocated_bytes(folder: Path) -> int:
    """Bytes that the files of a folder already take on the disk."""
    if not folder.is_dir():
        return 0
    return sum(entry.stat().st_blocks * 512 for entry in folder.iterdir() if entry.is_file())


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB"
