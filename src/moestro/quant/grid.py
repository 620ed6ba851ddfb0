"""The grid that codes are rounded to: a scale and a middle per group, constants per matrix.

    w(level) = unit * (middle + scale * step(level) * position)
    position = code - (2^level - 1) / 2                 up to 4 bits
    position = hi * (code4 - 7.5) + lo * (nibble - 7.5)   at 8 bits

Shapes: N rows, K columns, G groups, g columns of a group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from moestro.quant.codes import LEVELS, Codes
from moestro.quant.tiles import HEADER

_TARGET_EXPONENT = 12
"""Scales are stored as fp16 with the largest near 2^12: 26 binary orders of magnitude below it keep their precision."""


HI, LO = 32, 4
"""How code and nibble join at 8 bits. With 16 and 1 they would be one integer; with 32 and 4 the nibbles of
neighbouring codes overlap by half, so that a code chosen for the low levels' sake costs the highest nothing. Measured
on the built-in model: with 3 instead of 4, divergence is 4% more at 2 bits and 5% less at 4."""


@dataclass(frozen=True)
class Grid:
    """`scale_NG` and `middle_NG` are fp16; `steps` maps a level to its step in units of the scale."""

    scale_NG: torch.Tensor
    middle_NG: torch.Tensor
    unit: float
    steps: dict[int, float]
    hi: int = HI
    lo: int = LO

    def header(self) -> torch.Tensor:
        """The 64 bytes of constants that kernels read before the tiles."""
        constants = torch.zeros(HEADER // 4)
        constants[0] = self.unit
        for place, level in enumerate(LEVELS, start=1):
            constants[place] = self.steps.get(level, 0.0) / 2
        constants[5], constants[6] = self.hi, self.lo
        return constants.view(torch.uint8)

    @classmethod
    def parse(cls, header: torch.Tensor, scale_NG: torch.Tensor, middle_NG: torch.Tensor) -> Grid:
        """A grid from its stored parts."""
        constants = header.clone().view(torch.float32).tolist()
        steps = {level: 2 * constants[place] for place, level in enumerate(LEVELS, start=1) if constants[place]}
        return cls(scale_NG, middle_NG, constants[0], steps, int(constants[5]), int(constants[6]))

    @property
    def real_scale_NG(self) -> torch.Tensor:  # noqa: N802
        """Scales in fp32, in the units of the weights."""
        return self.scale_NG.float() * self.unit

    @property
    def real_middle_NG(self) -> torch.Tensor:  # noqa: N802
        """Middles likewise."""
        return self.middle_NG.float() * self.unit


def unit_for(weights: torch.Tensor) -> float:
    """The power of two that weights are divided by, so that the largest sits well inside fp16."""
    largest = float(weights.abs().max()) if weights.numel() else 0.0
    if largest == 0.0:
        return 1.0
    return math.ldexp(1.0, max(-126, min(126, math.frexp(largest)[1] - _TARGET_EXPONENT)))


def spread(values_NG: torch.Tensor, group: int) -> torch.Tensor:
    """Per-group values as per-column ones, [N, K]."""
    values_NK: torch.Tensor = values_NG.repeat_interleave(group, dim=1)
    return values_NK


def positions(codes: Codes, level: int, grid: Grid) -> torch.Tensor:
    """Where the codes of a level lie, [N, K] fp32, in steps from the group's middle."""
    if level == 8:
        return (codes.code_NK.float() - 7.5) * grid.hi + (codes.nibble_NK.float() - 7.5) * grid.lo
    prefix_NK = codes.code_NK >> (4 - level)
    centred_NK: torch.Tensor = prefix_NK.float() - (2**level - 1) / 2
    return centred_NK


def decode(codes: Codes, level: int, grid: Grid, group: int) -> torch.Tensor:
    """The weights [N, K] that the codes of a level stand for."""
    step_NK = spread(grid.real_scale_NG * grid.steps[level], group)
    weights_NK: torch.Tensor = spread(grid.real_middle_NG, group) + step_NK * positions(codes, level, grid)
    return weights_NK
