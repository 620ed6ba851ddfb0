"""What `moestro doctor` found out about a disk, kept for the runs that read from it.

One small JSON file for each file system, in the cache folder. Nothing is ever measured when a model is opened: where
there is no such file, or it is not usable, the defaults of the transfer engine serve.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import xxhash

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class DiskProfile:
    """`threads` reads at a time, of up to `request_bytes` each, reach `bytes_per_s`; `device` names the disk."""

    device: str
    threads: int
    request_bytes: int
    bytes_per_s: float
    version: int = VERSION

    def __post_init__(self) -> None:
        if not (1 <= self.threads <= 64 and 4096 <= self.request_bytes <= 1 << 30 and self.bytes_per_s > 0):
            raise ValueError("its values are out of range")
        if self.version != VERSION:
            raise ValueError(f"it is of version {self.version}, this moestro reads version {VERSION}")


def device_of(path: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str:
    """Device, type and number of the file system that holds `path`, which exists."""
    number = os.stat(path).st_dev
    name = f"{os.major(number)}:{os.minor(number)}"
    kind = source = "unknown"
    for line in mounts.read_text().splitlines() if mounts.exists() else ():
        mounted, _, about = line.partition(" - ")
        if mounted.split()[2] == name:
            kind, source = about.split()[:2]
    return f"{source} ({kind}, {os.statvfs(path).f_fsid:x})" if kind != "unknown" else f"device {name}"


def load_profile(path: Path, cache: Path) -> DiskProfile | None:
    """What is known of the disk that holds `path`; None where nothing is, said once if a file is not usable."""
    device = device_of(path)
    file = _file_of(device, cache)
    if not file.exists():
        return None
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        profile = _parse(known)
        if profile.device != device:
            raise ValueError(f"it is of another disk, {profile.device}")
    except (OSError, ValueError, TypeError, KeyError) as error:
        logging.getLogger("moestro").warning(
            "The measurement of this disk in %s is not usable (%s); the defaults serve. Run `moestro doctor` again.",
            file,
            error,
        )
        return None
    return profile


def save_profile(profile: DiskProfile, cache: Path) -> Path:
    """Write it where `load_profile` looks, whole or not at all. Raises OSError."""
    file = _file_of(profile.device, cache)
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=file.stem, suffix=".tmp")
    try:
        with open(descriptor, "w", encoding="utf-8") as out:
            json.dump(asdict(profile), out, indent=1)
            out.flush()
            os.fsync(out.fileno())
        os.replace(name, file)
    except BaseException:
        os.unlink(name)
        raise
    return file


def _file_of(device: str, cache: Path) -> Path:
    return cache / "disks" / f"{xxhash.xxh3_64_hexdigest(device.encode())}.json"


def _parse(known: dict[str, Any]) -> DiskProfile:
    for one in fields(DiskProfile):
        kinds = {"str": str, "int": int, "float": (int, float)}[str(one.type)]
        value = known[one.name]
        if not isinstance(value, kinds) or isinstance(value, bool):  # type: ignore[arg-type]
            raise ValueError(f"{one.name} is {value!r}")
    return DiskProfile(**{one.name: known[one.name] for one in fields(DiskProfile)})
