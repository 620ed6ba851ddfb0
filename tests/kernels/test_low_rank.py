"""Deltas that are products of thin matrices: what their bytes stand for, whatever the batch and the threads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moestro.kernels.base import Kernels
from moestro.kernels.cpu import CpuKernels
from moestro.kernels.reference import ReferenceKernels
from moestro.quant.low_rank import LowRankRegion, low_rank_decode
from packed_matrices import Source

PROPERTY = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Delta:
    """Random bytes of a delta, in memory."""

    def __init__(self, source: Source, region: LowRankRegion) -> None:
        self.region = region
        self.bytes = torch.randint(0, 256, (region.nbytes + 64,), dtype=torch.uint8, generator=source.generator)
        self.address = -(-self.bytes.data_ptr() // 64) * 64
        self.own = self.bytes[self.address - self.bytes.data_ptr() :][: region.nbytes]
        self.own[: 8 * region.rank].view(torch.float32).copy_(source.normal(1, 2 * region.rank)[0] * 0.1)
        if region.bias:
            self.own[region.bias_at : region.bias_at + 4 * region.rows].view(torch.float32).fill_(0.5)

    def values(self) -> torch.Tensor:
        """[N, K]."""
        return low_rank_decode(self.own, self.region)


@pytest.mark.parametrize("kernels", [CpuKernels(threads=2), ReferenceKernels()], ids=lambda one: one.name)
@PROPERTY
@given(
    tokens=st.integers(0, 9),
    rows=st.integers(6, 70),
    width=st.integers(6, 70),
    ranks=st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(1, 2)),
    bias=st.booleans(),
    seed=st.integers(0, 100),
)
def test_it_is_what_the_bytes_stand_for(
    kernels: Kernels, tokens: int, rows: int, width: int, ranks: tuple[int, int, int], bias: bool, seed: int
) -> None:
    source = Source(seed)
    delta = Delta(source, LowRankRegion(rows, width, ranks, bias))
    x_TK, before_TN = source.normal(tokens, width), source.normal(tokens, rows)
    out_TN = before_TN.clone()
    kernels.add_delta(x_TK, delta.region, delta.address, out_TN)
    expected_TN = before_TN + x_TK @ delta.values().T + (0.5 if bias else 0.0)
    torch.testing.assert_close(out_TN, expected_TN, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(kernels.unpack_delta(delta.region, delta.address), delta.values(), rtol=1e-5, atol=1e-4)
    ids = torch.tensor([rows - 1, 0, rows // 2, 0])
    looked_up_RK = torch.ones(4, width)
    kernels.add_delta_rows(delta.region, delta.address, ids, looked_up_RK)
    torch.testing.assert_close(looked_up_RK, 1 + delta.values()[ids], rtol=1e-5, atol=1e-4)
    with pytest.raises(ValueError, match="is not in"):
        kernels.add_delta_rows(delta.region, delta.address, torch.tensor([rows]), looked_up_RK[:1])


def test_a_row_does_not_depend_on_the_others_nor_on_threads() -> None:
    source = Source(3)
    delta = Delta(source, LowRankRegion(300, 160, (2, 5, 90), bias=True))
    x_TK, before_TN = source.normal(20, 160), source.normal(20, 300)
    together_TN = before_TN.clone()
    CpuKernels(threads=2).add_delta(x_TK, delta.region, delta.address, together_TN)
    kernels = CpuKernels(threads=1)
    for token in range(20):
        alone_1N = before_TN[token : token + 1].clone()
        kernels.add_delta(x_TK[token : token + 1], delta.region, delta.address, alone_1N)
        assert torch.equal(together_TN[token : token + 1], alone_1N)


def test_vectors_longer_than_a_part() -> None:
    """Left vectors are decoded some values at a time."""
    source = Source(4)
    delta = Delta(source, LowRankRegion(9000, 64, (1, 1, 60)))
    x_TK, out_TN = source.normal(2, 64), torch.zeros(2, 9000)
    CpuKernels(threads=2).add_delta(x_TK, delta.region, delta.address, out_TN)
    torch.testing.assert_close(out_TN, x_TK @ delta.values().T, rtol=1e-4, atol=1e-3)
