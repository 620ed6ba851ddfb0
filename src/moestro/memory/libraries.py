"""Pages of libraries that a process has mapped: most are touched while it starts, and only take room from then on."""

from __future__ import annotations

import ctypes
import functools
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from moestro.memory.budget import resident_bytes

_SPARE_BYTES = 24 << 20
"""What comes back as a model is served, beyond what a warm-up touches: 12 to 16 MiB measured."""

_MADV_PAGEOUT = 21  # Linux 5.4
_RESET_PEAK = b"5"
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) r(?:-x|--)p \S+ \S+ [1-9]")


@functools.cache
def let_go_of_libraries(process: Path = Path("/proc/self")) -> int:
    """Have this process, once, hold only those pages of its libraries that it still uses.

    They stay in the page cache and come back from there when they are touched: importing torch and transformers leaves
    115 MiB of them, of which serving a model uses 28 (measured). The process's peak counts from here on, as what was
    there before has gone. Pages that other processes have mapped as well stay. Where a peak cannot be set back
    (clear_refs, proc(5)), or the system is another, nothing is done.

    Returns:
        Bytes that are to be counted as resident all the same: as many as are likely to come back, at most what went.
    """
    if not sys.platform.startswith("linux"):
        return 0
    before = resident_bytes()
    try:
        ranges = list(_library_ranges((process / "maps").read_text()))
        with (process / "clear_refs").open("wb", buffering=0) as peak:
            peak.write(_RESET_PEAK)  # if that does not work, nothing else is to happen
            _page_out(ranges)
            peak.write(_RESET_PEAK)
    except OSError:
        return 0
    return min(_SPARE_BYTES, max(0, before - resident_bytes()))


def _library_ranges(maps: str) -> Iterator[tuple[int, int]]:
    """First and last address of the private mappings of files that nobody writes to."""
    for line in maps.splitlines():
        if match := _MAPPING.match(line):
            yield int(match[1], 16), int(match[2], 16)


def _page_out(ranges: Iterable[tuple[int, int]]) -> None:
    """Pages that were written to before stay, unless there is swap; an old system does nothing."""
    madvise = ctypes.CDLL(None).madvise
    for start, end in ranges:
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_PAGEOUT)
