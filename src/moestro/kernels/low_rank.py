"""What a fine-tune adds as a product of two thin matrices, from its bytes: two maps one after another, the right
vectors and then some of the left ones in fp32 at a time. For comparison with flat deltas, not for speed: vectors are
decoded at every use.

Shapes: T rows (tokens), K inputs, N outputs, R ranks (pairs of vectors), I ids of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from moestro.kernels.quantised import bytes_at
from moestro.quant.low_rank import LowRankRegion, Region, decode_vectors

Linear = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""x [T, K] and weights [N, K], contiguous, to [T, N]; what keeps the exactness rule there keeps it here."""

_VALUES = 1 << 18
"""About so many are decoded at once."""


def add_low_rank(linear: Linear, x_TK: torch.Tensor, delta: LowRankRegion, address: int, out_TN: torch.Tensor) -> None:
    """See `Kernels.add_delta`."""
    packed = bytes_at(address, delta.nbytes)
    inner_TR = linear(x_TK, decode_vectors(packed, delta, "right", slice(0, delta.columns)))
    for own in _parts(delta.rows, delta.rank):
        out_TN[:, own] += linear(inner_TR, decode_vectors(packed, delta, "left", own).T.contiguous())
    if delta.bias:
        out_TN += packed[delta.bias_at : delta.bias_at + 4 * delta.rows].view(torch.float32)


def add_low_rank_rows(
    linear: Linear, delta: LowRankRegion, address: int, ids_I: torch.Tensor, out_IK: torch.Tensor
) -> None:
    """See `Kernels.add_delta_rows`; ids are rows."""
    packed = bytes_at(address, delta.nbytes)
    left_IR = torch.empty((len(ids_I), delta.rank))
    for place, row in enumerate(ids_I.tolist()):
        first = row // 8 * 8
        left_R8 = decode_vectors(packed, delta, "left", slice(first, min(first + 8, delta.rows)))
        left_IR[place] = left_R8[:, row - first]
    for own in _parts(delta.columns, delta.rank):
        right_Rk = decode_vectors(packed, delta, "right", own)
        out_IK[:, own] += linear(left_IR, right_Rk.T.contiguous())


def unpack_low_rank(linear: Linear, delta: LowRankRegion, address: int) -> torch.Tensor:
    """See `Kernels.unpack_delta`."""
    delta_NK = torch.zeros((delta.rows, delta.columns))
    add_low_rank_rows(linear, delta, address, torch.arange(delta.rows), delta_NK)
    return delta_NK


def check_ids(ids_I: torch.Tensor, delta: Region) -> None:
    """Raise ValueError when an id is not a row of a delta."""
    if bool(((ids_I < 0) | (ids_I >= delta.rows)).any()):
        raise ValueError(f"add_delta_rows: an id of {ids_I.tolist()} is not in [0, {delta.rows})")


def low_rank_scratch_bytes(delta: LowRankRegion, rows: int) -> int:
    """Most bytes that `add_low_rank` takes meanwhile for so many rows."""
    part = max(_VALUES, 8 * delta.rank, delta.columns * delta.rank)
    return 4 * (3 * part + rows * (delta.rank + 2 * min(delta.rows, max(8, _VALUES // delta.rank))))


def _parts(length: int, rank: int) -> Iterator[slice]:
    """So many values of each vector at a time, whole groups of eight."""
    size = max(8, _VALUES // rank // 8 * 8)
    return (slice(first, min(first + size, length)) for first in range(0, length, size))
