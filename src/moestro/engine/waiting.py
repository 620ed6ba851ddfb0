"""Who is next: by priority, then by arrival, with a bound on how many may overtake."""

from __future__ import annotations

import heapq

from moestro.engine.sequence import Sequence

MOST_OVERTAKES = 8
"""So many may start before the one that has waited longest, counted from when it became that."""


class WaitingLine:
    """Requests that wait. Lower priorities come first; whoever has waited longest is passed over a few times at most,
    so that each one's turn comes after a bounded number of others."""

    def __init__(self) -> None:
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

    def first(self) -> Sequence:
        """Whose turn it is. There is one."""
        oldest = next(iter(self._by_arrival.values()))
        if self._overtakes >= MOST_OVERTAKES:
            return oldest
        while self._by_priority[0][1] not in self._by_arrival:
            heapq.heappop(self._by_priority)  # has left otherwise
        return self._by_arrival[self._by_priority[0][1]]

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
