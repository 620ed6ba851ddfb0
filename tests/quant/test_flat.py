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


def test_calibration_lowers_the_error_of_outputs() -> None:
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn((600, 96), generator=generator) @ torch.randn((96, 96), generator=generator)
    weights = torch.randn((40, 96), generator=generator)
    regions = [flat_encode(weights, 4, hessian) for hessian in (None, inputs.T @ inputs)]
    plain, calibrated = (
        float((inputs @ (weights - flat_decode(region, 40, 96, 4)).T).square().sum()) for region in regions
    )
    assert calibrated < 0.7 * plain


def test_eight_bits_need_no_calibration() -> None:
    weights = torch.randn((16, 64), generator=torch.Generator().manual_seed(1))
    empty = torch.zeros(64, 64)
    assert torch.equal(flat_encode(weights, 8, empty), flat_encode(weights, 8))
    assert torch.equal(flat_encode(weights, 4, empty), flat_encode(weights, 4))
