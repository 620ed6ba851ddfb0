"""What a nested encoding of an expert's matrices does, whoever does it.

Shapes: N rows (outputs), K columns (inputs).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch.nn import functional

from moestro.quant.codes import LEVELS
from moestro.quant.groups import padded_columns, padded_rows

PRIORITIES = {2: 1.0, 3: 2.0, 4: 10.0, 8: 50.0}
"""Weights of the levels' squared errors when one code serves all: the inverse of the loss that each may cost."""


class Encoding(Protocol):
    """Weights as a chain of planes; plane p reaches level LEVELS[p]."""

    @property
    def name(self) -> str:
        """The name in manifests and flags."""
        ...

    def plane_bytes(self, rows: int, columns: int, level: int) -> int:
        """Bytes that the plane of `level` takes for a matrix of this (unpadded) shape."""
        ...

    def encode(
        self,
        weights_NK: torch.Tensor,
        *,
        levels: tuple[int, ...],
        hessian_KK: torch.Tensor | None = None,
        aims: Mapping[int, torch.Tensor] | None = None,
        metric_NN: torch.Tensor | None = None,
    ) -> dict[int, torch.Tensor]:
        """The bytes of each plane up to the highest of `levels`, by level; good at each of `levels`.

        `hessian_KK` is the sum over calibration rows x of x x^T; without it weights are rounded for their own sake.
        With it, `aims` has matrices [N, K] that levels are to come near to instead of the weights, and `metric_NN`
        says what errors of outputs cost together (an encoding may leave it aside). All are fp32 and finite.
        """
        ...

    def decode(self, regions: Sequence[torch.Tensor], rows: int, columns: int, level: int) -> torch.Tensor:
        """The weights [N, K] in fp32 that the planes up to `level` stand for."""
        ...


def padded(weights_NK: torch.Tensor) -> torch.Tensor:
    """The matrix with zeros up to whole tiles and groups."""
    rows, columns = weights_NK.shape
    extra = (0, padded_columns(columns) - columns, 0, padded_rows(rows) - rows)
    return functional.pad(weights_NK, extra) if any(extra) else weights_NK


def offsets_of(
    weights_NK: torch.Tensor, aims: Mapping[int, torch.Tensor] | None, unit: float, middle_NK: torch.Tensor
) -> list[torch.Tensor]:
    """What each of LEVELS aims at, as distances [N, K] from the middles of groups, in units.

    Weights and middles are padded and in units, `aims` are neither.
    """
    of_weights_NK = weights_NK - middle_NK
    aims = aims or {}
    return [padded(aims[level]) / unit - middle_NK if level in aims else of_weights_NK for level in LEVELS]
