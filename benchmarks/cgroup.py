"""A process held to so many bytes, page cache included, where version 1 memory cgroups can be made."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup/memory")


class Cgroup:
    """`with Cgroup(limit) as enter: subprocess.run(..., preexec_fn=enter)`; None limits nothing."""

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._folder = CGROUPS / f"moestro-benchmark-{os.getpid()}"

    def __enter__(self) -> Callable[[], None] | None:
        if self._limit is None or not os.access(CGROUPS, os.W_OK):
            return None
        self._folder.mkdir()
        (self._folder / "memory.limit_in_bytes").write_text(str(self._limit))
        return lambda: _write_pid(self._folder)

    def __exit__(self, *_: object) -> None:
        if self._folder.exists():
            self._folder.rmdir()

    def peak(self) -> int | None:
        """Most bytes that the group ever held, page cache included."""
        if not self._folder.exists():
            return None
        return int((self._folder / "memory.max_usage_in_bytes").read_text())


def _write_pid(folder: Path) -> None:
    (folder / "cgroup.procs").write_text(str(os.getpid()))


def evict(*files: Path) -> None:
    """Drop the files' pages from the page cache."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
