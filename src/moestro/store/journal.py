"""What of an unfinished store is already on disk.

The journal is a file of JSON lines that only grows. Its first line says which pack it belongs to; each further line
[unit, checksums, errors, check] says that a unit's bytes were on disk (synced) before the line was; `check` is the
line's own checksum. A line that was cut or garbled by a crash ends the journal.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moestro.store.checksum import checksum, to_hex
from moestro.store.disk import write_all

JOURNAL_NAME = "journal.jsonl"


@dataclass(frozen=True)
class UnitRecord:
    """A finished unit: the checksum of a dense tensor, or those of an expert's planes and its error at each level."""

    checksums: tuple[int, ...]
    errors: tuple[float, ...] = ()


class Journal:
    """The journal of one pack. `done` maps each finished unit (its number) to what is to be known of it."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.done: dict[int, UnitRecord] = {}
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

    def add(self, units: dict[int, UnitRecord]) -> None:
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
                if not _read(entry, self.done):
                    break
            kept += len(line)
        return kept


def _record(unit: int, record: UnitRecord) -> list[Any]:
    content = [unit, [to_hex(value) for value in record.checksums], list(record.errors)]
    return [*content, to_hex(checksum(json.dumps(content).encode()))]


def _read(entry: Any, done: dict[int, UnitRecord]) -> bool:
    """Take over a line; whether it was whole."""
    try:
        unit, checksums, errors, _ = entry
        record = UnitRecord(tuple(int(digits, 16) for digits in checksums), tuple(errors))
        if entry != _record(unit, record):
            return False
        done[unit] = record
    except (TypeError, ValueError):
        return False
    return True


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
