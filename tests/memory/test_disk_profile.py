from __future__ import annotations

import json
from pathlib import Path

import pytest

from moestro.memory.disk_profile import DiskProfile, device_of, load_profile, save_profile


def profile(path: Path) -> DiskProfile:
    return DiskProfile(device=device_of(path), threads=3, request_bytes=1 << 20, bytes_per_s=1.5e9)


def test_what_is_saved_is_found_for_the_same_disk(tmp_path: Path) -> None:
    assert load_profile(tmp_path, tmp_path / "cache") is None
    file = save_profile(profile(tmp_path), tmp_path / "cache")
    assert load_profile(tmp_path, tmp_path / "cache") == profile(tmp_path)
    assert [one.name for one in file.parent.iterdir()] == [file.name]
    assert load_profile(Path("/proc"), tmp_path / "cache") is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 99}, "version 99"),
        ({"threads": 0}, "out of range"),
        ({"threads": "2"}, "threads is '2'"),
        ({"device": "another"}, "another disk"),
        ({"bytes_per_s": None}, "bytes_per_s is None"),
    ],
)
def test_what_is_not_usable_is_said_and_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: dict[str, object], said: str
) -> None:
    file = save_profile(profile(tmp_path), tmp_path / "cache")
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    assert load_profile(tmp_path, tmp_path / "cache") is None
    assert said in caplog.text
    assert "moestro doctor" in caplog.text


@pytest.mark.parametrize("text", ["", "[]", "{}", "\x00"])
def test_a_damaged_file_is_said_and_left(tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str) -> None:
    save_profile(profile(tmp_path), tmp_path / "cache").write_text(text)
    assert load_profile(tmp_path, tmp_path / "cache") is None
    assert "not usable" in caplog.text


def test_a_failed_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = save_profile(profile(tmp_path), tmp_path / "cache")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        save_profile(profile(tmp_path), tmp_path / "cache")
    assert [one.name for one in file.parent.iterdir()] == [file.name]
