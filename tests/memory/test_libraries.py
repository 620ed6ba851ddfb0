"""Letting go of library pages, in processes of their own: it is done once in each, and sets its peak back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pages are asked of Linux")

# A copy of a library that no other process has mapped, as pages of those stay; big enough to count.
_PROGRAM = """
import ctypes, mmap, pathlib, shutil, sys
from moestro.memory.budget import peak_resident_bytes, resident_bytes
from moestro.memory.libraries import let_go_of_libraries

with open(sys.argv[1], "rb") as file:
    mapped = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
digest = sum(mapped[::4096])
before = resident_bytes()
kept = let_go_of_libraries(*map(pathlib.Path, sys.argv[2:]))
after, peak = resident_bytes(), peak_resident_bytes()
assert sum(mapped[::4096]) == digest
again = resident_bytes()
assert let_go_of_libraries(*map(pathlib.Path, sys.argv[2:])) == kept
print(before, after, peak, again, resident_bytes(), kept)
"""
_MIB = 1 << 20


def _run(mapped: Path, *process: Path) -> list[int]:
    mapped.write_bytes(bytes(range(256)) * (64 * _MIB // 256))
    answer = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(mapped), *map(str, process)], capture_output=True, text=True, check=True
    )
    return [int(one) for one in answer.stdout.split()]


def test_pages_go_and_come_back_and_the_peak_counts_from_then_on(tmp_path: Path) -> None:
    before, after, peak, again, at_last, kept = _run(tmp_path / "mapped")
    assert before - after > 60 * _MIB
    assert peak < before - 50 * _MIB
    assert again - after > 60 * _MIB
    assert at_last > again - _MIB  # a second call does nothing
    assert kept == 24 * _MIB


def test_where_the_peak_cannot_be_set_back_all_stays(tmp_path: Path) -> None:
    (tmp_path / "maps").write_text(Path("/proc/self/maps").read_text())
    (tmp_path / "clear_refs").mkdir()
    before, after, peak, _, _, kept = _run(tmp_path / "mapped", tmp_path)
    assert abs(before - after) < _MIB
    assert peak >= before
    assert kept == 0
