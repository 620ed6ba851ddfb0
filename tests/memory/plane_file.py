"""A file of planes with known bytes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from moestro.keys import PlaneExtent, PlaneKey

PAGE = 4096


@dataclass(frozen=True)
class PlaneFile:
    """Where the planes lie and what they hold; the bytes differ from plane to plane."""

    path: Path
    extents: dict[PlaneKey, PlaneExtent]
    contents: dict[PlaneKey, bytes]

    def locate(self, key: PlaneKey) -> PlaneExtent:
        return self.extents[key]


def pattern(number: int, nbytes: int) -> bytes:
    return bytes((number * 37 + index * 11 + (index >> 8)) & 255 for index in range(nbytes))


def write_plane_file(path: Path, count: int, chains: Sequence[Sequence[int]]) -> PlaneFile:
    """Expert i of layer 0 has planes of `chains[i % len(chains)]` pages, one after another."""
    extents: dict[PlaneKey, PlaneExtent] = {}
    contents: dict[PlaneKey, bytes] = {}
    offset = 0
    with path.open("wb") as out:
        for expert in range(count):
            for plane, pages in enumerate(chains[expert % len(chains)]):
                content = pattern(len(contents), pages * PAGE)
                key = (0, expert, plane)
                contents[key] = content
                extents[key] = PlaneExtent(path, offset, len(content), xxhash.xxh3_64_intdigest(content))
                offset += out.write(content)
        out.flush()
        os.fsync(out.fileno())
    return PlaneFile(path, extents, contents)
