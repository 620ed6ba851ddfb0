from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from moestro.keys import PlaneKey
from moestro.policy import LRU, Need
from routings import Free

NEED = Need((9, 9, 9), 4096, urgent=True)


A, B, C = (0, 0, 0), (0, 1, 0), (1, 0, 0)


def loaded(*keys: PlaneKey) -> LRU:
    policy = LRU()
    for key in keys:
        policy.on_load(key, 4096)
    return policy


def test_the_oldest_leaves_first() -> None:
    assert loaded(A, B, C).victim(NEED, Free(C, B, A)) == A


def test_a_use_makes_young() -> None:
    policy = loaded(A, B, C)
    policy.on_use(A)
    assert policy.victim(NEED, Free(A, B, C)) == B


def test_what_may_not_leave_is_skipped() -> None:
    assert loaded(A, B, C).victim(NEED, Free(C)) == C
    assert loaded(A, B, C).victim(NEED, Free()) is None


def test_the_evicted_is_forgotten_and_a_use_of_the_absent_changes_nothing() -> None:
    policy = loaded(A, B)
    policy.on_evict(A)
    policy.on_use(A)
    assert policy.victim(NEED, Free(A, B)) == B
    policy.on_load(A, 4096)
    assert policy.victim(NEED, Free(A, B)) == B


@given(st.lists(st.integers(0, 5), max_size=60), st.sets(st.integers(0, 5)))
def test_like_a_list_ordered_by_last_touch(touches: list[int], free: set[int]) -> None:
    policy = LRU()
    order: list[int] = []
    for expert in touches:
        if expert in order:
            order.remove(expert)
            policy.on_use((0, expert, 0))
        else:
            policy.on_load((0, expert, 0), 4096)
        order.append(expert)
    expected = next(((0, expert, 0) for expert in order if expert in free), None)
    assert policy.victim(NEED, Free(*((0, expert, 0) for expert in free))) == expected
