"""Packing for tests that want a model's weights as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moestro.config import PackOptions
from moestro.store.pack import PackLimits, PackProgress, pack
from moestro.store.reader import Store


def pack_raw(
    source: Path,
    destination: Path,
    *,
    dtype: str | None = None,
    progress: Callable[[PackProgress], None] | None = None,
    limits: PackLimits | None = None,
) -> Store:
    """A raw store, in which nothing is quantised."""
    options = PackOptions(levels="raw", dtype=dtype or "")
    return pack(source, destination, options=options, progress=progress, limits=limits)
