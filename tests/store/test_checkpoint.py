"""Opening checkpoint folders, and refusing what is not one by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from families import save_checkpoint
from moestro.errors import CheckpointError, MoestroError
from moestro.store.checkpoint import INDEX_NAME, Checkpoint, shard_names
from moestro.store.fingerprint import fingerprint


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    save_checkpoint("olmoe", tmp_path, max_shard_size="100KB")
    with Checkpoint(tmp_path) as checkpoint:
        assert len(checkpoint.files) > 2
        name = "model.layers.1.mlp.experts.3.up_proj.weight"
        assert checkpoint.read(name).shape == (32, 64)
        assert torch.equal(checkpoint.read_rows(name, 4, 6), checkpoint.read(name)[4:6])
        assert checkpoint.quantisation is None


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save_checkpoint("olmoe", tmp_path, max_shard_size="100KB")
    names = shard_names(tmp_path)
    (tmp_path / names[1]).unlink()
    with pytest.raises(CheckpointError, match=f"lacks 1 of {len(names)} weight files, {names[1]} among them"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("weight_map", [None, {}, {"a": "../outside.safetensors"}, {"a": 7}])
def test_an_index_without_a_map_is_refused(weight_map: object, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="has no usable weight_map"):
        Checkpoint(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for shard in ("a.safetensors", "b.safetensors"):
        save_file({"w": torch.zeros(2)}, tmp_path / shard)
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"w": "a.safetensors", "v": "b.safetensors"}}))
    with pytest.raises(CheckpointError, match="Tensor w occurs twice"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model-Q4_K_M.gguf", "GGUF files"),
        ("pytorch_model-00001-of-00002.bin", r"pytorch_model\.bin files \(Python pickles"),
        ("consolidated.00.pth", r"\.pth files"),
        ("consolidated.safetensors", r"consolidated\.safetensors files"),
        ("README.md", "holds no weights"),
    ],
)
def test_other_formats_are_refused_by_name(name: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_text("")
    with pytest.raises(CheckpointError, match=kind):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\udcff"])
def test_a_bad_config_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Checkpoint(tmp_path)


def test_no_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(MoestroError, match=r"config\.json is missing"):
        Checkpoint(tmp_path)


def _fingerprint(folder: Path) -> str:
    with Checkpoint(folder) as checkpoint:
        return fingerprint(checkpoint)


def test_a_fingerprint_tells_checkpoints_apart(tmp_path: Path) -> None:
    save_checkpoint("olmoe", tmp_path / "one")
    save_checkpoint("olmoe", tmp_path / "same")
    save_checkpoint("olmoe", tmp_path / "tuned", seed=1)
    save_checkpoint("olmoe", tmp_path / "half", dtype=torch.bfloat16)
    first = _fingerprint(tmp_path / "one")
    assert _fingerprint(tmp_path / "same") == first
    (tmp_path / "same" / "README.md").write_text("words")
    assert _fingerprint(tmp_path / "same") == first
    (tmp_path / "same" / "chat_template.jinja").write_text("{{ messages }}")
    others = {_fingerprint(tmp_path / name) for name in ("same", "tuned", "half")}
    assert len(others | {first}) == 4
