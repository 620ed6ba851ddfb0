"""What of an unfinished store is already on disk.

The journal is a file of JSON lines that only grows. Its first line says which pack it belongs to; each further line
[unit, checksum, check] says that a unit's bytes were on disk (synced) before the line was; `check` is the line's own
checksum. A line that was cut or garbled by a crash ends the journal.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from moestro.store.checksum import checksum, to_hex
from moestro.store.disk import write_all

JOURNAL_NAME = "journal.jsonl"


class Journal:
    """The journal of one pack. `done` maps each finished unit (its number) to its checksum."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.done: dict[int, int] = {}
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            kept = self._replay(path.read_bytes(), header)
            os.ftruncate(self._descriptor, kept)
            os.lseek(self._descriptor, kept, os.SEEK_SET)
            if not kept:
                self._append([header])
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def add(self, units: dict[int, int]) -> None:
        """Note that units are on disk. The caller has synced them; they are noted for good when this returns."""
        self._append([_record(unit, value) for unit, value in units.items()])
        self.done.update(units)

    def restart(self, header: dict[str, Any]) -> None:
        """Forget everything."""
        self.done.clear()
        os.ftruncate(self._descriptor, 0)
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        self._append([header])

    def _append(self, lines: list[Any]) -> None:
        write_all(self._descriptor, "".join(json.dumps(line) + "\n" for line in lines).encode())
        os.fdatasync(self._descriptor)

    def _replay(self, raw: bytes, header: dict[str, Any]) -> int:
        """Take over the lines of `raw` and return how many of its bytes are good."""
        kept = 0
        for line in raw.splitlines(keepends=True):
            entry = _parse(line)
            if kept == 0:
                if entry != header:
                    return 0
            else:
                if not isinstance(entry, list) or len(entry) != 3 or entry != _record(entry[0], _value(entry[1])):
                    break
                self.done[entry[0]] = _value(entry[1])
            kept += len(line)
        return kept


def _record(unit: int, value: int) -> list[Any]:
    return [unit, to_hex(value), to_hex(checksum(f"{unit} {value}".encode()))]


def _value(text: Any) -> int:
    """A checksum from its digits; anything else gives a number that no record has."""
    try:
        return int(text, 16)
    except (TypeError, ValueError):
        return 0


def read_header(path: Path) -> Any:
    """The first line of a journal, or None where there is none (or it was cut). Raises OSError."""
    try:
        with path.open("rb") as file:
            return _parse(file.readline())
    except FileNotFoundError:
        return None


def _parse(line: bytes) -> Any:
    if not line.endswith(b"\n"):
        return None
    try:
        return json.loads(line)
    except ValueError:
        return None
