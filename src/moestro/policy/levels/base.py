"""What a policy that chooses levels sees and says. Pure: no file, no clock, no thread, no tensor.

Levels are numbers here: 0 leaves an expert out, 1 is the lowest that the store promises, the highest is the exact one.

Shapes: T rows of a step, K experts per row, L MoE layers, E experts per layer, D levels, 0 among them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from moestro.policy.observation import Routing


@dataclass(frozen=True, eq=False)
class LevelTable:
    """What a model's levels cost.

    `bytes_LD` are those of the planes up to each level; `errors_LED` relative squared errors of an expert's output (1
    at level 0). `sensitivity_L`, nats that a layer costs per unit of relative error of its output, is None where it was
    not measured. `picks` experts are used per row. `prices`, of a store with a bit router: nats that the bytes of an
    exact expert are worth, by a row's budget.
    """

    bytes_LD: np.ndarray
    errors_LED: np.ndarray
    sensitivity_L: np.ndarray | None
    picks: int
    prices: Mapping[float, float] | None = None

    @property
    def exact(self) -> int:
        """The number of the exact level."""
        return int(self.bytes_LD.shape[1]) - 1


@dataclass(frozen=True, slots=True, eq=False)
class LevelAsk:
    """One layer of one step: `budget_T` is what each row may lose over the whole model in nats, 0 for exact rows.

    `held_E` is the highest level of each expert whose planes are all in memory. `scores_TKS`, [T, K, D - 1], is what
    a bit router says, where there is one.
    """

    routing: Routing
    budget_T: np.ndarray
    held_E: np.ndarray
    scores_TKS: np.ndarray | None = None


class LevelPolicy(Protocol):
    """Chooses the level that each expert of each row is applied at."""

    def step(self, budget_T: np.ndarray, /) -> None:
        """A step begins, whose rows may lose so much, and some of them anything."""
        ...

    def choose(self, ask: LevelAsk, /) -> np.ndarray:
        """[T, K] int64; rows without a budget are always exact. Layers of a step are asked for in ascending order."""
        ...

    def gains(self) -> np.ndarray | None:
        """[L, E, D - 1]: worth of holding the planes of levels 1, 2, ..., as a share of what a use of them is worth.

        At most 1, never rising with the level; None where all planes of an expert are worth the same.
        """
        ...


def shares(weights_TK: np.ndarray) -> np.ndarray:
    """[T, K]: each expert's part of its row's squared error when all of a layer's experts are equally wrong.

    The errors of different experts are taken as independent, and their outputs as of equal length.
    """
    squares_TK = np.square(weights_TK, dtype=np.float32)
    return np.asarray(squares_TK / np.maximum(squares_TK.sum(-1, keepdims=True), np.float32(1e-30)))
