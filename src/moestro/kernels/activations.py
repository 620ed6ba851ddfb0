"""The activations of experts in plain torch.

Shapes: R rows, I expert width, G = 2I with a gate, else I.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.nn import functional

from moestro.kernels.specs import ActivationName, ActivationSpec, Gate

FUNCTIONS: Mapping[ActivationName, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu_quick": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
    "sigmoid": torch.sigmoid,
}


def activate(spec: ActivationSpec, gate: Gate, up_RG: torch.Tensor) -> torch.Tensor:
    """What goes into the down projection, [R, I]."""
    if gate == "none":
        return FUNCTIONS[spec.name](up_RG)
    gate_RI, up_RI = up_RG.chunk(2, dim=-1) if gate == "halves" else (up_RG[:, ::2], up_RG[:, 1::2])
    if spec.name != "clamped_swiglu":
        return FUNCTIONS[spec.name](gate_RI) * up_RI
    gate_RI, up_RI = gate_RI.clamp(max=spec.limit), up_RI.clamp(-spec.limit, spec.limit)
    return (up_RI + 1) * (gate_RI * torch.sigmoid(gate_RI * spec.alpha))
