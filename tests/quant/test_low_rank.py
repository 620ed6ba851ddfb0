"""Products of two thin matrices: their bytes, their ranks, and how near they come."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moestro.quant.delta import DeltaRegion, salient_channels
from moestro.quant.low_rank import (
    LowRankParts,
    LowRankRegion,
    decode_vectors,
    low_rank_decode,
    low_rank_of,
    low_rank_region,
    pack_low_rank,
    pack_vectors,
    vector_bytes,
)


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_how_codes_lie() -> None:
    code_BL = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 1]], dtype=torch.uint8)
    assert pack_vectors(code_BL, 8).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 1, 0, 0, 0, 0, 0, 0, 0]]
    assert pack_vectors(code_BL, 3).tolist() == [[0b11100100, 0b11100100, 0b11110000, 1, 0, 0]]
    assert pack_vectors(code_BL & 3, 2).tolist() == [[0b11100100, 0b11100100, 1, 0]]
    assert [vector_bytes(9, bits) for bits in (8, 3, 2)] == [16, 6, 4]


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 70),
    ranks=st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 9)),
    bias=st.booleans(),
)
def test_bytes_come_back_as_they_were(rows: int, columns: int, ranks: tuple[int, int, int], bias: bool) -> None:
    fine = max(1, min(ranks[0], rows, columns))
    middle = min(ranks[1], min(rows, columns) - fine)
    coarse = min(ranks[2], min(rows, columns) - fine - middle)
    region = LowRankRegion(rows, columns, (fine, middle, coarse), bias)
    generator = torch.Generator().manual_seed(1)
    most_R1 = torch.tensor([255] * fine + [7] * middle + [3] * coarse).unsqueeze(1)
    right_RK, left_RN = (
        (torch.randint(0, 256, (region.rank, length), generator=generator) % (most_R1 + 1)).to(torch.uint8)
        for length in (columns, rows)
    )
    steps_2R = torch.rand((2, region.rank), generator=generator)
    parts = LowRankParts(right_RK, left_RN, steps_2R[0], steps_2R[1], _random(rows) if bias else None)
    packed = pack_low_rank(parts, region)
    assert packed.dtype == torch.uint8
    assert len(packed) == region.nbytes
    right, left = (
        (code_RL.float() - most_R1 / 2) * step_R.unsqueeze(1)
        for code_RL, step_R in zip((right_RK, left_RN), steps_2R, strict=True)
    )
    assert torch.equal(decode_vectors(packed, region, "right", slice(0, columns)), right)
    assert torch.equal(decode_vectors(packed, region, "left", slice(0, rows)), left)
    if rows > 8:
        assert torch.equal(decode_vectors(packed, region, "left", slice(8, rows)), left[:, 8:])
    assert torch.equal(low_rank_decode(packed, region), left.T @ right)
    if parts.bias_N is not None:
        assert torch.equal(packed[region.bias_at : region.bias_at + 4 * rows].view(torch.float32), parts.bias_N)


@given(
    rows=st.integers(16, 600),
    columns=st.integers(16, 600),
    bits=st.sampled_from([1, 2, 4]),
    share=st.sampled_from([0.0, 0.02, 0.1]),
)
def test_ranks_use_up_the_bytes_of_codes(rows: int, columns: int, bits: int, share: float) -> None:
    budget = DeltaRegion(rows, columns, bits, salient_channels(columns, share)).nbytes
    region = low_rank_region(rows, columns, budget)
    fine, middle, coarse = region.ranks
    least = LowRankRegion(rows, columns, (1, 1, 0))
    assert region.nbytes <= budget or region == least
    assert region.rank <= min(rows, columns)
    if region.rank < min(rows, columns):
        more = LowRankRegion(rows, columns, (fine, middle, coarse + 1))
        assert more.nbytes > budget


def test_what_is_of_low_rank_is_met_and_the_first_ranks_best() -> None:
    delta_NK = _random(96, 3, seed=1) @ _random(3, 64, seed=2) * 1e-3
    region = LowRankRegion(96, 64, (3, 1, 1))
    found_NK = low_rank_decode(pack_low_rank(low_rank_of(delta_NK, region), region), region)
    assert (found_NK - delta_NK).norm() / delta_NK.norm() < 0.02
    coarse = LowRankRegion(96, 64, (0, 0, 5))
    worse_NK = low_rank_decode(pack_low_rank(low_rank_of(delta_NK, coarse), coarse), coarse)
    assert 0.1 < (worse_NK - delta_NK).norm() / delta_NK.norm() < 0.7


def test_nothing_is_nothing() -> None:
    region = low_rank_region(32, 48, 600)
    packed = pack_low_rank(low_rank_of(torch.zeros(32, 48), region), region)
    assert not low_rank_decode(packed, region).any()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_more_bytes_are_nearer(bits: int) -> None:
    """Of a matrix whose singular values fall as those of a fine-tune's difference do."""
    left_NN, right_KK = (torch.linalg.qr(_random(128, 128, seed=seed)).Q for seed in (1, 2))
    delta_NK = left_NN @ torch.diag(torch.arange(1, 129) ** -0.7) @ right_KK
    errors = []
    for some in (bits, 2 * bits):
        region = low_rank_region(128, 128, DeltaRegion(128, 128, some, 2).nbytes if some < 8 else 1 << 20)
        found_NK = low_rank_decode(pack_low_rank(low_rank_of(delta_NK, region), region), region)
        errors.append(float((found_NK - delta_NK).norm() / delta_NK.norm()))
    assert errors[1] < errors[0] < 0.7
