"""Skeletons: what is found in a model, what is refused and how the refusal reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    DbrxConfig,
    JetMoeConfig,
    Llama4TextConfig,
    LlamaConfig,
    NllbMoeConfig,
    PreTrainedConfig,
    SwitchTransformersConfig,
)

from families import FAMILIES, random_model
from moestro.errors import CheckpointError, UnsupportedModelError
from moestro.hf.skeleton import build_skeleton, config_from_dict, load_config


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_experts_and_dense_tensors_make_up_the_model(family: str) -> None:
    config = FAMILIES[family]()
    skeleton = build_skeleton(config)
    model = random_model(FAMILIES[family]())
    in_experts = sum(
        layer.num_experts * torch.Size(param.shape).numel()
        for layer in skeleton.expert_layers
        for param in layer.params
    )
    in_dense = sum(torch.Size(shape).numel() for shape, _ in skeleton.dense.values())
    tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    assert in_experts + in_dense == sum(tensor.numel() for tensor in tensors.values())
    assert [layer.layer for layer in skeleton.expert_layers] == list(range(len(skeleton.expert_layers)))
    assert all(param.device.type == "meta" for param in skeleton.model.parameters())


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_computed_buffers_are_those_of_a_real_model(family: str) -> None:
    expected = dict(random_model(FAMILIES[family]()).named_non_persistent_buffers())
    actual = dict(build_skeleton(FAMILIES[family]()).model.named_non_persistent_buffers())
    assert actual.keys() == expected.keys()
    for name, buffer in actual.items():
        assert torch.equal(buffer, expected[name]), name


def test_transposed_experts_are_described_in_canonical_layout() -> None:
    params = {param.name: param for param in build_skeleton(FAMILIES["gpt_oss"]()).expert_layers[0].params}
    assert params["gate_up_proj"].shape == (128, 64)
    assert params["gate_up_proj"].transposed
    assert params["down_proj"].shape == (64, 64)
    assert params["gate_up_proj_bias"].shape == (128,)
    assert not params["gate_up_proj_bias"].transposed


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2), "not a mixture-of-experts"),
        (JetMoeConfig(num_hidden_layers=1), "does not route the experts of 'jetmoe'"),
        (Llama4TextConfig(num_hidden_layers=1), "does not route the experts of 'llama4_text'"),
        (DbrxConfig(), "dbrx"),
        (SwitchTransformersConfig(), "encoder-decoder"),
        (NllbMoeConfig(), "encoder-decoder"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_what_is_not_eligible_is_refused_by_name(config: PreTrainedConfig, says: str) -> None:
    with pytest.raises(UnsupportedModelError, match=says) as refusal:
        build_skeleton(config)
    assert config.model_type.split("_")[0] in str(refusal.value)


@pytest.mark.parametrize("method", ["awq", "gptq", "bitsandbytes", "gguf"])
def test_unreadable_quantisation_is_refused_by_name(method: str) -> None:
    config = FAMILIES["mixtral"]()
    config.quantization_config = {"quant_method": method}
    with pytest.raises(UnsupportedModelError, match=method):
        build_skeleton(config)


def test_unknown_architecture() -> None:
    with pytest.raises(UnsupportedModelError, match="'flux_capacitor' is unknown"):
        config_from_dict({"model_type": "flux_capacitor"})


def test_code_that_comes_with_a_model_is_never_run() -> None:
    raw = {"model_type": "flux_capacitor", "auto_map": {"AutoConfig": "configuration.FluxConfig"}}
    with pytest.raises(UnsupportedModelError, match="never runs"):
        config_from_dict(raw)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (None, CheckpointError),
        ("{", CheckpointError),
        ("[1]", CheckpointError),
        (json.dumps({"hidden_size": 4}), UnsupportedModelError),
        (json.dumps({"model_type": "mixtral", "hidden_size": "large"}), CheckpointError),
    ],
)
def test_bad_config_files(tmp_path: Path, content: str | None, error: type[Exception]) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(error):
        load_config(tmp_path)


def test_building_takes_no_memory_for_weights() -> None:
    big: dict[str, Any] = {"model_type": "qwen3_moe", "num_hidden_layers": 48, "num_experts": 512, "hidden_size": 8192}
    skeleton = build_skeleton(config_from_dict(big))
    assert skeleton.total_experts == 48 * 512
