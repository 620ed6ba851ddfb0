"""Plain codes of 8 or 4 bits, for dense matrices, of 4, 2 or 1 for deltas: a scale and a middle per group, no planes.

Shapes: N rows (outputs), K columns (inputs), both padded inside.
"""

from __future__ import annotations

import torch

from moestro.quant.codes import LEVELS
from moestro.quant.encoding import padded
from moestro.quant.grid import Grid, spread, unit_for
from moestro.quant.groups import group_size, groups, padded_columns, padded_rows
from moestro.quant.hessian import compensation, importance
from moestro.quant.rounding import Rule, round_compensated
from moestro.quant.tiles import BITS1, BITS2, BITS4, BITS8, HEADER, code_bytes, pack_scaled, unpack_scaled

FORMS = {1: BITS1, 2: BITS2, 4: BITS4, 8: BITS8}
_SHRINKS = {
    1: tuple(1.0 - 0.04 * step for step in range(24)),
    2: tuple(1.0 - 0.04 * step for step in range(20)),
    4: tuple(1.0 - 0.04 * step for step in range(10)),
    8: (1.0,),
}
_SWEEPS = 2

_ROWS = 4096
"""Rows that are encoded at once: whole tiles."""

_SIGNED = 128
"""8-bit codes are stored as signed bytes, less this."""


def flat_bytes(rows: int, columns: int, bits: int) -> int:
    """Bytes of a matrix of this (unpadded) shape."""
    tall = padded_rows(rows)
    return HEADER + 4 * tall * groups(columns) + code_bytes(tall, padded_columns(columns), FORMS[bits])


def flat_encode(weights_NK: torch.Tensor, bits: int, hessian_KK: torch.Tensor | None = None) -> torch.Tensor:
    """The bytes of a matrix (fp32, finite): the nearest codes, groups clipped where that has less error.

    With `hessian_KK`, the sum over calibration rows x of x x^T, 4-bit codes are those that keep the outputs. (8 bits
    lose next to nothing.)
    """
    unit = unit_for(weights_NK)
    group, columns = group_size(weights_NK.shape[1]), padded_columns(weights_NK.shape[1])
    importance_K = importance(hessian_KK, columns)
    how = compensation(hessian_KK, columns) if bits == 4 else None
    # Rows have nothing to do with each other; some at a time bound the memory for the widest heads.
    parts = [_header(unit)]
    for start in range(0, len(weights_NK), _ROWS):
        some_NK = padded(weights_NK[start : start + _ROWS]) / unit
        scale_NG, middle_NG = _fit(some_NK, importance_K, group, bits)
        if how is None:
            codes_NK = _nearest(some_NK, scale_NG, middle_NG, bits) - (_SIGNED if bits == 8 else 0)
            codes_NK = codes_NK.to(torch.int16).to(torch.uint8)
        else:
            # The third level of a chain that cares for no other has just these codes.
            rule = Rule([scale_NG.float()], {4: 1.0}, {4: 1.0}, 0, 0)
            offsets = [some_NK - spread(middle_NG.float(), group)] * len(LEVELS)
            codes_NK = round_compensated(offsets, rule, group, how, sweeps=_SWEEPS).code_NK
        parts.append(pack_scaled((scale_NG, middle_NG), codes_NK, group, FORMS[bits]))
    return torch.cat(parts)


def _fit(
    weights_NK: torch.Tensor, importance_K: torch.Tensor, group: int, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and middles [N, G], fp16, with the least error of plain rounding."""
    values_NGg = weights_NK.view(len(weights_NK), -1, group)
    low_NG, high_NG = values_NGg.amin(-1), values_NGg.amax(-1)
    middle_NG = ((low_NG + high_NG) / 2).half()
    least_NG = torch.full(low_NG.shape, float("inf"))
    scale_NG = torch.zeros(low_NG.shape, dtype=torch.float16)
    for shrink in _SHRINKS[bits]:
        tried_NG = ((high_NG - low_NG) * (shrink / (2**bits - 1))).half()
        codes_NK = _nearest(weights_NK, tried_NG, middle_NG, bits)
        error_NK = weights_NK - _values(codes_NK, tried_NG.float(), middle_NG.float(), bits)
        cost_NG = (error_NK.square() * importance_K).view(values_NGg.shape).sum(-1)
        scale_NG = torch.where(cost_NG < least_NG, tried_NG, scale_NG)
        least_NG = cost_NG.minimum(least_NG)
    return scale_NG, middle_NG


def flat_decode(region: torch.Tensor, rows: int, columns: int, bits: int) -> torch.Tensor:
    """The weights [N, K] in fp32 that the bytes of a matrix stand for."""
    (scale_NG, middle_NG), codes_NK = unpack_scaled(
        region[HEADER:], 2, padded_rows(rows), padded_columns(columns), group_size(columns), FORMS[bits]
    )
    unit = Grid.parse(region[:HEADER], scale_NG, middle_NG).unit
    stored_NK = codes_NK.view(torch.int8).float() + _SIGNED if bits == 8 else codes_NK.float()
    return _values(stored_NK, scale_NG.float() * unit, middle_NG.float() * unit, bits)[:rows, :columns]


def _header(unit: float) -> torch.Tensor:
    # The header has one step for flat codes, in the place of the lowest level.
    nothing = torch.empty(0)
    return Grid(nothing, nothing, unit, {2: 1.0}, hi=0, lo=0).header()


def _nearest(weights_NK: torch.Tensor, scale_NG: torch.Tensor, middle_NG: torch.Tensor, bits: int) -> torch.Tensor:
    group = weights_NK.shape[1] // scale_NG.shape[1]
    relative_NK = (weights_NK - spread(middle_NG.float(), group)) / spread(scale_NG.float(), group).clamp_min(1e-30)
    codes_NK: torch.Tensor = (relative_NK + (2**bits - 1) / 2).round().clamp(0, 2**bits - 1)
    return codes_NK


def _values(codes_NK: torch.Tensor, scale_NG: torch.Tensor, middle_NG: torch.Tensor, bits: int) -> torch.Tensor:
    group = codes_NK.shape[1] // scale_NG.shape[1]
    weights_NK: torch.Tensor = spread(middle_NG, group) + spread(scale_NG, group) * (codes_NK - (2**bits - 1) / 2)
    return weights_NK
