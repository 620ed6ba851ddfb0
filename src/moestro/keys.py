"""How an expert's plane is named everywhere: (layer, expert, plane).

`layer` counts the MoE layers only, from 0; `expert` counts inside the layer; `plane` is the position in the expert's
chain, 0 being the base. From `FIRST_DELTA` on it is what a variant adds to the expert: `FIRST_DELTA` plus the number
that the runtime knows the variant by.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PlaneKey = tuple[int, int, int]

FIRST_DELTA = 4
"""No chain of a store has so many planes."""

MOST_VARIANTS = 58
"""Variants that have a number at once: policies keep a bit for each plane of an expert."""


@dataclass(frozen=True, slots=True)
class PlaneExtent:
    """Where a plane lies on disk: `nbytes` bytes (padding included) from `offset` of `file`.

    `offset` and `nbytes` are multiples of 4096 in a store; `checksum` is the xxh3_64 of all `nbytes` bytes.
    """

    file: Path
    offset: int
    nbytes: int
    checksum: int
