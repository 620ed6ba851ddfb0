"""What is remembered of requests of variants: each has a collection of its own, beside its files, and the base's stays
what it is."""

from __future__ import annotations

import logging

from moestro.errors import TraceError
from moestro.policy.observation import Shape
from moestro.runtime.history import BYTES_PER_COUNT, History
from moestro.runtime.open_variant import OpenVariant
from moestro.trace.collection import Collections

_ENTRIES = 64
"""Of each phase: a variant is one domain, where the base has many."""


class VariantHistories:
    """Those of the variants in memory."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._by_slot: dict[int, History] = {}

    @property
    def nbytes(self) -> int:
        """Most bytes that the collection of a variant takes."""
        return BYTES_PER_COUNT * self._shape.layers * self._shape.experts * _ENTRIES

    def entered(self, variant: OpenVariant) -> None:
        """A variant has come into memory."""
        assert variant.slot is not None
        stored = variant.stored
        try:
            history = History(self._shape, store=stored.folder, model=stored.manifest.source, entries=_ENTRIES)
        except TraceError as error:
            logging.getLogger("moestro").warning(
                "%s Requests of the variant %s are not remembered.", error, stored.name
            )
            return
        self._by_slot[variant.slot] = history

    def leaving(self, variant: OpenVariant, *, is_gone: bool) -> None:
        """It leaves; what is learned goes into its folder, unless that is another's by now."""
        assert variant.slot is not None
        history = self._by_slot.pop(variant.slot, None)
        if history is not None and not is_gone:
            history.save()

    def of(self, slot: int) -> Collections | None:
        """Where requests of a variant go."""
        history = self._by_slot.get(slot)
        return None if history is None else history.collections
