"""The compiled kernels. The checks are asserts: what reaches a kernel was made by moestro, and decode is in a hurry."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from moestro import _native
from moestro.kernels.base import WEIGHT_DTYPES
from moestro.kernels.low_rank import add_low_rank, add_low_rank_rows, check_ids, unpack_low_rank
from moestro.kernels.shapes import native_delta, native_expert_delta, native_experts, native_matrix
from moestro.kernels.specs import ExpertDeltas, ExpertJobs, ExpertSpec, MatrixSpec
from moestro.quant.delta import DeltaRegion
from moestro.quant.groups import group_size
from moestro.quant.low_rank import LowRankRegion, Region

_TYPE_CODES = {dtype: code for code, dtype in enumerate(WEIGHT_DTYPES)}
_CPU = torch.device("cpu")


class CpuKernels:
    """See `Kernels`; keeps the exactness rule. Same bits with every instruction set that the module has kernels for.

    The thread pool is the process's: the kernels made last set its size (which no result depends on). Calls release the
    GIL and may come from several threads; they take turns.
    """

    name = "cpu"

    def __init__(self, *, threads: int) -> None:
        _native.set_threads(threads)

    def linear(self, x_TK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
        tokens, inputs = x_TK.shape
        outputs = weight_NK.shape[0]
        assert x_TK.dtype is torch.float32, x_TK.dtype
        assert x_TK.device == weight_NK.device == _CPU, (x_TK.device, weight_NK.device)
        assert inputs <= 1 or x_TK.stride(1) == 1, x_TK.stride()
        assert weight_NK.shape == (outputs, inputs), (weight_NK.shape, x_TK.shape)
        assert weight_NK.is_contiguous(), weight_NK.stride()
        out_TN = torch.empty((tokens, outputs))
        bias, bias_type = 0, 0
        if bias_N is not None:
            assert bias_N.shape == (outputs,), (bias_N.shape, outputs)
            assert bias_N.is_contiguous(), bias_N.stride()
            bias, bias_type = bias_N.data_ptr(), _TYPE_CODES[bias_N.dtype]
        _native.linear(
            x_TK.data_ptr(),
            x_TK.stride(0),
            weight_NK.data_ptr(),
            _TYPE_CODES[weight_NK.dtype],
            bias,
            bias_type,
            out_TN.data_ptr(),
            tokens,
            outputs,
            inputs,
        )
        return out_TN

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
        rows, heads, key_dim = query_THD.shape
        blocks, heads_kv, block_size, value_dim = value_pool.shape
        sequences, max_blocks = block_table.shape
        key_block_stride, key_head_stride, key_position_stride, _ = key_pool.stride()
        value_block_stride, value_head_stride, value_position_stride, _ = value_pool.stride()
        _check_pools(query_THD, key_pool, value_pool)
        _check_rows(block_table, row_sequence, row_position, rows=rows)
        assert window >= 0, window
        assert softcap >= 0.0, softcap
        sinks = 0
        if sinks_H is not None:
            assert sinks_H.dtype is torch.float32, sinks_H.dtype
            assert sinks_H.shape == (heads,), sinks_H.shape
            assert sinks_H.is_contiguous(), sinks_H.stride()
            sinks = sinks_H.data_ptr()
        out_THDv = torch.empty((rows, heads, value_dim))
        _native.attention(
            query_THD.data_ptr(),
            query_THD.stride(0),
            query_THD.stride(1),
            key_pool.data_ptr(),
            key_block_stride,
            key_head_stride,
            key_position_stride,
            value_pool.data_ptr(),
            value_block_stride,
            value_head_stride,
            value_position_stride,
            block_table.data_ptr(),
            row_sequence.data_ptr(),
            row_position.data_ptr(),
            sinks,
            out_THDv.data_ptr(),
            rows,
            heads,
            heads_kv,
            key_dim,
            value_dim,
            blocks,
            block_size,
            sequences,
            max_blocks,
            scale,
            window,
            softcap,
        )
        return out_THDv

    def experts(
        self,
        spec: ExpertSpec,
        jobs: ExpertJobs,
        hidden_TH: torch.Tensor,
        out_PH: torch.Tensor,
        deltas: ExpertDeltas | None = None,
    ) -> None:
        _check_matrix(hidden_TH, columns=spec.up.columns)
        _check_matrix(out_PH, columns=spec.down.rows)
        _native.experts(
            native_experts(spec),
            jobs.planes,
            jobs.levels,
            jobs.starts,
            jobs.rows,
            jobs.places,
            hidden_TH.data_ptr(),
            hidden_TH.stride(0),
            len(hidden_TH),
            out_PH.data_ptr(),
            out_PH.stride(0),
            len(out_PH),
            _NO_DELTAS if deltas is None else _deltas(deltas),
        )

    def known_experts(
        self, spec: ExpertSpec, planes_EP: NDArray[np.int64], levels: Sequence[int]
    ) -> _native.KnownExperts:
        assert planes_EP.flags.c_contiguous
        return _native.KnownExperts(native_experts(spec), planes_EP.ctypes.data, len(planes_EP), levels)

    def packed_linear(
        self,
        x_TK: torch.Tensor,
        matrix: MatrixSpec,
        planes: Sequence[int],
        level: int,
        bias_N: torch.Tensor | None = None,
    ) -> torch.Tensor:
        _check_matrix(x_TK, columns=matrix.columns)
        out_TN = torch.empty((len(x_TK), matrix.rows))
        bias = 0
        if bias_N is not None:
            assert bias_N.dtype is torch.float32, bias_N.dtype
            assert bias_N.shape == (matrix.rows,), (bias_N.shape, matrix)
            assert bias_N.is_contiguous(), bias_N.stride()
            bias = bias_N.data_ptr()
        _native.packed_linear(
            native_matrix(matrix),
            planes,
            level,
            x_TK.data_ptr(),
            x_TK.stride(0),
            len(x_TK),
            bias,
            out_TN.data_ptr(),
        )
        return out_TN

    def unpack(self, matrix: MatrixSpec, planes: Sequence[int], level: int) -> torch.Tensor:
        out_NK = torch.empty((matrix.rows, matrix.columns))
        _native.unpack(native_matrix(matrix), planes, level, out_NK.data_ptr())
        return out_NK

    def packed_rows(self, matrix: MatrixSpec, planes: Sequence[int], ids: torch.Tensor) -> torch.Tensor:
        assert matrix.flat, matrix
        assert ids.dtype is torch.int64, ids.dtype
        ids = ids.contiguous()
        out_RK = torch.empty((len(ids), matrix.columns))
        _native.packed_rows(native_matrix(matrix), planes, ids.data_ptr(), len(ids), out_RK.data_ptr())
        return out_RK

    def add_delta(self, x_TK: torch.Tensor, delta: Region, address: int, out_TN: torch.Tensor) -> None:
        _check_matrix(x_TK, columns=delta.columns)
        _check_matrix(out_TN, columns=delta.rows)
        assert len(x_TK) == len(out_TN), (x_TK.shape, out_TN.shape)
        if isinstance(delta, LowRankRegion):
            add_low_rank(self.linear, x_TK, delta, address, out_TN)
            return
        native = _delta_at(delta, address)
        _native.add_delta(native, x_TK.data_ptr(), x_TK.stride(0), len(x_TK), out_TN.data_ptr(), out_TN.stride(0))

    def add_delta_rows(self, delta: Region, address: int, ids: torch.Tensor, out_RK: torch.Tensor) -> None:
        _check_matrix(out_RK, columns=delta.columns)
        assert out_RK.is_contiguous(), out_RK.stride()
        assert ids.dtype is torch.int64, ids.dtype
        if isinstance(delta, LowRankRegion):
            check_ids(ids, delta)
            add_low_rank_rows(self.linear, delta, address, ids, out_RK)
            return
        ids = ids.contiguous()
        _native.add_delta_rows(_delta_at(delta, address), ids.data_ptr(), len(ids), out_RK.data_ptr())

    def unpack_delta(self, delta: Region, address: int) -> torch.Tensor:
        if isinstance(delta, LowRankRegion):
            return unpack_low_rank(self.linear, delta, address)
        out_NK = torch.empty((delta.rows, delta.columns))
        _native.unpack_delta(_delta_at(delta, address), out_NK.data_ptr())
        return out_NK


def _delta_at(delta: DeltaRegion, address: int) -> _native.Delta:
    assert address % 64 == 0, address
    return _native.Delta(native_delta(delta), address)


def _deltas(deltas: ExpertDeltas) -> _native.ExpertDeltas:
    shapes = [native_expert_delta(spec) for spec in deltas.specs]
    return _native.ExpertDeltas(shapes, deltas.jobs, deltas.firsts, deltas.ends, deltas.spec, deltas.planes)


_NO_ROWS = np.empty(0, dtype=np.int32)
_NO_DELTAS = _native.ExpertDeltas([], _NO_ROWS, _NO_ROWS, _NO_ROWS, _NO_ROWS, np.empty(0, dtype=np.int64))


def scratch_bytes(
    *,
    threads: int,
    positions: int,
    value_dim: int,
    rows: int = 0,
    top_k: int = 0,
    hidden: int = 0,
    expert_width: int = 0,
    dense_width: int = 0,
) -> int:
    """Most bytes of scratch that the kernels keep, for plans of memory.

    Args:
        threads: size of the pool.
        positions: most positions that a row attends to (the context, or the window plus 15 where there is one).
        value_dim: width of a value row.
        rows: most rows of a step. It counts, with the sizes below, where weights are quantised (else leave it 0).
        top_k: experts of a row.
        hidden: inputs of an expert.
        expert_width: inputs of its down projection.
        dense_width: inputs of the widest quantised dense matrix.
    """
    own = max(_native.linear_scratch_bytes(), _native.attention_scratch_bytes(positions, value_dim))
    if rows == 0:
        return threads * own
    hidden_group, width_group = group_size(max(hidden, 1)), group_size(max(expert_width, 1))
    experts = _native.experts_shared_bytes(rows, hidden, hidden_group, rows * top_k, expert_width, width_group, threads)
    dense = _native.quantised_bytes(rows, dense_width, group_size(max(dense_width, 1)))
    return threads * max(own, _native.experts_scratch_bytes()) + max(experts, dense)


def _check_matrix(matrix: torch.Tensor, *, columns: int) -> None:
    assert matrix.device == _CPU, matrix.device
    assert matrix.dtype is torch.float32, matrix.dtype
    assert matrix.ndim == 2, matrix.shape
    assert matrix.shape[1] == columns, (matrix.shape, columns)
    assert matrix.stride(1) == 1 or columns <= 1, matrix.stride()


def _check_pools(query_THD: torch.Tensor, key_pool: torch.Tensor, value_pool: torch.Tensor) -> None:
    heads, key_dim = query_THD.shape[1:]
    assert query_THD.device == key_pool.device == value_pool.device == _CPU
    assert query_THD.dtype is key_pool.dtype is value_pool.dtype is torch.float32
    assert key_pool.shape[:3] == value_pool.shape[:3], (key_pool.shape, value_pool.shape)
    assert key_pool.shape[3] == key_dim, (key_pool.shape, query_THD.shape)
    assert heads % key_pool.shape[1] == 0, (query_THD.shape, key_pool.shape)
    assert query_THD.stride(2) == 1 or key_dim <= 1, query_THD.stride()
    assert key_pool.stride(3) == 1 or key_dim <= 1, key_pool.stride()
    assert value_pool.stride(3) == 1 or value_pool.shape[3] <= 1, value_pool.stride()


def _check_rows(
    block_table: torch.Tensor, row_sequence: torch.Tensor, row_position: torch.Tensor, *, rows: int
) -> None:
    assert block_table.dtype is row_sequence.dtype is row_position.dtype is torch.int32
    assert block_table.device == row_sequence.device == row_position.device == _CPU
    assert block_table.ndim == 2, block_table.shape
    assert row_sequence.shape == row_position.shape == (rows,), (row_sequence.shape, row_position.shape, rows)
    assert block_table.is_contiguous()
    assert row_sequence.is_contiguous()
    assert row_position.is_contiguous()
