"""How long experts take to compute, learned from how long calls took."""

from __future__ import annotations

_MEMORY = 1 / 64


class ComputeCosts:
    """A part for every expert of a call and a part for every token of it, by least squares that forget slowly."""

    def __init__(self) -> None:
        # Decaying sums of experts^2, experts * tokens, tokens^2, seconds * experts and seconds * tokens.
        self._ee = self._et = self._tt = self._se = self._st = 0.0

    def computed(self, experts: int, tokens: int, seconds: float) -> None:
        """A call computed with so many experts, for so many (token, expert) pairs."""
        keep = 1 - _MEMORY
        self._ee = keep * self._ee + experts * experts
        self._et = keep * self._et + experts * tokens
        self._tt = keep * self._tt + tokens * tokens
        self._se = keep * self._se + seconds * experts
        self._st = keep * self._st + seconds * tokens

    def seconds(self, tokens: int) -> float:
        """Of one expert for so many tokens; 0 before the first call."""
        determinant = self._ee * self._tt - self._et * self._et
        if determinant > 1e-6 * self._ee * self._tt:
            each = (self._se * self._tt - self._st * self._et) / determinant
            token = (self._st * self._ee - self._se * self._et) / determinant
            if each >= 0 and token >= 0:
                return each + token * tokens
        # All calls were alike so far: tokens tell as much as experts do.
        return self._st / self._tt * tokens if self._tt else 0.0
