"""Configurations of the families that the native path knows, with whatever each of them can switch on or off."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedConfig

from families import FAMILIES


class MakeStore(Protocol):
    """Makes a store of a random model of a config."""

    def __call__(self, config: Callable[[], PreTrainedConfig], dtype: torch.dtype, dense_bits: int = 16) -> Path: ...


NATIVE = ("gpt_oss", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe")


def changed(family: str, **values: Any) -> Callable[[], PreTrainedConfig]:
    """The family's test config with some fields changed."""

    def make() -> PreTrainedConfig:
        config = FAMILIES[family]()
        return type(config)(**{**config.to_dict(), **values})

    return make


_ROPE = {"rope_theta": 10000.0, "factor": 4.0}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}

VARIANTS: dict[str, Callable[[], PreTrainedConfig]] = {
    **{family: FAMILIES[family] for family in NATIVE},
    "mixtral_whole_history": changed("mixtral", sliding_window=None, head_dim=24),
    "mixtral_one_head": changed("mixtral", num_attention_heads=3, num_key_value_heads=1, head_dim=6, hidden_size=36),
    "mixtral_all_experts": changed("mixtral", num_local_experts=3, num_experts_per_tok=3),
    "olmoe_plain": changed("olmoe", clip_qkv=None, norm_topk_prob=True, num_key_value_heads=4),
    "olmoe_biased": changed("olmoe", attention_bias=True, num_experts=11, num_experts_per_tok=5),
    "qwen3_moe_dense_layers": changed("qwen3_moe", num_hidden_layers=5, mlp_only_layers=[0], decoder_sparse_step=2),
    "qwen3_moe_unscaled": changed("qwen3_moe", norm_topk_prob=False, attention_bias=True, tie_word_embeddings=False),
    "qwen3_moe_window": changed("qwen3_moe", use_sliding_window=True, sliding_window=7, max_window_layers=0),
    "qwen3_moe_llama3_rope": changed("qwen3_moe", rope_parameters={"rope_type": "llama3", **_ROPE, **_LLAMA3}),
    "qwen3_moe_yarn": changed(
        "qwen3_moe", rope_parameters={"rope_type": "yarn", **_ROPE, "original_max_position_embeddings": 64}
    ),
    "qwen2_moe_no_bias": changed("qwen2_moe", qkv_bias=False, mlp_only_layers=[], norm_topk_prob=True),
    "qwen2_moe_odd_widths": changed(
        "qwen2_moe", shared_expert_intermediate_size=21, intermediate_size=13, hidden_size=44, num_attention_heads=2
    ),
    "gpt_oss_plain_rope": changed("gpt_oss", rope_parameters={"rope_type": "default", "rope_theta": 1e4}, head_dim=20),
}
