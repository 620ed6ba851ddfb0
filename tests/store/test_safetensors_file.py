"""Reading safetensors files range by range, and refusing bad ones."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from moestro.errors import CheckpointError
from moestro.store.safetensors_file import SafetensorsFile


def _write(path: Path, header: object, data: bytes = b"") -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_tensors_and_rows_are_those_of_the_library(tmp_path: Path) -> None:
    tensors = {
        "matrix": torch.randn(7, 5),
        "stack": torch.randn(3, 4, 2).bfloat16(),
        "half": torch.randn(9).half(),
        "fp8": torch.randn(4, 4).to(torch.float8_e4m3fn),
        "bytes": torch.arange(12, dtype=torch.uint8).view(3, 4),
        "number": torch.tensor(5, dtype=torch.int64),
        "empty": torch.empty(0, 3),
    }
    save_file(tensors, tmp_path / "f.safetensors", metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "f.safetensors")
    assert set(file.entries) == set(tensors)
    for name, tensor in tensors.items():
        read = file.read(name)
        assert read.dtype == tensor.dtype
        assert read.shape == tensor.shape
        assert torch.equal(read.view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))
    assert torch.equal(file.read_rows("stack", 1, 3), tensors["stack"][1:3])
    assert torch.equal(file.read_rows("matrix", 6, 7), tensors["matrix"][6:])
    assert file.read_rows("matrix", 2, 2).shape == (0, 5)
    assert file.read_bytes("bytes", 5, 3) == bytes([5, 6, 7])
    file.close()


_ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "entry",
    [
        {**_ENTRY, "dtype": "F31"},
        {**_ENTRY, "dtype": ["F32"]},
        {**_ENTRY, "shape": [3]},
        {**_ENTRY, "shape": [-2]},
        {**_ENTRY, "shape": "2"},
        {**_ENTRY, "shape": [True, 2]},
        {**_ENTRY, "data_offsets": [8, 0]},
        {**_ENTRY, "data_offsets": [0]},
        {"dtype": "F32"},
        7,
    ],
)
def test_a_wrong_entry_is_named(entry: object, tmp_path: Path) -> None:
    path = _write(tmp_path / "f", {"w": entry}, b"12345678")
    with pytest.raises(CheckpointError, match="describes tensor w wrongly"):
        SafetensorsFile(path)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = _write(tmp_path / "f", {"w": _ENTRY}, b"1234567")
    with pytest.raises(CheckpointError, match="is truncated: tensor w ends at byte"):
        SafetensorsFile(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:20])
    with pytest.raises(CheckpointError, match="is truncated: its header alone needs"):
        SafetensorsFile(path)
    path.write_bytes(whole[:5])
    with pytest.raises(CheckpointError, match="too few for a safetensors file"):
        SafetensorsFile(path)


def test_a_file_cut_after_opening_is_named(tmp_path: Path) -> None:
    path = _write(tmp_path / "f", {"w": _ENTRY}, b"12345678")
    file = SafetensorsFile(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="ends inside tensor w"):
        file.read("w")


def test_a_block_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = SafetensorsFile(_write(tmp_path / "f", {"w": _ENTRY}, b"12345678"))

    def failing(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(CheckpointError, match=r"Tensor w could not be read from .* \(Input/output error\)"):
        file.read("w")


def test_what_is_not_safetensors_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"PK\x03\x04" + b"\xff" * 40)
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        SafetensorsFile(path)
    path.write_bytes((4).to_bytes(8, "little") + b"nope")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        SafetensorsFile(path)
    with pytest.raises(CheckpointError, match="not a JSON object"):
        SafetensorsFile(_write(path, [1]))
    with pytest.raises(CheckpointError, match="cannot be opened"):
        SafetensorsFile(tmp_path / "missing")


_VALUES = st.none() | st.integers() | st.text(max_size=5) | st.lists(st.integers(-3, 20), max_size=3)


@given(
    header=st.dictionaries(
        st.text(max_size=3),
        _VALUES | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "x"]), _VALUES | st.just("F32")),
    ),
    data=st.binary(max_size=16),
)
@example(header={"w": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}, data=b"")
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_header_is_read_or_refused(header: dict[str, object], data: bytes, tmp_path: Path) -> None:
    path = _write(tmp_path / "f", header, data)
    try:
        file = SafetensorsFile(path)
    except CheckpointError:
        return
    for name, entry in file.entries.items():
        assert entry.offset + entry.nbytes <= path.stat().st_size
        assert file.read(name).shape == entry.shape
    file.close()
