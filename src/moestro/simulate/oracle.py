"""What only someone who knows the future can do: Belady's rule, for caches that must admit every miss.

L. A. Belady, "A study of replacement algorithms for a virtual-storage computer", 1966.
Shapes: U experts that a pass uses (each once, as numbers from 0 to those of the model), X experts of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

NEVER = np.int32(2**30)


def next_uses(used_PU: Sequence[np.ndarray], experts: int) -> Iterator[np.ndarray]:
    """Of each pass [X] int32: the number of the pass after it that uses the expert next, NEVER if none does.

    The array is written over by the next step.
    """
    upcoming_X = np.full(experts, NEVER, dtype=np.int32)
    after_PU = []
    for index in range(len(used_PU) - 1, -1, -1):
        after_PU.append(upcoming_X[used_PU[index]])
        upcoming_X[used_PU[index]] = index
    for used_U, after_U in zip(used_PU, reversed(after_PU), strict=True):
        upcoming_X[used_U] = after_U
        yield upcoming_X


def last_uses(used_PU: Sequence[np.ndarray], experts: int) -> Iterator[np.ndarray]:
    """Of each pass [X] int32: the number of the last pass up to this one that used the expert, -1 if none did.

    The array is written over by the next step.
    """
    last_X = np.full(experts, -1, dtype=np.int32)
    for index, used_U in enumerate(used_PU):
        last_X[used_U] = index
        yield last_X
