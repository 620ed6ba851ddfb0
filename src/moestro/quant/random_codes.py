"""Random quantised matrices, drawn as codes: weights of a wanted size without weights to quantise.

Codes are uniform, so that every level uses all of its bits; scales are the same throughout, chosen so that the weights
have the wanted standard deviation.

Shapes: N rows, K columns (both padded inside), G groups, T tiles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from moestro.quant.codes import LEVELS
from moestro.quant.grid import HI, LO, Grid, unit_for
from moestro.quant.groups import TILE, group_size, padded_columns, padded_rows
from moestro.quant.nested import FORMS
from moestro.quant.tiles import (
    BITS4,
    BITS8,
    SCALE_BYTES,
    CodeFormat,
    code_bytes,
    pack_codes,
    pack_scales,
    unpack_codes,
)

_FLAT_FORMS = {4: BITS4, 8: BITS8}
_STEPS = {2: 4.0, 3: 2.0, 4: 1.0, 8: 1.0 / HI}
"""Steps of the levels, in those of 4 bits, with which their grids have the same middle and nearly the same reach."""

_LINE = 64


def random_regions(
    encoding: str, rows: int, columns: int, levels: Sequence[int], deviation: float, random: np.random.Generator
) -> dict[int, torch.Tensor]:
    """The bytes of each plane of a matrix up to the highest of `levels`, by level, as `Encoding.encode` gives them.

    Weights have mean 0 and, at 4 and 8 bits, the standard deviation `deviation`; lower levels are up to 3% off it.
    """
    chain = LEVELS[: LEVELS.index(max(levels)) + 1]
    scale = deviation / _deviation(4)
    planes = {}
    for level in chain:
        codes = _random_codes(rows, columns, FORMS[level], random)
        if level == 2:
            steps = _STEPS if encoding == "nested" else {2: _STEPS[2]}
            planes[level] = torch.cat([_header(scale, steps, nested=encoding == "nested"), _scaled(scale, codes, rows)])
        elif encoding == "nested":
            planes[level] = codes.flatten()
        else:
            planes[level] = _sign_plane(scale * _SIGN_SCALES[level], _unit(scale), codes, rows)
    return planes


def random_flat(rows: int, columns: int, bits: int, deviation: float, random: np.random.Generator) -> torch.Tensor:
    """The bytes of a flat matrix as `flat_encode` gives them, weights of mean 0 and this standard deviation.

    A run of whole tiles of rows without its header (the first 64 bytes) is what these rows have in a larger matrix.
    """
    scale = deviation / _deviation(bits)
    codes = _random_codes(rows, columns, _FLAT_FORMS[bits], random)
    return torch.cat([_header(scale, {2: 1.0}, nested=False), _scaled(scale, codes, rows)])


_SIGN_SCALES = {3: _STEPS[2] / 4, 4: _STEPS[2] / 8, 8: _STEPS[2] / 64}
"""Half of what is left of a step at each level; the nibble's 16 values fill the last one."""


def _deviation(bits: int) -> float:
    """Of a uniform code of so many bits."""
    return math.sqrt((4**bits - 1) / 12)


def _unit(scale: float) -> float:
    return unit_for(torch.tensor([scale]))


def _header(scale: float, steps: dict[int, float], *, nested: bool) -> torch.Tensor:
    nothing = torch.empty(0)
    return Grid(nothing, nothing, _unit(scale), steps, hi=HI if nested else 0, lo=LO if nested else 0).header()


def _random_codes(rows: int, columns: int, form: CodeFormat, random: np.random.Generator) -> torch.Tensor:
    """Codes as they are packed, uint8 [T, G, bytes]; zero in rows and columns that were filled up."""
    tall, wide, group = padded_rows(rows), padded_columns(columns), group_size(columns)
    words = random.integers(0, 1 << 64, -(-code_bytes(tall, wide, form) // 8), dtype=np.uint64)
    packed = torch.from_numpy(words.view(np.uint8)).view(tall // TILE, wide // group, -1)
    if (tall, wide) == (rows, columns):
        return packed
    codes_NK = unpack_codes(packed, group, form)
    codes_NK[rows:], codes_NK[:, columns:] = 0, 0
    return pack_codes(codes_NK, group, form)


def _scales(value: float, rows: int, count: int) -> torch.Tensor:
    """`value` for all groups of the rows there are, as bytes [T, G, 32]."""
    scale_NG = torch.zeros((padded_rows(rows), count), dtype=torch.float16)
    scale_NG[:rows] = value
    return pack_scales(scale_NG)


def _scaled(scale: float, codes: torch.Tensor, rows: int) -> torch.Tensor:
    """For every tile and group its scales, middles of 0 and codes; bytes in one row."""
    tiles, count, size = codes.shape
    region = torch.zeros((tiles, count, 2 * SCALE_BYTES + size), dtype=torch.uint8)
    region[..., :SCALE_BYTES] = _scales(scale / _unit(scale), rows, count)
    region[..., 2 * SCALE_BYTES :] = codes
    return region.flatten()


def _sign_plane(scale: float, unit: float, codes: torch.Tensor, rows: int) -> torch.Tensor:
    """For every tile the scales of all groups, filled up to whole lines, then the codes; bytes in one row."""
    tiles, count, size = codes.shape
    width = -(-count * SCALE_BYTES // _LINE) * _LINE
    region = torch.zeros((tiles, width + count * size), dtype=torch.uint8)
    region[:, : count * SCALE_BYTES] = _scales(scale / unit, rows, count).view(tiles, -1)
    region[:, width:] = codes.reshape(tiles, -1)
    return region.flatten()
