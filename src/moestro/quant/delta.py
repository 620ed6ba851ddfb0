"""Where the parts of a matrix's delta lie: what a fine-tune adds to the matrix of its base.

A delta is codes of few bits for all input channels, as of a flat matrix (see `flat.py`), and a few input channels whose
values are kept in fp16 (their codes are zero): ME-Switch, arXiv 2406.09041.

Shapes: N rows (outputs), K columns (inputs), C channels that are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from moestro.quant.flat import flat_bytes
from moestro.quant.groups import TILE, group_size, padded_rows

DELTA_BITS = (1, 2, 4)
"""How many bits the codes of a delta can have."""

_ALIGNMENT = 64


@dataclass(frozen=True)
class DeltaRegion:
    """The bytes of one matrix's delta, each part on a multiple of 64 from their start; gaps are zeros.

    First the codes, as `flat_bytes` has them; then the channels kept, int32 [C], ascending; their values, fp16
    (`pack_kept`), tile after tile of all channels, as kernels go through them; and, with `bias`, the difference of the
    biases, fp32 [N].
    """

    rows: int
    columns: int
    bits: int
    salient: int
    bias: bool = False

    def __post_init__(self) -> None:
        assert self.rows > 0, self.rows
        assert self.bits in DELTA_BITS, self.bits
        assert 0 <= self.salient <= self.columns, (self.salient, self.columns)

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return group_size(self.columns)

    @property
    def ids_at(self) -> int:
        return aligned(flat_bytes(self.rows, self.columns, self.bits))

    @property
    def values_at(self) -> int:
        return aligned(self.ids_at + 4 * self.salient)

    @property
    def bias_at(self) -> int:
        return aligned(self.values_at + 2 * self.salient * padded_rows(self.rows))

    @property
    def nbytes(self) -> int:
        """Bytes of all parts, a multiple of 64."""
        return aligned(self.bias_at + (4 * self.rows if self.bias else 0))


def salient_channels(columns: int, share: float) -> int:
    """How many input channels are kept: a share of them, at least 2 unless it is 0 (or the matrix has fewer)."""
    if share == 0:
        return 0
    return min(columns, max(2, -int(-columns * share // 1)))


def pack_kept(value_CN: torch.Tensor) -> torch.Tensor:
    """Values of kept channels, fp16 [C, N], as they lie: [tiles, C, 16] in one row, filled up with zeros."""
    channels, rows = value_CN.shape
    whole_CN = functional.pad(value_CN, (0, padded_rows(rows) - rows))
    return whole_CN.view(channels, padded_rows(rows) // TILE, TILE).transpose(0, 1).flatten()


def unpack_kept(packed: torch.Tensor, channels: int, rows: int) -> torch.Tensor:
    """The values [C, N] that `pack_kept` has put so."""
    tiles = padded_rows(rows) // TILE
    return packed.view(tiles, channels, TILE).transpose(0, 1).reshape(channels, tiles * TILE)[:, :rows]


def aligned(nbytes: int) -> int:
    """The next multiple of 64, on which parts of a delta begin."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
