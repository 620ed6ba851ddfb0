"""Reading a store's dense weights into one buffer, checked tensor by tensor."""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast

import torch
import xxhash

from moestro.errors import PlaneReadError
from moestro.kernels.base import MatrixSpec
from moestro.kernels.specs import FLAT_BITS, Encoding
from moestro.memory.direct import FileReader
from moestro.memory.pages import PAGE, HostBuffer
from moestro.quant.groups import group_size
from moestro.runtime.dense import PackedMatrix
from moestro.runtime.slots import DTYPES
from moestro.store.reader import DenseTensor, Store

_CHUNK = 8 << 20


def read_dense(store: Store, reader: FileReader) -> tuple[HostBuffer, dict[str, torch.Tensor | PackedMatrix]]:
    """The dense tensors by name, as views into the buffer that is returned with them; quantised ones as they are.

    Raises:
        PlaneReadError: the file cannot be read, or a tensor does not match its checksum.
    """
    size = store.dense_file.stat().st_size
    buffer = HostBuffer(size)
    try:
        _fill(store.dense_file, buffer, size, reader)
    except (OSError, EOFError) as error:
        raise PlaneReadError(
            f"The dense weights in {store.dense_file} could not be read: {error}. Check the disk, then pack the store "
            "again."
        ) from error
    return buffer, {name: _checked(name, tensor, buffer, store.dense_file) for name, tensor in store.dense.items()}


def _fill(file: Path, buffer: HostBuffer, size: int, reader: FileReader) -> None:
    whole = size - size % PAGE
    for offset in range(0, whole, _CHUNK):
        reader.read(file, offset, buffer.view(offset, min(_CHUNK, whole - offset)))
    if whole < size:
        # A direct read ends on a page boundary; the file need not.
        with file.open("rb", buffering=0) as tail:
            if os.preadv(tail.fileno(), [buffer.view(whole, size - whole)], whole) != size - whole:
                raise EOFError(f"the file ends before byte {size}")


def _checked(name: str, tensor: DenseTensor, buffer: HostBuffer, file: Path) -> torch.Tensor | PackedMatrix:
    actual = xxhash.xxh3_64_intdigest(buffer.view(tensor.offset, tensor.nbytes))
    if actual != tensor.checksum:
        raise PlaneReadError(
            f"The dense weight {name} ({tensor.nbytes} bytes at offset {tensor.offset} of {file}) is damaged: its "
            f"checksum is {actual:016x}, expected {tensor.checksum:016x}. Pack the store again."
        )
    flat = buffer.tensor[tensor.offset : tensor.offset + tensor.nbytes]
    if tensor.dtype in FLAT_BITS:
        rows, columns = tensor.shape
        return PackedMatrix(flat, MatrixSpec(cast(Encoding, tensor.dtype), rows, columns, group_size(columns), (0,)))
    return flat.view(DTYPES[tensor.dtype]).view(tensor.shape)
