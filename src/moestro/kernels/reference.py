"""The kernels in plain torch: any device, the oracle of the others.

Not for serving: torch's matrix products sum in an order that depends on the number of rows, so the last bits do too. On
the meta device only shapes are computed, which is how memory is planned.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from moestro.kernels.activations import activate
from moestro.kernels.deltas import add_delta, of_jobs, unpack_delta
from moestro.kernels.low_rank import add_low_rank, add_low_rank_rows, check_ids, unpack_low_rank
from moestro.kernels.quantised import bytes_at, linear, matrix_at, quantise_rows, values
from moestro.kernels.specs import FLAT_BITS, ExpertDeltas, ExpertJobs, ExpertSpec, MatrixSpec
from moestro.quant.low_rank import LowRankRegion, Region


class ReferenceKernels:
    """See `Kernels`. Stateless."""

    name = "reference"

    def linear(self, x_TK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
        return functional.linear(x_TK, weight_NK.to(x_TK.dtype), None if bias_N is None else bias_N.to(x_TK.dtype))

    def attention(
        self,
        query_THD: torch.Tensor,
        key_pool: torch.Tensor,
        value_pool: torch.Tensor,
        block_table: torch.Tensor,
        row_sequence: torch.Tensor,
        row_position: torch.Tensor,
        *,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
        sinks_H: torch.Tensor | None = None,
    ) -> torch.Tensor:
        out_THDv = query_THD.new_empty((*query_THD.shape[:2], value_pool.shape[3]))
        if query_THD.is_meta:
            return out_THDv
        _check_rows(block_table, row_sequence, row_position, block_size=key_pool.shape[2])
        for sequence in sorted(set(row_sequence.tolist())):
            rows = (row_sequence == sequence).nonzero().squeeze(1)
            position_R = row_position[rows].long()
            kv_length = int(position_R.max()) + 1
            first_R = (position_R - window + 1).clamp_min(0) if window else torch.zeros_like(position_R)
            start = int(first_R.min())
            kv_J = torch.arange(start, kv_length, device=query_THD.device)
            probability_RHJ = _probabilities(
                _scores(query_THD[rows], _gather(key_pool, block_table[sequence], kv_J), scale=scale, softcap=softcap),
                visible_RJ=(kv_J >= first_R[:, None]) & (kv_J <= position_R[:, None]),
                sinks_H=sinks_H,
            )
            value_JGDv = _gather(value_pool, block_table[sequence], kv_J)
            out_THDv[rows] = _weighted_values(probability_RHJ, value_JGDv)
        return out_THDv

    def experts(
        self,
        spec: ExpertSpec,
        jobs: ExpertJobs,
        hidden_TH: torch.Tensor,
        out_PH: torch.Tensor,
        deltas: ExpertDeltas | None = None,
    ) -> None:
        deltas_of = of_jobs(deltas, jobs.starts)
        for job, (planes, level) in enumerate(zip(jobs.planes.tolist(), jobs.levels.tolist(), strict=True)):
            listed = slice(int(jobs.starts[job]), int(jobs.starts[job + 1]))
            rows, places = jobs.rows[listed], jobs.places[listed]
            bias_at = partial(_bias, planes[0])
            up_RG = self.packed_linear(hidden_TH[rows], spec.up, planes, level, bias_at(spec.up_bias, spec.up.rows))
            for own, delta, plane in deltas_of[job]:
                if delta.up is not None:
                    self.add_delta(hidden_TH[rows[own]], delta.up, plane + delta.up_at, up_RG[own])
            width_RI = activate(spec.activation, spec.gate, up_RG)
            down_bias = bias_at(spec.down_bias, spec.down.rows)
            output_RH = self.packed_linear(width_RI, spec.down, planes, level, down_bias)
            for own, delta, plane in deltas_of[job]:
                if delta.down is not None:
                    self.add_delta(width_RI[own], delta.down, plane + delta.down_at, output_RH[own])
            out_PH[places] = output_RH

    def known_experts(self, _spec: ExpertSpec, _planes_EP: NDArray[np.int64], _levels: Sequence[int]) -> None:
        return None

    def packed_linear(
        self,
        x_TK: torch.Tensor,
        matrix: MatrixSpec,
        planes: Sequence[int],
        level: int,
        bias_N: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if x_TK.is_meta:
            return x_TK.new_empty((len(x_TK), matrix.rows))
        out_TN = linear(quantise_rows(x_TK, matrix.group), matrix_at(matrix, planes, level), matrix.rows)
        return out_TN if bias_N is None else out_TN + bias_N

    def unpack(self, matrix: MatrixSpec, planes: Sequence[int], level: int) -> torch.Tensor:
        return values(matrix_at(matrix, planes, level))[: matrix.rows, : matrix.columns]

    def packed_rows(self, matrix: MatrixSpec, planes: Sequence[int], ids: torch.Tensor) -> torch.Tensor:
        if ids.is_meta:
            return torch.empty((len(ids), matrix.columns), device=ids.device)
        if bool(((ids < 0) | (ids >= matrix.rows)).any()):
            raise ValueError(f"packed_rows: an id of {ids.tolist()} is not in [0, {matrix.rows})")
        return self.unpack(matrix, planes, FLAT_BITS[matrix.encoding])[ids]

    def add_delta(self, x_TK: torch.Tensor, delta: Region, address: int, out_TN: torch.Tensor) -> None:
        if x_TK.is_meta:
            return
        if isinstance(delta, LowRankRegion):
            add_low_rank(self.linear, x_TK, delta, address, out_TN)
        else:
            add_delta(x_TK, delta, address, out_TN)

    def add_delta_rows(self, delta: Region, address: int, ids: torch.Tensor, out_RK: torch.Tensor) -> None:
        if ids.is_meta:
            return
        check_ids(ids, delta)
        if isinstance(delta, LowRankRegion):
            add_low_rank_rows(self.linear, delta, address, ids, out_RK)
        else:
            out_RK += unpack_delta(delta, address)[ids]

    def unpack_delta(self, delta: Region, address: int) -> torch.Tensor:
        if isinstance(delta, LowRankRegion):
            return unpack_low_rank(self.linear, delta, address)
        return unpack_delta(delta, address)


def _bias(plane: int, offset: int | None, rows: int) -> torch.Tensor | None:
    return None if offset is None else bytes_at(plane + offset, 4 * rows).view(torch.float32)


def _check_rows(
    block_table: torch.Tensor, row_sequence: torch.Tensor, row_position: torch.Tensor, *, block_size: int
) -> None:
    sequences, max_blocks = block_table.shape
    for row, (sequence, position) in enumerate(zip(row_sequence.tolist(), row_position.tolist(), strict=True)):
        if not 0 <= sequence < sequences:
            raise ValueError(f"attention row {row}: sequence {sequence} is not in [0, {sequences})")
        if not 0 <= position < max_blocks * block_size:
            raise ValueError(f"attention row {row}: position {position} is not in [0, {max_blocks * block_size})")


def _gather(pool: torch.Tensor, table: torch.Tensor, kv_J: torch.Tensor) -> torch.Tensor:
    """The pool's rows of positions kv_J, as [J, heads_kv, D]."""
    block_size = pool.shape[2]
    block_J = table[kv_J // block_size].long()
    if bool(((block_J < 0) | (block_J >= pool.shape[0])).any()):
        raise ValueError(f"attention: a block of {block_J.tolist()} is not in [0, {pool.shape[0]})")
    return pool[block_J, :, kv_J % block_size]


def _scores(query_RHD: torch.Tensor, key_JGD: torch.Tensor, *, scale: float, softcap: float) -> torch.Tensor:
    rows, heads, dim = query_RHD.shape
    heads_kv = key_JGD.shape[1]
    query_RGQD = query_RHD.reshape(rows, heads_kv, heads // heads_kv, dim)
    score_RHJ = torch.einsum("rgqd,jgd->rgqj", query_RGQD, key_JGD).reshape(rows, heads, -1) * scale
    return softcap * torch.tanh(score_RHJ / softcap) if softcap else score_RHJ


def _probabilities(score_RHJ: torch.Tensor, *, visible_RJ: torch.Tensor, sinks_H: torch.Tensor | None) -> torch.Tensor:
    score_RHJ = score_RHJ.masked_fill(~visible_RJ[:, None], float("-inf"))
    if sinks_H is None:
        return score_RHJ.softmax(-1)
    sink_RH1 = sinks_H.to(score_RHJ.dtype)[None, :, None].expand(score_RHJ.shape[0], -1, 1)
    return torch.cat((score_RHJ, sink_RH1), -1).softmax(-1)[..., :-1]


def _weighted_values(probability_RHJ: torch.Tensor, value_JGDv: torch.Tensor) -> torch.Tensor:
    rows, heads, length = probability_RHJ.shape
    heads_kv = value_JGDv.shape[1]
    probability_RGQJ = probability_RHJ.reshape(rows, heads_kv, heads // heads_kv, length)
    return torch.einsum("rgqj,jgd->rgqd", probability_RGQJ, value_JGDv).reshape(rows, heads, -1)
