"""One expert's MLP, from views into its slot.

Shapes: T rows routed to the expert, H hidden, I expert width, G = 2I where gate and up are one matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from moestro.kernels.base import Kernels
from moestro.runtime.narrow import GROUP

_SILU = (nn.SiLU, type(ACT2FN["silu"]))


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
        activated_TI = _activate(experts, experts._apply_gate, gate_up_TG, gate_up_TG.shape[1] // 2)
    else:
        up_TI = kernels.linear(hidden_TH, views["up_proj"], views.get("up_proj_bias"))
        activated_TI = _activate(experts, experts.act_fn, up_TI, up_TI.shape[1])
    return kernels.linear(activated_TI, views["down_proj"], views.get("down_proj_bias"))


def _activate(
    experts: Any, function: Callable[[torch.Tensor], torch.Tensor], values_TG: torch.Tensor, width: int
) -> torch.Tensor:
    """Activation of T rows, each with the same bits whatever T is.

    Full groups of elements per row make that so for SiLU and for the families with a gating of their own (gpt-oss). In
    other cases the rows are padded to full groups, so that torch takes the same path for every element.
    """
    known = getattr(experts, "act_fn", None) is None or isinstance(experts.act_fn, _SILU)
    if known and width % GROUP == 0:
        return function(values_TG)
    rows = values_TG.shape[0]
    return function(F.pad(values_TG, (0, 0, 0, -rows % GROUP)))[:rows]
