"""Planes that are given up before somebody needs their slots."""

from __future__ import annotations

import numpy as np

from moestro.keys import PlaneKey
from moestro.memory.given_up import GivenUp
from moestro.policy.base import Evictable
from moestro.policy.lru import LRU

LATE = 99
"""A layer after all others."""


def _held(count: int) -> LRU:
    policy = LRU()
    for expert in range(count):
        policy.on_load((0, expert, 0), 1)
    return policy


class _Evictable(set):  # type: ignore[type-arg]
    def nbytes(self, _key: object) -> int:
        return 1


class _Worth(LRU):
    """Names the experts of the first layer, by worths that are set."""

    def __init__(self) -> None:
        super().__init__()
        self.worths_LE = np.zeros((3, 4))

    def victims(self, _count: int, evictable: Evictable) -> list[PlaneKey]:
        keys = [(0, expert, 0) for expert in np.argsort(self.worths_LE[0]).tolist()]
        return [key for key in keys if key in evictable]

    def worths(self) -> np.ndarray:  # type: ignore[override]
        return self.worths_LE.copy()


def _keys(given_up: GivenUp) -> list[PlaneKey]:
    return [key for key, _ in given_up]


def _load(given_up: GivenUp, count: int) -> None:
    for expert in range(count):
        given_up.loaded((1, expert, 0))


def test_as_many_as_passes_took_of_late() -> None:
    given_up, policy = GivenUp(), _held(300)
    everything = _Evictable((0, expert, 0) for expert in range(300))
    given_up.renew(policy, everything)
    assert _keys(given_up) == [(0, expert, 0) for expert in range(8)], "the least"
    for _ in range(50):
        _load(given_up, 20)
        given_up.renew(policy, everything)
    assert 8 + 28 <= len(_keys(given_up)) <= 8 + 30
    for _ in range(50):
        _load(given_up, 1000)
        given_up.renew(policy, everything)
    assert len(_keys(given_up)) == 128, "the most"
    given_up.forget()
    assert _keys(given_up) == []


def test_what_is_used_or_may_not_go_is_not_taken() -> None:
    given_up, policy = GivenUp(), _held(8)
    everything = _Evictable((0, expert, 0) for expert in range(8))
    given_up.renew(policy, everything)
    given_up.used(0, np.array([[1, 0, 0, 2, 0, 0, 0, 0]]))
    given_up.used(1, np.ones((1, 8), dtype=int))
    given_up.keep((0, 5, 0))
    assert given_up.take(everything - {(0, 1, 0)}, LATE) == (0, 2, 0)
    assert given_up.take(everything, LATE) == (0, 1, 0), "that could not go before"
    assert _keys(given_up) == [(0, 4, 0), (0, 6, 0), (0, 7, 0)]
    assert given_up.take(_Evictable(), LATE) is None


def test_what_is_loaded_goes_before_what_is_worth_more() -> None:
    given_up, policy = GivenUp(), _Worth()
    everything = _Evictable((layer, expert, 0) for layer in range(3) for expert in range(4))
    policy.worths_LE[0] = [1, 2, 3, 4]
    given_up.renew(policy, everything)
    given_up.loaded((1, 0, 0))
    given_up.loaded((1, 1, 0))
    policy.worths_LE[1, :2] += [2, 1]  # as they are used
    given_up.renew(policy, everything)
    assert given_up.rise == 1.5
    policy.worths_LE[2, 3] = 99  # too late: what counts is what they were worth when the pass began
    for key in ((1, 1, 0), (1, 3, 0), (2, 3, 0)):
        given_up.loaded(key)
    assert dict(given_up)[2, 3, 0] == dict(given_up)[1, 3, 0] == 1.5
    assert dict(given_up)[1, 1, 0] == 2.5
    assert given_up.take(everything, 1) == (0, 0, 0)
    assert given_up.take(everything, 1) == (0, 1, 0), "layer 1 is still being computed"
    assert given_up.take(everything, 2) == (1, 3, 0)
    assert [given_up.take(everything, LATE) for _ in range(3)] == [(2, 3, 0), (1, 1, 0), (0, 2, 0)]


def test_where_worths_are_not_known_what_is_loaded_stays() -> None:
    given_up, policy = GivenUp(), _held(3)
    everything = _Evictable((0, expert, 0) for expert in range(4))
    given_up.renew(policy, everything)
    given_up.loaded((0, 3, 0))
    assert _keys(given_up) == [(0, 0, 0), (0, 1, 0), (0, 2, 0)]
