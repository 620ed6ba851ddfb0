"""Plain codes of dense matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moestro.quant.flat import flat_bytes, flat_decode, flat_encode


@pytest.mark.parametrize("bits", [4, 8])
@given(rows=st.integers(1, 40), columns=st.integers(1, 300), seed=st.integers(0, 99))
def test_values_come_back_within_half_a_step(bits: int, rows: int, columns: int, seed: int) -> None:
    weights = torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed))
    region = flat_encode(weights, bits)
    assert len(region) == flat_bytes(rows, columns, bits)
    error = (flat_decode(region, rows, columns, bits) - weights).abs()
    reach = weights.abs().max() * 2 / (2**bits - 1)
    assert error.max() <= reach * (0.51 if bits == 8 else 3)
    assert error.square().mean() <= weights.square().mean() * (1e-4 if bits == 8 else 0.02) + 1e-12


@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_and_constants_are_exact(bits: int) -> None:
    weights = torch.zeros(17, 64)
    weights[1] = 0.5
    weights[2, :] = -3.0
    assert torch.equal(flat_decode(flat_encode(weights, bits), 17, 64, bits), weights)
