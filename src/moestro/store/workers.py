"""Several experts at a time, on one thread each."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from moestro.cores import available_cores

Result = TypeVar("Result")


def worker_count() -> int:
    """One for each core that this process may use."""
    return available_cores()


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """torch on one thread per caller.

    Small matrices gain nothing from more, and results that depend on how many threads share a sum could not be had
    again after a kill.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_order(jobs: Iterable[Callable[[], Result]]) -> Iterator[Result]:
    """The results of `jobs` in their order. A few run at a time; jobs are taken from the iterable as they are begun."""
    workers = worker_count()
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for job in jobs:
                waiting.append(pool.submit(job))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
