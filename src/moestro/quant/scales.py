"""Scales and middles of groups, and the steps of levels, chosen for all levels together.

Shapes: N rows, K columns, G groups, g columns of a group, S scales that are tried.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from moestro import _native
from moestro.quant.codes import LEVELS, Codes
from moestro.quant.grid import HI, LO, Grid, positions, spread

SHRINKS = (1.0, 0.95, 0.9)
"""Shares of a group's range that the 16 codes may span; what lies outside is clipped."""

FIRST_STEPS = {2: 3.5, 3: 1.92, 4: 1.0, 8: 1.0 / HI}
"""Steps of the levels in units of the scale, before they are fitted: a little less than 4 and 2 for bell-shaped
weights, because the cells at the ends hold values that lie near their inner side."""


def fit_grid(weights_NK: torch.Tensor, importance_K: torch.Tensor, group: int, priorities: Mapping[int, float]) -> Grid:
    """The grid with the least error of plain rounding, per group over SHRINKS, weighted by importance and level.

    Weights are in units that suit fp16 (see `unit_for`); so is the grid, whose own unit is 1.
    """
    steps = {level: FIRST_STEPS[level] for level in priorities}
    values_NGg = weights_NK.view(len(weights_NK), -1, group)
    low_NG, high_NG = values_NGg.amin(-1), values_NGg.amax(-1)
    middle_NG = ((low_NG + high_NG) / 2).half()
    tried_SNG = torch.stack([((high_NG - low_NG) * (shrink / 15)).half() for shrink in SHRINKS])
    costs_SNG = _costs(weights_NK, importance_K, tried_SNG, middle_NG, group, steps, priorities)
    scale_NG = tried_SNG.gather(0, costs_SNG.argmin(0, keepdim=True))[0]
    return Grid(scale_NG, middle_NG, 1.0, steps)


def _costs(
    weights_NK: torch.Tensor,
    importance_K: torch.Tensor,
    tried_SNG: torch.Tensor,
    middle_NG: torch.Tensor,
    group: int,
    steps: Mapping[int, float],
    priorities: Mapping[int, float],
) -> torch.Tensor:
    """Weighted squared error of every group with each of S scales, [S, N, G] (csrc/rounding.cpp)."""
    weights_NK, importance_K = weights_NK.contiguous(), importance_K.contiguous()
    scales_SNG, middles_NG = tried_SNG.float(), middle_NG.float()
    costs_SNG = torch.empty_like(scales_SNG)
    _native.scale_costs(
        weights_NK.data_ptr(),
        importance_K.data_ptr(),
        scales_SNG.data_ptr(),
        middles_NG.data_ptr(),
        costs_SNG.data_ptr(),
        [steps.get(level, 0.0) for level in LEVELS],
        [priorities.get(level, 0.0) for level in LEVELS],
        HI,
        LO,
        len(SHRINKS),
        len(weights_NK),
        weights_NK.shape[1] // group,
        group,
    )
    return costs_SNG


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
