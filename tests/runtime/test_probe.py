"""The probe: what a family's layers cache, and what it refuses before any weight is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import JambaConfig, Qwen2MoeConfig, Qwen3NextConfig

from families import FAMILIES, random_model
from moestro.errors import UnsupportedModelError
from moestro.hf.skeleton import build_skeleton
from moestro.runtime.kv import LayerKV
from moestro.runtime.probe import probe


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_cached_rows_are_those_that_transformers_caches(family: str) -> None:
    model = random_model(FAMILIES[family]())
    cache = model(torch.tensor([[3, 4, 5]]), use_cache=True).past_key_values
    probed = probe(build_skeleton(FAMILIES[family]()), rows=8, history=8, logit_rows=1)
    assert len(probed.kv_layers) == len(cache.layers)
    for layer, expected in zip(probed.kv_layers, cache.layers, strict=True):
        assert (layer.heads, layer.key_width) == (expected.keys.shape[1], expected.keys.shape[3])
        assert (layer.value_heads, layer.value_width) == (expected.values.shape[1], expected.values.shape[3])
        assert layer.gathered == family.startswith("deepseek")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_activations_grow_with_the_step_and_know_the_experts_per_token(family: str) -> None:
    skeleton = build_skeleton(FAMILIES[family]())
    small = probe(skeleton, rows=32, history=32, logit_rows=1)
    large = probe(skeleton, rows=320, history=320, logit_rows=1)
    assert 6 < large.activation_bytes / small.activation_bytes < 12
    per_token = skeleton.config.num_experts_per_tok if family != "ernie4_5_moe" else skeleton.config.moe_k
    assert small.experts_per_token == (per_token,) * len(skeleton.expert_layers)


@pytest.mark.parametrize(
    "config",
    [
        JambaConfig(num_hidden_layers=8, hidden_size=64, intermediate_size=64, num_attention_heads=4, vocab_size=64),
        Qwen3NextConfig(num_hidden_layers=4, hidden_size=64, num_experts=4, num_experts_per_tok=2, vocab_size=64),
    ],
    ids=lambda config: config.model_type,
)
def test_recurrent_families_are_refused_by_name(config: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=config.model_type):
        probe(build_skeleton(config), rows=4, history=4, logit_rows=1)


def test_a_window_that_no_layer_uses_does_no_harm() -> None:
    config = Qwen2MoeConfig(num_hidden_layers=2, num_experts=4, vocab_size=64)
    assert config.sliding_window == 0
    assert len(probe(build_skeleton(config), rows=4, history=4, logit_rows=1).kv_layers) == 2


def test_dynamic_rotary_scaling_is_refused() -> None:
    config = FAMILIES["qwen3_moe"]()
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(UnsupportedModelError, match="dynamic rotary scaling"):
        probe(build_skeleton(config), rows=4, history=4, logit_rows=1)


def test_block_sizes_are_aligned() -> None:
    layer = LayerKV(heads=3, key_width=5, value_heads=1, value_width=7, gathered=False)
    assert layer.key_block_bytes % 64 == 0
    assert layer.key_block_bytes >= 16 * 3 * 5 * 4
