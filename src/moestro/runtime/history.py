"""What the runtime remembers of past requests: their matrices, in memory and in the store.

Shapes: L MoE layers, E experts per layer, K experts per row.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

from moestro.errors import TraceError
from moestro.policy.observation import Shape
from moestro.trace.collection import Collections, default_capacity
from moestro.trace.collection_file import COLLECTION_NAME, CollectionFile
from moestro.trace.recorder import PUT_BY_ROWS

_ENTRIES = 256
"""Of each phase. Published (arXiv 2401.14361): more than about 120 entries hardly help."""

_SAVE_EVERY_S = 300.0

BYTES_PER_COUNT = 32
"""Of an entry, for each expert. Both phases' counts and directions are 16; a file on its way in or out, with what
others have added to it, is up to 16 more for a moment."""

_BYTES_PER_PICK = 26
"""Of a row that is put by: an id of 8 bytes and its copies while it is counted."""


def history_bytes(shape: Shape, *, step_rows: int, max_sequences: int) -> int:
    """Most bytes that remembering takes, where no step has more than `step_rows` rows."""
    experts, entries = shape.layers * shape.experts, _entries(shape)
    in_flight = max_sequences * (16 * experts + 16 * shape.layers * entries)
    rows = (PUT_BY_ROWS + step_rows) * shape.layers * shape.picks
    return BYTES_PER_COUNT * experts * entries + in_flight + _BYTES_PER_PICK * rows


class History:
    """The collections of a model that serves. With a store, or the folder of a variant, they are those of its file,
    which is kept up to date. `entries` is how many each phase has at most (0: by the size of the model).

    Raises:
        TraceError: the store has a file of another model, or one that cannot be read. A damaged file is set aside,
            with a warning.
    """

    def __init__(self, shape: Shape, *, store: Path | None, model: str, entries: int = 0) -> None:
        capacity = entries or _entries(shape)
        self.collections: Collections
        self._file: CollectionFile | None = None
        if store is None:
            self.collections = Collections(shape.layers, shape.experts, capacity=capacity)
        else:
            self.collections = self._file = CollectionFile(
                store / COLLECTION_NAME,
                model=model,
                layers=shape.layers,
                experts=shape.experts,
                capacity=capacity,
            )
        self._saved_s = time.monotonic()

    def ended(self) -> None:
        """A request has ended: every few minutes what was learned goes into the store."""
        if time.monotonic() - self._saved_s >= _SAVE_EVERY_S:
            self.save()

    def save(self) -> None:
        """Into the store, if there is one. Where that cannot be, says so once and goes on without."""
        if self._file is None:
            return
        try:
            self._file.save()
        except TraceError as error:
            logging.getLogger("moestro").warning("%s", error)
            self._file = None
        self._saved_s = time.monotonic()


def _entries(shape: Shape) -> int:
    return min(_ENTRIES, default_capacity(shape.layers, shape.experts))
