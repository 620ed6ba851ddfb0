"""Counts of which experts follow which: P(expert used | an expert that was used before it).

Shapes: P places, E experts per layer, N rows, J places before of each, K experts per row, M rows of the table.
"""

from __future__ import annotations

import numpy as np

from moestro.policy.predictors.flight import any_of

# A row of counts is halved when it was counted so often: half the weight is on the last few thousand.
_FORGET_AT = 4096.0
# After so many additions it is looked which rows those are.
_LOOK_EVERY = 512
# Probabilities are kept so far from 0 and 1 where their log-odds are taken.
_LEAST = 1e-5


def log_odds(chance: np.ndarray) -> np.ndarray:
    """log(p / (1 - p)), finite for 0 and 1 too."""
    chance = np.minimum(np.maximum(chance, _LEAST), 1 - _LEAST)
    return np.asarray(np.log(chance / (1 - chance)))


def chance_of(odds: np.ndarray) -> np.ndarray:
    """The probability of log-odds."""
    return np.asarray(1 / (1 + np.exp(-odds)))


def odds_of_any(odds_RE: np.ndarray) -> np.ndarray:
    """[E] log-odds that at least one of R requests uses it, each on its own, of those for each."""
    if len(odds_RE) == 1:
        return np.asarray(odds_RE[0])
    return log_odds(any_of(chance_of(odds_RE)))


class Successors:
    """Conditional frequencies, smoothed; at most `limit_bytes` of them: beyond, the oldest row makes room.

    What came before is given as places: pair x E + expert.
    """

    def __init__(self, pairs: int, experts: int, *, limit_bytes: int = 64 << 20) -> None:
        rows = max(1, min(pairs * experts, limit_bytes // (4 * experts)))
        self._counts_ME = np.zeros((rows, experts), np.float32)
        self._total_M = np.zeros(rows, np.float32)
        self._number_P: np.ndarray | None = None
        self._until_forget = _LOOK_EVERY
        if rows < pairs * experts:
            # Row 0 is that of all places without a row of their own, and stays empty.
            self._number_P = np.zeros(pairs * experts, np.int64)
            self._owner_M = np.full(rows + 1, -1, np.int64)
            self._counts_ME = np.zeros((rows + 1, experts), np.float32)
            self._total_M = np.zeros(rows + 1, np.float32)
            self._next = 1
        self._counts_X = self._counts_ME.reshape(-1)

    def add(self, before_NJ: np.ndarray, after_NK: np.ndarray) -> None:
        """Row n used the experts `after` when the places `before` had been used."""
        if self._number_P is not None:
            before_NJ = self._numbers(before_NJ)
        if len(before_NJ) == 1:
            self._counts_X[(before_NJ[0] * self._counts_ME.shape[1])[:, None] + after_NK[0]] += 1
            self._total_M[before_NJ[0]] += 1
        else:
            np.add.at(self._counts_ME, (before_NJ[:, :, None], after_NK[:, None, :]), 1)
            np.add.at(self._total_M, before_NJ, 1)
        if self._number_P is not None:
            # Places that lost their row to another one of the same call counted here.
            self._counts_ME[0] = 0
            self._total_M[0] = 0
        self._until_forget -= len(before_NJ)
        if self._until_forget < 0:
            self._until_forget = _LOOK_EVERY
            full_M = self._total_M > _FORGET_AT
            self._counts_ME[full_M] *= 0.5
            self._total_M[full_M] *= 0.5

    def chances(self, before_NJ: np.ndarray, prior_E: np.ndarray, *, strength: float = 4.0) -> np.ndarray:
        """[N, J, E] P(used | place j of row n was used before); the prior counts as `strength` observations."""
        if self._number_P is not None:
            before_NJ = self._number_P[before_NJ]
        counts_NJE = self._counts_ME[before_NJ]
        counts_NJE += (strength * prior_E).astype(np.float32)
        counts_NJE /= (self._total_M[before_NJ] + np.float32(strength))[:, :, None]
        return np.asarray(counts_NJE)

    def mean(self, before_NJ: np.ndarray, prior_E: np.ndarray, *, strength: float = 4.0) -> np.ndarray:
        """[N, E] `chances` averaged over the places before; the prior may differ between rows."""
        if self._number_P is not None:
            before_NJ = self._number_P[before_NJ]
        share_NJ = self._total_M.take(before_NJ)
        share_NJ += np.float32(strength)
        share_NJ *= np.float32(before_NJ.shape[1])
        np.reciprocal(share_NJ, out=share_NJ)
        mean_NE: np.ndarray = np.matmul(share_NJ[:, None], self._counts_ME.take(before_NJ, 0))[:, 0]
        mean_NE += (np.float32(strength) * np.add.reduce(share_NJ, 1))[:, None] * prior_E
        return mean_NE

    def log_odds(
        self, before_NJ: np.ndarray, weights_NJ: np.ndarray, prior_E: np.ndarray, *, strength: float = 4.0
    ) -> np.ndarray:
        """[N, E] of use: those of the prior, and for each place before, by its weight, how much it lifts them.

        The prior is below 1, and so is what is made of it and the counts.
        """
        if self._number_P is not None:
            before_NJ = self._number_P[before_NJ]
        prior_E = prior_E.astype(np.float32)
        used_NJE: np.ndarray = self._counts_ME.take(before_NJ, 0)
        used_NJE += np.float32(strength) * prior_E
        total_NJ = self._total_M.take(before_NJ)
        total_NJ += np.float32(strength)
        used_NJE /= total_NJ[:, :, None] - used_NJE
        np.log(used_NJE, out=used_NJE)
        said_NE: np.ndarray = np.matmul(weights_NJ[:, None], used_NJE)[:, 0]
        said_NE += (1 - np.add.reduce(weights_NJ, 1))[:, None] * np.log(prior_E / (1 - prior_E))
        return said_NE

    def _numbers(self, before_NJ: np.ndarray) -> np.ndarray:
        assert self._number_P is not None
        for place in np.unique(before_NJ[self._number_P[before_NJ] == 0]):
            self._give_row(int(place))
        return np.asarray(self._number_P[before_NJ])

    def _give_row(self, place: int) -> None:
        assert self._number_P is not None
        row = self._next
        self._next = row % (len(self._owner_M) - 1) + 1
        if self._owner_M[row] >= 0:
            self._number_P[self._owner_M[row]] = 0
        self._counts_ME[row] = 0
        self._total_M[row] = 0
        self._owner_M[row] = place
        self._number_P[place] = row
