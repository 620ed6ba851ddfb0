"""Which models the native path takes, and that it takes none that differs from what it knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from families import FAMILIES
from moestro.config import RuntimeOptions
from moestro.hf.skeleton import build_skeleton
from moestro.runtime.native import Blueprint, describe
from moestro.runtime.plan import probe_for
from runtime.native.variants import NATIVE, VARIANTS, changed

OPTIONS = RuntimeOptions(context=64)


def _described(config: Any, change: Callable[[Any], None] | None = None) -> Blueprint | None:
    skeleton = build_skeleton(config)
    probed = probe_for(skeleton, OPTIONS)
    if change is not None:
        change(skeleton.model)
    return describe(skeleton, probed)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_families_are_on_the_path_that_is_meant(family: str) -> None:
    assert (_described(FAMILIES[family]()) is not None) == (family in NATIVE)


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_every_variant_is_described(variant: str) -> None:
    blueprint = _described(VARIANTS[variant]())
    assert blueprint is not None
    assert any(layer.experts is not None for layer in blueprint.layers)


def _of_first_layer(name: str, value: Any) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        owner, _, leaf = name.rpartition(".")
        setattr(model.model.layers[0].get_submodule(owner), leaf, value)

    return change


class _OtherNorm(nn.LayerNorm):
    """A norm that the path does not know."""


UNKNOWN: dict[str, Callable[[Any], None]] = {
    "another norm": _of_first_layer("input_layernorm", _OtherNorm(64)),
    "a norm more": _of_first_layer("self_attn.v_norm", nn.Identity()),
    "a parameter more": _of_first_layer("self_attn.gain", nn.Parameter(torch.ones(4))),
    "a bias of the router": _of_first_layer("mlp.gate.bias", nn.Parameter(torch.ones(8))),
    "another linear map": _of_first_layer("self_attn.q_proj", nn.Bilinear(2, 2, 2)),
    "another router": _of_first_layer("mlp.gate", nn.Linear(64, 8)),
    "a shared expert": _of_first_layer("mlp.shared_expert", nn.Linear(64, 64)),
    "another number of picks": _of_first_layer("mlp.gate.top_k", 5),
    "another layer number": _of_first_layer("self_attn.layer_idx", 2),
}


@pytest.mark.parametrize("difference", sorted(UNKNOWN))
def test_what_differs_runs_on_the_general_path(difference: str) -> None:
    assert _described(FAMILIES["qwen3_moe"](), UNKNOWN[difference]) is None


def test_an_activation_that_is_not_known_runs_on_the_general_path() -> None:
    assert _described(changed("qwen2_moe", hidden_act="gelu")()) is None
    assert _described(changed("mixtral", hidden_act="gelu")()) is not None, "its only MLPs are the experts"


def test_heads_that_rotate_in_part_run_on_the_general_path() -> None:
    skeleton = build_skeleton(FAMILIES["qwen3_moe"]())
    probed = probe_for(skeleton, OPTIONS)
    rotary: Any = skeleton.model.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq[:8]
    assert describe(skeleton, probed) is None


def test_windows_sinks_and_limits_are_the_models() -> None:
    blueprint = _described(FAMILIES["gpt_oss"]())
    assert blueprint is not None
    assert [layer.attention.window for layer in blueprint.layers] == [8, 0, 8, 0]
    assert all(layer.attention.sinks_owner is not None for layer in blueprint.layers)
    olmoe = _described(FAMILIES["olmoe"]())
    assert olmoe is not None
    assert {layer.attention.clip for layer in olmoe.layers} == {2.0}


def test_dense_layers_have_an_mlp_and_no_experts() -> None:
    blueprint = _described(VARIANTS["qwen3_moe_dense_layers"]())
    assert blueprint is not None
    assert [layer.experts is None for layer in blueprint.layers] == [True, False, True, False, True]
    assert [layer.mlp is None for layer in blueprint.layers] == [False, True, False, True, False]


def test_the_plan_counts_the_buffers() -> None:
    blueprint = _described(FAMILIES["olmoe"]())
    assert blueprint is not None
    # The residual, the hidden state, and queries, keys and values of 64 + 2 * 32; three picks of 12 bytes in each of
    # three layers; 64 codes and a group's 12 bytes for each row, in multiples of 64; what three experts of a row leave.
    for rows, few, codes in ((10, 10, 10 * 64 + 128), (17, 16, 17 * 64 + 256)):
        floats = 4 * (64 + 64 + 128)
        assert blueprint.workspace_bytes(rows=rows) == rows * (floats + 3 * 3 * 12) + codes + few * 3 * 4 * 64
    # The angles of 99 positions, what the experts leave, and the experts themselves or the logits.
    kept = blueprint.workspace_bytes(rows=10) + 99 * 4 * 16 + 10 * 4 * 64
    for logit_rows, more in ((1, 1000), (10, 10 * 4 * 160)):
        assert kept + more == blueprint.activation_bytes(rows=10, context=99, logit_rows=logit_rows, experts_bytes=1000)
