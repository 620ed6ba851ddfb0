"""Codes and scales of a matrix to the bytes that kernels read, and back.

Rows come in tiles of 16; within a tile, group after group. A chunk is 64 bytes: byte 4r + i belongs to row r of the
tile and to a column that is i modulo 4, so that one 32-bit lane of a vector holds four columns of one row and integer
dot products need no sums across lanes. How many columns share a byte depends on the width of the codes.

Shapes: N rows and K columns, both padded; T tiles, G groups, g columns of a group, R = 16 rows of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moestro.quant.groups import TILE

HEADER = 64
"""Bytes before the tiles: 16 fp32 constants of the matrix."""

SCALE_BYTES = 2 * TILE
"""Bytes of one fp16 number for each row of a tile."""


@dataclass(frozen=True)
class CodeFormat:
    """How codes of `bits` bits share bytes.

    `quad_shifts[c][q]` is the lowest bit, in every byte of chunk c, of the code whose column lies in the q-th quad
    of that chunk's columns; quads are runs of four columns.
    """

    bits: int
    shifts: tuple[int, ...]

    @property
    def quads(self) -> int:
        """Quads of columns in one chunk."""
        return len(self.shifts)


# A bit plane pairs quad 4c + f with field f of base chunk c: after masking with 0x55 or 0xAA its bits line up with the
# two-bit fields, so that planes are joined without moving single bits.
BITS1 = CodeFormat(1, tuple(2 * field + chunk for chunk in range(2) for field in range(4)))
BITS2 = CodeFormat(2, (0, 2, 4, 6))
BITS4 = CodeFormat(4, (0, 4))
BITS8 = CodeFormat(8, (0,))


def code_bytes(rows: int, columns: int, form: CodeFormat) -> int:
    """Bytes that the codes of a padded matrix take."""
    return rows * columns * form.bits // 8


def pack_codes(codes_NK: torch.Tensor, group: int, form: CodeFormat) -> torch.Tensor:
    """uint8 codes [N, K] to bytes [T, G, chunks * 64]."""
    rows, columns = codes_NK.shape
    chunks = group // (4 * form.quads)
    codes = codes_NK.view(rows // TILE, TILE, columns // group, chunks, form.quads, 4)
    packed = torch.zeros((rows // TILE, columns // group, chunks, TILE, 4), dtype=torch.uint8)
    for quad, shift in enumerate(form.shifts):
        packed |= codes[..., quad, :].permute(0, 2, 3, 1, 4) << shift
    return packed.view(rows // TILE, columns // group, chunks * 4 * TILE)


def unpack_codes(packed: torch.Tensor, group: int, form: CodeFormat) -> torch.Tensor:
    """The codes [N, K] of bytes [T, G, chunks * 64]."""
    tiles, groups, _ = packed.shape
    chunks = group // (4 * form.quads)
    lanes = packed.reshape(tiles, groups, chunks, TILE, 4)
    codes = torch.empty((tiles, TILE, groups, chunks, form.quads, 4), dtype=torch.uint8)
    mask = (1 << form.bits) - 1
    for quad, shift in enumerate(form.shifts):
        codes[..., quad, :] = ((lanes >> shift) & mask).permute(0, 3, 1, 2, 4)
    return codes.view(tiles * TILE, groups * group)


def pack_scales(scales_NG: torch.Tensor) -> torch.Tensor:
    """fp16 numbers [N, G] to bytes [T, G, 32]."""
    rows, groups = scales_NG.shape
    lanes = scales_NG.view(rows // TILE, TILE, groups).transpose(1, 2).contiguous()
    return lanes.view(torch.uint8).view(rows // TILE, groups, SCALE_BYTES)


def unpack_scales(packed: torch.Tensor) -> torch.Tensor:
    """The fp16 numbers [N, G] of bytes [T, G, 32]."""
    tiles, groups, _ = packed.shape
    lanes = packed.contiguous().view(torch.float16).view(tiles, groups, TILE)
    return lanes.transpose(1, 2).reshape(tiles * TILE, groups)


def pack_scaled(
    scales_NG: tuple[torch.Tensor, ...], codes_NK: torch.Tensor, group: int, form: CodeFormat
) -> torch.Tensor:
    """For every tile and group, its scales (fp16, one kind after the other) and then its codes; bytes in one row."""
    parts = [*(pack_scales(scale_NG) for scale_NG in scales_NG), pack_codes(codes_NK, group, form)]
    return torch.cat(parts, dim=-1).flatten()


def unpack_scaled(
    packed: torch.Tensor, kinds: int, rows: int, columns: int, group: int, form: CodeFormat
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """The scales and codes that `pack_scaled` joined."""
    lanes = packed.view(rows // TILE, columns // group, -1)
    scales_NG = tuple(unpack_scales(lanes[..., kind * SCALE_BYTES : (kind + 1) * SCALE_BYTES]) for kind in range(kinds))
    return scales_NG, unpack_codes(lanes[..., kinds * SCALE_BYTES :], group, form)
