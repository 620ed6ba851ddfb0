"""Which dense tensors of a model are weights of linear maps that can be quantised."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from moestro.hf.skeleton import Skeleton, is_experts_module

LEAST_OUTPUTS = 16
"""Narrower maps (a gate of one value) are not worth it."""

_ROUTER = re.compile(r"(.*_)?(gate|router|gating)", re.IGNORECASE)


def linear_names(skeleton: Skeleton) -> frozenset[str]:
    """The dense tensors that are weights of `nn.Linear` modules, an embedding that is tied to one included.

    Routers are left out, by name and by what they are: a map beside experts with one output for each of them. A router
    decides which experts a token gets; an error there is not a small one.
    """
    model = skeleton.model
    routers = frozenset(_beside_experts(model))
    weights = {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.out_features >= LEAST_OUTPUTS
        and name not in routers
        and not any(_ROUTER.fullmatch(part) for part in name.split("."))
    }
    state = model.state_dict(keep_vars=True)
    return frozenset(name for name in skeleton.dense if id(state[name]) in weights)


def head_names(skeleton: Skeleton) -> frozenset[str]:
    """The dense tensors that logits come of, an embedding that is tied to the head included."""
    head = skeleton.model.get_output_embeddings()
    if head is None:
        return frozenset()
    state = skeleton.model.state_dict(keep_vars=True)
    return frozenset(name for name in skeleton.dense if state[name] is head.weight)


def lookup_names(skeleton: Skeleton) -> frozenset[str]:
    """The dense tensors of which rows are looked up and nothing else: an embedding that is not tied to the head."""
    embedding: Any = skeleton.model.get_input_embeddings()
    state = skeleton.model.state_dict(keep_vars=True)
    return frozenset(name for name in skeleton.dense if state[name] is embedding.weight) - head_names(skeleton)


def _beside_experts(model: nn.Module) -> Iterator[str]:
    """Linear maps inside the modules that hold experts, with as many outputs as there are experts."""
    modules = dict(model.named_modules())
    for name, experts in modules.items():
        if not is_experts_module(experts):
            continue
        block = name.rpartition(".")[0]
        for other, module in modules.items():
            beside = other.startswith(f"{block}.") and isinstance(module, nn.Linear)
            if beside and module.out_features == experts.num_experts:
                yield other
