"""What a policy is told: which experts the rows of one layer of one forward pass were routed to.

Shapes: T rows of the step, K experts per row, L MoE layers, E experts per layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Shape:
    """Of the routed part of a model: MoE layers, experts per layer, experts per row."""

    layers: int
    experts: int
    picks: int


@dataclass(frozen=True, slots=True)
class RequestRows:
    """Rows `first` to `last` (not included) of a step belong to this request: a chunk of its prompt, or one token."""

    request: int
    first: int
    last: int
    decode: bool


@dataclass(frozen=True, slots=True)
class Routing:
    """One layer of one forward pass.

    `experts_TK` are ids, in any order within a row; `weights_TK` float32 router weights, normalised over K or not as
    the model does it. `counts_E` is how many rows each expert has. `requests` covers all rows, in ascending order.
    """

    layer: int
    experts_TK: np.ndarray
    weights_TK: np.ndarray
    requests: Sequence[RequestRows]
    counts_E: np.ndarray

    @staticmethod
    def of(
        layer: int, experts_TK: np.ndarray, weights_TK: np.ndarray, requests: Sequence[RequestRows], *, experts: int
    ) -> Routing:
        """With the counts that follow from the ids."""
        counts_E = np.bincount(experts_TK.ravel(), minlength=experts)
        return Routing(layer, experts_TK, weights_TK, requests, counts_E)
