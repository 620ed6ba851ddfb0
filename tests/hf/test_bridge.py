"""The contract with transformers: what moestro relies on beyond its public API still is as it was."""

from __future__ import annotations

import inspect

import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import Qwen3MoeConfig

from moestro.hf import bridge
from moestro.hf.skeleton import build_skeleton, is_experts_module


def test_version_is_in_the_tested_range() -> None:
    assert Version("5.17") <= Version(transformers.__version__) < Version("5.24")


def test_interfaces_can_be_registered_and_asked() -> None:
    def anything(*_: object) -> None:
        """Stands for an implementation; it is only looked up, never called."""

    bridge.ALL_EXPERTS_FUNCTIONS.register("moestro-contract", anything)
    bridge.AttentionInterface.register("moestro-contract", anything)
    bridge.AttentionMaskInterface.register("moestro-contract", anything)
    assert bridge.ALL_EXPERTS_FUNCTIONS.get_interface("moestro-contract", None) is anything
    assert bridge.ALL_ATTENTION_FUNCTIONS.get_interface("moestro-contract", None) is anything
    assert bridge.ALL_MASK_ATTENTION_FUNCTIONS["moestro-contract"] is anything


def test_cache_methods_that_masks_and_layers_call() -> None:
    update = inspect.signature(bridge.Cache.update)
    assert list(update.parameters)[:4] == ["self", "key_states", "value_states", "layer_idx"]
    for name in ("get_seq_length", "get_query_offset", "get_mask_sizes", "is_sliding"):
        assert hasattr(bridge.Cache, name)


def test_conversion_mapping_of_a_fused_family() -> None:
    skeleton = build_skeleton(_tiny())
    transforms = bridge.get_model_conversion_mapping(skeleton.model)
    renamings = [one for one in transforms if isinstance(one, bridge.WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, bridge.WeightConverter)]
    name, pattern = bridge.rename_source_key("model.layers.0.mlp.experts.3.up_proj.weight", renamings, converters)
    assert name == "model.layers.0.mlp.experts.gate_up_proj"
    converter = next(one for one in converters if pattern in one.source_patterns)
    assert [type(operation) for operation in converter.operations] == [bridge.MergeModulelist, bridge.Concatenate]
    assert converter.source_patterns[0].startswith("mlp.experts.*.gate_proj")


def test_experts_modules_say_how_they_are_laid_out() -> None:
    skeleton = build_skeleton(_tiny())
    modules = [module for module in skeleton.model.modules() if is_experts_module(module)]
    assert len(modules) == 2
    assert callable(modules[0]._apply_gate)
    gated = modules[0]._apply_gate(torch.tensor([[1.0, -2.0, 3.0, 4.0]]))
    expected = nn.functional.silu(torch.tensor([[1.0, -2.0]])) * torch.tensor([[3.0, 4.0]])
    assert torch.equal(gated, expected)


def _tiny() -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
    )
