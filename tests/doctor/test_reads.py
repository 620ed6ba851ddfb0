from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from moestro.doctor.reads import Reading, choose, measure_reads

BLOCKS, THREADS = (4096, 16384), (1, 2)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "bytes"
    path.write_bytes(os.urandom(1 << 20))
    return path


def test_every_combination_is_measured(file: Path) -> None:
    found = measure_reads(file, blocks=[*BLOCKS, 1 << 20], threads=THREADS, seconds=0.002)
    assert [(one.block_bytes, one.threads) for one in found.grid] == [(b, t) for b in BLOCKS for t in THREADS]
    assert all(one.bytes_per_s > 0 for one in found.grid)
    assert found.buffered_bytes_per_s > 0
    assert found.small_pages_bytes_per_s > 0


def test_a_file_system_that_refuses_direct_reads(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really_open = os.open

    def refusing(path: Path, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return really_open(path, flags, *rest)

    monkeypatch.setattr(os, "open", refusing)
    found = measure_reads(file, blocks=BLOCKS, threads=THREADS, seconds=0.002)
    assert not found.direct
    assert all(one.bytes_per_s > 0 for one in found.grid)


def test_an_error_of_the_disk_comes_through(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(OSError, match="Input/output"):
        measure_reads(file, blocks=BLOCKS, threads=THREADS, seconds=0.002)


def test_the_least_that_is_nearly_the_best_is_chosen() -> None:
    grid = [
        Reading(1 << 20, 1, 2.6e9),
        Reading(1 << 20, 2, 1.5e9),
        Reading(4 << 20, 2, 2.45e9),
        Reading(16 << 20, 2, 2.48e9),
        Reading(4 << 20, 8, 2.5e9),
    ]
    assert choose(grid) == grid[2]
    assert choose(grid[:1]) == grid[0]
