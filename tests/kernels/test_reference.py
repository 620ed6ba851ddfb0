"""The oracle itself, against torch's own attention and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from moestro.kernels.reference import ReferenceKernels

REFERENCE = ReferenceKernels()


def contiguous_pool(rows_GJD: torch.Tensor) -> torch.Tensor:
    return rows_GJD.transpose(0, 1)[:, :, None]


@pytest.mark.parametrize("window", [0, 4])
def test_attention_is_torch_attention(window: int) -> None:
    query_HTD, key_GJD, value_GJD = torch.randn(6, 10, 16), torch.randn(2, 10, 16), torch.randn(2, 10, 8)
    position_T = torch.arange(10, dtype=torch.int32)
    distance_TJ = position_T[:, None] - position_T
    out_THDv = REFERENCE.attention(
        query_HTD.transpose(0, 1),
        contiguous_pool(key_GJD),
        contiguous_pool(value_GJD),
        position_T[None],
        torch.zeros(10, dtype=torch.int32),
        position_T,
        scale=0.3,
        window=window,
    )
    expected_HTDv = functional.scaled_dot_product_attention(
        query_HTD,
        key_GJD.repeat_interleave(3, 0),
        value_GJD.repeat_interleave(3, 0),
        attn_mask=(distance_TJ >= 0) & (distance_TJ < (window or 100)),
        scale=0.3,
    )
    torch.testing.assert_close(out_THDv.transpose(0, 1), expected_HTDv)


def test_softcap_and_sink_by_hand() -> None:
    key, value = torch.tensor([1.0, 3.0]), torch.tensor([10.0, 20.0])
    out = REFERENCE.attention(
        torch.ones(1, 1, 1),
        key.reshape(2, 1, 1, 1),
        value.reshape(2, 1, 1, 1),
        torch.tensor([[0, 1]], dtype=torch.int32),
        torch.zeros(1, dtype=torch.int32),
        torch.ones(1, dtype=torch.int32),
        scale=1.0,
        softcap=2.0,
        sinks_H=torch.tensor([0.5]),
    )
    first, second, sink = (math.exp(v) for v in (2 * math.tanh(0.5), 2 * math.tanh(1.5), 0.5))
    assert out.item() == pytest.approx((10 * first + 20 * second) / (first + second + sink), rel=1e-6)


def test_linear_converts_to_the_dtype_of_its_input() -> None:
    x_TK, weight_NK, bias_N = torch.randn(3, 4), torch.randn(5, 4).bfloat16(), torch.randn(5).half()
    expected_TN = x_TK @ weight_NK.float().T + bias_N.float()
    torch.testing.assert_close(REFERENCE.linear(x_TK, weight_NK, bias_N), expected_TN)


def test_meta_tensors_give_shapes() -> None:
    with torch.device("meta"):
        out_TN = REFERENCE.linear(torch.empty(3, 4), torch.empty(5, 4, dtype=torch.bfloat16), torch.empty(5))
        out_THDv = REFERENCE.attention(
            torch.empty(3, 4, 8),
            torch.empty(7, 2, 16, 8),
            torch.empty(7, 2, 16, 6),
            torch.empty(1, 7, dtype=torch.int32),
            torch.empty(3, dtype=torch.int32),
            torch.empty(3, dtype=torch.int32),
            scale=1.0,
        )
    assert (out_TN.shape, out_TN.dtype, out_TN.is_meta) == ((3, 5), torch.float32, True)
    assert (out_THDv.shape, out_THDv.dtype, out_THDv.is_meta) == ((3, 4, 6), torch.float32, True)
