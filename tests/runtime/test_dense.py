"""Dense weights stay in their stored type, and models compute with them as if they were fp32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moestro.kernels import make_kernels
from moestro.runtime.dense import DenseWeight, place_dense

KERNELS = make_kernels("cpu", threads=1)


def _weight(rows: int = 32, columns: int = 40, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, DenseWeight]:
    stored = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    return stored, DenseWeight.over(stored, KERNELS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_linear_computes_in_fp32_over_any_leading_shape(dtype: torch.dtype) -> None:
    stored, weight = _weight(dtype=dtype)
    hidden, bias = torch.randn(2, 3, 40), torch.randn(32)
    actual = F.linear(hidden, weight, bias)
    assert type(actual) is torch.Tensor
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, F.linear(hidden, stored.float(), bias), rtol=1e-5, atol=1e-5)


def test_converted_weights_still_take_our_kernel() -> None:
    stored, weight = _weight()
    for converted in (weight.float(), weight.to(torch.float32), weight.type(torch.float32)):
        assert converted is weight
    assert weight.dtype == torch.float32
    assert stored.dtype == torch.bfloat16
    half = weight.to(torch.float16)
    assert type(half) is torch.Tensor
    assert half.dtype == torch.float16


def test_embedding_and_other_operations_see_fp32() -> None:
    stored, weight = _weight()
    ids = torch.tensor([[3, 0, 31]])
    assert torch.equal(F.embedding(ids, weight), stored.float()[ids])
    product = torch.ones(2, 32) @ weight
    assert type(product) is torch.Tensor
    torch.testing.assert_close(product, torch.ones(2, 32) @ stored.float())
    assert weight.shape == (32, 40)


def test_placing_replaces_parameters_buffers_and_tied_names() -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"a": nn.Linear(8, 4), "tied": nn.Linear(8, 4, bias=False), "norm": nn.LayerNorm(4)})
        model["norm"].register_buffer("shift", torch.zeros(4))
    model["tied"].weight = model["a"].weight
    stored = {
        "a.weight": torch.randn(4, 8, dtype=torch.bfloat16),
        "a.bias": torch.randn(4),
        "norm.weight": torch.ones(4),
        "norm.bias": torch.zeros(4),
        "norm.shift": torch.full((4,), 2.0),
    }
    place_dense(model, stored, KERNELS)
    assert model["a"].weight is model["tied"].weight
    assert model["a"].weight.data_ptr() == stored["a.weight"].data_ptr()
    assert torch.equal(model["norm"].shift, stored["norm.shift"])
    hidden = torch.randn(3, 8)
    expected = F.linear(hidden, stored["a.weight"].float(), stored["a.bias"])
    torch.testing.assert_close(model["norm"](model["a"](hidden)), F.layer_norm(expected, (4,)), rtol=1e-4, atol=1e-5)
