"""The bytes that kernels read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moestro.quant.groups import group_size, groups, padded_columns, padded_rows
from moestro.quant.tiles import (
    BITS1,
    BITS2,
    BITS4,
    BITS8,
    CodeFormat,
    pack_codes,
    pack_scaled,
    pack_scales,
    unpack_codes,
    unpack_scaled,
)

FORMATS = (BITS1, BITS2, BITS4, BITS8)


@given(tiles=st.integers(1, 3), groups=st.integers(1, 3), group=st.sampled_from((32, 64, 128)), seed=st.integers(0, 99))
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: f"{form.bits}-bit")
def test_codes_come_back(form: CodeFormat, tiles: int, groups: int, group: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (16 * tiles, groups * group)
    codes = torch.randint(0, 1 << form.bits, shape, generator=generator).to(torch.uint8)
    packed = pack_codes(codes, group, form)
    assert packed.shape == (tiles, groups, 16 * group * form.bits // 8)
    assert torch.equal(unpack_codes(packed, group, form), codes)


@pytest.mark.parametrize("column", range(32))
def test_two_bit_codes_lie_where_the_format_says(column: int) -> None:
    codes = torch.zeros((16, 32), dtype=torch.uint8)
    codes[5, column] = 3
    packed = pack_codes(codes, 32, BITS2).flatten()
    chunk, inside = divmod(column, 16)
    field, i = divmod(inside, 4)
    assert packed.nonzero().flatten().tolist() == [64 * chunk + 4 * 5 + i]
    assert packed.max().item() == 3 << (2 * field)


@pytest.mark.parametrize("column", range(32))
def test_bit_planes_line_up_with_the_fields_of_base_chunks(column: int) -> None:
    codes = torch.zeros((16, 32), dtype=torch.uint8)
    codes[9, column] = 1
    packed = pack_codes(codes, 32, BITS1).flatten()
    quad, i = divmod(column, 4)
    chunk, field = divmod(quad, 4)
    assert packed.nonzero().flatten().tolist() == [4 * 9 + i]
    assert packed.max().item() == 1 << (2 * field + chunk)


@pytest.mark.parametrize("column", range(16))
def test_nibbles_and_bytes_lie_where_the_format_says(column: int) -> None:
    codes = torch.zeros((16, 32), dtype=torch.uint8)
    codes[2, column] = 15
    packed = pack_codes(codes, 32, BITS4).flatten()
    chunk, inside = divmod(column, 8)
    assert packed.nonzero().flatten().tolist() == [64 * chunk + 4 * 2 + inside % 4]
    assert packed.max().item() == 15 << (4 * (inside // 4))
    packed = pack_codes(codes, 32, BITS8).flatten()
    assert packed.nonzero().flatten().tolist() == [64 * (column // 4) + 4 * 2 + column % 4]


def test_scales_of_a_tile_lie_before_its_codes() -> None:
    scales = torch.arange(32, dtype=torch.float16).view(32, 1) + 1
    middles = -scales
    codes = torch.full((32, 32), 2, dtype=torch.uint8)
    packed = pack_scaled((scales, middles), codes, 32, BITS2).view(2, -1)
    assert packed.shape[1] == 32 + 32 + 16 * 32 // 4
    assert packed[1, :32].view(torch.float16).tolist() == list(range(17, 33))
    assert packed[1, 32:64].view(torch.float16).tolist() == [-value for value in range(17, 33)]
    assert set(packed[:, 64:].flatten().tolist()) == {0b10101010}
    (scales_back, middles_back), codes_back = unpack_scaled(packed.flatten(), 2, 32, 32, 32, BITS2)
    assert torch.equal(scales_back, scales)
    assert torch.equal(middles_back, middles)
    assert torch.equal(codes_back, codes)
    assert pack_scales(scales).shape == (2, 1, 32)


@pytest.mark.parametrize(("columns", "group"), [(2048, 128), (2880, 64), (96, 32), (24, 32), (100, 32), (1, 32)])
def test_groups_are_the_largest_that_divide_a_row(columns: int, group: int) -> None:
    assert group_size(columns) == group
    assert padded_columns(columns) == groups(columns) * group >= columns
    assert padded_columns(columns) - columns < group
    assert padded_rows(columns) % 16 == 0
