"""Dequantised values, against transformers' own code and against the definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moestro.store.dequantise import block_values, e8m0_values, mxfp4_values


def test_mxfp4_is_what_transformers_makes_of_it() -> None:
    blocks = torch.randint(0, 256, (3, 10, 4, 16), dtype=torch.uint8)
    blocks[0, 0, 0] = torch.arange(16) * 17
    scales = torch.randint(100, 140, (3, 10, 4), dtype=torch.uint8)
    oracle = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    ours = mxfp4_values(blocks, scales).transpose(1, 2)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, oracle.float())


def test_mxfp4_by_its_definition() -> None:
    blocks = torch.zeros(1, 1, 2, 16, dtype=torch.uint8)
    blocks[0, 0, 0, :4] = torch.tensor([0x10, 0x32, 0xFE, 0x08])
    blocks[0, 0, 1, 15] = 0x70
    values = mxfp4_values(blocks, torch.tensor([[[127, 130]]], dtype=torch.uint8))[0, 0]
    assert values[:8].tolist() == [0.0, 0.5, 1.0, 1.5, -4.0, -6.0, -0.0, 0.0]
    assert values[6].signbit()
    assert values[63] == 6.0 * 2**3


def test_scales_are_powers_of_two() -> None:
    values = e8m0_values(torch.arange(256, dtype=torch.uint8))
    assert values[:255].tolist() == [2.0 ** (exponent - 127) for exponent in range(255)]
    assert values[255].isnan()


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_block_fp8_is_what_transformers_makes_of_it(scale_dtype: torch.dtype) -> None:
    weight = torch.randn(256, 384).to(torch.float8_e4m3fn)
    scales = torch.rand(2, 3).to(scale_dtype)
    if scale_dtype == torch.uint8:
        scales = torch.tensor([[120, 127, 130], [100, 126, 128]], dtype=torch.uint8)
    oracle = Fp8Dequantize(None)._dequantize_one(weight, scales, output_dtype=torch.float32)
    assert torch.equal(block_values(weight, scales, (128, 128)), oracle)


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    tile=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    cut=st.data(),
)
@settings(deadline=None, max_examples=50)
def test_block_values_by_their_definition(rows: int, columns: int, tile: tuple[int, int], cut: st.DataObject) -> None:
    weight = torch.randn(rows, columns).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-rows // tile[0]), -(-columns // tile[1]))
    whole = block_values(weight, scales, tile)
    for row in range(rows):
        for column in range(columns):
            assert whole[row, column] == weight[row, column].float() * scales[row // tile[0], column // tile[1]]
    start = cut.draw(st.integers(0, rows))
    assert torch.equal(block_values(weight[start:], scales, tile, first_row=start), whole[start:])
