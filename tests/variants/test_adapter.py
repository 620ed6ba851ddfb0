"""LoRA adapters as fine-tunes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fine_tunes import Tensors, base_checkpoint, edited
from moestro.config import VariantOptions
from moestro.errors import VariantError
from moestro.store.reader import Store
from moestro.variants.add import add_variant
from packing import pack_raw

_QUERY = "model.layers.1.self_attn.q_proj"
_EXPERT = "model.layers.2.mlp.experts.5.up_proj"
_NORM = "model.norm"
_SETTINGS = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "up_proj"]}
_DATA_FREE = VariantOptions(calibration=False)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_checkpoint(tmp_path_factory.mktemp("base") / "base", dtype=torch.float32)


@pytest.fixture
def store(base: Path, tmp_path: Path) -> Store:
    return pack_raw(base, tmp_path / "store")


def _adapter(folder: Path, tensors: Tensors, **settings: Any) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({**_SETTINGS, **settings}))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def _factors() -> Tensors:
    generator = torch.Generator().manual_seed(3)
    shapes = {_QUERY: (128, 64), _EXPERT: (32, 64)}
    tensors = {}
    for module, (rows, columns) in shapes.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = 0.1 * torch.randn((2, columns), generator=generator)
        tensors[f"base_model.model.{module}.lora_B.weight"] = 0.1 * torch.randn((rows, 2), generator=generator)
    return {**tensors, f"base_model.model.{_NORM}.weight": torch.full((64,), 1.5)}


@pytest.mark.parametrize(
    ("settings", "scales"),
    [
        ({}, (2.0, 2.0)),
        ({"use_rslora": True}, (4 / 2**0.5, 4 / 2**0.5)),
        ({"alpha_pattern": {"q_proj": 1}}, (0.5, 2.0)),
    ],
)
def test_it_is_the_variant_of_the_merged_model(
    settings: dict[str, Any], scales: tuple[float, float], base: Path, store: Store, tmp_path: Path
) -> None:
    factors = _factors()

    def merge(tensors: Tensors) -> None:
        for module, scale in zip((_QUERY, _EXPERT), scales, strict=True):
            a, b = (factors[f"base_model.model.{module}.lora_{half}.weight"] for half in "AB")
            tensors[f"{module}.weight"] = tensors[f"{module}.weight"] + scale * (b @ a)
        tensors[f"{_NORM}.weight"] = factors[f"base_model.model.{_NORM}.weight"]

    merged = edited(base, tmp_path / "merged", merge)
    adapter = _adapter(tmp_path / "adapter", factors, **settings)
    ours = add_variant(store, "adapter", str(adapter), options=_DATA_FREE)
    theirs = add_variant(store, "merged", str(merged), options=_DATA_FREE)
    assert [(plane.layer, plane.expert) for plane in ours.manifest.planes] == [(2, 5)]
    assert ours.planes_file.read_bytes() == theirs.planes_file.read_bytes()
    assert ours.dense_file.read_bytes() == theirs.dense_file.read_bytes()
    assert ours.manifest.source != theirs.manifest.source


def _without(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: [tensors.pop(key) for key in list(tensors) if key.endswith(name)] and None


@pytest.mark.parametrize(
    ("change", "settings", "words"),
    [
        (None, {"peft_type": "IA3"}, "'IA3'"),
        (None, {"use_dora": True}, "use_dora"),
        (_without("q_proj.lora_B.weight"), {}, "without"),
        (
            lambda tensors: tensors.update({"base_model.model.lost.lora_A.weight": torch.ones(2, 2)}),
            {},
            "no tensor lost.weight",
        ),
        (
            lambda tensors: tensors.update({f"base_model.model.{_QUERY}.lora_A.weight": torch.ones(2, 63)}),
            {},
            "do not fit",
        ),
        (
            lambda tensors: tensors.update({f"base_model.model.{_NORM}.weight": torch.ones(63)}),
            {},
            "has shape",
        ),
    ],
)
def test_adapters_that_are_refused(
    change: Callable[[Tensors], None] | None, settings: dict[str, Any], words: str, store: Store, tmp_path: Path
) -> None:
    tensors = _factors()
    if change:
        change(tensors)
    with pytest.raises(VariantError, match=words):
        add_variant(store, "one", str(_adapter(tmp_path / "adapter", tensors, **settings)), options=_DATA_FREE)
    assert not (store.path / "variants").exists()


def test_an_adapter_needs_the_checkpoint_of_its_base(base: Path, store: Store, tmp_path: Path) -> None:
    adapter = _adapter(tmp_path / "adapter", _factors())
    (store.path / "origin.json").unlink()
    with pytest.raises(VariantError, match="--base"):
        add_variant(store, "one", str(adapter), options=_DATA_FREE)
    add_variant(store, "one", str(adapter), base=str(base), options=_DATA_FREE)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(VariantError, match=r"no adapter_model\.safetensors"):
        add_variant(store, "two", str(adapter), base=str(base), options=_DATA_FREE)
    shutil.rmtree(adapter)
    assert load_file(store.path / "variants" / "one" / "dense.safetensors")
