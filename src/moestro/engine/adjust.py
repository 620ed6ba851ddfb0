"""What a request changes about logits before a token is picked: bias and penalties. Shapes: V vocabulary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from moestro.config import SamplingParams


class Adjustments:
    """Bias and penalties of one request, which has to tell of each of its tokens.

    Presence and frequency penalties have OpenAI's meaning and count the answer's tokens; the repetition penalty is that
    of CTRL (Keskar et al. 2019, section 4.1) as transformers and vLLM apply it, to the prompt's tokens as well.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        self._params = params
        bias = params.logit_bias or {}
        self._bias_ids, self._bias = np.array([*bias], dtype=np.int64), np.array([*bias.values()])
        self._counts: Counter[int] = Counter()
        self._seen = set(prompt_ids) if params.repetition_penalty != 1.0 else set()
        self._counting = bool(params.presence_penalty or params.frequency_penalty)
        self.any = bool(bias) or self._counting or params.repetition_penalty != 1.0

    def take(self, token: int) -> None:
        """A token of the answer."""
        if self._counting:
            self._counts[token] += 1
        if self._params.repetition_penalty != 1.0:
            self._seen.add(token)

    def apply(self, logits_V: np.ndarray) -> None:
        """Change float64 logits in place."""
        params = self._params
        if len(self._bias_ids):
            logits_V[self._bias_ids] += self._bias
        if self._seen:
            ids = np.fromiter(self._seen, dtype=np.int64, count=len(self._seen))
            logits = logits_V[ids]
            penalty = params.repetition_penalty
            logits_V[ids] = np.where(logits > 0, logits / penalty, logits * penalty)
        if self._counts:
            ids = np.fromiter(self._counts, dtype=np.int64, count=len(self._counts))
            counts = np.fromiter(self._counts.values(), dtype=np.float64, count=len(self._counts))
            logits_V[ids] -= params.presence_penalty + params.frequency_penalty * counts
