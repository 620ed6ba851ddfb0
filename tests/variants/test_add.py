"""From a fine-tune to a variant: what is in the files, and what is refused."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fine_tunes import Tensors, base_checkpoint, edited, fine_tune
from moestro.config import PackOptions, VariantOptions
from moestro.errors import CheckpointError, MoestroError, VariantError
from moestro.store import disk
from moestro.store.pack import pack
from moestro.store.reader import Store
from moestro.store.variant_file import list_variants, open_variant, remove_variant
from moestro.variants.add import add_variant
from packing import pack_raw
from variants.serving import served

NAN = float("nan")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_checkpoint(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def tuned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fine_tune(base, tmp_path_factory.mktemp("tuned") / "tuned")


@pytest.fixture
def store(base: Path, tmp_path: Path) -> Store:
    return pack_raw(base, tmp_path / "store")


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(("family", "bits"), [("qwen3_moe", 2), ("gpt_oss", 4), ("glm4_moe", 2), ("olmoe", 4)])
def test_a_variant_holds_the_difference(family: str, bits: int, tmp_path: Path) -> None:
    base = base_checkpoint(tmp_path / "base", family, torch.float32)
    tuned = fine_tune(base, tmp_path / "tuned")
    store = pack_raw(base, tmp_path / "store")
    variant = add_variant(store, "one", str(tuned), options=VariantOptions(bits=bits, calibration=False))
    assert variant.verify() == []
    found = served(base, variant, store)
    ours = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.float32).state_dict()
    for name, wanted in theirs.items():
        if name not in store.dense and "experts" not in name:
            continue  # tied to another
        off = (found[name] - wanted).square().sum()
        moved = (wanted - ours[name]).square().sum()
        assert off <= moved * {2: 0.13, 4: 0.02}[bits], name
        if wanted.ndim == 1:
            assert torch.equal(found[name], wanted), name


def test_it_is_the_same_for_raw_and_quantised_stores(base: Path, tuned: Path, tmp_path: Path) -> None:
    raw = pack_raw(base, tmp_path / "raw")
    quantised = pack(base, tmp_path / "quantised", options=PackOptions(calibration=False))
    ours, theirs = (add_variant(one, "one", str(tuned)) for one in (raw, quantised))
    assert ours.planes_file.read_bytes() == theirs.planes_file.read_bytes()
    assert ours.dense_file.read_bytes() == theirs.dense_file.read_bytes()


def test_what_did_not_change_costs_nothing(base: Path, store: Store, tmp_path: Path) -> None:
    expert = "model.layers.1.mlp.experts.3.down_proj.weight"
    query = "model.layers.2.self_attn.q_proj.weight"
    norm = "model.norm.weight"

    def change(tensors: Tensors) -> None:
        for name in (expert, query, norm):
            tensors[name] = tensors[name] * 1.25

    variant = add_variant(store, "little", str(edited(base, tmp_path / "tuned", change)))
    assert [(plane.layer, plane.expert) for plane in variant.manifest.planes] == [(1, 3)]
    up, down, _, down_at, nbytes = variant.expert_spec(1)
    assert up is None
    assert down is not None
    assert (down.rows, down.columns, down_at) == (64, 32, 0)
    assert variant.planes_file.stat().st_size == nbytes == 4096
    assert variant.plane(1, 2) is None
    assert variant.expert_spec(0) == (None, None, 0, 0, 0)
    assert set(variant.dense_deltas) == {query}
    assert set(variant.replacements) == {norm}


def test_a_store_whose_base_has_moved_says_so(base: Path, tuned: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(base, tmp_path / "gone"))
    store = pack(moved, tmp_path / "store", options=PackOptions(calibration=False))
    shutil.rmtree(moved)
    with pytest.raises(VariantError, match="--base"):
        add_variant(store, "one", str(tuned))
    with pytest.raises(VariantError, match="not the base"):
        add_variant(store, "one", str(tuned), base=str(tuned))
    assert add_variant(store, "one", str(tuned), base=str(base)).verify() == []


def test_a_raw_store_is_its_own_base(base: Path, tuned: Path, store: Store, tmp_path: Path) -> None:
    (store.path / "origin.json").unlink()
    ours = add_variant(store, "one", str(tuned))
    theirs = add_variant(pack_raw(base, tmp_path / "other"), "one", str(tuned), base=str(base))
    assert _files(ours.folder) == _files(theirs.folder)


def _set(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        tensors[name] = change(tensors[name])

    return edit


def _spoil(tensor: torch.Tensor, value: float) -> torch.Tensor:
    spoilt = tensor.clone()
    spoilt.view(-1)[5] = value
    return spoilt


_QUERY = "model.layers.1.self_attn.q_proj.weight"
_EXPERT = "model.layers.2.mlp.experts.5.up_proj.weight"


@pytest.mark.parametrize(
    ("edit", "error", "words"),
    [
        (_set(_EXPERT, lambda one: _spoil(one, NAN)), CheckpointError, "expert 5.*NaN"),
        (_set(_QUERY, lambda one: _spoil(one, -float("inf"))), CheckpointError, "q_proj.*NaN or infinite"),
        (lambda tensors: tensors.pop(_QUERY), CheckpointError, "lacks 1 tensor.*q_proj"),
        (lambda tensors: tensors.pop(_EXPERT), CheckpointError, "lacks 1 tensor"),
        (_set(_QUERY, lambda one: one[:-1]), CheckpointError, r"q_proj.*shape \[127, 64\]"),
        (_set(_EXPERT, lambda one: one[:, :-1]), CheckpointError, "shape"),
        (lambda tensors: tensors.update(extra=torch.ones(3)), VariantError, "no place for: extra"),
        (_set(_QUERY, lambda one: one), VariantError, "is the base"),
        (
            lambda tensors: tensors.update({name: torch.randn(one.shape) for name, one in tensors.items()}),
            VariantError,
            "is no fine-tune",
        ),
    ],
)
def test_checkpoints_that_are_refused(
    edit: Callable[[Tensors], None], error: type[MoestroError], words: str, base: Path, store: Store, tmp_path: Path
) -> None:
    wrong = edited(base, tmp_path / "wrong", edit)
    before = _files(store.path)
    with pytest.raises(error, match=words):
        add_variant(store, "one", str(wrong))
    assert _files(store.path) == before


def test_another_base_of_the_same_shape_is_refused(tuned: Path, store: Store, tmp_path: Path) -> None:
    add_variant(store, "one", str(tuned))
    other = pack_raw(fine_tune(tuned, tmp_path / "other", seed=7), tmp_path / "other-store")
    shutil.copytree(store.path / "variants", other.path / "variants")
    with pytest.raises(VariantError, match="own base"):
        open_variant(other, "one")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", "a:b", "auto", "base", ".a", "a b", "x.partial", "é"])
def test_names_that_are_none(name: str, store: Store, tuned: Path) -> None:
    with pytest.raises(VariantError, match="cannot be named"):
        add_variant(store, name, str(tuned))
    with pytest.raises(VariantError, match="cannot be named"):
        open_variant(store, name)


def test_a_name_in_use_is_refused_until_it_is_removed(store: Store, tuned: Path) -> None:
    add_variant(store, "one", str(tuned))
    with pytest.raises(VariantError, match="has a variant named one already"):
        add_variant(store, "one", str(tuned))
    assert list_variants(store.path) == ("one",)
    with (store.path / "variants" / "one" / "experts.planes").open("rb") as reader:
        remove_variant(store.path, "one")
        assert reader.read(64) != b""
    assert list_variants(store.path) == ()
    with pytest.raises(VariantError, match="no variant named one"):
        open_variant(store, "one")
    with pytest.raises(VariantError, match="no variant named one"):
        remove_variant(store.path, "one")
    add_variant(store, "one", str(tuned))
    assert list_variants(store.path) == ("one",)


@pytest.mark.parametrize("after", [0, 3, 20])
def test_a_full_disk_changes_nothing(after: int, store: Store, tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, calls = _files(store.path), [0]
    real = os.pwrite

    def full(descriptor: int, data: bytes, offset: int) -> int:
        calls[0] += 1
        if calls[0] > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(disk.os, "pwrite", full)
        with pytest.raises(VariantError, match="No space left"):
            add_variant(store, "one", str(tuned))
    assert calls[0] == after + 1
    assert _files(store.path) == before
    assert not (store.path / "variants").exists()
    assert add_variant(store, "one", str(tuned)).verify() == []


def test_what_a_killed_command_left_is_in_nobodys_way(store: Store, tuned: Path) -> None:
    left = store.path / "variants" / "one.partial"
    left.mkdir(parents=True)
    (left / "experts.planes").write_bytes(b"half")
    assert list_variants(store.path) == ()
    assert add_variant(store, "one", str(tuned)).verify() == []
    assert [one.name for one in left.parent.iterdir()] == ["one"]
