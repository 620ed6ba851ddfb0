"""The three functions that moestro registers with transformers: experts, attention, attention mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moestro.hf.bridge import ALL_EXPERTS_FUNCTIONS, AttentionInterface, AttentionMaskInterface
from moestro.runtime.context import AttentionCall, current

NAME = "moestro"
NO_ROWS = -1


def install(model: PreTrainedModel) -> None:
    """Make `model` call the three functions below. They are registered process-wide, under a name of our own."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, mask_forward)
    model.set_attn_implementation(NAME)
    model.set_experts_implementation(NAME)


def experts_forward(
    module: nn.Module, hidden_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """transformers' experts interface: hidden states, chosen experts and their weights to the combined output."""
    return current().experts(module, hidden_TH, index_TK, weights_TK)


def mask_forward(*, mask_function: Any, local_size: int | None = None, **_: Any) -> torch.Tensor:
    """transformers' mask interface. No [T, T] mask is built: the "mask" is the window's size as a scalar.

    0 stands for no window, NO_ROWS for a window of none (some families make such a mask and never use it).
    """
    window = 0 if local_size is None else (int(local_size) or NO_ROWS)
    current().check_mask(mask_function, window)
    return torch.tensor(window)


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **extras: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: [1, H, T, D] queries to [1, T, H, V] outputs."""
    assert attention_mask is not None
    assert attention_mask.ndim == 0, "the mask did not come from mask_forward"
    assert int(attention_mask) != NO_ROWS, "a layer uses a window of no rows"
    call = AttentionCall(
        module=module,
        query=query,
        key=key,
        value=value,
        scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        window=int(attention_mask),
        softcap=float(softcap or 0.0),
        sinks_H=s_aux,
        extras=extras,
    )
    return current().attend(call).unsqueeze(0), None
