"""The codes of one matrix's difference.

Shapes: N rows (outputs), K columns (inputs), C channels that are kept.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from moestro.quant.delta import DeltaRegion
from moestro.quant.delta_codes import DeltaParts, fit_codes, largest_channels


def encode_delta(delta_NK: torch.Tensor, region: DeltaRegion, bias_N: torch.Tensor | None = None) -> DeltaParts:
    """Codes of a difference from its values alone; the channels are kept whose codes are the most off."""
    kept_C = torch.empty(0, dtype=torch.int32)
    parts = fit_codes(delta_NK, region.bits, kept_C)
    if region.salient:
        error_K = (delta_NK - parts.decoded(region.bits)).square().sum(0)
        parts = fit_codes(delta_NK, region.bits, largest_channels(error_K, region.salient))
    return replace(parts, bias_N=bias_N)
