"""A pack that is killed at any moment goes on where it was and gives the same bytes."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest

from families import save_checkpoint
from moestro.errors import StoreError
from moestro.store.pack import PackProgress
from moestro.store.reader import Store
from packing import pack_raw
from store.crash import LIMITS, pack_counting, pack_until, run


def _content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume") / "source"
    save_checkpoint("deepseek_v3", folder)
    return folder


@pytest.fixture(scope="module")
def whole(source: Path) -> tuple[dict[str, bytes], int]:
    """What an undisturbed pack writes, and in how many calls."""
    store, report = source.with_name("store"), source.with_name("calls")
    assert run(pack_counting, source, store, report) == 0
    return _content(store), int(report.read_text())


@pytest.mark.parametrize("point", range(10))
def test_killed_at_a_random_point(
    point: int, source: Path, whole: tuple[dict[str, bytes], int], tmp_path: Path
) -> None:
    content, calls = whole
    assert calls > 60
    rng = random.Random(point)
    destination = tmp_path / "store"
    for fatal_call in (rng.randint(1, calls), rng.randint(1, calls // 2)):
        if run(pack_until, source, destination, fatal_call) == 0:
            break
        if not destination.exists():
            with pytest.raises(StoreError, match=r"not finished|no store"):
                Store.open(destination)
    assert pack_raw(source, destination, limits=LIMITS).verify() == []
    assert _content(destination) == content
    assert not destination.with_name("store.partial").exists()


def test_killed_at_each_of_the_last_calls(source: Path, whole: tuple[dict[str, bytes], int], tmp_path: Path) -> None:
    content, calls = whole
    for back in range(9):
        destination = tmp_path / f"store{back}"
        assert run(pack_until, source, destination, calls - back) == -signal.SIGKILL
        pack_raw(source, destination, limits=LIMITS)
        assert _content(destination) == content, f"killed {back} calls before the end"


def test_a_resumed_pack_does_not_write_again_what_is_done(
    source: Path, whole: tuple[dict[str, bytes], int], tmp_path: Path
) -> None:
    assert run(pack_until, source, tmp_path / "store", whole[1] * 3 // 4) == -signal.SIGKILL
    reports: list[PackProgress] = []
    pack_raw(source, tmp_path / "store", progress=reports.append)
    assert reports[0].done_bytes > reports[0].total_bytes // 3
    assert reports[-1].done_bytes == reports[-1].total_bytes
    assert [report.done_bytes for report in reports] == sorted(report.done_bytes for report in reports)
    assert _content(tmp_path / "store") == whole[0]


def test_a_file_lost_in_between_is_written_again(
    source: Path, whole: tuple[dict[str, bytes], int], tmp_path: Path
) -> None:
    for name in ("experts.planes", "dense.safetensors"):
        destination = tmp_path / name
        assert run(pack_until, source, destination, whole[1] * 3 // 4) == -signal.SIGKILL
        (tmp_path / f"{name}.partial" / name).unlink()
        pack_raw(source, destination)
        assert _content(destination) == whole[0]


def test_another_source_or_dtype_does_not_continue(
    source: Path, whole: tuple[dict[str, bytes], int], tmp_path: Path
) -> None:
    destination = tmp_path / "store"
    assert run(pack_until, source, destination, whole[1] // 2) == -signal.SIGKILL
    left = _content(tmp_path / "store.partial")
    with pytest.raises(StoreError, match=r"store\.partial is an unfinished store of another source, with"):
        pack_raw(source, destination, dtype="bfloat16")
    save_checkpoint("deepseek_v3", tmp_path / "other", seed=1)
    with pytest.raises(StoreError, match=r"store\.partial is an unfinished store of another source, with"):
        pack_raw(tmp_path / "other", destination)
    assert _content(tmp_path / "store.partial") == left
    pack_raw(source, destination)
    assert _content(destination) == whole[0]
