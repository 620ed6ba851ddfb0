"""The weights of a bit router.

Shapes: L MoE layers, R inner width, H hidden width, E experts per layer, D levels, leaving out and exact among them,
O = E x (D - 1) outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class BitRouter:
    """Two linear maps per layer with a ReLU between them; all arrays are fp32.

    An output is the logarithm of the nats that a token is expected to lose by taking an expert at a level, if all of
    its layer's weight were that expert's. The exact level loses nothing and has no output.

    Attributes:
        levels: the bits that the D - 1 levels above leaving out have; the last is exact.
        prices: nats that the bytes of one exact expert are worth, by the quality asked for.
    """

    inner_LRH: np.ndarray
    inner_bias_LR: np.ndarray
    outer_LOR: np.ndarray
    outer_bias_LO: np.ndarray
    levels: tuple[int, ...]
    prices: Mapping[str, float]

    def arrays(self) -> dict[str, np.ndarray]:
        """Weights by name, as they are kept."""
        return {
            "inner": self.inner_LRH,
            "inner_bias": self.inner_bias_LR,
            "outer": self.outer_LOR,
            "outer_bias": self.outer_bias_LO,
        }

    @property
    def nbytes(self) -> int:
        """Of all weights."""
        return sum(array.nbytes for array in self.arrays().values())


def array_shapes(*, layers: int, width: int, hidden: int, experts: int, levels: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays of a router for a model whose experts have so many `levels` of bits."""
    outputs = experts * levels
    return {
        "inner": (layers, width, hidden),
        "inner_bias": (layers, width),
        "outer": (layers, outputs, width),
        "outer_bias": (layers, outputs),
    }
