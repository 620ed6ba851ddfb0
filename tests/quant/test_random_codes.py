"""Random codes are matrices as encodings make them: same bytes, same layout, weights of the wanted size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moestro.quant import LEVELS, make_encoding
from moestro.quant.flat import flat_bytes, flat_decode
from moestro.quant.random_codes import random_flat, random_regions


def _random(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("encoding", ["nested", "signs"])
@given(rows=st.integers(1, 40), columns=st.integers(1, 300), seed=st.integers(0, 99))
def test_regions_are_as_long_as_encoded_ones(encoding: str, rows: int, columns: int, seed: int) -> None:
    maker = make_encoding(encoding)
    regions = random_regions(encoding, rows, columns, (2, 8), 0.5, _random(seed))
    for level in LEVELS:
        assert regions[level].numel() == maker.plane_bytes(rows, columns, level)
    assert maker.decode(list(regions.values()), rows, columns, 8).isfinite().all()


@pytest.mark.parametrize("encoding", ["nested", "signs"])
@pytest.mark.parametrize(("level", "tolerance"), [(2, 0.05), (3, 0.03), (4, 0.02), (8, 0.02)])
def test_weights_have_the_wanted_deviation(encoding: str, level: int, tolerance: float) -> None:
    regions = random_regions(encoding, 96, 1000, LEVELS, 0.02, _random(1))
    weights = make_encoding(encoding).decode([regions[bits] for bits in LEVELS if bits <= level], 96, 1000, level)
    assert float(weights.std()) == pytest.approx(0.02, rel=tolerance)
    assert abs(float(weights.mean())) < 0.0004


@pytest.mark.parametrize("encoding", ["nested", "signs"])
def test_levels_come_nearer_to_the_highest(encoding: str) -> None:
    regions = random_regions(encoding, 64, 256, LEVELS, 1.0, _random(2))
    decoded = [make_encoding(encoding).decode(list(regions.values())[: n + 1], 64, 256, LEVELS[n]) for n in range(4)]
    errors = [float((one - decoded[-1]).square().mean()) for one in decoded[:-1]]
    assert 0.1 > errors[0] > 1.5 * errors[1] > 2 * errors[2] > 0


@pytest.mark.parametrize("bits", [4, 8])
@given(rows=st.integers(1, 40), columns=st.integers(1, 300), seed=st.integers(0, 99))
def test_flat_matrices(bits: int, rows: int, columns: int, seed: int) -> None:
    region = random_flat(rows, columns, bits, 3.0, _random(seed))
    assert len(region) == flat_bytes(rows, columns, bits)
    weights = flat_decode(region, rows, columns, bits)
    assert 0 < float(weights.abs().max()) < 3.0 * 2


def test_what_was_filled_up_is_zero() -> None:
    region = random_regions("nested", 5, 33, (2,), 1.0, _random(3))[2]
    # 2 groups of 32 columns, of which 33 are there, in a tile of which 5 rows are.
    codes = region[64:].view(1, 2, -1)[..., 64:].reshape(2, 2, 16, 4)
    assert torch.count_nonzero(codes[:, :, 5:]) == 0
    assert torch.count_nonzero(codes[1, 1]) == 0
    assert torch.count_nonzero(codes[0]) > 0
