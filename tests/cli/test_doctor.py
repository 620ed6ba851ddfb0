"""`moestro doctor` measures, says what it means, keeps it for later runs, and leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.running import assert_user_error, run
from moestro.doctor import diagnosis, sample
from moestro.doctor.reads import measure_reads
from moestro.memory.disk_profile import load_profile

KEYS = {
    "path",
    "read_file",
    "disk",
    "profile",
    "memory_bytes_per_s",
    "machine_bytes",
    "cores",
    "isa",
    "chain_bytes",
    "token_bytes",
    "words",
    "kept",
}
"""Published: keys may be added here, never changed or taken away."""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder of this test, and measurements that take no time."""
    monkeypatch.setenv("MOESTRO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sample, "SAMPLE_BYTES", 1 << 20)
    monkeypatch.setattr(sample, "LEAST_BYTES", 1 << 16)
    monkeypatch.setattr(diagnosis, "_MATRIX_ROWS", 1024)

    def quickly(file: Path) -> object:
        return measure_reads(file, blocks=(1 << 14, 1 << 16), threads=(1, 2), seconds=0.001)

    monkeypatch.setattr(diagnosis, "measure_reads", quickly)
    return tmp_path / "cache"


def test_it_measures_keeps_and_cleans_up(cache: Path, tmp_path: Path) -> None:
    where = tmp_path / "disk"
    where.mkdir()
    picture = tmp_path / "disk.png"
    result = run("doctor", "--path", where, "--json", "--picture", picture)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert set(found) >= KEYS
    assert len(found["words"]) >= 3
    assert list(where.iterdir()) == []
    assert picture.read_bytes().startswith(b"\x89PNG")
    kept = load_profile(where, cache)
    assert kept is not None
    assert (kept.threads, kept.request_bytes) == (found["profile"]["threads"], found["profile"]["request_bytes"])


def test_without_a_path_the_cache_folder_is_measured(cache: Path) -> None:
    result = run("doctor")
    assert result.exit_code == 0, result.output
    assert "reads at a time" in result.stdout
    assert "Kept in" in result.stdout
    assert [one.name for one in cache.iterdir()] == ["disks"]


def test_both_ways_at_once(cache: Path, tmp_path: Path) -> None:
    assert_user_error(run("doctor", "--path", tmp_path, "--store", tmp_path), "--path", "--store")


def test_no_folder(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert_user_error(run("doctor", "--path", tmp_path / "none"), "none", "no folder")
    assert_user_error(run("doctor", "--path", tmp_path / "file"), "file", "no folder")
    assert_user_error(run("doctor", "--store", tmp_path), str(tmp_path))
    assert_user_error(run("doctor", "--picture", tmp_path / "no.jpg"), ".png")


def test_a_folder_that_may_not_be_written(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> tuple[int, str]:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    assert_user_error(run("doctor", "--path", tmp_path), "Read-only file system", "--store")


def test_a_full_disk(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    where = tmp_path / "disk"
    where.mkdir()
    monkeypatch.setattr(sample, "write_all", full)
    assert_user_error(run("doctor", "--path", where), "has no room", "--store")
    assert list(where.iterdir()) == []
    monkeypatch.setattr(sample, "SAMPLE_BYTES", 1 << 60)
    assert_user_error(run("doctor", "--path", where), "has no room")


def test_a_cache_folder_that_cannot_be_written(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really = os.replace

    def refuse(source: str, destination: Path) -> None:
        if str(destination).startswith(str(cache)):
            raise OSError(errno.EACCES, "Permission denied")
        really(source, destination)

    monkeypatch.setattr("os.replace", refuse)
    result = run("doctor", "--path", tmp_path)
    assert result.exit_code == 0
    assert "cannot be kept" in result.stderr
