"""The order in which recorded rows go through the model: passes over one chunk of each request in flight.

Shapes: N rows of a trace, B rows of a pass.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from moestro.policy.observation import RequestRows
from moestro.trace import trace


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
    chunks: deque[trace.Pass]


def passes(recorded: trace.Trace, *, concurrency: int = 1) -> Iterator[Pass]:
    """All rows of the trace: requests start in its order, `concurrency` of them at a time."""
    waiting = deque(_Flight(request, deque(recorded.passes(request))) for request in range(recorded.requests))
    flying: list[_Flight] = []
    while waiting or flying:
        begins = []
        while waiting and len(flying) < concurrency:
            flying.append(waiting.popleft())
            begins.append(flying[-1].request)
        spans, requests, first = [], [], 0
        for flight in flying:
            chunk = flight.chunks.popleft()
            spans.append(np.arange(chunk.first, chunk.last))
            last = first + chunk.last - chunk.first
            requests.append(RequestRows(flight.request, first, last, chunk.decode))
            first = last
        ends = tuple(flight.request for flight in flying if not flight.chunks)
        flying = [flight for flight in flying if flight.chunks]
        yield Pass(np.concatenate(spans), tuple(requests), tuple(begins), ends)
