"""Expert activation matrices (EAM): how many tokens of one request, in one phase, went to which expert of which layer.

From MoE-Infinity (arXiv 2401.14361, section 4). A layer of which nothing is known has a row of zeros; such rows say
nothing, so they are left out of every comparison instead of counting as different.

Shapes: L MoE layers, E experts per layer, N rows, K experts per row.
"""

from __future__ import annotations

import numpy as np

from moestro.trace.trace import Trace


def eam_of_rows(experts_NLK: np.ndarray, num_experts: int) -> np.ndarray:
    """Counts [L, E], int64, of these rows."""
    layers = experts_NLK.shape[1]
    places_NLK = experts_NLK + np.arange(layers)[:, None] * num_experts
    return np.bincount(places_NLK.ravel(), minlength=layers * num_experts).reshape(layers, num_experts)


def request_eam(trace: Trace, request: int, *, decode: bool) -> np.ndarray:
    """Counts [L, E] of a request's answer, or of its prompt."""
    rows = trace.rows_of(request)
    return eam_of_rows(trace.experts_NLK[rows][trace.decode_N[rows] == decode], trace.num_experts)


def shares_of(counts: np.ndarray) -> np.ndarray:
    """Rows (last axis) that add up to 1, float32. Rows of zeros stay zeros: nothing is known."""
    totals = counts.sum(axis=-1, keepdims=True, dtype=np.float64)
    return _divided(counts, totals)


def directions_of(counts: np.ndarray) -> np.ndarray:
    """Rows (last axis) of Euclidean length 1, float32. Rows of zeros stay zeros: nothing is known."""
    lengths = np.sqrt(np.square(counts, dtype=np.float64).sum(axis=-1, keepdims=True))
    return _divided(counts, lengths)


def similarity(one_LE: np.ndarray, other_LE: np.ndarray) -> float:
    """Mean over layers of the cosine of their rows, 0 to 1; layers unknown on either side are left out.

    1 minus the distance of MoE-Infinity's code. 0 when no layer is known on both sides.
    """
    known_L = one_LE.any(axis=1) & other_LE.any(axis=1)
    if not known_L.any():
        return 0.0
    return float((directions_of(one_LE[known_L]) * directions_of(other_LE[known_L])).sum(axis=1).mean())


def _divided(counts: np.ndarray, by: np.ndarray) -> np.ndarray:
    quotient: np.ndarray = np.divide(counts, by, out=np.zeros(counts.shape), where=by > 0)
    return quotient.astype(np.float32)
