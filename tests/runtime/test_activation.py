"""Activations of transformers' experts modules, recognised by what they compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from families import FAMILIES
from moestro.hf.skeleton import build_skeleton, is_experts_module
from moestro.kernels.base import ActivationSpec
from moestro.runtime.activation import find_activation


class Experts(nn.Module):
    """As much of an experts module as the search looks at."""

    def __init__(self, act_fn: Any, *, has_gate: bool = True, interleaved: bool = False) -> None:
        super().__init__()
        self.act_fn, self.has_gate, self.interleaved = act_fn, has_gate, interleaved

    def _apply_gate(self, values: torch.Tensor) -> torch.Tensor:
        gate, up = (values[..., ::2], values[..., 1::2]) if self.interleaved else values.chunk(2, dim=-1)
        activated: torch.Tensor = self.act_fn(gate) * up
        return activated


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_recognised(family: str) -> None:
    module = next(one for one in build_skeleton(FAMILIES[family]()).model.modules() if is_experts_module(one))
    expected: tuple[str, ActivationSpec] = ("halves", ActivationSpec("silu"))
    if family == "gpt_oss":
        expected = ("interleaved", ActivationSpec("clamped_swiglu", alpha=1.702, limit=1.0))
    assert find_activation(module) == expected


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("silu", "silu"),
        ("gelu", "gelu"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("gelu_new", "gelu_tanh"),
        ("quick_gelu", "gelu_quick"),
        ("relu", "relu"),
        ("relu2", "relu2"),
        ("sigmoid", "sigmoid"),
    ],
)
@pytest.mark.parametrize("gate", ["none", "halves", "interleaved"])
def test_activations_of_transformers_by_their_names(name: str, found: str, gate: str) -> None:
    module = Experts(ACT2FN[name], has_gate=gate != "none", interleaved=gate == "interleaved")
    assert find_activation(module) == (gate, ActivationSpec(found))  # type: ignore[arg-type]


def test_what_the_kernels_do_not_know_is_not_found() -> None:
    assert find_activation(Experts(torch.tanh)) is None
    assert find_activation(Experts(lambda values: torch.nn.functional.silu(values).clamp(max=4.0))) is None
    assert find_activation(Experts(torch.nn.functional.mish, has_gate=False)) is None
