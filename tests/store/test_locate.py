"""One noun: stores, checkpoints, the built-in model, and what is none of them."""

from __future__ import annotations

import re
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest

from families import save_checkpoint
from moestro.calibration import pack
from moestro.config import PackOptions
from moestro.errors import CheckpointError, StoreError
from moestro.store.locate import locate, locate_shapes, locate_source
from moestro.store.pack import PackProgress
from moestro.store.reader import Store
from packing import pack_raw


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of our own, and no network."""
    monkeypatch.setenv("MOESTRO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "cache" / "stores"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_checkpoint("olmoe", tmp_path / "olmoe")
    return tmp_path / "olmoe"


def _pack_quickly(
    source: Path,
    destination: Path,
    *,
    options: PackOptions,
    progress: Callable[[PackProgress], None] | None = None,
) -> Store:
    """What is packed does not matter to where it lies."""
    assert options == PackOptions()
    return pack_raw(source, destination, progress=progress)


def test_a_store_is_itself(checkpoint: Path, tmp_path: Path) -> None:
    store = pack_raw(checkpoint, tmp_path / "store").path
    assert locate(str(store), auto_pack=False, pack=pack) == store
    assert locate_shapes(str(store)) == store
    with pytest.raises(StoreError, match="is a store already"):
        locate_source(str(store))


def test_a_checkpoint_is_packed_once(checkpoint: Path, cache: Path) -> None:
    reports: list[PackProgress] = []
    found = locate(str(checkpoint), auto_pack=True, pack=pack, progress=reports.append)
    assert found.parent == cache
    assert re.fullmatch(rf"olmoe-{Store.open(found).manifest.source.fingerprint}-[0-9a-f]{{8}}", found.name)
    assert reports[-1].done_bytes == reports[-1].total_bytes
    reports.clear()
    assert locate(str(checkpoint), auto_pack=False, pack=pack, progress=reports.append) == found
    assert reports == []
    save_checkpoint("olmoe", checkpoint, seed=1)
    assert locate(str(checkpoint), auto_pack=True, pack=pack) != found
    assert len(list(cache.iterdir())) == 2


def test_no_auto_pack_says_how_to_pack(checkpoint: Path, cache: Path) -> None:
    with pytest.raises(StoreError, match=f"Pack it with `moestro pack {checkpoint} STORE`"):
        locate(str(checkpoint), auto_pack=False, pack=pack)
    assert not cache.exists()
    assert locate_source(str(checkpoint)) == locate_shapes(str(checkpoint)) == checkpoint


def test_the_built_in_model(cache: Path) -> None:
    source = locate_source("tiny-qwen3moe-28m")
    assert (source / "README.md").is_file()
    assert locate("tiny-qwen3moe-28m", auto_pack=True, pack=_pack_quickly).parent == cache


def test_a_folder_comes_before_the_built_in_name(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.rename(tmp_path / "tiny-qwen3moe-28m")
    monkeypatch.chdir(tmp_path)
    assert locate_source("tiny-qwen3moe-28m") == Path("tiny-qwen3moe-28m")
    monkeypatch.chdir(tmp_path / "tiny-qwen3moe-28m")
    assert locate_source(".") == Path(".")
    assert locate(".", auto_pack=True, pack=_pack_quickly).name.startswith("tiny-qwen3moe-28m-")


def test_too_little_disk_is_said_before_packing(checkpoint: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")(0, 0, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StoreError, match=r"needs .* of free disk"):
        locate(str(checkpoint), auto_pack=True, pack=pack)
    assert not cache.exists()


def test_an_unfinished_store_is_named(checkpoint: Path, tmp_path: Path) -> None:
    pack_raw(checkpoint, tmp_path / "store").path.rename(tmp_path / "store.partial")
    for name in ("store", "store.partial"):
        for find in (locate_source, locate_shapes, lambda model: locate(model, auto_pack=True, pack=pack)):
            with pytest.raises(StoreError, match=r"store\.partial is an unfinished store\. Run the `moestro pack`"):
                find(str(tmp_path / name))


def test_what_is_no_model_is_said(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.gguf").write_text("GGUF")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    for model, message in {
        "banana": "There is no model 'banana'",
        str(tmp_path / "nothing"): "There is no model",
        "": "neither a store",
        str(tmp_path / "empty"): r"neither a store \(it has no manifest\.json\) nor a checkpoint",
        str(tmp_path / "weights.gguf"): "is a file. Expected a folder",
        "owner/name": "could not be downloaded: the Hugging Face hub cannot be reached",
    }.items():
        with pytest.raises(StoreError, match=message):
            locate(model, auto_pack=True, pack=pack)
    with pytest.raises(CheckpointError, match="holds no weights"):
        locate(str(tmp_path / "bare"), auto_pack=True, pack=pack)


def test_a_hub_model_in_the_cache_is_found_offline(checkpoint: Path, tmp_path: Path, cache: Path) -> None:
    commit = "0" * 40
    repository = tmp_path / "hub" / "models--owner--name"
    shutil.copytree(checkpoint, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert locate_shapes("owner/name") == repository / "snapshots" / commit
    assert locate("owner/name", auto_pack=True, pack=pack).name.startswith("owner--name-")
