"""Which servers run on this machine: a small file for each, in the cache folder."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from moestro.store.folders import cache_folder

_LOG = logging.getLogger("moestro")


@dataclass(frozen=True)
class Entry:
    """One server. `started` is the process's own start time, so that another with its number is not taken for it."""

    pid: int
    started: str
    url: str
    model: str
    memory: str


def folder() -> Path:
    """Where the files are."""
    return cache_folder() / "servers"


@contextmanager
def registered(url: str, model: str, memory: str) -> Iterator[None]:
    """List this process while the block runs. A folder that cannot be written costs a note, not the server."""
    path = folder() / f"{os.getpid()}.json"
    entry = Entry(os.getpid(), _start_of(os.getpid()) or "", url, model, memory)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(entry)), encoding="utf-8")
    except OSError as error:
        _LOG.warning("%s cannot be written (%s): moestro ps will not show this server.", path, error.strerror)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()


def running() -> list[Entry]:
    """The servers that are alive, oldest file first. Files of those that are not are removed."""
    found = []
    for path in sorted(folder().glob("*.json"), key=lambda one: one.name):
        entry = _read(path)
        if entry is not None and entry.started == _start_of(entry.pid):
            found.append(entry)
        else:
            with suppress(OSError):
                path.unlink()
    return found


def _read(path: Path) -> Entry | None:
    try:
        return Entry(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _start_of(pid: int) -> str | None:
    """When a process began, in the kernel's ticks; None where there is no such process."""
    try:
        stat = Path(f"/proc/{int(pid)}/stat").read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError):
        return None
    return stat.rpartition(")")[2].split()[19]
