"""Reading a store's dense weights into one buffer, checked tensor by tensor."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import cast

import torch
import xxhash

from moestro.errors import PlaneReadError
from moestro.kernels.base import MatrixSpec
from moestro.kernels.specs import FLAT_BITS, Encoding
from moestro.memory.direct import FileReader
from moestro.memory.pages import PAGE, HostBuffer, round_up
from moestro.quant.groups import group_size
from moestro.runtime.dense import PackedMatrix
from moestro.runtime.slots import DTYPES
from moestro.store.checksum import checksum_range
from moestro.store.reader import DenseTensor, Store

_CHUNK = 8 << 20


def read_dense(
    store: Store, reader: FileReader, *, leave: Collection[str] = ()
) -> tuple[HostBuffer, dict[str, torch.Tensor | PackedMatrix]]:
    """The dense tensors by name, as views into the buffer that is returned with them; quantised ones as they are.

    Those of `leave` are checked, and left on disk: they are not among the tensors, and their part of the buffer is
    never touched, so that it takes no memory.

    Raises:
        PlaneReadError: the file cannot be read, or a tensor does not match its checksum.
    """
    file, size = store.dense_file, store.dense_file.stat().st_size
    buffer = HostBuffer(size)
    left = {name: tensor for name, tensor in store.dense.items() if name in leave}
    try:
        for start, end in _wanted(size, left.values()):
            _fill(file, buffer, start, end, reader)
        sums = {name: _checksum_on_disk(file, tensor) for name, tensor in left.items()}
    except (OSError, EOFError) as error:
        raise PlaneReadError(
            f"The dense weights in {store.dense_file} could not be read: {error}. Check the disk, then pack the store "
            "again."
        ) from error
    for name, actual in sums.items():
        _check(name, left[name], actual, file)
    return buffer, {
        name: _tensor_of(name, tensor, buffer, file) for name, tensor in store.dense.items() if name not in left
    }


def _wanted(size: int, left: Collection[DenseTensor]) -> Iterator[tuple[int, int]]:
    """The ranges of the file that hold anything else, from page to page."""
    start = 0
    for tensor in sorted(left, key=lambda one: one.offset):
        yield start, min(size, round_up(tensor.offset, PAGE))
        start = (tensor.offset + tensor.nbytes) // PAGE * PAGE
    if start < size:
        yield start, size


def _checksum_on_disk(file: Path, tensor: DenseTensor) -> int:
    with file.open("rb", buffering=0) as opened:
        found = checksum_range(opened.fileno(), tensor.offset, tensor.nbytes)
        os.posix_fadvise(opened.fileno(), tensor.offset, tensor.nbytes, os.POSIX_FADV_DONTNEED)
    return found


def _fill(file: Path, buffer: HostBuffer, start: int, size: int, reader: FileReader) -> None:
    whole = size - size % PAGE
    for offset in range(start, whole, _CHUNK):
        reader.read(file, offset, buffer.view(offset, min(_CHUNK, whole - offset)))
    if whole < size:
        # A direct read ends on a page boundary; the file need not.
        with file.open("rb", buffering=0) as tail:
            if os.preadv(tail.fileno(), [buffer.view(whole, size - whole)], whole) != size - whole:
                raise EOFError(f"the file ends before byte {size}")


def _check(name: str, tensor: DenseTensor, actual: int, file: Path) -> None:
    if actual != tensor.checksum:
        raise PlaneReadError(
            f"The dense weight {name} ({tensor.nbytes} bytes at offset {tensor.offset} of {file}) is damaged: its "
            f"checksum is {actual:016x}, expected {tensor.checksum:016x}. Pack the store again."
        )


def _tensor_of(name: str, tensor: DenseTensor, buffer: HostBuffer, file: Path) -> torch.Tensor | PackedMatrix:
    _check(name, tensor, xxhash.xxh3_64_intdigest(buffer.view(tensor.offset, tensor.nbytes)), file)
    flat = buffer.tensor[tensor.offset : tensor.offset + tensor.nbytes]
    if tensor.dtype in FLAT_BITS:
        rows, columns = tensor.shape
        return PackedMatrix(flat, MatrixSpec(cast(Encoding, tensor.dtype), rows, columns, group_size(columns), (0,)))
    return flat.view(DTYPES[tensor.dtype]).view(tensor.shape)
