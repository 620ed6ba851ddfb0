from __future__ import annotations

import errno
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from memory.plane_file import PAGE, PlaneFile
from moestro.memory.direct import FileReader, preadv
from moestro.memory.pages import HostBuffer


@pytest.fixture
def buffer() -> HostBuffer:
    return HostBuffer(16 * PAGE)


def read_plane(reader: FileReader, planes: PlaneFile, expert: int, buffer: HostBuffer) -> bytes:
    extent = planes.extents[(0, expert, 0)]
    destination = buffer.view(0, extent.nbytes)
    destination[:] = bytes(extent.nbytes)
    reader.read(extent.file, extent.offset, destination)
    return bytes(destination)


def refuse_at_open(monkeypatch: pytest.MonkeyPatch) -> None:
    really_open = os.open

    def refusing(path: Path, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return really_open(path, flags, *rest)

    monkeypatch.setattr(os, "open", refusing)


def refuse_at_read(descriptor: int, destinations: Sequence[memoryview], offset: int) -> int:
    if direct_flag(descriptor):
        raise OSError(errno.EINVAL, "Invalid argument")
    return preadv(descriptor, destinations, offset)


def direct_flag(descriptor: int) -> bool:
    flags = Path(f"/proc/self/fdinfo/{descriptor}").read_text().split("flags:")[1].split()[0]
    return bool(int(flags, 8) & os.O_DIRECT)


def test_planes_are_read(uniform_planes: PlaneFile, buffer: HostBuffer) -> None:
    reader = FileReader()
    for expert in (3, 0, 15):
        assert read_plane(reader, uniform_planes, expert, buffer) == uniform_planes.contents[(0, expert, 0)]
    reader.close()


def test_reads_are_direct_where_the_file_system_allows(uniform_planes: PlaneFile, buffer: HostBuffer) -> None:
    try:
        os.close(os.open(uniform_planes.path, os.O_RDONLY | os.O_DIRECT))
        allowed = True
    except OSError:
        allowed = False
    seen: list[bool] = []

    def watching(descriptor: int, destinations: Sequence[memoryview], offset: int) -> int:
        seen.append(direct_flag(descriptor))
        return preadv(descriptor, destinations, offset)

    reader = FileReader(watching)
    read_plane(reader, uniform_planes, 1, buffer)
    assert seen[-1] == allowed == reader.direct
    reader.close()


def test_a_refusal_at_open_is_said_once(
    uniform_planes: PlaneFile,
    mixed_planes: PlaneFile,
    buffer: HostBuffer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    refuse_at_open(monkeypatch)
    reader = FileReader()
    with caplog.at_level(logging.WARNING, "moestro"):
        for expert in (1, 2):
            assert read_plane(reader, uniform_planes, expert, buffer) == uniform_planes.contents[(0, expert, 0)]
        read_plane(reader, mixed_planes, 1, buffer)  # another file on the same file system
    assert [record.name for record in caplog.records] == ["moestro"]
    assert "refuses direct reads" in caplog.text
    assert not reader.direct
    reader.close()


def test_a_refusal_at_read_falls_back_too(
    uniform_planes: PlaneFile, buffer: HostBuffer, caplog: pytest.LogCaptureFixture
) -> None:
    reader = FileReader(refuse_at_read)
    for expert in (1, 2):
        assert read_plane(reader, uniform_planes, expert, buffer) == uniform_planes.contents[(0, expert, 0)]
    assert len(caplog.records) == 1
    assert not reader.direct
    reader.close()


def test_buffered_reads_leave_nothing_in_the_page_cache(
    uniform_planes: PlaneFile, buffer: HostBuffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_at_open(monkeypatch)
    dropped: list[tuple[int, int]] = []
    really_advise = os.posix_fadvise

    def watching(descriptor: int, offset: int, length: int, advice: int) -> None:
        if advice == os.POSIX_FADV_DONTNEED:
            dropped.append((offset, length))
        really_advise(descriptor, offset, length, advice)

    monkeypatch.setattr(os, "posix_fadvise", watching)
    reader = FileReader()
    read_plane(reader, uniform_planes, 5, buffer)
    extent = uniform_planes.extents[(0, 5, 0)]
    assert dropped == [(extent.offset, extent.nbytes)]
    reader.close()


@pytest.mark.parametrize("step", [1 * PAGE, PAGE + 512])
def test_short_reads_go_on(mixed_planes: PlaneFile, buffer: HostBuffer, step: int) -> None:
    offsets: list[int] = []

    def short(descriptor: int, destinations: Sequence[memoryview], offset: int) -> int:
        offsets.append(offset)
        return min(preadv(descriptor, destinations, offset), step)

    reader = FileReader(short)
    assert read_plane(reader, mixed_planes, 2, buffer) == mixed_planes.contents[(0, 2, 0)]
    assert len(offsets) == 3
    if reader.direct:
        assert all(offset % PAGE == 0 for offset in offsets)
    reader.close()


def test_interrupted_reads_go_on(uniform_planes: PlaneFile, buffer: HostBuffer) -> None:
    interruptions = [InterruptedError(errno.EINTR, "Interrupted"), InterruptedError(errno.EINTR, "Interrupted")]

    def interrupted(descriptor: int, destinations: Sequence[memoryview], offset: int) -> int:
        if interruptions:
            raise interruptions.pop()
        return preadv(descriptor, destinations, offset)

    reader = FileReader(interrupted)
    assert read_plane(reader, uniform_planes, 2, buffer) == uniform_planes.contents[(0, 2, 0)]
    assert not interruptions
    reader.close()


@pytest.mark.parametrize("length", [0, 100, PAGE, PAGE + 100])
def test_a_file_that_ends_too_early(tmp_path: Path, buffer: HostBuffer, length: int) -> None:
    file = tmp_path / "short.bin"
    file.write_bytes(b"x" * length)
    reader = FileReader()
    with pytest.raises(EOFError, match="ends before byte 8192"):
        reader.read(file, 0, buffer.view(0, 2 * PAGE))
    reader.close()


def test_a_missing_file(tmp_path: Path, buffer: HostBuffer) -> None:
    with pytest.raises(FileNotFoundError):
        FileReader().read(tmp_path / "none.bin", 0, buffer.view(0, PAGE))


def test_a_disk_error_comes_through_and_the_next_read_works(uniform_planes: PlaneFile, buffer: HostBuffer) -> None:
    errors = [OSError(errno.EIO, "Input/output error")]

    def failing(descriptor: int, destinations: Sequence[memoryview], offset: int) -> int:
        if errors:
            raise errors.pop()
        return preadv(descriptor, destinations, offset)

    reader = FileReader(failing)
    with pytest.raises(OSError, match="Input/output"):
        read_plane(reader, uniform_planes, 2, buffer)
    assert reader.direct
    assert read_plane(reader, uniform_planes, 2, buffer) == uniform_planes.contents[(0, 2, 0)]
    reader.close()


def test_close_closes_every_file(uniform_planes: PlaneFile, buffer: HostBuffer) -> None:
    def open_files() -> int:
        return sum(
            os.readlink(f"/proc/self/fd/{name}") == str(uniform_planes.path)
            for name in os.listdir("/proc/self/fd")
            if os.path.islink(f"/proc/self/fd/{name}")
        )

    reader = FileReader(refuse_at_read)
    read_plane(reader, uniform_planes, 2, buffer)
    assert open_files() == 2  # the refused one as well, which other threads may still be reading from
    reader.close()
    assert open_files() == 0


def test_a_kept_file_is_what_it_was_whatever_becomes_of_its_name(tmp_path: Path, buffer: HostBuffer) -> None:
    file, reader = tmp_path / "kept.bin", FileReader()
    file.write_bytes(b"a" * 2 * PAGE)
    first = reader.keep(file)
    file.unlink()
    file.write_bytes(b"b" * 2 * PAGE)
    second = reader.keep(file)
    file.unlink()
    for kept, letter in ((first, b"a"), (second, b"b")):
        reader.read(kept, PAGE, buffer.view(0, PAGE))
        assert bytes(buffer.view(0, PAGE)) == letter * PAGE
        assert str(kept) == str(file)
    assert first != second
    before = len(os.listdir("/proc/self/fd"))
    reader.let_go(first)
    assert len(os.listdir("/proc/self/fd")) == before - 1
    reader.close()
    reader.let_go(second)
    with pytest.raises(FileNotFoundError):
        reader.keep(file)


@pytest.mark.parametrize("size", [1, PAGE, PAGE + 1, 3 * PAGE - 1])
def test_a_file_is_read_to_its_end_wherever_that_is(tmp_path: Path, buffer: HostBuffer, size: int) -> None:
    file, reader = tmp_path / "odd.bin", FileReader()
    content = bytes(index * 7 & 255 for index in range(size))
    file.write_bytes(content)
    room = -(-size // PAGE) * PAGE
    reader.read_to_end(file, size, buffer.view(0, room))
    assert bytes(buffer.view(0, size)) == content
    with pytest.raises(EOFError):
        reader.read_to_end(file, room + 1, buffer.view(0, room + PAGE))
    reader.close()
