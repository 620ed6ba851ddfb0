"""Scales compared in compiled code, and steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moestro import _native
from moestro.quant.codes import Codes
from moestro.quant.grid import Grid, decode, positions, spread
from moestro.quant.scales import SHRINKS, fit_grid, fit_steps

GROUP = 32
PRIORITIES = {2: 0.5, 3: 1.0, 4: 3.0, 8: 60.0}


def nearest(weights: torch.Tensor, grid: Grid) -> Codes:
    """The codes nearest to the weights at the highest level."""
    relative = (weights - spread(grid.real_middle_NG, GROUP)) / spread(grid.real_scale_NG, GROUP)
    code = (relative + 7.5).round().clamp(0, 15)
    nibble = ((relative / grid.steps[8] - grid.hi * (code - 7.5)) / grid.lo + 7.5).round().clamp(0, 15)
    return Codes(code.to(torch.uint8), nibble.to(torch.uint8))


def cost(weights: torch.Tensor, importance: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Weighted squared error of every group, [N, G]."""
    codes = nearest(weights, grid)
    errors = sum(p * (weights - decode(codes, level, grid, GROUP)).square() for level, p in PRIORITIES.items())
    return (errors * importance).view(len(weights), -1, GROUP).sum(-1)


@pytest.mark.parametrize("isa", _native.available_isas())
def test_the_scale_of_each_group_is_the_best_of_those_tried(isa: str) -> None:
    generator = torch.Generator().manual_seed(7)
    weights = torch.randn((24, 96), generator=generator) * 100
    importance = torch.rand(96, generator=generator) + 0.1
    _native.set_isa(isa)
    grid = fit_grid(weights, importance, GROUP, PRIORITIES)
    _native.set_isa(_native.available_isas()[0])
    groups = weights.view(24, -1, GROUP)
    span = groups.amax(-1) - groups.amin(-1)
    tried = [replace(grid, scale_NG=(span * (shrink / 15)).half()) for shrink in SHRINKS]
    costs = torch.stack([cost(weights, importance, one) for one in tried])
    torch.testing.assert_close(cost(weights, importance, grid), costs.amin(0), rtol=1e-4, atol=1e-3)
    assert len({float(value) for value in (grid.scale_NG.float() / span).round(decimals=3).flatten()}) > 1


def test_steps_keep_the_size_of_the_weights_along_themselves() -> None:
    weights = torch.randn((64, 128), generator=torch.Generator().manual_seed(8)) * 100
    importance = torch.ones(128)
    grid = fit_grid(weights, importance, GROUP, PRIORITIES)
    codes = nearest(weights, grid)
    fitted = fit_steps(weights, importance, codes, grid, GROUP)
    offset = weights - spread(grid.real_middle_NG, GROUP)
    for level in PRIORITIES:
        value = spread(fitted.real_scale_NG * fitted.steps[level], GROUP) * positions(codes, level, fitted)
        assert float((value * offset).sum()) == pytest.approx(float(offset.square().sum()), rel=1e-4)
