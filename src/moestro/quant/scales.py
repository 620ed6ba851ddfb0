"""Scales and middles of groups, and the steps of levels, chosen for all levels together.

Shapes: N rows, K columns, G groups, g columns of a group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from moestro.quant.codes import Codes
from moestro.quant.grid import HI, Grid, decode, positions, spread

SHRINKS = (1.0, 0.95, 0.9)
"""Shares of a group's range that the 16 codes may span; what lies outside is clipped."""

FIRST_STEPS = {2: 3.5, 3: 1.92, 4: 1.0, 8: 1.0 / HI}
"""Steps of the levels in units of the scale, before they are fitted: a little less than 4 and 2 for bell-shaped
weights, because the cells at the ends hold values that lie near their inner side."""


def fit_grid(weights_NK: torch.Tensor, importance_K: torch.Tensor, group: int, priorities: Mapping[int, float]) -> Grid:
    """The grid with the least error of plain rounding, per group over SHRINKS, weighted by importance and level.

    Weights are in units that suit fp16 (see `unit_for`); so is the grid, whose own unit is 1.
    """
    rows, columns = weights_NK.shape
    values_NGg = weights_NK.view(rows, columns // group, group)
    low_NG, high_NG = values_NGg.amin(-1), values_NGg.amax(-1)
    middle_NG = ((low_NG + high_NG) / 2).half()
    steps = {level: FIRST_STEPS[level] for level in priorities}
    best_cost_NG = torch.full(low_NG.shape, float("inf"))
    best_scale_NG = torch.zeros(low_NG.shape, dtype=torch.float16)
    for shrink in SHRINKS:
        scale_NG = ((high_NG - low_NG) * (shrink / 15)).half()
        grid = Grid(scale_NG, middle_NG, 1.0, steps)
        cost_NG = _cost(weights_NK, importance_K, grid, group, priorities)
        better_NG = cost_NG < best_cost_NG
        best_cost_NG = torch.where(better_NG, cost_NG, best_cost_NG)
        best_scale_NG = torch.where(better_NG, scale_NG, best_scale_NG)
    grid = Grid(best_scale_NG, middle_NG, 1.0, steps)
    return fit_steps(weights_NK, importance_K, nearest(weights_NK, grid, group), grid, group)


def _cost(
    weights_NK: torch.Tensor, importance_K: torch.Tensor, grid: Grid, group: int, priorities: Mapping[int, float]
) -> torch.Tensor:
    """Weighted squared error of every group, [N, G]."""
    codes = nearest(weights_NK, grid, group)
    cost_NK = torch.zeros_like(weights_NK)
    for level, priority in priorities.items():
        cost_NK += priority * (weights_NK - decode(codes, level, grid, group)).square()
    return (cost_NK * importance_K).view(len(weights_NK), -1, group).sum(-1)


def nearest(weights_NK: torch.Tensor, grid: Grid, group: int) -> Codes:
    """The codes nearest to the weights at the highest level."""
    step_NK = spread(grid.real_scale_NG, group)
    relative_NK = (weights_NK - spread(grid.real_middle_NG, group)) / step_NK.clamp_min(1e-30)
    code_NK = (relative_NK + 7.5).round().clamp(0, 15)
    fine = grid.steps.get(8, FIRST_STEPS[8])
    nibble_NK = ((relative_NK / fine - grid.hi * (code_NK - 7.5)) / grid.lo + 7.5).round().clamp(0, 15)
    return Codes(code_NK.to(torch.uint8), nibble_NK.to(torch.uint8))


def fit_steps(weights_NK: torch.Tensor, importance_K: torch.Tensor, codes: Codes, grid: Grid, group: int) -> Grid:
    """The grid with the steps, one number per level, that keep the weights' size along themselves.

    Least squares would shrink every matrix of an expert towards zero, by 12% at 2 bits, and three matrices of every
    layer all in the same direction: measured on the built-in model that loses twice as much as it gains.
    """
    offset_NK = weights_NK - spread(grid.real_middle_NG, group)
    scale_NK = spread(grid.real_scale_NG, group)
    size = float((offset_NK.square() * importance_K).sum())
    steps = {}
    for level, old in grid.steps.items():
        along = float((scale_NK * positions(codes, level, grid) * offset_NK * importance_K).sum())
        steps[level] = size / along if along > 0 else old
    return replace(grid, steps=steps)
