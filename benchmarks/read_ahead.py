"""How far Linux reads ahead of who reads a mapped file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def read_ahead(file: Path, kib: int | None) -> Iterator[None]:
    """Have the disk that the file lies on read at most so many KiB ahead, and then as before; None: as it is."""
    if kib is None:
        yield
        return
    setting = _setting(file)
    before = setting.read_text()
    try:
        setting.write_text(str(kib))
    except OSError as error:
        raise SystemExit(f"{setting} cannot be set ({error.strerror}): run as root, or without --read-ahead") from error
    try:
        yield
    finally:
        setting.write_text(before)


def _setting(file: Path) -> Path:
    device = file.stat().st_dev
    folder = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    found = [disk / "queue/read_ahead_kb" for disk in (folder, folder.parent)]  # a partition has its disk's
    for one in found:
        if one.exists():
            return one
    raise SystemExit(f"{file} does not lie on a disk whose read-ahead is known ({found[0]} is not there)")
