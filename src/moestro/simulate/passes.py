"""The order in which recorded rows go through the model: passes over one chunk of each request in flight.

Shapes: N rows of a trace, B rows of a pass.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from moestro.policy.observation import RequestRows
from moestro.trace.trace import Trace


@dataclass(frozen=True, slots=True)
class Pass:
    """Rows of the trace that go through together; `begins` and `ends` are the requests that start or finish with it."""

    rows_B: np.ndarray
    requests: tuple[RequestRows, ...]
    begins: tuple[int, ...]
    ends: tuple[int, ...]


@dataclass(slots=True)
class _Flight:
    request: int
    chunks: deque[tuple[int, int]]


def passes(trace: Trace, *, concurrency: int = 1) -> Iterator[Pass]:
    """All rows of the trace: requests start in its order, `concurrency` of them at a time."""
    waiting = deque(_Flight(request, _chunks(trace, request)) for request in range(len(trace.offsets_R1) - 1))
    flying: list[_Flight] = []
    while waiting or flying:
        begins = []
        while waiting and len(flying) < concurrency:
            flight = waiting.popleft()
            if flight.chunks:
                flying.append(flight)
                begins.append(flight.request)
        if not flying:
            return
        spans, requests, first = [], [], 0
        for flight in flying:
            start, end = flight.chunks.popleft()
            spans.append(np.arange(start, end))
            requests.append(RequestRows(flight.request, first, first + end - start, bool(trace.decode_N[start])))
            first += end - start
        ends = tuple(flight.request for flight in flying if not flight.chunks)
        flying = [flight for flight in flying if flight.chunks]
        yield Pass(np.concatenate(spans), tuple(requests), tuple(begins), ends)


def _chunks(trace: Trace, request: int) -> deque[tuple[int, int]]:
    """(first row, row after the last) of each pass of a request: the steps recorded, or a row each."""
    first, last = int(trace.offsets_R1[request]), int(trace.offsets_R1[request + 1])
    if trace.step_N is None:
        return deque((row, row + 1) for row in range(first, last))
    steps_N = trace.step_N[first:last]
    cuts = [first, *(first + 1 + np.flatnonzero(np.diff(steps_N))).tolist(), last] if last > first else []
    return deque(itertools.pairwise(cuts))
