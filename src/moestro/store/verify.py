"""Reading every byte of a store and naming what does not match its checksum."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from moestro.keys import PlaneExtent, PlaneKey
from moestro.store.checksum import checksum_range, to_hex
from moestro.store.manifest import FileEntry, Manifest

_CHUNK = 1 << 20


@dataclass(frozen=True)
class VerifyProgress:
    """How many of the store's bytes have been checked."""

    done_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class _Range:
    """Bytes to check: `checksum` None means that they must be zero."""

    label: str
    file: Path
    offset: int
    nbytes: int
    checksum: int | None


def find_problems(
    folder: Path,
    manifest: Manifest,
    planes: Mapping[PlaneKey, PlaneExtent],
    progress: Callable[[VerifyProgress], None] | None = None,
) -> list[str]:
    """One line per part of the store that cannot be read or is not what was packed."""
    ranges = [*_plane_ranges(planes), *_dense_ranges(folder, manifest), *_asset_ranges(folder, manifest)]
    total = sum(item.nbytes for item in ranges)
    problems = []
    done = 0
    for item in ranges:
        problem = _problem(item)
        if problem:
            problems.append(problem)
        done += item.nbytes
        if progress:
            progress(VerifyProgress(done, total))
    return problems


def _plane_ranges(planes: Mapping[PlaneKey, PlaneExtent]) -> Iterator[_Range]:
    for (layer, expert, plane), extent in planes.items():
        label = f"plane {plane} of expert {expert} in MoE layer {layer}"
        yield _Range(label, extent.file, extent.offset, extent.nbytes, extent.checksum)


def _dense_ranges(folder: Path, manifest: Manifest) -> Iterator[_Range]:
    file = folder / manifest.dense_file.name
    tensors = sorted(manifest.dense.items(), key=lambda item: (item[1].offset, item[1].nbytes))
    end = tensors[0][1].offset if tensors else manifest.dense_file.nbytes
    yield _Range("the header", file, 0, end, manifest.dense_file.checksum)
    for name, tensor in tensors:
        if tensor.offset > end:
            yield _Range(f"the padding before {name}", file, end, tensor.offset - end, None)
        yield _Range(f"tensor {name}", file, tensor.offset, tensor.nbytes, tensor.checksum)
        end = tensor.offset + tensor.nbytes
    if end < manifest.dense_file.nbytes:
        yield _Range("the end", file, end, manifest.dense_file.nbytes - end, None)


def _asset_ranges(folder: Path, manifest: Manifest) -> Iterator[_Range]:
    entry: FileEntry
    for entry in manifest.assets:
        yield _Range("the file", folder / entry.name, 0, entry.nbytes, entry.checksum)


def _problem(item: _Range) -> str | None:
    place = f"{item.label} ({item.nbytes} bytes at offset {item.offset} of {item.file})"
    try:
        descriptor = os.open(item.file, os.O_RDONLY)
        try:
            if item.checksum is None:
                return None if _is_zero(descriptor, item.offset, item.nbytes) else f"{place} is not zero"
            actual = checksum_range(descriptor, item.offset, item.nbytes)
        finally:
            os.close(descriptor)
    except OSError as error:
        return f"{place} cannot be read: {error.strerror}"
    except EOFError as error:
        return f"{place} cannot be read: {error}"
    if actual != item.checksum:
        return f"{place} is damaged: its checksum is {to_hex(actual)}, expected {to_hex(item.checksum)}"
    return None


def _is_zero(descriptor: int, offset: int, nbytes: int) -> bool:
    end = offset + nbytes
    while offset < end:
        piece = os.pread(descriptor, min(_CHUNK, end - offset), offset)
        if not piece or piece.count(0) != len(piece):
            return False
        offset += len(piece)
    return True
