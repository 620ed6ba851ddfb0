"""Which of the kernels' activations a transformers experts module computes, found by trying.

Families write their gating in many ways: by `act_fn`, by a method of their own, with limits. What counts is what comes
out, so the module's function and the candidates are run on the same values.

Shapes: S sample rows, G outputs of the up projection (gate included), I expert width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from moestro.kernels.activations import activate
from moestro.kernels.base import ActivationSpec
from moestro.kernels.specs import ACTIVATIONS, Gate

_SAMPLE_ROWS, _SAMPLE_WIDTH = 64, 64
_SPREAD = 6.0
"""Standard deviation of the sample: wide enough for limits (7 in gpt-oss) to be at work."""


def find_activation(module: nn.Module) -> tuple[Gate, ActivationSpec] | None:
    """How the experts' module combines gate and up, and by which activation; None when the kernels do not know it."""
    experts: Any = module
    width = 2 * _SAMPLE_WIDTH if experts.has_gate else _SAMPLE_WIDTH
    values_SG = _SPREAD * torch.randn(_SAMPLE_ROWS, width, generator=torch.Generator().manual_seed(0))
    expected_SI = (experts._apply_gate if experts.has_gate else experts.act_fn)(values_SG)
    for gate, activation in _candidates(experts):
        actual_SI = activate(activation, gate, values_SG)
        if actual_SI.shape == expected_SI.shape and torch.allclose(actual_SI, expected_SI, rtol=1e-5, atol=1e-5):
            return gate, activation
    return None


def _candidates(experts: Any) -> Iterator[tuple[Gate, ActivationSpec]]:
    gates: tuple[Gate, ...] = ("halves", "interleaved") if experts.has_gate else ("none",)
    for gate in gates:
        for name in ACTIVATIONS:
            if name != "clamped_swiglu":
                yield gate, ActivationSpec(name)
            elif experts.has_gate:
                limit = _number(experts, "limit", "swiglu_limit")
                alpha = _number(experts, "alpha", "swiglu_alpha")
                if limit is not None and alpha is not None:
                    yield gate, ActivationSpec(name, alpha=alpha, limit=limit)


def _number(experts: Any, *names: str) -> float | None:
    found = [getattr(experts, name) for name in names if isinstance(getattr(experts, name, None), (int, float))]
    return float(found[0]) if found else None
