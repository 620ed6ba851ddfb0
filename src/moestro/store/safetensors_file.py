"""Reading safetensors files range by range.

Mapped files would count as resident memory while they are packed, so ranges are read with `preadv` into buffers of our
own. The format: 8 bytes header length (little endian), a JSON object name -> {dtype, shape, data_offsets}, data.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch

from moestro.errors import CheckpointError
from moestro.store.dtypes import TORCH_DTYPES, byte_view, tensor_bytes

_MAX_HEADER = 100 << 20


@dataclass(frozen=True)
class TensorEntry:
    """One tensor: `nbytes` bytes from `offset` of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class SafetensorsFile:
    """An open safetensors file. `entries` tells what is inside; `read` and `read_rows` copy from disk.

    Raises:
        CheckpointError: the file is missing, truncated, or its header is not valid.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be opened ({error.strerror}). Copy or download the checkpoint again."
            ) from error
        try:
            self.nbytes = os.fstat(self._descriptor).st_size
            self.header_bytes = self._read_header()
            self.entries = _parse_header(self.header_bytes, 8 + len(self.header_bytes), self.nbytes, path)
        except BaseException:
            os.close(self._descriptor)
            raise

    def close(self) -> None:
        """Close the file; tensors that were read stay valid."""
        os.close(self._descriptor)

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor."""
        entry = self.entries[name]
        return self._read(name, entry, entry.shape, 0)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` along the first dimension."""
        entry = self.entries[name]
        assert 0 <= start <= stop <= entry.shape[0], (name, entry.shape, start, stop)
        row_bytes = tensor_bytes(entry.dtype, entry.shape[1:])
        return self._read(name, entry, (stop - start, *entry.shape[1:]), start * row_bytes)

    def read_bytes(self, name: str, start: int, nbytes: int) -> bytes:
        """`nbytes` bytes of a tensor's data from its byte `start`."""
        return bytes(self._fill(name, bytearray(nbytes), self.entries[name].offset + start))

    def _read(self, name: str, entry: TensorEntry, shape: tuple[int, ...], skip: int) -> torch.Tensor:
        buffer = torch.empty(tensor_bytes(entry.dtype, shape), dtype=torch.uint8)
        self._fill(name, byte_view(buffer), entry.offset + skip)
        return buffer.view(TORCH_DTYPES[entry.dtype]).view(shape)

    def _fill(self, name: str, destination: bytearray | memoryview, offset: int) -> bytearray | memoryview:
        view = memoryview(destination)
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._descriptor, [view[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(
                    f"Tensor {name} could not be read from {self.path} at byte {offset + done} ({error.strerror}). "
                    "Check the disk, then copy or download the file again."
                ) from error
            if count == 0:
                raise CheckpointError(f"{self.path} ends inside tensor {name}. Copy or download the file again.")
            done += count
        return destination

    def _read_header(self) -> bytes:
        if self.nbytes < 8:
            raise CheckpointError(
                f"{self.path} has {self.nbytes} bytes, too few for a safetensors file. Copy or download it again."
            )
        length = int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
        if length > _MAX_HEADER:
            raise CheckpointError(
                f"{self.path} is not a safetensors file: it announces a header of {length} bytes, "
                f"expected at most {_MAX_HEADER}. Copy or download it again."
            )
        if 8 + length > self.nbytes:
            raise CheckpointError(
                f"{self.path} is truncated: its header alone needs {8 + length} bytes, it has {self.nbytes}. "
                "Copy or download it again."
            )
        return os.pread(self._descriptor, length, 8)


def _parse_header(raw: bytes, data_start: int, file_bytes: int, path: Path) -> dict[str, TensorEntry]:
    try:
        header = json.loads(raw.decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(
            f"The header of {path} is not valid JSON ({error}). Copy or download it again."
        ) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"The header of {path} is not a JSON object. Copy or download it again.")
    entries = {}
    for name, value in header.items():
        if name == "__metadata__":
            continue
        entries[name] = _parse_entry(name, value, data_start, path)
        if entries[name].offset + entries[name].nbytes > file_bytes:
            raise CheckpointError(
                f"{path} is truncated: tensor {name} ends at byte {entries[name].offset + entries[name].nbytes}, "
                f"the file has {file_bytes}. Copy or download it again."
            )
    return entries


def _parse_entry(name: str, value: Any, data_start: int, path: Path) -> TensorEntry:
    problem = CheckpointError(
        f"The header of {path} describes tensor {name} wrongly: {value!r:.200}. Expected a known dtype, a shape and "
        "data_offsets that match. Copy or download the file again."
    )
    if not isinstance(value, dict):
        raise problem
    dtype, shape, offsets = (value.get(field) for field in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in TORCH_DTYPES:
        raise problem
    if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
        raise problem
    nbytes = offsets[1] - offsets[0]
    if nbytes != tensor_bytes(dtype, shape):
        raise problem
    return TensorEntry(dtype, tuple(shape), data_start + offsets[0], nbytes)


def _is_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
