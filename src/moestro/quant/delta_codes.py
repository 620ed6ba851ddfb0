"""The codes of a delta and back: low bits for every input channel, and what is missing in the few that are kept.

In a kept channel the value is what the codes leave over, so that kernels add both and mask nothing.

Shapes: N rows (outputs), K columns (inputs), C channels that are kept, G groups of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from moestro.quant.delta import DeltaRegion, pack_kept, unpack_kept
from moestro.quant.flat import FORMS, flat_bytes, flat_decode
from moestro.quant.grid import Grid, spread, unit_for
from moestro.quant.groups import groups, padded_columns, padded_rows
from moestro.quant.tiles import HEADER, pack_scaled, unpack_scaled

_ROUNDS = 12
"""How often codes and steps are fitted to each other; on deltas of fine-tunes later rounds change next to nothing."""

_FIRST_STEPS = {1: 1.6, 2: 1.0, 4: 0.34}
"""Steps in standard deviations with the least error for normally distributed values."""


@dataclass(frozen=True)
class DeltaParts:
    """What the bytes of a delta stand for.

    `code_NK` are uint8 codes, `scale_NG` and `middle_NG` fp16 in units of `unit`; `kept_C` are ascending channels,
    int32, `value_CN` their values, fp16; `bias_N` is fp32 or None. Nothing is filled up.
    """

    code_NK: torch.Tensor
    scale_NG: torch.Tensor
    middle_NG: torch.Tensor
    unit: float
    kept_C: torch.Tensor
    value_CN: torch.Tensor
    bias_N: torch.Tensor | None

    def decoded_codes(self, bits: int) -> torch.Tensor:
        """What the codes alone stand for, fp32 [N, K]."""
        rows, columns = self.code_NK.shape
        group = padded_columns(columns) // groups(columns)
        scale_NK = spread(self.scale_NG.float() * self.unit, group)[:, :columns]
        middle_NK = spread(self.middle_NG.float() * self.unit, group)[:, :columns]
        codes_NK: torch.Tensor = middle_NK + scale_NK * (self.code_NK.float() - (2**bits - 1) / 2)
        assert codes_NK.shape == (rows, columns)
        return codes_NK

    def decoded(self, bits: int) -> torch.Tensor:
        """The delta, fp32 [N, K]."""
        delta_NK = self.decoded_codes(bits)
        delta_NK[:, self.kept_C.long()] += self.value_CN.float().T
        return delta_NK


def fit_codes(
    delta_NK: torch.Tensor, bits: int, kept_C: torch.Tensor, importance_K: torch.Tensor | None = None
) -> DeltaParts:
    """Codes, scales and middles with the least squared error, columns weighing `importance_K`; channels `kept_C` have
    no say in them and are made right by their values."""
    unit = unit_for(delta_NK)
    rows, columns = delta_NK.shape
    count, wide = groups(columns), padded_columns(columns)
    weight_K = torch.ones(columns) if importance_K is None else importance_K.clone()
    weight_K[kept_C.long()] = 0.0
    weight_1Gg = functional.pad(weight_K, (0, wide - columns)).view(1, count, -1)
    scaled_NGg = functional.pad(delta_NK / unit, (0, wide - columns)).view(rows, count, -1)
    scale_NG, middle_NG = _first_steps(scaled_NGg, weight_1Gg, bits)
    for _ in range(_ROUNDS):
        position_NGg = _positions(scaled_NGg, scale_NG, middle_NG, bits)
        scale_NG, middle_NG = _least_squares(scaled_NGg, position_NGg, weight_1Gg, scale_NG)
    scale_NG, middle_NG = scale_NG.half(), middle_NG.half()
    position_NGg = _positions(scaled_NGg, scale_NG.float(), middle_NG.float(), bits)
    code_NK = (position_NGg + (2**bits - 1) / 2).to(torch.uint8).view(rows, wide)[:, :columns].contiguous()
    empty = torch.empty((len(kept_C), rows), dtype=torch.float16)
    parts = DeltaParts(code_NK, scale_NG, middle_NG, unit, kept_C, empty, None)
    return with_exact_values(parts, delta_NK, bits)


def signs_of(delta_NK: torch.Tensor) -> DeltaParts:
    """BitDelta (arXiv 2402.10193): the signs of values and one size for all of them, the mean of theirs."""
    rows, columns = delta_NK.shape
    unit = unit_for(delta_NK)
    size = 2 * float(delta_NK.abs().mean()) / unit
    shape = (rows, groups(columns))
    return DeltaParts(
        (delta_NK >= 0).to(torch.uint8),
        torch.full(shape, size, dtype=torch.float16),
        torch.zeros(shape, dtype=torch.float16),
        unit,
        torch.empty(0, dtype=torch.int32),
        torch.empty((0, rows), dtype=torch.float16),
        None,
    )


def with_exact_values(parts: DeltaParts, delta_NK: torch.Tensor, bits: int) -> DeltaParts:
    """The same codes, the values of kept channels being what the codes leave over."""
    kept_C = parts.kept_C.long()
    rest_CN = (delta_NK[:, kept_C] - parts.decoded_codes(bits)[:, kept_C]).T
    return DeltaParts(
        parts.code_NK,
        parts.scale_NG,
        parts.middle_NG,
        parts.unit,
        parts.kept_C,
        rest_CN.half().contiguous(),
        parts.bias_N,
    )


def largest_channels(error_K: torch.Tensor, count: int) -> torch.Tensor:
    """The channels with the largest errors, int32 [C] ascending."""
    return error_K.topk(count).indices.sort().values.to(torch.int32)


def pack_delta(parts: DeltaParts, region: DeltaRegion) -> torch.Tensor:
    """The bytes of a delta, uint8 [region.nbytes]."""
    rows, columns = region.rows, region.columns
    assert parts.code_NK.shape == (rows, columns), (parts.code_NK.shape, region)
    assert len(parts.kept_C) == region.salient, (len(parts.kept_C), region)
    assert (parts.bias_N is not None) == region.bias, region
    tall, wide = padded_rows(rows) - rows, padded_columns(columns) - columns
    scales = tuple(functional.pad(one, (0, 0, 0, tall)) for one in (parts.scale_NG, parts.middle_NG))
    # Columns that were filled up are multiplied with zeros, so it is no matter what their codes stand for.
    code_NK = functional.pad(parts.code_NK, (0, wide, 0, tall))
    packed = torch.zeros(region.nbytes, dtype=torch.uint8)
    nothing = torch.empty(0)
    _put(packed, 0, Grid(nothing, nothing, parts.unit, {2: 1.0}, hi=0, lo=0).header())
    _put(packed, HEADER, pack_scaled(scales, code_NK, region.group, FORMS[region.bits]))
    _put(packed, region.ids_at, parts.kept_C.to(torch.int32))
    _put(packed, region.values_at, pack_kept(parts.value_CN))
    if parts.bias_N is not None:
        _put(packed, region.bias_at, parts.bias_N.float())
    return packed


def unpack_delta(packed: torch.Tensor, region: DeltaRegion) -> DeltaParts:
    """What the bytes of a delta stand for."""
    rows, columns = region.rows, region.columns
    tall, wide = padded_rows(rows), padded_columns(columns)
    body = packed[HEADER : flat_bytes(rows, columns, region.bits)]
    (scale_NG, middle_NG), code_NK = unpack_scaled(body, 2, tall, wide, region.group, FORMS[region.bits])
    unit = Grid.parse(packed[:HEADER], scale_NG, middle_NG).unit
    kept_C = _take(packed, region.ids_at, 4 * region.salient).view(torch.int32)
    values = _take(packed, region.values_at, 2 * region.salient * tall).view(torch.float16)
    return DeltaParts(
        code_NK[:rows, :columns],
        scale_NG[:rows],
        middle_NG[:rows],
        unit,
        kept_C,
        unpack_kept(values, region.salient, rows),
        _take(packed, region.bias_at, 4 * rows).view(torch.float32) if region.bias else None,
    )


def delta_decode(packed: torch.Tensor, region: DeltaRegion) -> torch.Tensor:
    """The delta [N, K] in fp32 that bytes stand for, without the bias."""
    delta_NK = flat_decode(packed[: region.ids_at], region.rows, region.columns, region.bits).contiguous()
    parts = unpack_delta(packed, region)
    delta_NK[:, parts.kept_C.long()] += parts.value_CN.float().T
    return delta_NK


def _first_steps(scaled_NGg: torch.Tensor, weight_1Gg: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    total_1G = weight_1Gg.sum(-1).clamp_min(1e-30)
    mean_NG = (scaled_NGg * weight_1Gg).sum(-1) / total_1G
    spread_NG = (((scaled_NGg - mean_NG.unsqueeze(-1)).square() * weight_1Gg).sum(-1) / total_1G).sqrt()
    return spread_NG * _FIRST_STEPS[bits], mean_NG


def _positions(scaled_NGg: torch.Tensor, scale_NG: torch.Tensor, middle_NG: torch.Tensor, bits: int) -> torch.Tensor:
    """The nearest codes, as distances from the middle in steps."""
    half = (2**bits - 1) / 2
    relative_NGg = (scaled_NGg - middle_NG.unsqueeze(-1)) / scale_NG.unsqueeze(-1).clamp_min(1e-30)
    positions_NGg: torch.Tensor = (relative_NGg + half).round().clamp(0, 2**bits - 1) - half
    return positions_NGg


def _least_squares(
    scaled_NGg: torch.Tensor, position_NGg: torch.Tensor, weight_1Gg: torch.Tensor, old_NG: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and middle [N, G] with the least error for given codes; the old scale where codes are all alike."""
    total_1G = weight_1Gg.sum(-1).clamp_min(1e-30)
    mean_p_NG = (position_NGg * weight_1Gg).sum(-1) / total_1G
    mean_x_NG = (scaled_NGg * weight_1Gg).sum(-1) / total_1G
    off_p_NGg = position_NGg - mean_p_NG.unsqueeze(-1)
    square_NG = (off_p_NGg.square() * weight_1Gg).sum(-1)
    along_NG = (off_p_NGg * scaled_NGg * weight_1Gg).sum(-1)
    scale_NG = torch.where(square_NG > 1e-12, along_NG / square_NG.clamp_min(1e-12), old_NG)
    return scale_NG, mean_x_NG - scale_NG * mean_p_NG


def _put(packed: torch.Tensor, at: int, values: torch.Tensor) -> None:
    data = values.reshape(-1).view(torch.uint8)
    packed[at : at + len(data)] = data


def _take(packed: torch.Tensor, at: int, nbytes: int) -> torch.Tensor:
    return packed[at : at + nbytes].clone()
