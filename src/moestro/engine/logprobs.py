"""How likely the model found the tokens of an answer. Shapes: V vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class TokenLikelihood:
    """A token, the logarithm of its probability in nats, and the likeliest tokens at its place, likeliest first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Likelihoods:
    """The logarithms of all tokens' probabilities at one place: the log-softmax of the model's own logits [V]."""

    def __init__(self, logits_V: torch.Tensor) -> None:
        logits = logits_V.numpy().astype(np.float64)
        logits -= logits.max()
        self._logprobs_V = logits - np.log(np.exp(logits).sum())

    def of(self, token: int, top: int) -> TokenLikelihood:
        """That of a token, with the `top` likeliest; of equals the first in the vocabulary."""
        logprobs = self._logprobs_V
        best: np.ndarray = np.zeros(0, dtype=np.int64)
        if top:
            least = np.partition(logprobs, -top)[-top] if top < len(logprobs) else -np.inf
            ids = np.flatnonzero(logprobs >= least)
            best = ids[np.argsort(-logprobs[ids], kind="stable")][:top]
        return TokenLikelihood(token, float(logprobs[token]), tuple((int(one), float(logprobs[one])) for one in best))
