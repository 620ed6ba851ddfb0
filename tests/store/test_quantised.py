"""Packing quantised checkpoints: the values they stand for, in bf16 or wider."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from families import save_checkpoint
from moestro.errors import CheckpointError, MoestroError
from packing import pack_raw
from store.quantised_checkpoints import rewrite, save_fp8, save_mxfp4
from store.reading import read_dense, read_expert


@pytest.mark.parametrize(("option", "stored"), [(None, "BF16"), ("float32", "F32")])
def test_mxfp4_experts_are_dequantised(option: str | None, stored: str, tmp_path: Path) -> None:
    tensors = save_mxfp4(tmp_path / "source")
    store = pack_raw(tmp_path / "source", tmp_path / "store", dtype=option)
    assert store.manifest.dtype == stored
    assert store.manifest.source.quantisation == "mxfp4"
    assert store.manifest.source.ignored == ()
    for layer in range(4):
        prefix = f"model.layers.{layer}.mlp.experts"
        for param in ("gate_up_proj", "down_proj"):
            blocks, scales = (tensors[f"{prefix}.{param}_{part}"] for part in ("blocks", "scales"))
            oracle = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
            for expert in range(8):
                ours = read_expert(store, layer, expert)
                assert torch.equal(ours[param].float(), oracle[expert].t().float())
                bias = ours[f"{param}_bias"]
                assert torch.equal(bias.float(), tensors[f"{prefix}.{param}_bias"][expert].float())
    assert torch.equal(read_dense(store)["lm_head.weight"].float(), tensors["lm_head.weight"].float())


@pytest.mark.parametrize("tile", [(128, 128), (24, 40)])
def test_block_fp8_is_dequantised(tile: tuple[int, int], tmp_path: Path) -> None:
    tensors = save_fp8(tmp_path / "source", tile)

    def values(name: str) -> torch.Tensor:
        scales = tensors[f"{name}_scale_inv"]
        wide = scales.repeat_interleave(tile[0], 0).repeat_interleave(tile[1], 1)
        rows, columns = tensors[name].shape
        return (tensors[name].float() * wide[:rows, :columns]).bfloat16()

    store = pack_raw(tmp_path / "source", tmp_path / "store")
    assert store.manifest.dtype == "BF16"
    assert store.manifest.source.quantisation == "fp8"
    assert store.manifest.source.ignored == ()
    for layer in range(2):
        for expert in range(8):
            prefix = f"model.layers.{layer + 1}.mlp.experts.{expert}"
            ours = read_expert(store, layer, expert)
            gate_up = torch.cat([values(f"{prefix}.gate_proj.weight"), values(f"{prefix}.up_proj.weight")])
            assert torch.equal(ours["gate_up_proj"], gate_up)
            assert torch.equal(ours["down_proj"], values(f"{prefix}.down_proj.weight"))
    dense = read_dense(store)
    for name, stored in dense.items():
        if f"{name}_scale_inv" in tensors:
            assert torch.equal(stored, values(name)), name
    assert torch.equal(dense["lm_head.weight"], tensors["lm_head.weight"])


@pytest.mark.parametrize("method", ["awq", "gptq", "bitsandbytes", "compressed-tensors", "fbgemm_fp8", None])
def test_other_methods_are_refused_by_name(method: str | None, tmp_path: Path) -> None:
    save_checkpoint("olmoe", tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": method}}))
    with pytest.raises(MoestroError, match=str(method)):
        pack_raw(tmp_path / "source", tmp_path / "store")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["source"]


def test_fp8_without_scales_is_refused(tmp_path: Path) -> None:
    tensors = save_fp8(tmp_path / "source", (128, 128))
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    del tensors[f"{name}_scale_inv"]
    rewrite(tmp_path / "source", tensors, {"quant_method": "fp8", "weight_block_size": [128, 128]})
    with pytest.raises(CheckpointError, match=f"{name} holds fp8 numbers without scales"):
        pack_raw(tmp_path / "source", tmp_path / "store")


@pytest.mark.parametrize("block_size", [None, [64, 64, 1], [16, 128], [0, 0]])
def test_fp8_scales_of_another_shape_are_refused(block_size: object, tmp_path: Path) -> None:
    tensors = save_fp8(tmp_path / "source", (128, 128))
    rewrite(tmp_path / "source", tensors, {"quant_method": "fp8", "weight_block_size": block_size})
    with pytest.raises(CheckpointError, match="does not match the config's weight_block_size"):
        pack_raw(tmp_path / "source", tmp_path / "store")


def test_mxfp4_blocks_without_scales_are_refused(tmp_path: Path) -> None:
    tensors = save_mxfp4(tmp_path / "source")
    del tensors["model.layers.2.mlp.experts.down_proj_scales"]
    rewrite(tmp_path / "source", tensors, {"quant_method": "mxfp4"})
    with pytest.raises(CheckpointError, match=r"MXFP4 tensor model\.layers\.2\.mlp\.experts\.down_proj_blocks"):
        pack_raw(tmp_path / "source", tmp_path / "store")


def test_integers_that_say_not_how_they_are_quantised_are_refused(tmp_path: Path) -> None:
    save_checkpoint("olmoe", tmp_path / "source")
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    integers = {name: (t * 100).to(torch.int8) if "experts" in name else t for name, t in tensors.items()}
    save_file(integers, tmp_path / "source" / "model.safetensors")
    with pytest.raises(CheckpointError, match="experts are stored as I8"):
        pack_raw(tmp_path / "source", tmp_path / "store")
