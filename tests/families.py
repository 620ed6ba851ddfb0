"""Tiny randomly initialised mixture-of-experts models, one of each supported family.

Every tensor gets random values that matter (norms, biases, attention sinks and routing corrections included), so that a
tensor which is lost, swapped or mixed up between layers or experts changes the logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Ernie4_5_MoeConfig,
    Glm4MoeConfig,
    GptOssConfig,
    GraniteMoeConfig,
    MixtralConfig,
    OlmoeConfig,
    PhimoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

EXPERTS = 8
WINDOW = 8

_COMMON: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MLA: dict[str, Any] = {
    **_COMMON,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "routed_scaling_factor": 1.5,
}


def _mixtral() -> PreTrainedConfig:
    return MixtralConfig(
        **_COMMON, intermediate_size=96, num_local_experts=EXPERTS, num_experts_per_tok=2, sliding_window=WINDOW
    )


def _qwen2_moe() -> PreTrainedConfig:
    return Qwen2MoeConfig(
        **_COMMON,
        intermediate_size=128,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=64,
        num_experts=EXPERTS,
        num_experts_per_tok=3,
        mlp_only_layers=[1],
        use_sliding_window=True,
        sliding_window=WINDOW,
        max_window_layers=2,
    )


def _qwen3_moe() -> PreTrainedConfig:
    return Qwen3MoeConfig(
        **_COMMON,
        head_dim=32,
        intermediate_size=128,
        moe_intermediate_size=32,
        num_experts=EXPERTS,
        num_experts_per_tok=3,
        norm_topk_prob=True,
        tie_word_embeddings=True,
    )


def _olmoe() -> PreTrainedConfig:
    return OlmoeConfig(**_COMMON, intermediate_size=32, num_experts=EXPERTS, num_experts_per_tok=3, clip_qkv=2.0)


def _deepseek_v2() -> PreTrainedConfig:
    return DeepseekV2Config(**_MLA, topk_method="group_limited_greedy")


def _deepseek_v3() -> PreTrainedConfig:
    return DeepseekV3Config(**_MLA, norm_topk_prob=True)


def _gpt_oss() -> PreTrainedConfig:
    rope = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 128,
    }
    # A low limit, so that the clamp inside the experts is at work.
    return GptOssConfig(
        **{**_COMMON, "num_hidden_layers": 4},
        head_dim=32,
        intermediate_size=64,
        num_local_experts=EXPERTS,
        num_experts_per_tok=3,
        sliding_window=WINDOW,
        swiglu_limit=1.0,
        rope_parameters=rope,
    )


def _glm4_moe() -> PreTrainedConfig:
    return Glm4MoeConfig(
        **_COMMON,
        head_dim=32,
        intermediate_size=96,
        moe_intermediate_size=32,
        n_routed_experts=EXPERTS,
        n_shared_experts=1,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
        routed_scaling_factor=1.5,
        attention_bias=True,
        use_qk_norm=True,
    )


def _ernie4_5_moe() -> PreTrainedConfig:
    return Ernie4_5_MoeConfig(
        **_COMMON,
        intermediate_size=96,
        moe_intermediate_size=32,
        moe_num_experts=EXPERTS,
        moe_k=3,
        moe_num_shared_experts=2,
        use_bias=True,
    )


def _granitemoe() -> PreTrainedConfig:
    return GraniteMoeConfig(
        **_COMMON,
        intermediate_size=32,
        num_local_experts=EXPERTS,
        num_experts_per_tok=3,
        embedding_multiplier=2.0,
        logits_scaling=2.0,
        residual_multiplier=0.5,
        attention_multiplier=0.2,
    )


def _phimoe() -> PreTrainedConfig:
    return PhimoeConfig(
        **_COMMON,
        intermediate_size=96,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        sliding_window=WINDOW,
        attention_bias=True,
        lm_head_bias=True,
    )


FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "olmoe": _olmoe,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "gpt_oss": _gpt_oss,
    "glm4_moe": _glm4_moe,
    "ernie4_5_moe": _ernie4_5_moe,
    "granitemoe": _granitemoe,
    "phimoe": _phimoe,
}


def random_model(config: PreTrainedConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of `config` with random values in every tensor, the same for the same seed."""
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(_random_values(name, tuple(tensor.shape), generator))
    return model.eval()


def save_checkpoint(
    family: str, folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, max_shard_size: str = "50GB"
) -> PreTrainedModel:
    """Write a random checkpoint of `family` as its users know it (original key names) and return the model."""
    model = random_model(FAMILIES[family](), seed, dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def _random_values(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    values = torch.randn(shape, generator=generator, dtype=torch.float32)
    if "norm" in name and len(shape) == 1 and not name.endswith("bias"):
        return 1.0 + 0.2 * values
    if "e_score_correction_bias" in name:
        return 0.2 * values
    if len(shape) == 1 or "bias" in name:
        return 0.3 * values
    if "embed_tokens" in name:
        return values
    return values / math.sqrt(shape[-1])
