"""The codes of a matrix: 2 + 1 + 1 bits and a nibble, one level for each prefix.

Shapes: N rows, K columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

LEVELS = (2, 3, 4, 8)
"""Bits of an expert with its first 1, 2, 3 and 4 planes."""


@dataclass(frozen=True)
class Codes:
    """`code_NK` holds the 4 high bits (2 + 1 + 1), `nibble_NK` the 4 low ones; both uint8."""

    code_NK: torch.Tensor
    nibble_NK: torch.Tensor

    def plane(self, level: int) -> torch.Tensor:
        """The bits that the plane of `level` adds, uint8 [N, K]."""
        if level == 8:
            return self.nibble_NK
        return self.code_NK >> 2 if level == 2 else (self.code_NK >> (4 - level)) & 1

    @classmethod
    def join(cls, planes: list[torch.Tensor]) -> Codes:
        """Codes from their first planes; the bits of absent ones are zero."""
        base, *bits = planes
        code_NK = base << 2
        for shift, plane in zip((1, 0), bits[:2], strict=False):
            code_NK = code_NK | plane << shift
        return cls(code_NK, bits[2] if len(bits) > 2 else torch.zeros_like(base))
