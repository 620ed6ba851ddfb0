"""Deltas as codes and kept channels, and their bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moestro.quant.delta import DeltaRegion
from moestro.quant.delta_codes import DeltaParts, delta_decode, fit_codes, largest_channels, pack_delta, unpack_delta


def _random(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed)) * 1e-3


def _kept(columns: int, count: int, seed: int) -> torch.Tensor:
    chosen = torch.randperm(columns, generator=torch.Generator().manual_seed(seed))[:count]
    return chosen.sort().values.to(torch.int32)


@pytest.mark.parametrize("bits", [1, 2, 4])
@given(rows=st.integers(1, 40), columns=st.integers(1, 300), kept=st.integers(0, 4), bias=st.booleans())
def test_bytes_come_back_as_they_were(bits: int, rows: int, columns: int, kept: int, bias: bool) -> None:
    delta_NK = _random(rows, columns, 1)
    region = DeltaRegion(rows, columns, bits, min(kept, columns), bias)
    parts = fit_codes(delta_NK, bits, _kept(columns, region.salient, 2))
    parts = replace(parts, bias_N=_random(1, rows, 3)[0] if bias else None)
    packed = pack_delta(parts, region)
    assert packed.dtype == torch.uint8
    assert len(packed) == region.nbytes
    again = unpack_delta(packed, region)
    for name in ("code_NK", "scale_NG", "middle_NG", "kept_C", "value_CN", "unit"):
        ours, theirs = getattr(parts, name), getattr(again, name)
        assert ours == theirs if name == "unit" else torch.equal(ours, theirs), name
    assert (again.bias_N is None) == (not bias)
    assert torch.equal(delta_decode(packed, region), parts.decoded(bits))


@pytest.mark.parametrize(("bits", "most"), [(1, 0.40), (2, 0.13), (4, 0.013)])
def test_the_error_is_that_of_the_best_even_steps(bits: int, most: float) -> None:
    """For normal values: .363, .119 and .0115 of their size (Max, 1960); groups of 128 have a little less."""
    delta_NK = _random(64, 256, 4)
    parts = fit_codes(delta_NK, bits, torch.empty(0, dtype=torch.int32))
    error = (parts.decoded(bits) - delta_NK).square().sum() / delta_NK.square().sum()
    assert error < most


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_kept_channels_are_right_and_do_not_widen_the_steps_of_others(bits: int) -> None:
    delta_NK = _random(32, 128, 5)
    delta_NK[:, [7, 100]] *= 50
    kept_C = largest_channels(delta_NK.square().sum(0), 2)
    assert kept_C.tolist() == [7, 100]
    with_kept = fit_codes(delta_NK, bits, kept_C).decoded(bits)
    torch.testing.assert_close(with_kept[:, [7, 100]], delta_NK[:, [7, 100]], rtol=2e-3, atol=1e-7)
    small_NK = delta_NK.clone()
    small_NK[:, [7, 100]] = 0
    rest = [column for column in range(128) if column not in (7, 100)]
    plain = fit_codes(small_NK, bits, torch.empty(0, dtype=torch.int32)).decoded(bits)
    error, least = ((one - delta_NK)[:, rest].square().sum() for one in (with_kept, plain))
    assert error < 1.05 * least


def test_nothing_costs_nothing() -> None:
    parts = fit_codes(torch.zeros(17, 40), 2, _kept(40, 2, 6))
    assert not parts.decoded(2).any()


def test_the_bytes_of_a_delta() -> None:
    """Each part where docs/format.md says."""
    region = DeltaRegion(rows=2, columns=32, bits=1, salient=1, bias=True)
    codes = torch.zeros((2, 32), dtype=torch.uint8)
    codes[1, 1] = 1
    half = torch.float16
    parts = DeltaParts(
        codes,
        torch.tensor([[1.0], [2.0]], dtype=half),
        torch.tensor([[0.5], [0.0]], dtype=half),
        2.0,
        torch.tensor([3], dtype=torch.int32),
        torch.tensor([[1.0, -1.0]], dtype=half),
        torch.tensor([1.0, 2.0]),
    )
    header = bytes.fromhex("00000040" + "0000003f").ljust(64, b"\0")  # u = 2, k / 2 = 0.5
    scales, middles = bytes.fromhex("003c0040").ljust(32, b"\0"), bytes.fromhex("00380000").ljust(32, b"\0")
    row_1 = bytes([0, 1, 0, 0])  # column 1 is bit 0 of the second byte of the row
    tile = header + scales + middles + (bytes(4) + row_1).ljust(64, b"\0")
    wanted = tile + bytes.fromhex("03000000").ljust(64, b"\0")
    wanted += bytes.fromhex("003c00bc").ljust(64, b"\0") + bytes.fromhex("0000803f00000040").ljust(64, b"\0")
    assert bytes(pack_delta(parts, region).tolist()) == wanted
    decoded = delta_decode(pack_delta(parts, region), region)
    assert decoded[0, 0] == 2 * (0.5 - 0.5)
    assert decoded[1, 1] == 2 * 2 * 0.5
    assert decoded[1, 3] == -2 * 2 * 0.5 - 1
