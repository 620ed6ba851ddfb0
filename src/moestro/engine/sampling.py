"""Picking a token from logits. Shapes: V vocabulary, C candidates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from moestro.config import SamplingParams
from moestro.engine.adjust import Adjustments
from moestro.engine.logprobs import Likelihoods, TokenLikelihood

_BLOCK = 256
_CANDIDATES = 256
"""How many tokens top-p looks at first: mostly enough."""


class Constraint(Protocol):
    """What narrows the choice down, token by token."""

    def allowed(self) -> np.ndarray:
        """Whether each token may come next: bool [V]. Raises RequestError when it cannot be told any more."""

    def take(self, token: int) -> None:
        """A token was picked."""

    @property
    def complete(self) -> bool:
        """Whether nothing may come any more."""


class Sampler:
    """One request's sampler: its own random numbers, so that nothing else in flight can change its tokens."""

    def __init__(
        self, params: SamplingParams, prompt_ids: Sequence[int] = (), constraint: Constraint | None = None
    ) -> None:
        self._params = params
        self._random = np.random.Generator(np.random.Philox(params.seed))
        self._adjustments = Adjustments(params, prompt_ids)
        self._constraint = constraint

    @property
    def complete(self) -> bool:
        """Whether the answer cannot go on."""
        return self._constraint is not None and self._constraint.complete

    def pick(self, logits_V: torch.Tensor) -> int:
        """The next token, in the order that `SamplingParams` tells.

        Raises:
            RequestError: the request's guide allows none.
        """
        token = self._pick(logits_V)
        self._adjustments.take(token)
        if self._constraint is not None:
            self._constraint.take(token)
        return token

    def likelihood(self, logits_V: torch.Tensor, token: int) -> TokenLikelihood | None:
        """That of a token that was picked, if the request asked for it."""
        wanted = self._params.logprobs
        return None if wanted is None else Likelihoods(logits_V).of(token, wanted)

    def _pick(self, logits_V: torch.Tensor) -> int:
        params, raw = self._params, logits_V.numpy()
        if params.temperature == 0.0 and not self._adjustments.any and self._constraint is None:
            return int(raw.argmax())
        logits = raw.astype(np.float64)
        self._adjustments.apply(logits)
        ids = None
        if self._constraint is not None:
            ids = np.flatnonzero(self._constraint.allowed())
            logits = logits[ids]
        place = int(logits.argmax()) if params.temperature == 0.0 else self._draw(logits)
        return place if ids is None else int(ids[place])

    def _draw(self, logits: np.ndarray) -> int:
        """A place of logits, which are overwritten."""
        params = self._params
        logits -= logits.max()
        with np.errstate(over="ignore"):  # the coldest temperatures leave the likeliest token alone
            logits /= params.temperature
        weights = np.exp(logits)
        if params.min_p:
            kept = np.flatnonzero(~(weights < params.min_p))  # the likeliest one weighs 1
            return int(kept[self._draw_from(logits[kept], weights[kept])])
        return self._draw_from(logits, weights)

    def _draw_from(self, logits: np.ndarray, weights: np.ndarray) -> int:
        params = self._params
        if not params.top_k and params.top_p == 1.0:
            return self._draw_any(weights)
        order, cumulative = _candidates(logits, weights, top_k=params.top_k, top_p=params.top_p)
        return int(order[_place_of(self._random.random() * cumulative[-1], cumulative)])

    def _draw_any(self, weights: np.ndarray) -> int:
        """A token with the probability of its weight: a block first, because adding all one by one takes 0.2 ms."""
        blocks = np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK)).cumsum()
        drawn = self._random.random() * blocks[-1]
        block = _place_of(drawn, blocks)
        first = block * _BLOCK
        before = blocks[block - 1] if block else 0.0
        return first + _place_of(drawn, before + weights[first : first + _BLOCK].cumsum())


def _candidates(logits: np.ndarray, weights: np.ndarray, *, top_k: int, top_p: float) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that top-k and then top-p leave, likeliest first [C], and their cumulative weights.

    Sorting a whole vocabulary takes 4 ms: as many are sorted as are needed, which for top-p is found by trying.
    """
    count = top_k or _CANDIDATES
    whole = 0.0 if top_k else float(weights.sum())
    while True:
        order = _greatest(logits, count)
        cumulative = weights[order].cumsum()
        wanted = top_p * (cumulative[-1] if top_k else whole)
        if top_k or cumulative[-1] >= wanted or len(order) == len(logits):
            break
        count *= 8
    if top_p < 1.0:
        keep = int(np.searchsorted(cumulative, wanted, side="left")) + 1
        order, cumulative = order[:keep], cumulative[:keep]
    return order, cumulative


def _greatest(logits: np.ndarray, count: int) -> np.ndarray:
    """The tokens of the `count` greatest logits, greatest first, of equals the first in the vocabulary."""
    if count >= len(logits):
        return np.argsort(-logits, kind="stable")
    least = np.partition(logits, -count)[-count]
    ids = np.flatnonzero(~(logits < least))  # NaN is kept: it has to come out as it went in
    return ids[np.argsort(-logits[ids], kind="stable")][:count]


def _place_of(drawn: float, cumulative: np.ndarray) -> int:
    """The index whose part of the cumulative weights `drawn` falls into."""
    return min(int(np.searchsorted(cumulative, drawn, side="right")), len(cumulative) - 1)
