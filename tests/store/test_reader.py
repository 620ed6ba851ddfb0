"""Opening and verifying stores: whole, damaged, cut, incomplete."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from families import save_checkpoint
from moestro.errors import StoreError
from moestro.store.reader import Store
from moestro.store.verify import VerifyProgress
from packing import pack_raw


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("reader")
    save_checkpoint("mixtral", folder / "source")
    return pack_raw(folder / "source", folder / "store")


@pytest.fixture
def copy(whole: Store, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole.path, tmp_path / "copy"))


def _flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def test_a_whole_store(whole: Store, copy: Path) -> None:
    store = Store.open(copy)
    assert store.manifest == whole.manifest
    assert [(layer.layer, layer.module, layer.num_experts) for layer in store.layers] == [
        (index, f"model.layers.{index}.mlp.experts", 8) for index in range(3)
    ]
    assert store.config_dict["model_type"] == "mixtral"
    assert store.expert_bytes == (copy / "experts.planes").stat().st_size == 24 * store.layers[0].layout.nbytes
    assert store.dense_bytes == sum(tensor.nbytes for tensor in store.dense.values())
    extents = [store.plane((layer, expert, 0)) for layer in range(3) for expert in range(8)]
    assert [extent.offset for extent in extents] == list(range(0, store.expert_bytes, extents[0].nbytes))
    assert all(extent.offset % 4096 == 0 and extent.file == copy / "experts.planes" for extent in extents)
    reports: list[VerifyProgress] = []
    assert store.verify(reports.append) == []
    assert reports[-1].done_bytes == reports[-1].total_bytes
    files = sum(path.stat().st_size for path in copy.iterdir() if path.name not in _UNNAMED)
    assert reports[-1].total_bytes == files


_UNNAMED = ("manifest.json", "origin.json")
"""Files whose bytes `verify` does not count."""


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_flipped_bit_anywhere_is_found(data: st.DataObject, copy: Path) -> None:
    path = copy / data.draw(
        st.sampled_from(sorted(path.name for path in copy.iterdir() if path.name != "origin.json")), label="file"
    )
    bit = data.draw(st.integers(0, 8 * path.stat().st_size - 1), label="bit")
    _flip(path, bit)
    try:
        if path.name == "manifest.json":
            with pytest.raises(StoreError, match=r"manifest\.json"):
                Store.open(copy)
        else:
            (problem,) = Store.open(copy).verify()
            assert str(path) in problem
    finally:
        _flip(path, bit)
    assert Store.open(copy).verify() == []


def test_problems_say_what_is_bad_and_where(copy: Path) -> None:
    store = Store.open(copy)
    extent = store.plane((1, 3, 0))
    norm = store.dense["model.norm.weight"]
    _flip(copy / "experts.planes", 8 * (extent.offset + extent.nbytes - 1))
    _flip(copy / "dense.safetensors", 8 * norm.offset)
    _flip(copy / "dense.safetensors", 8 * 20)
    _flip(copy / "config.json", 3)
    plane, header, tensor, asset = store.verify()
    assert plane.startswith(
        f"plane 0 of expert 3 in MoE layer 1 ({extent.nbytes} bytes at offset {extent.offset} of {extent.file}) is "
        "damaged: its checksum is "
    )
    assert header.startswith("the header (")
    assert tensor.startswith(
        f"tensor model.norm.weight (256 bytes at offset {norm.offset} of {store.dense_file}) is damaged"
    )
    assert asset.startswith("the file (")
    assert str(copy / "config.json") in asset


@pytest.mark.parametrize("name", ["experts.planes", "dense.safetensors", "config.json"])
@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_of_another_size_is_refused(name: str, change: int, copy: Path) -> None:
    size = (copy / name).stat().st_size
    os.truncate(copy / name, size + change)
    word = "truncated" if change < 0 else "too long"
    with pytest.raises(StoreError, match=f"{name} is {word}: it has {size + change} bytes, expected {size}"):
        Store.open(copy)


@pytest.mark.parametrize("name", ["experts.planes", "dense.safetensors", "config.json"])
def test_a_missing_file_is_named(name: str, copy: Path) -> None:
    (copy / name).unlink()
    with pytest.raises(StoreError, match=f"{name} is missing from the store"):
        Store.open(copy)


def test_a_file_cut_after_opening_is_named(copy: Path) -> None:
    store = Store.open(copy)
    os.truncate(copy / "experts.planes", store.expert_bytes - 1)
    (problem,) = store.verify()
    assert "plane 0 of expert 7 in MoE layer 2" in problem
    assert "the file ends at byte" in problem


def test_a_block_that_cannot_be_read_is_named(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(copy)
    bad = store.plane((2, 4, 0)).offset
    real = os.pread

    def failing(descriptor: int, nbytes: int, offset: int) -> bytes:
        if offset == bad and os.fstat(descriptor).st_size == store.expert_bytes:
            raise OSError(errno.EIO, "Input/output error")
        return real(descriptor, nbytes, offset)

    monkeypatch.setattr(os, "pread", failing)
    (problem,) = store.verify()
    assert problem.startswith("plane 0 of expert 4 in MoE layer 2 (")
    assert problem.endswith("cannot be read: Input/output error")


def test_what_is_no_store_is_refused(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="There is no store at"):
        Store.open(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match=r"is not a store: it has no manifest\.json"):
        Store.open(tmp_path / "empty")
    unfinished = copy.rename(tmp_path / "some.partial")
    with pytest.raises(StoreError, match=r"some\.partial is an unfinished store"):
        Store.open(unfinished)
    with pytest.raises(StoreError, match="is not finished"):
        Store.open(tmp_path / "some")
