"""A dense matrix with what a variant adds to it.

Shapes: N out, K in, T rows, R ids.
"""

from __future__ import annotations

import torch

from moestro.kernels.base import Kernels
from moestro.quant.low_rank import Region
from moestro.runtime.dense import Bodiless, DenseWeight


class DeltaWeight(Bodiless):
    """A DenseWeight that is another one, however that is stored, plus a delta that lies at `address`."""

    base: DenseWeight
    region: Region
    address: int

    @classmethod
    def of(cls, base: DenseWeight, region: Region, address: int, kernels: Kernels) -> DeltaWeight:
        """The sum; whoever makes it keeps both parts where they are."""
        weight: DeltaWeight = torch.Tensor._make_wrapper_subclass(cls, tuple(base.shape), dtype=torch.float32)
        weight.kernels, weight.base, weight.region, weight.address = kernels, base, region, address
        return weight

    def product(self, rows_TK: torch.Tensor, bias_N: torch.Tensor | None) -> torch.Tensor:
        out_TN = self.base.product(rows_TK, bias_N)
        self.kernels.add_delta(rows_TK, self.region, self.address, out_TN)
        return out_TN

    def rows(self, ids_R: torch.Tensor) -> torch.Tensor:
        out_RK = self.base.rows(ids_R).contiguous()
        self.kernels.add_delta_rows(self.region, self.address, ids_R, out_RK)
        return out_RK

    def unpacked(self) -> torch.Tensor:
        return self.base.unpacked() + self.kernels.unpack_delta(self.region, self.address)
