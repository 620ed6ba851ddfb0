"""Packing in another process: the same store, the same errors, and nothing left behind."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
from pathlib import Path

import pytest

from calibration.checkpoints import save_with_tokenizer, write_text
from moestro.calibration import pack, pack_apart
from moestro.config import PackOptions
from moestro.errors import PackError, UnsupportedModelError
from moestro.memory.budget import peak_resident_bytes
from moestro.store.pack import PackProgress


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_with_tokenizer("olmoe", tmp_path / "source")
    return tmp_path / "source"


def test_the_store_and_the_progress_are_the_same(source: Path, tmp_path: Path) -> None:
    options = PackOptions(calibrate=str(write_text(tmp_path / "text.txt")))
    reports: dict[str, list[PackProgress]] = {"here": [], "apart": []}
    before = peak_resident_bytes()
    apart = pack_apart(source, tmp_path / "apart", options=options, progress=reports["apart"].append)
    assert peak_resident_bytes() - before < 16 << 20
    here = pack(source, tmp_path / "here", options=options, progress=reports["here"].append)
    assert apart.manifest == here.manifest
    assert apart.verify() == []
    assert reports["apart"] == reports["here"]


def test_errors_and_warnings_arrive(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (source / "tokenizer.json").unlink()
    with caplog.at_level(logging.WARNING, logger="moestro"):
        pack_apart(source, tmp_path / "store")
    assert "its experts are quantised from their weights alone" in caplog.text
    (source / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UnsupportedModelError, match="not a mixture-of-experts model"):
        pack_apart(source, tmp_path / "other")


def test_a_process_that_is_killed_is_named(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[str]] = []

    class Noted(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, **options)  # type: ignore[call-overload]
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Noted)
    with pytest.raises(PackError, match="was ended by signal SIGKILL"):
        pack_apart(source, tmp_path / "store", progress=lambda _: os.kill(started[0].pid, signal.SIGKILL))
    # Here: another process would take seconds to begin.
    assert pack(source, tmp_path / "store").verify() == []


def test_an_error_here_ends_the_process_there(source: Path, tmp_path: Path) -> None:
    def interrupt(_: PackProgress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_apart(source, tmp_path / "store", progress=interrupt)
    # The lock is free: nobody is at work any more.
    assert pack(source, tmp_path / "store").verify() == []
