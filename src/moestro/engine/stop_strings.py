"""Texts that end an answer and are not part of it."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Lets text through up to the first stop string; what may yet become one is held back.

    The first is the one that is complete first, of those complete at the same character the longest. So the answer
    does not depend on the pieces that its text comes in.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """Text that is certain now. After a stop string was found nothing is."""
        if self.found:
            return ""
        if not self._stops:
            return piece
        held = self._held + piece
        ends = [(begin + len(stop), begin) for stop in self._stops if (begin := held.find(stop)) >= 0]
        if ends:
            self.found = True
            return held[: min(ends)[1]]
        keep = self._undecided(held)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def finish(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return "" if self.found else held

    def _undecided(self, text: str) -> int:
        """The length of the longest end of the text that a stop string begins with."""
        longest = min(len(text), max(map(len, self._stops)) - 1)
        return next((n for n in range(longest, 0, -1) if any(one.startswith(text[-n:]) for one in self._stops)), 0)
