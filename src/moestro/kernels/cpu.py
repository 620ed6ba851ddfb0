"""The compiled kernels. The checks are asserts: what reaches a kernel was made by moestro, and decode is in a hurry."""

from __future__ import annotations

import torch

from moestro import _native
from moestro.kernels.base import WEIGHT_DTYPES

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


def scratch_bytes(*, threads: int, positions: int, value_dim: int) -> int:
    """Most bytes of scratch that the kernels keep, for plans of memory.

    Args:
        threads: size of the pool.
        positions: most positions that a row attends to (the context, or the window plus 15 where there is one).
        value_dim: width of a value row.
    """
    return threads * max(_native.linear_scratch_bytes(), _native.attention_scratch_bytes(positions, value_dim))


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
