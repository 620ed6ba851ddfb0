"""What only someone who knows the future can do: Belady's rule, for caches that must admit every miss.

L. A. Belady, "A study of replacement algorithms for a virtual-storage computer", 1966.
Shapes: P passes, L MoE layers, E experts.
"""

from __future__ import annotations

import numpy as np

NEVER = np.int32(2**30)


def next_uses(uses_PLE: np.ndarray) -> np.ndarray:
    """[P, L, E] int32: the number of the pass after this one that uses the expert next, NEVER if none does."""
    out_PLE = np.empty(uses_PLE.shape, dtype=np.int32)
    upcoming_LE = np.full(uses_PLE.shape[1:], NEVER, dtype=np.int32)
    for index in range(len(uses_PLE) - 1, -1, -1):
        out_PLE[index] = upcoming_LE
        upcoming_LE[uses_PLE[index]] = index
    return out_PLE


def last_uses(uses_PLE: np.ndarray) -> np.ndarray:
    """[P, L, E] int32: the number of the last pass up to this one that used the expert, -1 if none did."""
    numbers_P11 = np.arange(len(uses_PLE), dtype=np.int32)[:, None, None]
    return np.maximum.accumulate(np.where(uses_PLE, numbers_P11, np.int32(-1)), axis=0)
