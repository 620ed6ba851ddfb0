"""The layout of `dense.safetensors`: known before any weight is read, so that tensors can be written one by one.

safetensors allows no gaps between tensors. To start every tensor on a 64-byte boundary, gaps are filled with byte
tensors named `moestro.padding.N`, which hold zeros and which readers ignore.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moestro.quant.flat import flat_bytes
from moestro.store.dtypes import tensor_bytes
from moestro.store.layout import ALIGNMENT, align

PADDING_PREFIX = "moestro.padding."
FLAT_BITS = {"flat8": 8, "flat4": 4}
"""Element types of quantised dense matrices. In the safetensors file they are bytes (U8)."""


@dataclass(frozen=True)
class DenseSpec:
    """A tensor to be stored: `shape` is that of its values, `dtype` as in the manifest."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class DensePlace:
    """Where a tensor is stored: `nbytes` bytes from `offset` of the file."""

    spec: DenseSpec
    offset: int
    nbytes: int


@dataclass(frozen=True)
class DenseLayout:
    """The first bytes of the file (length and header), the places of the tensors, and the size of the whole file."""

    head: bytes
    places: tuple[DensePlace, ...]
    nbytes: int


def dense_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor in the dense file."""
    if dtype not in FLAT_BITS:
        return tensor_bytes(dtype, shape)
    rows, columns = shape
    return flat_bytes(rows, columns, FLAT_BITS[dtype])


def dense_layout(specs: Sequence[DenseSpec]) -> DenseLayout:
    """Lay out `specs` in their order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    relative: list[tuple[DenseSpec, int, int]] = []
    end = 0
    for spec in specs:
        assert not spec.name.startswith(PADDING_PREFIX), spec.name
        start = align(end, ALIGNMENT)
        if start > end:
            header[f"{PADDING_PREFIX}{len(relative)}"] = _entry("U8", (start - end,), end, start)
        end = start + dense_bytes(spec.dtype, spec.shape)
        as_bytes = spec.dtype in FLAT_BITS
        header[spec.name] = _entry(*(("U8", (end - start,)) if as_bytes else (spec.dtype, spec.shape)), start, end)
        relative.append((spec, start, end - start))
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(align(8 + len(text), ALIGNMENT) - 8)
    head = len(text).to_bytes(8, "little") + text
    places = tuple(DensePlace(spec, len(head) + start, nbytes) for spec, start, nbytes in relative)
    return DenseLayout(head=head, places=places, nbytes=len(head) + end)


def _entry(dtype: str, shape: Sequence[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
