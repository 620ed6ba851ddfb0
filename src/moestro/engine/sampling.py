"""Picking a token from logits. Shapes: V vocabulary."""

from __future__ import annotations

import numpy as np
import torch

from moestro.config import SamplingParams


class Sampler:
    """One request's sampler: its own random numbers, so that nothing else in flight can change its tokens."""

    def __init__(self, params: SamplingParams) -> None:
        self._params = params
        self._random = np.random.Generator(np.random.Philox(params.seed))

    def pick(self, logits_V: torch.Tensor) -> int:
        """The next token: the likeliest at temperature 0, else drawn after top-k and then top-p."""
        params = self._params
        if params.temperature == 0.0:
            return int(torch.argmax(logits_V))
        logits = logits_V.numpy().astype(np.float64)
        logits -= logits.max()
        with np.errstate(over="ignore"):  # the coldest temperatures leave the likeliest token alone
            logits /= params.temperature
        if not params.top_k and params.top_p == 1.0:
            return self._draw(np.exp(logits).cumsum())
        # A stable order makes ties break the same way every time.
        order = np.argsort(-logits, kind="stable")
        if params.top_k:
            order = order[: params.top_k]
        weights = np.exp(logits[order])
        cumulative = np.cumsum(weights)
        if params.top_p < 1.0:
            keep = int(np.searchsorted(cumulative, params.top_p * cumulative[-1], side="left")) + 1
            cumulative = cumulative[:keep]
        return int(order[self._draw(cumulative)])

    def _draw(self, cumulative: np.ndarray) -> int:
        """An index with the probability that it adds to the cumulative weights."""
        drawn = int(np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right"))
        return min(drawn, len(cumulative) - 1)
