"""Embeddings that stay on disk: the same rows, the same logits, less memory; what cannot be read is named."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from families import FAMILIES, random_model
from moestro.config import PackOptions, RuntimeOptions
from moestro.errors import PlaneReadError
from moestro.memory.direct import preadv
from moestro.runtime import plan
from moestro.runtime.dense import LookupWeight
from moestro.runtime.lookup import RowsOnDisk, lookup_table_bytes
from moestro.store.pack import pack
from moestro.store.reader import DenseTensor, Store
from opening import Feed, logits_of, open_store, plan_of

ROWS, COLUMNS, PLACES, OFFSET = 40, 24, 6, 100
MATRIX = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
PROMPT = [5, 17, 3, 99, 5, 8, 120, 64, 31, 77, 12, 150, 9, 9, 23]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lookup") / "file"
    path.write_bytes(bytes(OFFSET) + MATRIX.view(torch.uint8).numpy().tobytes())
    return path


def _tensor() -> DenseTensor:
    return DenseTensor(dtype="BF16", shape=(ROWS, COLUMNS), offset=OFFSET, nbytes=ROWS * COLUMNS * 2, checksum=0)


class Disk:
    """Hands out a few bytes at a time, counts, and fails when it is told to."""

    def __init__(self, most: int) -> None:
        self.most, self.reads, self.broken = most, 0, False

    def read_at(self, descriptor: int, destinations: Sequence[memoryview], offset: int) -> int:
        if self.broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self.reads += 1
        return preadv(descriptor, [destinations[0][: self.most]], offset)


@given(steps=st.lists(st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=PLACES), max_size=12))
def test_rows_are_those_of_the_file(file: Path, steps: list[list[int]]) -> None:
    rows = RowsOnDisk("embedding", _tensor(), file, places=PLACES, read_at=Disk(most=17).read_at)
    for ids in steps:
        assert torch.equal(rows.table_CK[rows.places(torch.tensor(ids))], MATRIX[ids])
    rows.close()


def test_the_rows_used_last_are_not_read_again(file: Path) -> None:
    disk = Disk(most=1 << 20)
    rows = RowsOnDisk("embedding", _tensor(), file, places=3, read_at=disk.read_at)
    for ids, reads in (([1, 2, 1], 2), ([2, 1], 2), ([3], 3), ([2], 3), ([4], 4), ([2, 3], 4), ([1], 5)):
        rows.places(torch.tensor(ids))
        assert disk.reads == reads, ids
    rows.close()


def test_a_row_that_cannot_be_read_is_named_and_nothing_is_lost(file: Path) -> None:
    disk = Disk(most=1 << 20)
    rows = RowsOnDisk("embedding", _tensor(), file, places=2, read_at=disk.read_at)
    rows.places(torch.tensor([1, 2]))
    disk.broken = True
    with pytest.raises(PlaneReadError, match=r"Row 3 of embedding \(48 bytes at offset 244 .*Input/output error"):
        rows.places(torch.tensor([3, 2]))
    disk.broken = False
    for ids in ([3, 2], [1, 3]):
        assert torch.equal(rows.table_CK[rows.places(torch.tensor(ids))], MATRIX[ids])
    os.truncate(file, OFFSET + 10 * COLUMNS)
    with pytest.raises(PlaneReadError, match="ends before byte"):
        rows.places(torch.tensor([9]))
    rows.close()
    file.write_bytes(bytes(OFFSET) + MATRIX.view(torch.uint8).numpy().tobytes())


@pytest.fixture(scope="module", params=["olmoe", "gpt_oss", "deepseek_v2"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp(request.param)
    random_model(FAMILIES[request.param](), dtype=torch.bfloat16).save_pretrained(folder / "checkpoint")
    return pack(folder / "checkpoint", folder / "store", options=PackOptions(calibration=False))


@pytest.fixture
def _any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "LEAST_SPARED_BYTES", 1)


@pytest.mark.usefixtures("_any_size")
def test_logits_are_the_same(store: Store) -> None:
    with open_store(store.path, context=16) as opened:
        assert not opened.rows_on_disk
        expected = logits_of(opened, PROMPT)
    with open_store(store.path, share=0.3, context=16, max_sequences=3) as opened:
        (rows,) = opened.rows_on_disk
        assert isinstance(opened.skeleton.model.get_input_embeddings().weight, LookupWeight)
        assert torch.equal(logits_of(opened, PROMPT, chunk=4), expected)
        feed = Feed(opened)
        feed.step({1: PROMPT[::-1]})
        assert torch.equal(feed.step({0: PROMPT})[0], expected)
        assert len(rows.table_CK) == opened.plan.step_rows == 48


@pytest.mark.usefixtures("_any_size")
def test_the_plan_spares_what_the_rows_took(store: Store) -> None:
    options = RuntimeOptions(context=16)
    whole = plan_of(store.path, options)
    less = plan_of(store.path, options, memory_bytes=whole.bytes_for_experts(0.5))
    vocabulary, hidden = FAMILIES[store.config_dict["model_type"]]().vocab_size, store.config_dict["hidden_size"]
    assert (whole.lookup_on_disk, less.lookup_on_disk) == (False, True)
    assert less.spared_bytes == 2 * vocabulary * hidden - lookup_table_bytes(2 * hidden, 16)
    assert whole.dense_bytes - less.dense_bytes == whole.spared_bytes == less.spared_bytes
    assert less.model_bytes == whole.model_bytes
    assert abs(less.arena_bytes - 0.5 * less.expert_bytes) <= 4096
    assert not plan_of(store.path, options, memory_bytes=less.bytes_for_experts(1.0)).lookup_on_disk


def test_small_embeddings_stay_in_memory(store: Store) -> None:
    options = RuntimeOptions(context=16)
    less = plan_of(store.path, options, memory_bytes=plan_of(store.path, options).bytes_for_experts(0.5))
    assert (less.lookup_on_disk, less.spared_bytes) == (False, 0)


@pytest.mark.usefixtures("_any_size")
def test_damage_is_found_when_the_model_is_opened(store: Store) -> None:
    (name,) = (name for name in store.dense if "embed" in name)
    tensor = store.dense[name]
    with store.dense_file.open("r+b") as file:
        file.seek(tensor.offset + 5)
        (byte,) = file.read(1)
        file.seek(tensor.offset + 5)
        file.write(bytes([byte ^ 1]))
        file.flush()
        with pytest.raises(PlaneReadError, match=f"{name}.*is damaged"):
            open_store(store.path, share=0.3, context=16)
        file.seek(tensor.offset + 5)
        file.write(bytes([byte]))
