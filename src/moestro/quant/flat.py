"""Plain codes of 8 or 4 bits, for dense matrices: a scale and a middle per group, no planes.

Shapes: N rows (outputs), K columns (inputs), both padded inside.
"""

from __future__ import annotations

import torch

from moestro.quant.encoding import padded
from moestro.quant.grid import Grid, spread, unit_for
from moestro.quant.groups import group_size, groups, padded_columns, padded_rows
from moestro.quant.tiles import BITS4, BITS8, HEADER, code_bytes, pack_scaled, unpack_scaled

FORMS = {4: BITS4, 8: BITS8}
_SHRINKS = {4: tuple(1.0 - 0.04 * step for step in range(10)), 8: (1.0,)}
_SIGNED = 128
"""8-bit codes are stored as signed bytes, less this."""


def flat_bytes(rows: int, columns: int, bits: int) -> int:
    """Bytes of a matrix of this (unpadded) shape."""
    tall = padded_rows(rows)
    return HEADER + 4 * tall * groups(columns) + code_bytes(tall, padded_columns(columns), FORMS[bits])


def flat_encode(weights_NK: torch.Tensor, bits: int) -> torch.Tensor:
    """The bytes of a matrix (fp32, finite): the nearest codes, groups clipped where that has less error."""
    group = group_size(weights_NK.shape[1])
    weights_NK = padded(weights_NK)
    values_NGg = weights_NK.view(len(weights_NK), -1, group)
    low_NG, high_NG = values_NGg.amin(-1), values_NGg.amax(-1)
    unit = unit_for((high_NG - low_NG) / (2**bits - 1), low_NG, high_NG)
    middle_NG = ((low_NG + high_NG) / 2 / unit).half()
    best = (torch.full(low_NG.shape, float("inf")), torch.zeros(low_NG.shape, dtype=torch.float16))
    for shrink in _SHRINKS[bits]:
        scale_NG = ((high_NG - low_NG) * (shrink / (2**bits - 1)) / unit).half()
        grid = _grid(scale_NG, middle_NG, unit, bits)
        error_NK = (weights_NK - _decode(_nearest(weights_NK, grid, bits, group), grid, bits, group)).square()
        cost_NG = error_NK.view(values_NGg.shape).sum(-1)
        best = (cost_NG.minimum(best[0]), torch.where(cost_NG < best[0], scale_NG, best[1]))
    grid = _grid(best[1], middle_NG, unit, bits)
    codes_NK = _nearest(weights_NK, grid, bits, group)
    codes_NK = (codes_NK - (_SIGNED if bits == 8 else 0)).to(torch.int16).to(torch.uint8)
    packed = pack_scaled((grid.scale_NG, grid.middle_NG), codes_NK, group, FORMS[bits])
    return torch.cat((grid.header(), packed))


def flat_decode(region: torch.Tensor, rows: int, columns: int, bits: int) -> torch.Tensor:
    """The weights [N, K] in fp32 that the bytes of a matrix stand for."""
    group = group_size(columns)
    scales, codes_NK = unpack_scaled(region[HEADER:], 2, padded_rows(rows), padded_columns(columns), group, FORMS[bits])
    grid = Grid.parse(region[:HEADER], *scales)
    stored_NK = codes_NK.view(torch.int8).float() + _SIGNED if bits == 8 else codes_NK.float()
    step_NK = spread(grid.real_scale_NG, group)
    return (spread(grid.real_middle_NG, group) + step_NK * (stored_NK - (2**bits - 1) / 2))[:rows, :columns]


def _grid(scale_NG: torch.Tensor, middle_NG: torch.Tensor, unit: float, bits: int) -> Grid:
    # The header has one step for flat codes, in the place of the lowest level.
    del bits
    return Grid(scale_NG, middle_NG, unit, {2: 1.0}, hi=0, lo=0)


def _nearest(weights_NK: torch.Tensor, grid: Grid, bits: int, group: int) -> torch.Tensor:
    step_NK = spread(grid.real_scale_NG, group).clamp_min(1e-30)
    relative_NK = (weights_NK - spread(grid.real_middle_NG, group)) / step_NK
    return (relative_NK + (2**bits - 1) / 2).round().clamp(0, 2**bits - 1)


def _decode(codes_NK: torch.Tensor, grid: Grid, bits: int, group: int) -> torch.Tensor:
    step_NK = spread(grid.real_scale_NG, group)
    return spread(grid.real_middle_NG, group) + step_NK * (codes_NK - (2**bits - 1) / 2)
