"""A process held to so many bytes, page cache included, where version 1 memory cgroups can be made."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

CGROUPS = Path("/sys/fs/cgroup/memory")
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
MOST_CACHED = 0.002
LIBC = ctypes.CDLL(None, use_errno=True)
VECTOR = ctypes.POINTER(ctypes.c_ubyte)


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
    """Drop the files' pages from the page cache, and make sure that they are gone.

    Pages that stayed would be charged to nobody, and make a limited run look quick.
    """
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
        if cached_share(file) > MOST_CACHED and os.access(DROP_CACHES, os.W_OK):
            DROP_CACHES.write_text("1")
        cached = cached_share(file)
        if cached > MOST_CACHED:
            raise SystemExit(f"{file} cannot be evicted from the page cache: {cached:.1%} of it is still there")


def cached_share(file: Path) -> float:
    """What part of a file is in the page cache."""
    size = file.stat().st_size
    if size == 0:
        return 0.0
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), size, mmap.MAP_PRIVATE) as mapping:
        pages = np.zeros(-(-size // mmap.PAGESIZE), dtype=np.uint8)
        start = np.frombuffer(mapping, dtype=np.uint8)
        failed = LIBC.mincore(ctypes.c_void_p(start.ctypes.data), ctypes.c_size_t(size), pages.ctypes.data_as(VECTOR))
        del start
        if failed:
            raise OSError(ctypes.get_errno(), "mincore failed")
        return float((pages & 1).mean())
