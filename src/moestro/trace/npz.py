"""Files of named arrays (npz) that are read with suspicion and written whole.

numpy's own reader believes what a header says of shape and type; this one compares it with the bytes that are there, so
that a damaged file is refused by name before anything large is allocated. Nothing is ever unpickled.
"""

from __future__ import annotations

import io
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from moestro.errors import TraceError
from moestro.store.disk import write_durably

_SUFFIX = ".npy"
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, struct.error, NotImplementedError, ValueError, RuntimeError)
_BAD_HEADER = (TypeError, SyntaxError, KeyError, OverflowError, tokenize.TokenError, *_DAMAGE)
"""What numpy raises for a header that is not one, besides what the zip file under it raises."""
_HEADER_READERS: dict[tuple[int, int], Any] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a file, by name; read-only.

    Raises:
        OSError: there is no such file, or it cannot be read.
        TraceError: it is no npz, was cut, is damaged, or holds Python objects.
    """
    content = io.BytesIO(path.read_bytes())
    try:
        with zipfile.ZipFile(content) as archive:
            members = archive.infolist()
            return {one.filename.removesuffix(_SUFFIX): _read_array(archive, one, path) for one in members}
    except TraceError:
        raise
    except _DAMAGE as error:
        raise TraceError(
            f"{path} is not a whole npz file ({error or type(error).__name__}): it was cut, damaged, or is of another "
            "kind. Copy or record it anew."
        ) from error


def write_npz(path: Path, arrays: Mapping[str, np.ndarray], *, compress: bool = True) -> None:
    """Make `path` hold these arrays, or leave it as it was. Raises OSError."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            # A fixed date: equal arrays make equal files.
            info = zipfile.ZipInfo(name + _SUFFIX)
            info.compress_type = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
            with archive.open(info, "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, np.asarray(array), allow_pickle=False)
    write_durably(path, buffer.getbuffer())


def _read_array(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> np.ndarray:
    name = info.filename.removesuffix(_SUFFIX)
    with archive.open(info) as stream:
        try:
            shape, fortran, dtype = _read_header(stream)
        except _BAD_HEADER as error:
            raise TraceError(f"{path}: {name} is not an array as numpy writes it ({error}).") from error
        if dtype.hasobject:
            raise TraceError(f"{path}: {name} holds Python objects, expected numbers or text. Export it anew.")
        expected, found = math.prod(shape) * dtype.itemsize, info.file_size - stream.tell()
        if expected != found:
            raise TraceError(f"{path}: {name} has {found} bytes, expected {expected} for {dtype} {list(shape)}.")
        data = stream.read()
    array = np.frombuffer(data, dtype=dtype) if dtype.itemsize else np.zeros(math.prod(shape), dtype)
    return array.reshape(shape[::-1]).T if fortran else array.reshape(shape)


def _read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    if version not in _HEADER_READERS:
        raise ValueError(f"version {version}")
    shape, fortran, dtype = _HEADER_READERS[version](stream)
    return shape, fortran, dtype
