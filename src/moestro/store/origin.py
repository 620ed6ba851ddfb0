"""`origin.json` in a store: where the checkpoint lay that it was packed from.

A hint, no part of the store: what is found there is checked against the store's fingerprint before it is used.
"""

from __future__ import annotations

import json
from pathlib import Path

from moestro.store.disk import write_durably

ORIGIN_NAME = "origin.json"


def write_origin(store: Path, source: Path) -> None:
    """Note in the folder of a store the checkpoint folder that it is made from. Raises OSError."""
    text = json.dumps({"checkpoint": str(source.absolute())}, ensure_ascii=False)
    write_durably(store / ORIGIN_NAME, text.encode("utf-8", "surrogateescape") + b"\n")


def read_origin(store: Path) -> Path | None:
    """The checkpoint folder that was noted, None where nothing (of use) was."""
    try:
        noted = json.loads((store / ORIGIN_NAME).read_bytes().decode("utf-8", "surrogateescape"))
    except (OSError, ValueError, RecursionError):
        return None
    folder = noted.get("checkpoint") if isinstance(noted, dict) else None
    return Path(folder) if isinstance(folder, str) and folder else None
