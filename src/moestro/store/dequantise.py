"""Values of quantised checkpoint tensors, in fp32.

MXFP4 (Open Compute microscaling formats, version 1.0): two e2m1 values per byte, the low nibble first, one E8M0 scale
(a power of two, bias 127, 255 is not a number) per group of 32. Block fp8 (DeepSeek-V3): one scale per tile of rows and
columns, 128 x 128 as a rule; tiles at the edges may be cut.

Shapes: E experts, R rows, G groups of a row, C columns, SR x SC tiles.
"""

from __future__ import annotations

import torch

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_SCALE_BIAS = 127
_SCALE_NAN = 255

MXFP4_BLOCK_BYTES = 16
"""Bytes of one MXFP4 group: 32 values of 4 bits."""


def mxfp4_values(blocks_ERGB: torch.Tensor, scales_ERG: torch.Tensor) -> torch.Tensor:
    """The matrices [E, R, 32 G] in fp32 (every value is also exact in bf16). Both arguments are uint8."""
    pairs = torch.tensor([(_E2M1[byte & 15], _E2M1[byte >> 4]) for byte in range(256)], dtype=torch.float32)
    values_ERGV = pairs[blocks_ERGB.int()].flatten(-2)
    values_ERGV *= e8m0_values(scales_ERG).unsqueeze(-1)
    return values_ERGV.flatten(-2)


def e8m0_values(scales: torch.Tensor) -> torch.Tensor:
    """Powers of two in fp32 from their biased exponents (uint8)."""
    powers = torch.ldexp(torch.ones(256), torch.arange(256) - _SCALE_BIAS)
    powers[_SCALE_NAN] = float("nan")
    return powers[scales.int()]


def block_values(
    weight_RC: torch.Tensor, scales: torch.Tensor, tile: tuple[int, int], *, first_row: int = 0
) -> torch.Tensor:
    """The matrix in fp32: each value times its tile's scale. Leading dimensions, if any, are those of both arguments.

    `scales` are those of the whole matrix (SR x SC tiles of `tile` elements); `weight_RC` may be some of its rows, from
    `first_row` on.
    """
    values = weight_RC.to(torch.float32)
    scales_fp32 = e8m0_values(scales) if scales.dtype == torch.uint8 else scales.to(torch.float32)
    rows, columns = values.shape[-2:]
    row_tile = torch.arange(first_row, first_row + rows) // tile[0]
    column_tile = torch.arange(columns) // tile[1]
    return values.mul_(scales_fp32[..., row_tile, :][..., column_tile])
