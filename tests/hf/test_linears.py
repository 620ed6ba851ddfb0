"""Which dense weights count as linear maps, in every family."""

from __future__ import annotations

import re

import pytest
import torch

from families import FAMILIES
from moestro.hf.linears import head_names, linear_names
from moestro.hf.skeleton import build_skeleton

_ROUTERS = re.compile(r"\.(gate|router|shared_expert_gate)\.|router\.layer|gate\.wg")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_attention_and_shared_experts_but_no_router(family: str) -> None:
    skeleton = build_skeleton(FAMILIES[family]())
    names = linear_names(skeleton)
    assert names <= skeleton.dense.keys()
    routers = {name for name in skeleton.dense if _ROUTERS.search(name)}
    assert routers
    assert not names & routers
    matrices = {name for name, (shape, _) in skeleton.dense.items() if len(shape) == 2}
    left = matrices - names - routers
    tied = "lm_head.weight" not in skeleton.dense
    assert {name for name in left if "moe_statics" not in name} == (set() if tied else {"model.embed_tokens.weight"})
    assert ("model.embed_tokens.weight" in names) == tied
    assert head_names(skeleton) == {"model.embed_tokens.weight" if tied else "lm_head.weight"}


def test_a_router_is_known_by_its_outputs_too() -> None:
    skeleton = build_skeleton(FAMILIES["qwen2_moe"]())
    block = skeleton.model.model.layers[0].mlp
    block.experts.num_experts = 16
    for name, outputs in (("chooser", 16), ("wide", 17)):
        setattr(block, name, torch.nn.Linear(64, outputs, bias=False, device="meta"))
        skeleton.dense[f"model.layers.0.mlp.{name}.weight"] = ((outputs, 64), torch.float32)
    names = linear_names(skeleton)
    assert "model.layers.0.mlp.wide.weight" in names
    assert "model.layers.0.mlp.chooser.weight" not in names
