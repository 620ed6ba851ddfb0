"""Planes that are given up before somebody needs their slots."""

from __future__ import annotations

import numpy as np

from moestro.memory.given_up import GivenUp
from moestro.policy.lru import LRU


def _held(count: int) -> LRU:
    policy = LRU()
    for expert in range(count):
        policy.on_load((0, expert, 0), 1)
    return policy


class _Evictable(set):  # type: ignore[type-arg]
    def nbytes(self, _key: object) -> int:
        return 1


def test_as_many_as_passes_took_of_late() -> None:
    given_up, policy = GivenUp(), _held(300)
    everything = _Evictable((0, expert, 0) for expert in range(300))
    given_up.renew(policy, everything)
    assert list(given_up) == [(0, expert, 0) for expert in range(8)], "the least"
    for _ in range(50):
        given_up.loads = 20
        given_up.renew(policy, everything)
    assert 8 + 28 <= len(list(given_up)) <= 8 + 30
    assert given_up.loads == 0
    for _ in range(50):
        given_up.loads = 1000
        given_up.renew(policy, everything)
    assert len(list(given_up)) == 128, "the most"


def test_what_is_used_or_may_not_go_is_not_taken() -> None:
    given_up, policy = GivenUp(), _held(8)
    everything = _Evictable((0, expert, 0) for expert in range(8))
    given_up.renew(policy, everything)
    given_up.used(0, np.array([[1, 0, 0, 2, 0, 0, 0, 0]]))
    given_up.used(1, np.ones((1, 8), dtype=int))
    given_up.keep((0, 5, 0))
    assert given_up.take(everything - {(0, 1, 0)}) == (0, 2, 0)
    assert given_up.take(everything) == (0, 1, 0), "that could not go before"
    assert list(given_up) == [(0, 4, 0), (0, 6, 0), (0, 7, 0)]
    assert given_up.take(_Evictable()) is None
