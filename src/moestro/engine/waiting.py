"""Who is next: by priority, then by likeness or arrival, with a bound on how many may overtake."""

from __future__ import annotations

import heapq
from collections.abc import Collection

from moestro.engine.likeness import most_alike
from moestro.engine.sequence import Sequence

MOST_OVERTAKES = 8
"""So many may start before the one that has waited longest, counted from when it became that."""

MOST_COMPARED = 64
"""So many of equal priority are looked at for their likeness, those that came first."""


class WaitingLine:
    """Requests that wait. Lower priorities come first; whoever has waited longest is passed over a few times at most,
    so that each one's turn comes after a bounded number of others.

    With `alike` those of equal priority do not come in the order of arrival, but whoever is most like those that run.
    """

    def __init__(self, *, alike: bool = False) -> None:
        self._alike = alike
        self._by_arrival: dict[int, Sequence] = {}
        self._by_priority: list[tuple[int, int]] = []
        self._overtakes = 0

    def __len__(self) -> int:
        return len(self._by_arrival)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence.number in self._by_arrival

    def add(self, sequence: Sequence) -> None:
        """A request that waits from now on."""
        self._by_arrival[sequence.number] = sequence
        heapq.heappush(self._by_priority, (sequence.priority, sequence.number))

    def add_back(self, sequence: Sequence) -> None:
        """One that had its turn and gave it up: it has its old place again."""
        self._by_arrival = {sequence.number: sequence, **self._by_arrival}
        self._by_arrival = dict(sorted(self._by_arrival.items()))
        heapq.heappush(self._by_priority, (sequence.priority, sequence.number))

    def first(self, running: Collection[Sequence] = ()) -> Sequence:
        """Whose turn it is, beside those that run. There is one."""
        oldest = next(iter(self._by_arrival.values()))
        if self._overtakes >= MOST_OVERTAKES:
            return oldest
        while self._by_priority[0][1] not in self._by_arrival:
            heapq.heappop(self._by_priority)  # has left otherwise
        first = self._by_arrival[self._by_priority[0][1]]
        return self._most_alike(first.priority, running) if self._alike and running else first

    def _most_alike(self, priority: int, running: Collection[Sequence]) -> Sequence:
        equals = [one for one in self._by_arrival.values() if one.priority == priority][:MOST_COMPARED]
        if len(equals) == 1:
            return equals[0]
        return equals[most_alike([one.sketch for one in equals], [one.sketch for one in running])]

    def start(self, sequence: Sequence) -> None:
        """Its turn has come."""
        overtakes = sequence.number != next(iter(self._by_arrival))
        self._overtakes = self._overtakes + 1 if overtakes else 0
        del self._by_arrival[sequence.number]

    def remove(self, sequence: Sequence) -> None:
        """It waits no more, without having had its turn."""
        if sequence.number == next(iter(self._by_arrival)):
            self._overtakes = 0
        del self._by_arrival[sequence.number]
