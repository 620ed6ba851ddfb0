"""A delta as the product of two thin matrices, their vectors in bands of 8, 3 and 2 bits: Delta-CoMe, arXiv 2406.08903.

    delta[n, k] = sum over r of left[r, n] right[r, k]        value = step[r] * (code - (2^bits - 1) / 2)

A pair of vectors is a singular pair of the difference, the root of its singular value in both. The first few pairs have
8 bits, the next ones 3, and so many have 2 that the bytes are used up.

Shapes: N rows (outputs), K columns (inputs), R ranks (pairs of vectors), B of one band, L values of a vector.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch.nn import functional

from moestro.quant.delta import DeltaRegion, aligned

BAND_BITS = (8, 3, 2)
"""Bits of the bands, in the order of their singular values."""

_OF_4096 = (2, 32)
"""Ranks of 8 and of 3 bits in a matrix of full rank 4096, by the paper; of smaller ones as large a share."""

_SHARES = tuple((0.2 + 0.025 * place) for place in range(33))
"""Steps that are tried, as shares of the one that reaches the largest value."""


@dataclass(frozen=True)
class LowRankRegion:
    """The bytes of one matrix's delta, each part on a multiple of 64 from their start; gaps are zeros.

    Steps, fp32 [2, R], of right vectors and of left ones; then the right vectors, [R] of K values, one after another,
    each in whole bytes (`pack_vectors`); then the left ones, of N values; and, with `bias`, the difference of the
    biases, fp32 [N].
    """

    rows: int
    columns: int
    ranks: tuple[int, int, int]
    bias: bool = False

    def __post_init__(self) -> None:
        assert self.rows > 0, self.rows
        assert self.columns > 0, self.columns
        assert 0 < self.rank <= min(self.rows, self.columns), self

    @property
    def rank(self) -> int:
        """Pairs of vectors in all bands."""
        return sum(self.ranks)

    @property
    def right_at(self) -> int:
        return aligned(8 * self.rank)

    @property
    def left_at(self) -> int:
        return aligned(self.right_at + self._vectors_nbytes(self.columns))

    @property
    def bias_at(self) -> int:
        return aligned(self.left_at + self._vectors_nbytes(self.rows))

    @property
    def nbytes(self) -> int:
        """Bytes of all parts, a multiple of 64."""
        return aligned(self.bias_at + (4 * self.rows if self.bias else 0))

    def bands(self, length: int) -> Iterator[tuple[int, slice, int]]:
        """Of vectors of this length: the band's bits, its ranks, and where its first vector begins."""
        first, at = 0, 0
        for bits, count in zip(BAND_BITS, self.ranks, strict=True):
            if count:
                yield bits, slice(first, first + count), at
            first, at = first + count, at + count * vector_bytes(length, bits)

    def _vectors_nbytes(self, length: int) -> int:
        return sum(count * vector_bytes(length, bits) for bits, count in zip(BAND_BITS, self.ranks, strict=True))


Region = DeltaRegion | LowRankRegion
"""What a matrix's delta may be."""


def flat_region(region: Region) -> DeltaRegion:
    """A delta that has to be a flat one."""
    assert isinstance(region, DeltaRegion), region
    return region


@dataclass(frozen=True)
class LowRankParts:
    """What the bytes of a delta stand for: codes, uint8, and steps, fp32 [R], of both sides; `bias_N` fp32 or None."""

    right_RK: torch.Tensor
    left_RN: torch.Tensor
    right_step_R: torch.Tensor
    left_step_R: torch.Tensor
    bias_N: torch.Tensor | None = None


def vector_bytes(length: int, bits: int) -> int:
    """Bytes of a vector: whole groups of eight values."""
    return -(-length // 8) * bits


@cache
def low_rank_region(rows: int, columns: int, nbytes: int, *, bias: bool = False) -> LowRankRegion:
    """As many ranks as take no more than `nbytes`; where the matrix has not so many, the largest get more bits."""
    most = min(rows, columns)
    fine, middle = (min(most, max(1, round(share * most / 4096))) for share in _OF_4096)
    region = LowRankRegion(rows, columns, (fine, min(middle, most - fine), 0), bias)
    while region.nbytes <= nbytes:
        larger = _next(region, most)
        if larger is None or larger.nbytes > nbytes:
            break
        region = larger
    return region


def _next(region: LowRankRegion, most: int) -> LowRankRegion | None:
    """One more rank, or one band better for one; None when all have 8 bits."""
    fine, middle, coarse = region.ranks
    if region.rank < most:
        return replace(region, ranks=(fine, middle, coarse + 1))
    if coarse:
        return replace(region, ranks=(fine, middle + 1, coarse - 1))
    return replace(region, ranks=(fine + 1, middle - 1, 0)) if middle else None


def low_rank_of(delta_NK: torch.Tensor, region: LowRankRegion) -> LowRankParts:
    """The nearest product of so many ranks, its vectors rounded with the steps of the least error each."""
    left_NR, value_R, right_RK = torch.linalg.svd(delta_NK, full_matrices=False)
    root_R1 = value_R[: region.rank].sqrt().unsqueeze(1)
    right_RK, right_step_R = _rounded(right_RK[: region.rank] * root_R1, region)
    left_RN, left_step_R = _rounded(left_NR.T[: region.rank] * root_R1, region)
    return LowRankParts(right_RK, left_RN, right_step_R, left_step_R)


def pack_low_rank(parts: LowRankParts, region: LowRankRegion) -> torch.Tensor:
    """The bytes of a delta, uint8 [region.nbytes]."""
    assert parts.right_RK.shape == (region.rank, region.columns), (parts.right_RK.shape, region)
    assert parts.left_RN.shape == (region.rank, region.rows), (parts.left_RN.shape, region)
    assert (parts.bias_N is not None) == region.bias, region
    packed = torch.zeros(region.nbytes, dtype=torch.uint8)
    steps = torch.stack((parts.right_step_R, parts.left_step_R)).float().flatten().view(torch.uint8)
    packed[: len(steps)] = steps
    for code_RL, start in ((parts.right_RK, region.right_at), (parts.left_RN, region.left_at)):
        for bits, ranks, at in region.bands(code_RL.shape[1]):
            data = pack_vectors(code_RL[ranks], bits).flatten()
            packed[start + at : start + at + len(data)] = data
    if parts.bias_N is not None:
        packed[region.bias_at : region.bias_at + 4 * region.rows] = parts.bias_N.float().view(torch.uint8)
    return packed


def low_rank_decode(packed: torch.Tensor, region: LowRankRegion) -> torch.Tensor:
    """The delta [N, K] in fp32 that bytes stand for, without the bias."""
    right_RK = decode_vectors(packed, region, "right", slice(0, region.columns))
    left_RN = decode_vectors(packed, region, "left", slice(0, region.rows))
    return left_RN.T @ right_RK


def decode_vectors(packed: torch.Tensor, region: LowRankRegion, side: str, values: slice) -> torch.Tensor:
    """Some values of all right or left vectors, fp32 [R, values]; `values` begin at a multiple of 8."""
    assert values.start % 8 == 0, values
    is_right = side == "right"
    length, start = (region.columns, region.right_at) if is_right else (region.rows, region.left_at)
    steps_at = 0 if is_right else 4 * region.rank
    step_R1 = packed[steps_at : steps_at + 4 * region.rank].view(torch.float32).unsqueeze(1)
    eights = slice(values.start // 8, -(-values.stop // 8))
    bands = []
    for bits, ranks, at in region.bands(length):
        count = ranks.stop - ranks.start
        band = packed[start + at : start + at + count * vector_bytes(length, bits)].view(count, -1, bits)
        code_BL = _unpack_eights(band[:, eights], bits)[:, : values.stop - values.start]
        bands.append((code_BL.float() - (2**bits - 1) / 2) * step_R1[ranks])
    return torch.cat(bands)


def pack_vectors(code_BL: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes, uint8 [B, L], as they lie: bytes [B, L / 8 * bits].

    Eight values take `bits` bytes: of 8 bits one each; else two bytes with the low two bits of values 0 to 3 and of 4
    to 7, the first in the lowest bits, and of 3 bits a third byte with their high bits.
    """
    count, length = code_BL.shape
    code_BE8 = functional.pad(code_BL, (0, -length % 8)).view(count, -1, 8)
    if bits == 8:
        return code_BE8.flatten(1)
    low_BE24 = (code_BE8 & 3).view(count, -1, 2, 4)
    parts = [_shifted_sum(low_BE24, 2)]
    if bits == 3:
        parts.append(_shifted_sum((code_BE8 >> 2).unsqueeze(-2), 1))
    return torch.cat(parts, -1).flatten(1)


def _shifted_sum(values: torch.Tensor, bits: int) -> torch.Tensor:
    shift = bits * torch.arange(values.shape[-1], dtype=torch.uint8)
    return (values << shift).sum(-1, dtype=torch.uint8)


def _unpack_eights(band_BEb: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes, uint8 [B, 8 E], of bytes [B, E, bits]."""
    if bits == 8:
        return band_BEb.flatten(1)
    low_BE24 = (band_BEb[..., :2].unsqueeze(-1) >> (2 * torch.arange(4, dtype=torch.uint8))) & 3
    code_BE8 = low_BE24.flatten(-2)
    if bits == 3:
        code_BE8 = code_BE8 | (((band_BEb[..., 2:] >> torch.arange(8, dtype=torch.uint8)) & 1) << 2)
    return code_BE8.flatten(1)


def _rounded(vector_RL: torch.Tensor, region: LowRankRegion) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, uint8, and steps, fp32 [R], of vectors in the order of the bands."""
    codes, steps = [], []
    for bits, ranks, _ in region.bands(vector_RL.shape[1]):
        code_BL, step_B1 = _nearest(vector_RL[ranks], bits)
        codes.append(code_BL)
        steps.append(step_B1[:, 0])
    return torch.cat(codes), torch.cat(steps)


def _nearest(vector_BL: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    half = (2**bits - 1) / 2
    largest_B1 = vector_BL.abs().amax(1, keepdim=True)
    best_BL, step_B1 = torch.zeros_like(vector_BL, dtype=torch.uint8), torch.zeros_like(largest_B1)
    least_B1 = torch.full_like(largest_B1, torch.inf)
    for share in _SHARES:
        tried_B1 = largest_B1 * (share / half)
        code_BL = (vector_BL / tried_B1.clamp_min(1e-30) + half).round().clamp(0, 2**bits - 1)
        cost_B1 = ((code_BL - half) * tried_B1 - vector_BL).square().sum(1, keepdim=True)
        better_B1 = cost_B1 < least_B1
        best_BL = torch.where(better_B1, code_BL.to(torch.uint8), best_BL)
        step_B1 = torch.where(better_B1, tried_B1, step_B1)
        least_B1 = torch.minimum(cost_B1, least_B1)
    return best_BL, step_B1
