"""What fine-tunes add, in plain torch: the numbers of the compiled kernels, to the bit.

Shapes: T rows (tokens), K inputs, N outputs (Np filled up to whole tiles), C salient input channels, G groups of a row,
g inputs of a group, R rows of some experts' jobs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from moestro.kernels.quantised import bytes_at, fused_multiply_add, linear, matrix_at, quantise_rows, values
from moestro.kernels.specs import ExpertDeltas, ExpertDeltaSpec, delta_codes
from moestro.quant.delta import DeltaRegion, unpack_kept
from moestro.quant.groups import padded_rows

AddDelta = Callable[[torch.Tensor, torch.Tensor], None]
"""Given inputs and results of some rows, adds to the results."""


def add_delta(x_TK: torch.Tensor, delta: DeltaRegion, address: int, out_TN: torch.Tensor) -> None:
    """See `Kernels.add_delta`."""
    x = quantise_rows(x_TK, delta.group)
    product_TN = linear(x, matrix_at(delta_codes(delta), (address,), delta.bits), delta.rows)
    input_TK = (x.scale_TG[..., None] * x.code_TGg.float()).flatten(1)
    ids_C, value_CN = _salient(delta, address)
    for channel, value_N in zip(ids_C.tolist(), value_CN, strict=True):
        product_TN = fused_multiply_add(input_TK[:, channel, None], value_N, product_TN)
    out_TN += product_TN
    if delta.bias:
        out_TN += bytes_at(address + delta.bias_at, 4 * delta.rows).view(torch.float32)


def unpack_delta(delta: DeltaRegion, address: int) -> torch.Tensor:
    """See `Kernels.unpack_delta`."""
    codes = matrix_at(delta_codes(delta), (address,), delta.bits)
    delta_NK = values(codes)[: delta.rows, : delta.columns].clone()
    ids_C, value_CN = _salient(delta, address)
    delta_NK[:, ids_C] += value_CN.T
    return delta_NK


def of_jobs(deltas: ExpertDeltas | None, starts: NDArray[np.int32]) -> list[list[tuple[slice, ExpertDeltaSpec, int]]]:
    """The deltas of each job: which of its own rows they are on, what they are, and the address of their plane.

    Raises:
        ValueError: a delta is on rows that are not its job's, or that have another.
    """
    found: list[list[tuple[slice, ExpertDeltaSpec, int]]] = [[] for _ in starts[1:]]
    taken = np.zeros(int(starts[-1]), dtype=bool)
    for number, job, first, end, spec, plane in _listed(deltas):
        if not (0 <= job < len(found) and starts[job] <= first <= end <= starts[job + 1]):
            raise ValueError(f"experts: delta {number} is on rows that are not its job's")
        if taken[first:end].any():
            raise ValueError("experts: two deltas are on the same rows")
        taken[first:end] = True
        found[job].append((slice(first - int(starts[job]), end - int(starts[job])), spec, plane))
    return found


def _listed(deltas: ExpertDeltas | None) -> Iterator[tuple[int, int, int, int, ExpertDeltaSpec, int]]:
    if deltas is None:
        return
    lists = (deltas.jobs, deltas.firsts, deltas.ends, deltas.spec, deltas.planes)
    for number, (job, first, end, spec, plane) in enumerate(zip(*(each.tolist() for each in lists), strict=True)):
        yield number, job, first, end, deltas.specs[spec], plane


def _salient(delta: DeltaRegion, address: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids int64 [C] of the salient channels and their values, fp32 [C, N]."""
    if delta.salient == 0:
        return torch.empty(0, dtype=torch.int64), torch.empty(0, delta.rows)
    ids_C = bytes_at(address + delta.ids_at, 4 * delta.salient).view(torch.int32).long()
    values = bytes_at(address + delta.values_at, 2 * delta.salient * padded_rows(delta.rows)).view(torch.float16)
    return ids_C, unpack_kept(values, delta.salient, delta.rows).float()
