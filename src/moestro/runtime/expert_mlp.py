"""One expert's MLP, from views into its slot.

Shapes: T rows routed to the expert, H hidden, I expert width, G = 2I where gate and up are one matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from moestro.kernels.base import Kernels
from moestro.runtime.deltas import Piece, add_pieces
from moestro.runtime.narrow import GROUP

_SILU = (nn.SiLU, type(ACT2FN["silu"]))


def expert_mlp(
    kernels: Kernels,
    module: nn.Module,
    views: Mapping[str, torch.Tensor],
    hidden_TH: torch.Tensor,
    pieces: Sequence[Piece] = (),
) -> torch.Tensor:
    """Output [T, H] of one expert, not yet weighted.

    `views` holds the expert's tensors in canonical layout ([out, in]) under their names in `module`, transformers'
    experts module, which knows the family's gating (interleaved, clamped, plain). `pieces` are what variants add.
    """
    up = "gate_up_proj" if module.has_gate else "up_proj"
    up_TG = kernels.linear(hidden_TH, views[up], views.get(f"{up}_bias"))
    add_pieces(kernels, pieces, "up", hidden_TH, up_TG)
    activated_TI = activate(module, up_TG)
    down_TH = kernels.linear(activated_TI, views["down_proj"], views.get("down_proj_bias"))
    add_pieces(kernels, pieces, "down", activated_TI, down_TH)
    return down_TH


def activate(module: nn.Module, values_TG: torch.Tensor) -> torch.Tensor:
    """What the module of a family does between the two projections: [T, G] to [T, I].

    Each row gets the same bits whatever T is. Full groups of elements per row make that so for SiLU and for the
    families with a gating of their own (gpt-oss). In other cases the rows are padded to full groups, so that torch
    takes the same path for every element.
    """
    experts: Any = module
    function = experts._apply_gate if experts.has_gate else experts.act_fn
    width = values_TG.shape[1] // 2 if experts.has_gate else values_TG.shape[1]
    known = getattr(experts, "act_fn", None) is None or isinstance(experts.act_fn, _SILU)
    if known and width % GROUP == 0:
        return cast(torch.Tensor, function(values_TG))
    rows = values_TG.shape[0]
    return cast(torch.Tensor, function(F.pad(values_TG, (0, 0, 0, -rows % GROUP)))[:rows])
