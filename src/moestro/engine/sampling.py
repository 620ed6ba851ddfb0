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
        # A stable order makes ties break the same way every time.
        order = np.argsort(-logits, kind="stable")
        if params.top_k:
            order = order[: params.top_k]
        weights = np.exp(logits[order])
        cumulative = np.cumsum(weights) / weights.sum()
        if params.top_p < 1.0:
            keep = int(np.searchsorted(cumulative, params.top_p, side="left")) + 1
            cumulative = cumulative[:keep] / cumulative[keep - 1 : keep]
        drawn = int(np.searchsorted(cumulative, self._random.random(), side="right"))
        return int(order[min(drawn, len(cumulative) - 1)])
