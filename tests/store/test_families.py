"""Packing a checkpoint of every family and reading the same numbers back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from families import FAMILIES, save_checkpoint
from moestro.store.pack import PackLimits
from moestro.store.reader import Store
from packing import pack_raw
from store.reading import assert_holds, read_dense, read_expert

TIED = {"qwen3_moe": {"lm_head.weight"}, "ernie4_5_moe": {"lm_head.weight"}}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_tensor_of_a_family_is_stored(family: str, tmp_path: Path) -> None:
    model = save_checkpoint(family, tmp_path / "source")
    store = pack_raw(tmp_path / "source", tmp_path / "store")
    assert_holds(store, model.state_dict(), frozenset(TIED.get(family, set())))
    assert store.manifest.dtype == "F32"
    assert store.manifest.exact_level == 32
    assert store.manifest.source.ignored == ()
    assert store.verify() == []


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "granitemoe", "ernie4_5_moe"])
def test_a_bf16_checkpoint_stays_bf16(family: str, tmp_path: Path) -> None:
    model = save_checkpoint(family, tmp_path / "source", dtype=torch.bfloat16)
    store = pack_raw(tmp_path / "source", tmp_path / "store")
    assert_holds(store, model.state_dict(), frozenset(TIED.get(family, set())))
    assert (store.manifest.dtype, store.manifest.levels) == ("BF16", (16,))
    for name, tensor in store.dense.items():
        keeps = len(tensor.shape) == 1 or (
            family == "ernie4_5_moe" and ("gate.weight" in name or "moe_statics" in name)
        )
        assert tensor.dtype == ("F32" if keeps else "BF16"), name


def test_a_sharded_checkpoint_gives_the_same_experts(tmp_path: Path) -> None:
    save_checkpoint("deepseek_v3", tmp_path / "one")
    save_checkpoint("deepseek_v3", tmp_path / "many", max_shard_size="100KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    one, many = (pack_raw(tmp_path / name, tmp_path / f"{name}.store") for name in ("one", "many"))
    assert one.manifest.planes == many.manifest.planes
    assert one.manifest.dense == many.manifest.dense


def test_planes_are_spread_over_files(tmp_path: Path) -> None:
    model = save_checkpoint("mixtral", tmp_path / "source")
    layer_bytes = pack_raw(tmp_path / "source", tmp_path / "whole").layers[0].layout.nbytes
    store = pack_raw(tmp_path / "source", tmp_path / "store", limits=PackLimits(plane_file_bytes=5 * layer_bytes))
    assert [entry.name for entry in store.manifest.plane_files] == [f"experts-{i:05d}.planes" for i in range(5)]
    assert store.plane((2, 7, 0)).file.name == "experts-00004.planes"
    assert_holds(store, model.state_dict())
    assert store.verify() == []


@pytest.mark.parametrize(("option", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_dtype_casts_matrices_and_keeps_vectors(option: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = save_checkpoint("gpt_oss", tmp_path / "source")
    store = pack_raw(tmp_path / "source", tmp_path / "store", dtype=option)
    assert_holds(store, model.state_dict())
    assert read_expert(store, 0, 0)["gate_up_proj"].dtype == dtype
    dense = read_dense(store)
    assert dense["lm_head.weight"].dtype == dtype
    assert dense["model.layers.0.self_attn.sinks"].dtype == torch.float32


def test_the_shipped_model_is_packed_as_it_is(tmp_path: Path, shipped_store: Store, shipped: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(shipped, dtype=torch.bfloat16)
    assert_holds(shipped_store, model.state_dict(), frozenset({"lm_head.weight"}))
    assert {entry.name for entry in shipped_store.manifest.assets} == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
