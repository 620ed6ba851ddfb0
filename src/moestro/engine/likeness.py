"""Which of those who wait should start beside those that run: the one whose prompt is most like theirs.

A router goes by what a token means, so that prompts that share tokens share experts: what has been read for one then
serves the other. On the built-in model a batch put together by likeness needs fewer reads than one put together by the
true domains of the prompts (docs/benchmarks/serving-order.md).

Shapes: D = 4096 places of a sketch.
"""

from __future__ import annotations

from collections.abc import Sequence as List

import numpy as np

PLACES = 4096


def sketch(token_ids: List[int]) -> np.ndarray:
    """[D] fp32 of length 1: the square root of how often each token occurs, which keeps frequent ones from ruling."""
    counts_D = np.bincount(np.asarray(token_ids) % PLACES, minlength=PLACES)
    root_D = np.sqrt(counts_D, dtype=np.float32)
    return np.asarray(root_D / np.linalg.norm(root_D))


def most_alike(waiting: List[np.ndarray], running: List[np.ndarray]) -> int:
    """Which of these sketches has most in common with all that run; the first of equals."""
    return int(np.argmax(np.stack(waiting) @ np.sum(running, axis=0)))
