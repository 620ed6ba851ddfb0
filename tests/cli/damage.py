"""Ways in which a store breaks."""

from __future__ import annotations

import shutil
from pathlib import Path


def copy_store(store: Path, destination: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(store, destination))


def flip_bit(file: Path, offset: int) -> None:
    """Change one bit of the byte at `offset`."""
    with file.open("r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([byte ^ 1]))


def truncate(file: Path, nbytes: int) -> None:
    """Cut `nbytes` off the end."""
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - nbytes)
