"""One expert's MLP, from views into its slot.

Shapes: T rows routed to the expert, H hidden, I expert width, G = 2I where gate and up are one matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from moestro.kernels.base import Kernels


def expert_mlp(
    kernels: Kernels, module: nn.Module, views: Mapping[str, torch.Tensor], hidden_TH: torch.Tensor
) -> torch.Tensor:
    """Output [T, H] of one expert, not yet weighted.

    `views` holds the expert's tensors in canonical layout ([out, in]) under their names in `module`, transformers'
    experts module, which knows the family's gating (interleaved, clamped, plain).
    """
    experts: Any = module
    if experts.has_gate:
        gate_up_TG = kernels.linear(hidden_TH, views["gate_up_proj"], views.get("gate_up_proj_bias"))
        activated_TI = experts._apply_gate(gate_up_TG)
    else:
        up_TI = kernels.linear(hidden_TH, views["up_proj"], views.get("up_proj_bias"))
        activated_TI = experts.act_fn(up_TI)
    return kernels.linear(activated_TI, views["down_proj"], views.get("down_proj_bias"))
