"""Sizes as users write them, and how much memory there is.

`512MiB`, `2GB`, `1.5 GiB`: KiB, MiB, GiB, TiB count in 1024s; kB, MB, GB, TB in 1000s; case does not matter. A plain
whole number is bytes. `800M` is refused: some tools mean 1000s by it and some 1024s.
"""

from __future__ import annotations

import os
import re
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from moestro.errors import BudgetError

_EXAMPLES = "Write a size such as 512MiB, 2GB or 1073741824 (bytes)"
_PREFIXES = "kmgt"
_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{prefix}b": 1000**power for power, prefix in enumerate(_PREFIXES, start=1)}
_UNITS |= {f"{prefix}ib": 1024**power for power, prefix in enumerate(_PREFIXES, start=1)}


def parse_bytes(text: str) -> int:
    """Bytes in a size such as `512MiB`, `2GB`, `1073741824`; fractions of a byte are cut. Raises BudgetError."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)", text.strip())
    if match is None:
        raise BudgetError(f"{text!r} is not a size. {_EXAMPLES}.")
    number, unit = match[1], match[2].lower()
    if len(unit) == 1 and unit in _PREFIXES:
        big = unit.upper()
        raise BudgetError(f"{text!r} could mean {number}{big}iB (1024s) or {number}{big}B (1000s). Write one of these.")
    if unit not in _UNITS or (unit in ("", "b") and "." in number):
        raise BudgetError(f"{text!r} is not a size. {_EXAMPLES}.")
    nbytes = int(Decimal(number) * _UNITS[unit])
    if nbytes == 0:
        raise BudgetError(f"{text!r} is no memory at all. {_EXAMPLES}.")
    return nbytes


def format_bytes(nbytes: int) -> str:
    """`nbytes` for people: three significant digits or more, `1.50 GiB`, `220 MiB`, `512 bytes`."""
    if abs(nbytes) < 1024:
        return f"{nbytes} bytes"
    value, units = nbytes / 1024, ["KiB", "MiB", "GiB", "TiB"]
    while abs(value) >= 999.5 and len(units) > 1:
        value /= 1024
        units.pop(0)
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f} {units[0]}"


@dataclass(frozen=True)
class MemoryRequest:
    """What the user gave: a number of bytes, or a percentage of the machine. Exactly one of the two is set."""

    nbytes: int | None = None
    percent: float | None = None

    def __post_init__(self) -> None:
        assert (self.nbytes is None) != (self.percent is None), self

    def resolve(self, floor_bytes: int, *, machine: int | None = None) -> int:
        """The budget in bytes. `floor_bytes`, what the process takes before any weight, comes off a percentage.

        `machine`: bytes that 100% stands for (default: `machine_bytes()`). Raises BudgetError when nothing is left.
        """
        if self.nbytes is not None:
            return self.nbytes
        assert self.percent is not None
        total = machine_bytes() if machine is None else machine
        budget = int(total * Decimal(str(self.percent)) / 100) - floor_bytes
        if budget <= 0:
            raise BudgetError(
                f"{self.percent:g}% of {format_bytes(total)} leaves nothing for the model after the"
                f" {format_bytes(floor_bytes)} that the process itself takes: give a larger percentage, or a size."
            )
        return budget


def parse_memory(text: str) -> MemoryRequest:
    """A size (see `parse_bytes`) or a percentage above 0 and at most 100, such as `25%`. Raises BudgetError."""
    stripped = text.strip()
    if not stripped.endswith("%"):
        try:
            return MemoryRequest(nbytes=parse_bytes(text))
        except BudgetError as error:
            raise BudgetError(f"Memory: {error} A percentage of this machine, such as 25%, works as well.") from None
    number = re.fullmatch(r"[0-9]+(?:\.[0-9]+)?", stripped[:-1].strip())
    if number is None or not 0 < float(number[0]) <= 100:
        raise BudgetError(f"Memory: {text!r} is not a percentage above 0% and at most 100%, such as 25%.")
    return MemoryRequest(percent=float(number[0]))


def machine_bytes(root: Path = Path("/")) -> int:
    """Bytes of memory this process may use: the machine's, or its cgroup's limit (v1 or v2) if that is less.

    `root`: where `proc` and `sys` are found.
    """
    return min([_physical_bytes(root), *_cgroup_limits(root)])


def resident_bytes(status: Path = Path("/proc/self/status")) -> int:
    """Bytes of this process resident now; where the system does not say, the peak."""
    value = _status_field(status, "VmRSS")
    return _peak_from_rusage() if value is None else value


def peak_resident_bytes(status: Path = Path("/proc/self/status")) -> int:
    """The most bytes of this process that were ever resident, since `let_go_of_libraries` if that was called."""
    value = _status_field(status, "VmHWM")
    return _peak_from_rusage() if value is None else value


def _peak_from_rusage() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status_field(file: Path, name: str) -> int | None:
    """A `Name:  123 kB` line of a file in /proc, in bytes; None when there is no such file or line."""
    if not file.exists():
        return None
    match = re.search(rf"^{name}:\s+([0-9]+) kB$", file.read_text(), re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def _physical_bytes(root: Path) -> int:
    total = _status_field(root / "proc/meminfo", "MemTotal")
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if total is None else total


def _cgroup_limits(root: Path) -> Iterator[int]:
    """Every limit set on this process's memory cgroup or on one above it."""
    membership = root / "proc/self/cgroup"
    if not membership.exists():
        return
    tree = root / "sys/fs/cgroup"
    for line in membership.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2; beside version 1 it is mounted in `unified`
            yield from _limits_upwards(tree, path, "memory.max")
            yield from _limits_upwards(tree / "unified", path, "memory.max")
        elif "memory" in controllers.split(","):
            yield from _limits_upwards(tree / "memory", path, "memory.limit_in_bytes")


def _limits_upwards(mount: Path, path: str, name: str) -> Iterator[int]:
    """Limits from the group at `path` up to the root of the mount.

    In a container the path may be the host's, while the mount shows the container's own group as the root.
    """
    parts = [part for part in path.split("/") if part not in ("", "..")]
    for depth in range(len(parts), -1, -1):
        file = mount.joinpath(*parts[:depth], name)
        if file.is_file() and (text := file.read_text().strip()).isdecimal():
            yield int(text)
