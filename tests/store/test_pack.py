"""Packing: what is at the destination before and after, and what goes wrong on the way."""

from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from families import save_checkpoint
from moestro.config import PackOptions
from moestro.errors import CheckpointError, StoreError, UnsupportedModelError
from moestro.hf.skeleton import build_skeleton, load_config
from moestro.store.disk import FolderLock
from moestro.store.pack import PackLimits, PackProgress
from moestro.store.pack_plan import planned_dense_bytes
from moestro.store.reader import Store
from packing import pack_raw
from store.reading import assert_holds, read_expert


@pytest.fixture
def model(tmp_path: Path) -> PreTrainedModel:
    """A checkpoint in `source` of the test's folder."""
    return save_checkpoint("olmoe", tmp_path / "source")


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_progress_counts_every_byte(model: PreTrainedModel, tmp_path: Path) -> None:
    reports: list[PackProgress] = []
    store = pack_raw(tmp_path / "source", tmp_path / "deep" / "store", progress=reports.append)
    assert reports[0].done_bytes == 0
    assert reports[-1].done_bytes == reports[-1].total_bytes == store.expert_bytes + store.dense_bytes
    assert [report.stage for report in (reports[0], reports[-1])] == ["dense weights", "experts"]
    assert _names(tmp_path / "deep") == ["store"]


def test_the_same_again_returns_the_store(model: PreTrainedModel, tmp_path: Path) -> None:
    first = pack_raw(tmp_path / "source", tmp_path / "store")
    before = {path.name: path.stat().st_mtime_ns for path in first.path.iterdir()}
    assert pack_raw(tmp_path / "source", tmp_path / "store", dtype="float32") == first
    assert {path.name: path.stat().st_mtime_ns for path in first.path.iterdir()} == before
    assert _names(tmp_path) == ["source", "store"]


def test_another_store_is_not_overwritten(model: PreTrainedModel, tmp_path: Path) -> None:
    pack_raw(tmp_path / "source", tmp_path / "store")
    with pytest.raises(StoreError, match=r"is a store of another checkpoint or .* in F32, raw; asked for .* BF16"):
        pack_raw(tmp_path / "source", tmp_path / "store", dtype="bfloat16")
    save_checkpoint("olmoe", tmp_path / "source", seed=1)
    with pytest.raises(StoreError, match="is a store of another checkpoint"):
        pack_raw(tmp_path / "source", tmp_path / "store")
    assert_holds(Store.open(tmp_path / "store"), model.state_dict())


def test_other_folders_are_not_touched(model: PreTrainedModel, tmp_path: Path) -> None:
    for name in ("notes", "store.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious.txt").write_text("mine")
    with pytest.raises(StoreError, match="exists and is not a store"):
        pack_raw(tmp_path / "source", tmp_path / "notes")
    with pytest.raises(StoreError, match=r"store\.partial holds files that are not an unfinished store"):
        pack_raw(tmp_path / "source", tmp_path / "store")
    with pytest.raises(StoreError, match=r"ends in \.partial"):
        pack_raw(tmp_path / "source", tmp_path / "store.partial")
    for name in ("notes", "store.partial"):
        assert _names(tmp_path / name) == ["precious.txt"]


def test_an_empty_folder_is_filled(model: PreTrainedModel, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    assert_holds(pack_raw(tmp_path / "source", tmp_path / "store"), model.state_dict())


def test_two_packs_do_not_write_one_store(model: PreTrainedModel, tmp_path: Path) -> None:
    lock = FolderLock(tmp_path / "store.partial")
    with pytest.raises(StoreError, match=r"Another process is writing .*store\.partial"):
        pack_raw(tmp_path / "source", tmp_path / "store")
    lock.close()
    assert pack_raw(tmp_path / "source", tmp_path / "store").verify() == []


def test_a_finished_partial_only_gets_its_name(model: PreTrainedModel, tmp_path: Path) -> None:
    pack_raw(tmp_path / "source", tmp_path / "store").path.rename(tmp_path / "store.partial")
    with pytest.raises(StoreError, match="unfinished store of another source, with other options"):
        pack_raw(tmp_path / "source", tmp_path / "store", dtype="float16")
    reports: list[PackProgress] = []
    assert pack_raw(tmp_path / "source", tmp_path / "store", progress=reports.append).verify() == []
    assert reports == []


def test_too_little_disk_is_said_first(model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")(10**9, 10**9, 1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StoreError, match=r"Packing source needs .* of free disk in .*, which has 0\.00 GiB"):
        pack_raw(tmp_path / "source", tmp_path / "store")
    assert _names(tmp_path) == ["source"]


def test_a_full_disk_keeps_what_is_done(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes: list[int] = []
    real = os.pwrite

    def limited(descriptor: int, data: memoryview, offset: int) -> int:
        writes.append(offset)
        if len(writes) > 40:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", limited)
        with pytest.raises(StoreError, match=r"could not be written: No space left on device\. What is finished"):
            pack_raw(tmp_path / "source", tmp_path / "store", limits=PackLimits(sync_bytes=4096))
    assert _names(tmp_path) == ["source", "store.partial"]
    reports: list[PackProgress] = []
    assert_holds(pack_raw(tmp_path / "source", tmp_path / "store", progress=reports.append), model.state_dict())
    assert reports[0].done_bytes > 0


@pytest.mark.parametrize("name", ["model.layers.1.mlp.experts.3.up_proj.weight", "lm_head.weight"])
def test_a_cast_that_overflows_names_the_tensor_and_leaves_nothing(
    name: str, model: PreTrainedModel, tmp_path: Path
) -> None:
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    tensors[name][0, 0] = 1e6
    save_file(tensors, tmp_path / "source" / "model.safetensors")
    named = r"model\.layers\.1\.mlp\.experts\.gate_up_proj of expert 3" if "experts" in name else r"lm_head\.weight"
    with pytest.raises(CheckpointError, match=f"Tensor {named} has values up to 1e\\+06, more than F16 can hold"):
        pack_raw(tmp_path / "source", tmp_path / "store", dtype="float16")
    assert _names(tmp_path) == ["source"]
    assert pack_raw(tmp_path / "source", tmp_path / "store", dtype="bfloat16").verify() == []


def test_infinities_and_nan_are_kept(model: PreTrainedModel, tmp_path: Path) -> None:
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    tensors["model.layers.0.mlp.experts.1.down_proj.weight"][0, :2] = torch.tensor([float("nan"), float("inf")])
    save_file(tensors, tmp_path / "source" / "model.safetensors")
    stored = read_expert(pack_raw(tmp_path / "source", tmp_path / "store"), 0, 1)["down_proj"]
    assert stored[0, 0].isnan()
    assert stored[0, 1].isinf()


def test_models_that_are_not_run_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UnsupportedModelError, match="not a mixture-of-experts model"):
        pack_raw(tmp_path, tmp_path / "store")
    (tmp_path / "config.json").write_text('{"model_type": "nobody_knows_me"}')
    with pytest.raises(UnsupportedModelError, match="nobody_knows_me"):
        pack_raw(tmp_path, tmp_path / "store")


@pytest.mark.parametrize(("option", "dtype"), [(None, "F32"), ("bfloat16", "BF16")])
@pytest.mark.parametrize("family", ["ernie4_5_moe", "gpt_oss", "qwen3_moe"])
def test_the_dense_file_is_as_large_as_planned(family: str, option: str | None, dtype: str, tmp_path: Path) -> None:
    save_checkpoint(family, tmp_path / "source")
    store = pack_raw(tmp_path / "source", tmp_path / "store", dtype=option)
    skeleton = build_skeleton(load_config(tmp_path / "source"))
    assert planned_dense_bytes(skeleton, dtype, PackOptions(levels="raw")) == store.dense_file.stat().st_size
