"""The C library's heap, which tensors of a step come from and go back to."""

from __future__ import annotations

import ctypes
import sys

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
_LARGE_BYTES = 1 << 20
_SPARE_BYTES = 2 << 20


def return_large_blocks() -> None:
    """Make blocks of 1 MiB and more go back to the system as soon as they are freed, for the whole process.

    glibc otherwise raises the size from which it does so, up to 32 MiB, whenever such a block is freed, and keeps up to
    twice as much: activations of one step then stay resident beside those of the next (35 MiB over the plan measured).
    Other C libraries have no such habit, and are left as they are. Source: mallopt(3).
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # not glibc
        return
    mallopt(_MMAP_THRESHOLD, _LARGE_BYTES)
    mallopt(_TRIM_THRESHOLD, _SPARE_BYTES)


def return_free_pages() -> None:
    """Give all pages of the heap that hold nothing back to the system, where the C library can: malloc_trim(3)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(0)
