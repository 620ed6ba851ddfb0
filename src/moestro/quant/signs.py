"""Published matryoshka quantisation (D2MoE, arXiv 2504.15299): a base of 2 bits, then planes of residual signs.

Levels 3 and 4 add the sign of what is left, each with a scale of its own per group; level 8 adds the rest in 4 bits.

Shapes: N rows, K columns (both padded inside), G groups, g columns of a group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from moestro.quant.codes import LEVELS, Codes
from moestro.quant.encoding import PRIORITIES, offsets_of, padded
from moestro.quant.grid import Grid, spread, unit_for
from moestro.quant.groups import TILE, group_size, groups, padded_columns, padded_rows
from moestro.quant.hessian import compensation, importance
from moestro.quant.nested import FORMS
from moestro.quant.rounding import Rule, round_compensated, round_nearest
from moestro.quant.scales import fit_grid, fit_steps
from moestro.quant.tiles import (
    BITS2,
    HEADER,
    SCALE_BYTES,
    code_bytes,
    pack_codes,
    pack_scaled,
    pack_scales,
    unpack_codes,
    unpack_scaled,
    unpack_scales,
)

_LINE = 64
_ROUNDS = 2
"""How often codes and scales are fitted to each other, before errors are pushed on and while they are."""


class SignsEncoding:
    """See `Encoding`. Codes are chosen over all levels at once, as those of nested integers are."""

    name = "signs"

    def plane_bytes(self, rows: int, columns: int, level: int) -> int:
        tall, count, wide = padded_rows(rows), groups(columns), padded_columns(columns)
        codes = code_bytes(tall, wide, FORMS[level])
        return codes + HEADER + 4 * tall * count if level == 2 else codes + tall // TILE * _scale_bytes(count)

    def encode(
        self,
        weights_NK: torch.Tensor,
        *,
        levels: tuple[int, ...],
        hessian_KK: torch.Tensor | None = None,
        aims: Mapping[int, torch.Tensor] | None = None,
        metric_NN: torch.Tensor | None = None,
    ) -> dict[int, torch.Tensor]:
        del metric_NN  # Rows are rounded one by one.
        group = group_size(weights_NK.shape[1])
        unit = unit_for(weights_NK)
        weights_NK = padded(weights_NK) / unit
        importance_K = importance(hessian_KK, weights_NK.shape[1])
        grid = fit_grid(weights_NK, importance_K, group, {2: 1.0})
        offsets = offsets_of(weights_NK, aims, unit, spread(grid.real_middle_NG, group))
        offset_NK = offsets[-1]
        priorities = {level: PRIORITIES[level] for level in levels}
        how = compensation(hessian_KK, weights_NK.shape[1])
        scales_NG: tuple[torch.Tensor, ...] = (grid.scale_NG,) * 3
        for round_ in range(2 * _ROUNDS):
            planes_NG = [grid.real_scale_NG, *(scale_NG.float() for scale_NG in scales_NG)]
            rule = Rule(planes_NG, grid.steps, priorities, 0, 0)
            if how is None or round_ < _ROUNDS:
                codes = round_nearest(offset_NK, rule, group)
            else:
                codes = round_compensated(offsets, rule, group, how, sweeps=0)
            if round_ + 1 < 2 * _ROUNDS:
                if round_ == 0:
                    grid = fit_steps(weights_NK, importance_K, codes, grid, group)
                scales_NG = _sign_scales(offset_NK, importance_K, codes, grid, group)
        grid = replace(grid, unit=unit)
        base = pack_scaled((grid.scale_NG, grid.middle_NG), codes.plane(2), group, BITS2)
        planes = {2: torch.cat((grid.header(), base))}
        for level, scale_NG in zip(LEVELS[1 : LEVELS.index(max(levels)) + 1], scales_NG, strict=False):
            planes[level] = _pack_sign_plane(scale_NG, codes.plane(level), group, level)
        return planes

    def decode(self, regions: Sequence[torch.Tensor], rows: int, columns: int, level: int) -> torch.Tensor:
        group, tall, wide = group_size(columns), padded_rows(rows), padded_columns(columns)
        scales, base_NK = unpack_scaled(regions[0][HEADER:], 2, tall, wide, group, BITS2)
        grid = Grid.parse(regions[0][:HEADER], *scales)
        step_NK = spread(grid.real_scale_NG * grid.steps[2], group)
        weights_NK = spread(grid.real_middle_NG, group) + step_NK * (base_NK.float() - 1.5)
        for region, above in zip(regions[1:], LEVELS[1 : LEVELS.index(level) + 1], strict=False):
            scale_NG, plane_NK = unpack_sign_plane(region, tall, wide, group, above)
            centred_NK = plane_NK.float() - 7.5 if above == 8 else 2 * plane_NK.float() - 1
            weights_NK += spread(scale_NG.float() * grid.unit, group) * centred_NK
        return weights_NK[:rows, :columns]


def _sign_scales(
    offset_NK: torch.Tensor, importance_K: torch.Tensor, codes: Codes, grid: Grid, group: int
) -> tuple[torch.Tensor, ...]:
    """Scales of the planes after the base, for given codes of the base: fp16 [N, G] each, in the grid's unit."""
    rows = len(offset_NK)
    step_NK = spread(grid.real_scale_NG * grid.steps[2], group)
    rest_NK = offset_NK - step_NK * (codes.plane(2).float() - 1.5)
    weight_NG = importance_K.view(-1, group).sum(-1)
    scales = []
    for _ in range(2):
        mean_NG = (rest_NK.abs() * importance_K).view(rows, -1, group).sum(-1) / weight_NG
        scales.append(mean_NG.half())
        size_NK = spread(scales[-1].float(), group)
        rest_NK = torch.where(rest_NK >= 0, rest_NK - size_NK, rest_NK + size_NK)
    scales.append((rest_NK.abs().view(rows, -1, group).amax(-1) / 7.5).half())
    return tuple(scales)


def _scale_bytes(count: int) -> int:
    """Bytes of a tile's scales, filled up to whole lines so that codes start on one."""
    return -(-count * SCALE_BYTES // _LINE) * _LINE


def _pack_sign_plane(scale_NG: torch.Tensor, plane_NK: torch.Tensor, group: int, level: int) -> torch.Tensor:
    tiles = len(scale_NG) // TILE
    scales = pack_scales(scale_NG).reshape(tiles, -1)
    padding = torch.zeros((tiles, _scale_bytes(scale_NG.shape[1]) - scales.shape[1]), dtype=torch.uint8)
    codes = pack_codes(plane_NK, group, FORMS[level]).reshape(tiles, -1)
    return torch.cat((scales, padding, codes), dim=-1).flatten()


def unpack_sign_plane(
    region: torch.Tensor, rows: int, columns: int, group: int, level: int
) -> tuple[torch.Tensor, torch.Tensor]:
    tiles, count = rows // TILE, columns // group
    lanes = region.view(tiles, -1)
    scales = unpack_scales(lanes[:, : count * SCALE_BYTES].reshape(tiles, count, SCALE_BYTES))
    codes = lanes[:, _scale_bytes(count) :].reshape(tiles, count, -1)
    return scales, unpack_codes(codes, group, FORMS[level])
