"""What a request's routing so far looks like to a learned predictor: to train it; `folded` follows requests.

Shapes: N visits, E experts per layer, F features of an expert's own history, D inputs of a layer's net.
"""

from __future__ import annotations

import numpy as np

DECAYS = (0.0, 0.5, 0.8, 0.92, 0.97, 0.99)
"""Of the averages of past use, per visit: the last visit alone, up to the last hundred."""

NEIGHBOURS = (-3, -2, -1, 1, 2)
"""Layers whose latest routing helps to foresee a layer's; those behind it speak of the token before."""

AVERAGES = len(DECAYS)
RECENCY, WEIGHT = AVERAGES, AVERAGES + 1
OWN = AVERAGES + 2
FADE = 0.25
"""A recency is 1 / (1 + FADE x visits since the last use)."""
_FADE = np.float32(FADE)
_DECAYS_A = np.array(DECAYS, dtype=np.float32)
GAINS = (1 - _DECAYS_A) * np.where(_DECAYS_A >= 0.9, np.float32(4), np.float32(1))
"""What a use adds to each average."""
_BLOCK = 64


def input_size(experts: int) -> int:
    """D: an expert's own features, and the latest weights of the neighbouring layers."""
    return (OWN + len(NEIGHBOURS)) * experts


def dense_rows(experts_NK: np.ndarray, weights_NK: np.ndarray, experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Use (0 or 1) and normalised router weight of every expert, [N, E] each."""
    uses_NE = np.zeros((len(experts_NK), experts), dtype=np.float32)
    np.put_along_axis(uses_NE, experts_NK.astype(np.int64), np.float32(1), 1)
    weights_NE = np.zeros_like(uses_NE)
    np.put_along_axis(weights_NE, experts_NK.astype(np.int64), _normalised(weights_NK), 1)
    return uses_NE, weights_NE


def histories(uses_NE: np.ndarray, weights_NE: np.ndarray, start_FE: np.ndarray) -> np.ndarray:
    """[N, F, E]: the own history after each of N visits of a layer, from `start_FE` on.

    Features: decayed averages of use (the slow ones times 4, so that all have a like spread), the recency, and the
    router weights of the latest visit, normalised.
    """
    visits, experts = uses_NE.shape
    out_NFE = np.empty((visits, OWN, experts), dtype=np.float32)
    for index, (decay, gain) in enumerate(zip(_DECAYS_A, GAINS, strict=True)):
        out_NFE[:, index] = _averages(uses_NE * gain, float(decay), start_FE[index])
    out_NFE[:, RECENCY] = _recencies(uses_NE, start_FE[RECENCY])
    out_NFE[:, WEIGHT] = weights_NE
    return out_NFE


def _normalised(weights: np.ndarray) -> np.ndarray:
    """Router weights of a row, or of rows: adding up to 1."""
    weights = weights.astype(np.float32)
    return np.asarray(weights / np.maximum(weights.sum(-1, keepdims=True), np.float32(1e-20)))


def _averages(uses_NE: np.ndarray, decay: float, start_E: np.ndarray) -> np.ndarray:
    """Sums of uses, decayed per visit: blocks of visits as one product with a triangle of powers."""
    lags = np.arange(_BLOCK)[:, None] - np.arange(_BLOCK)
    triangle_BB = np.where(lags >= 0, np.float32(decay) ** np.maximum(lags, 0), 0).astype(np.float32)
    carry_B = np.float32(decay) ** np.arange(1, _BLOCK + 1, dtype=np.float32)
    out_NE = np.empty_like(uses_NE)
    for first in range(0, len(uses_NE), _BLOCK):
        block_BE = uses_NE[first : first + _BLOCK]
        rows = len(block_BE)
        out_NE[first : first + rows] = triangle_BB[:rows, :rows] @ block_BE + carry_B[:rows, None] * start_E
        start_E = out_NE[first + rows - 1]
    return out_NE


def _recencies(uses_NE: np.ndarray, start_E: np.ndarray) -> np.ndarray:
    """1 / (1 + FADE x age), the age counted in visits since the last use, or on from what `start_E` says."""
    visits_N1 = np.arange(len(uses_NE), dtype=np.float32)[:, None]
    last_NE = np.maximum.accumulate(np.where(uses_NE > 0, visits_N1, np.float32(-1)), axis=0)
    with np.errstate(divide="ignore"):
        before_NE = 1 / (1 / start_E + _FADE * (visits_N1 + 1))
    return np.where(last_NE >= 0, 1 / (1 + _FADE * (visits_N1 - last_NE)), before_NE)
