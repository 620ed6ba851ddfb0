"""Collections on disk: nothing is lost between processes, and no file stops a model from being opened but another's."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.errors import TraceError
from moestro.trace import CollectionFile

LAYERS, EXPERTS = 3, 6

_WRITER = """
import sys
from pathlib import Path
import numpy as np
from moestro.trace import CollectionFile

path, first, entries = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
file = CollectionFile(path, model="m", layers=3, experts=6, capacity=1000)
print("open", flush=True)
sys.stdin.readline()
for id in range(first, first + entries):
    for collection in file.phases.values():
        collection.insert(np.full((3, 6), id), id=id)
    file.save()
    print(id, flush=True)
"""
"""Inserts and saves `entries` entries one by one, with ids from `first` on, once it is told to start."""


def open_file(path: Path, *, capacity: int | None = 1000, model: str = "m") -> CollectionFile:
    return CollectionFile(path, model=model, layers=LAYERS, experts=EXPERTS, capacity=capacity)


def entries_of(file: CollectionFile) -> dict[tuple[str, int], list[list[float]]]:
    return {
        (phase, number): collection.counts(index).tolist()
        for phase, collection in file.phases.items()
        for index, number in enumerate(collection.ids_n.tolist())
    }


def add(file: CollectionFile, *ids: int) -> None:
    for number in ids:
        for collection in file.phases.values():
            collection.insert(np.full((LAYERS, EXPERTS), number), id=number)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "requests.npz"


@pytest.fixture
def saved(path: Path) -> Path:
    file = open_file(path)
    add(file, 1, 2)
    file.save()
    return path


@given(seed=st.integers(0, 2**32 - 1), entries=st.integers(0, 20), large=st.booleans())
def test_what_is_saved_is_loaded(
    seed: int, entries: int, large: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rng = np.random.default_rng(seed)
    path = tmp_path_factory.mktemp("saved") / "requests.npz"
    file = open_file(path)
    for _ in range(entries):
        counts_LE = rng.integers(0, 100_000 if large else 100, (LAYERS, EXPERTS)) * (rng.random((LAYERS, 1)) < 0.8)
        if counts_LE.any():
            file.phases[rng.choice(["prefill", "decode"])].insert(counts_LE)
    file.save()
    assert not file.changed
    assert path.exists() == bool(entries_of(file))
    assert entries_of(open_file(path)) == entries_of(file)


def test_nothing_is_written_without_a_change(saved: Path) -> None:
    before = saved.stat()
    file = open_file(saved)
    assert not file.changed
    file.save()
    assert (saved.stat().st_ino, saved.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_what_others_saved_is_taken_in(saved: Path) -> None:
    one, other = open_file(saved), open_file(saved)
    add(one, 3)
    add(other, 4)
    one.save()
    other.save()
    assert {number for _, number in entries_of(other)} == {1, 2, 3, 4}
    add(one, 5)
    one.save()
    assert entries_of(open_file(saved)).keys() == {(phase, number) for phase in one.phases for number in range(1, 6)}


@settings(max_examples=30)
@given(steps=st.lists(st.tuples(st.integers(0, 2), st.booleans()), max_size=20))
def test_merging_loses_nothing(steps: list[tuple[int, bool]], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whoever inserts and saves when: at the end, all that was inserted is there once."""
    path = tmp_path_factory.mktemp("merged") / "requests.npz"
    files = [open_file(path) for _ in range(3)]
    for number, (writer, save) in enumerate(steps, start=1):
        add(files[writer], number)
        if save:
            files[writer].save()
    for file in files:
        file.save()
    ids = open_file(path).decode.ids_n.tolist()
    assert sorted(ids) == list(range(1, len(steps) + 1))


def test_what_was_given_up_stays_away(path: Path) -> None:
    """A full collection takes in what is new of the file, not what it has replaced itself."""
    rng = np.random.default_rng(0)
    one = open_file(path, capacity=3)
    for number in range(3):
        one.decode.insert(rng.integers(1, 9, (LAYERS, EXPERTS)), id=number)
    one.save()
    other = open_file(path, capacity=3)
    other.decode.insert(other.decode.counts(0), id=100)
    assert other.decode.ids_n.tolist() == [100, 1, 2]
    one.decode.insert(one.decode.counts(2), id=200)
    one.save()
    other.save()
    # Of 200, which the file had, and 2, which it is a copy of, one is left.
    assert sorted(other.decode.ids_n.tolist()) == [1, 100, 200]
    assert open_file(path, capacity=3).decode.ids_n.tolist() == other.decode.ids_n.tolist()


def _start(path: Path, first: int, entries: int) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(path), str(first), str(entries)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"
    return process


def _go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_processes_that_write_at_once_lose_nothing(saved: Path) -> None:
    writers = [_start(saved, first, 30) for first in (1000, 2000, 3000)]
    for writer in writers:
        _go(writer)
    for writer in writers:
        writer.communicate(timeout=60)
        assert writer.returncode == 0
    expected = {1, 2, *(first + step for first in (1000, 2000, 3000) for step in range(30))}
    file = open_file(saved)
    assert set(file.prefill.ids_n.tolist()) == set(file.decode.ids_n.tolist()) == expected
    assert all((np.array(counts) == number).all() for (_, number), counts in entries_of(file).items())


def test_a_process_that_is_killed_leaves_a_whole_file(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(0)
    kept = {1, 2}
    for round_ in range(4):
        writer = _start(saved, 1000 * (round_ + 1), 1000)
        _go(writer)
        assert writer.stdout is not None
        kept.add(int(writer.stdout.readline()))
        time.sleep(rng.random() * 0.1)
        writer.send_signal(signal.SIGKILL)
        kept.update(int(line) for line in writer.communicate(timeout=60)[0].splitlines() if line)
        assert writer.returncode == -signal.SIGKILL
        assert kept <= set(open_file(saved, capacity=9000).decode.ids_n.tolist())
    assert not caplog.records
    file = open_file(saved, capacity=9000)
    add(file, 99)
    file.save()  # the lock died with its holder


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    at = content.index(b"decode_counts.npy") + 200
    content[at] ^= 255
    path.write_bytes(content)


def _rewrite(path: Path, **changes: object) -> None:
    with np.load(path) as archive:
        arrays = {**dict(archive), **{key: np.asarray(value) for key, value in changes.items()}}
    np.savez(path, **{key: value for key, value in arrays.items() if value.dtype != object})


_DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "words": lambda path: path.write_text("words"),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "flipped": _flip,
    "another file": lambda path: np.savez(path, words=np.zeros(3)),
    "version of no kind": lambda path: _rewrite(path, version=1.5),
    "missing key": lambda path: _rewrite(path, decode_ids=None),
    "more keys": lambda path: _rewrite(path, more=1),
    "ids twice": lambda path: _rewrite(path, decode_ids=np.array([7, 7])),
    "ids of another length": lambda path: _rewrite(path, decode_ids=np.array([7])),
    "ids of another type": lambda path: _rewrite(path, decode_ids=np.array([1.0, 2.0])),
    "counts of another shape": lambda path: _rewrite(path, prefill_counts=np.ones((2, 4, 6), np.uint16)),
    "counts of another type": lambda path: _rewrite(path, prefill_counts=np.ones((2, 3, 6))),
    "an empty entry": lambda path: _rewrite(path, prefill_counts=np.zeros((2, 3, 6), np.uint16)),
    "counts too large": lambda path: _rewrite(path, prefill_counts=np.full((2, 3, 6), 1 << 24, np.uint32)),
}


@pytest.mark.parametrize("damage", _DAMAGE)
def test_a_damaged_file_is_set_aside(saved: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    _DAMAGE[damage](saved)
    content = saved.read_bytes()
    with caplog.at_level(logging.WARNING, logger="moestro"):
        file = open_file(saved)
    assert entries_of(file) == {}
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "requests.npz" in warning
    assert "set aside as requests.npz.damaged-1" in warning
    assert saved.with_name("requests.npz.damaged-1").read_bytes() == content
    add(file, 5)
    file.save()
    assert {number for _, number in entries_of(open_file(saved))} == {5}


def test_damage_while_open_costs_nothing_of_ours(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = open_file(saved)
    add(file, 3)
    for number in (1, 2):
        _DAMAGE["cut"](saved)
        add(file, 10 + number)
        file.save()
        assert saved.with_name(f"requests.npz.damaged-{number}").exists()
    assert len(caplog.records) == 2
    assert {number for _, number in entries_of(open_file(saved))} == {1, 2, 3, 11, 12}


def test_another_models_file_is_refused_and_left_alone(saved: Path) -> None:
    content = saved.read_bytes()
    with pytest.raises(TraceError, match=r"requests\.npz is of another model \(m\), expected other"):
        open_file(saved, model="other")
    assert saved.read_bytes() == content
    file = open_file(saved)
    add(file, 3)
    _rewrite(saved, model="moved in meanwhile")
    with pytest.raises(TraceError, match="of another model"):
        file.save()


def test_another_version_is_refused_and_left_alone(saved: Path) -> None:
    _rewrite(saved, version=2)
    content = saved.read_bytes()
    with pytest.raises(TraceError, match="is of format version 2, expected 1"):
        open_file(saved)
    assert saved.read_bytes() == content


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    missing = tmp_path / "missing" / "requests.npz"
    file = open_file(missing)
    add(file, 1)
    with pytest.raises(TraceError, match=r"missing.requests\.npz cannot be written: No such file or directory"):
        file.save()
    assert file.changed
    missing.parent.mkdir()
    file.save()
    assert {number for _, number in entries_of(open_file(missing))} == {1}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_damaged_file_that_cannot_be_moved_is_passed_over(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    _DAMAGE["cut"](saved)
    saved.with_name("requests.npz.lock").unlink()
    saved.parent.chmod(0o500)
    try:
        assert entries_of(open_file(saved)) == {}
    finally:
        saved.parent.chmod(0o700)
    assert "cannot be set aside" in caplog.records[0].getMessage()


def test_the_file_of_the_folder_is_a_folder(path: Path) -> None:
    path.mkdir()
    with pytest.raises(TraceError, match=r"requests\.npz cannot be read: Is a directory"):
        open_file(path)
