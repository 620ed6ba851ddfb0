"""Counts of which experts follow which: P(expert used | an expert that was used before it).

Shapes: P pairs of places (say: layer and the layer after it), E experts per layer, N rows, K experts per row, M rows of
the table.
"""

from __future__ import annotations

import numpy as np

# A row of counts is halved when it was counted so often: half the weight is on the last few thousand.
_FORGET_AT = 4096.0
# Probabilities are kept so far from 0 and 1 where their log-odds are taken.
_LEAST = 1e-5


def log_odds(chance: np.ndarray) -> np.ndarray:
    """log(p / (1 - p)), finite for 0 and 1 too."""
    chance = np.clip(chance, _LEAST, 1 - _LEAST)
    return np.asarray(np.log(chance / (1 - chance)))


def chance_of(odds: np.ndarray) -> np.ndarray:
    """The probability of log-odds."""
    return np.asarray(1 / (1 + np.exp(-odds)))


class Successors:
    """Conditional frequencies, smoothed; at most `limit_bytes` of them: beyond, the oldest row makes room."""

    def __init__(self, pairs: int, experts: int, *, limit_bytes: int = 64 << 20) -> None:
        self._experts = experts
        rows = max(1, min(pairs * experts, limit_bytes // (4 * experts)))
        self._counts_ME = np.zeros((rows, experts), np.float32)
        self._total_M = np.zeros(rows, np.float32)
        self._number_PE: np.ndarray | None = None
        if rows < pairs * experts:
            self._number_PE = np.full(pairs * experts, -1, np.int32)
            self._owner_M = np.full(rows, -1, np.int64)
            self._next = 0

    def add(self, pair: int, before_NK: np.ndarray, after_NK: np.ndarray) -> None:
        """Row n used the experts `after` where it had used the experts `before`."""
        numbers_NK = self._numbers(pair, before_NK, make=True)
        if len(numbers_NK) == 1:
            self._counts_ME[numbers_NK[0][:, None], after_NK[0]] += 1
            self._total_M[numbers_NK[0]] += 1
        else:
            np.add.at(self._counts_ME, (numbers_NK[:, :, None], after_NK[:, None, :]), 1)
            np.add.at(self._total_M, numbers_NK, 1)
        totals_NK = self._total_M[numbers_NK]
        if totals_NK.max(initial=0) > _FORGET_AT:
            full = np.unique(numbers_NK[totals_NK > _FORGET_AT])
            self._counts_ME[full] *= 0.5
            self._total_M[full] *= 0.5

    def given(self, pair: int, before_NK: np.ndarray, prior_E: np.ndarray, *, strength: float = 4.0) -> np.ndarray:
        """[N, K, E] P(used | expert k of row n was used before); the prior counts as `strength` observations."""
        numbers_NK = self._numbers(pair, before_NK, make=False)
        known_NK = numbers_NK >= 0
        counts_NKE = self._counts_ME[numbers_NK]
        total_NK = self._total_M[numbers_NK]
        if not known_NK.all():
            counts_NKE[~known_NK] = 0
            total_NK = np.where(known_NK, total_NK, 0)
        counts_NKE += strength * prior_E
        counts_NKE /= (total_NK + strength)[:, :, None]
        return np.asarray(counts_NKE)

    def evidence(self, pair: int, before_NK: np.ndarray, weights_NK: np.ndarray, prior_E: np.ndarray) -> np.ndarray:
        """[N, E] what the experts before say, in log-odds above the prior: a mean over them, weighted."""
        given_NKE = np.clip(self.given(pair, before_NK, prior_E), _LEAST, 1 - _LEAST)
        odds_NKE = np.log(given_NKE / (1 - given_NKE))
        mean_NE = np.matmul(weights_NK[:, None, :], odds_NKE)[:, 0]
        return np.asarray(mean_NE - log_odds(prior_E))

    def _numbers(self, pair: int, ids_NK: np.ndarray, *, make: bool) -> np.ndarray:
        places_NK = ids_NK.astype(np.int64) + pair * self._experts
        if self._number_PE is None:
            return places_NK
        if make:
            for place in np.unique(places_NK[self._number_PE[places_NK] < 0]):
                self._give_row(int(place))
        return self._number_PE[places_NK]

    def _give_row(self, place: int) -> None:
        assert self._number_PE is not None
        row, self._next = self._next, (self._next + 1) % len(self._owner_M)
        if self._owner_M[row] >= 0:
            self._number_PE[self._owner_M[row]] = -1
        self._counts_ME[row] = 0
        self._total_M[row] = 0
        self._owner_M[row] = place
        self._number_PE[place] = row
