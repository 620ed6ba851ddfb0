"""LRU, LFU, LRFU, HOBBIT and eMoE, against their formulas."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moestro.policy.keeping import make_keep_policy
from moestro.policy.keeping.keeper import shares
from moestro.policy.keeping.lrfu import LRFU
from moestro.policy.observation import RequestRows, Shape
from routings import routing, token

SHAPE = Shape(2, 4, 1)
PICKS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40)


def ranks(worth_LE: np.ndarray) -> list[list[int]]:
    return [np.argsort(row_E, kind="stable").tolist() for row_E in worth_LE]


@given(PICKS)
def test_lru_is_the_time_of_last_use(passes: list[tuple[int, int]]) -> None:
    policy = make_keep_policy("lru", SHAPE)
    last_LE = np.zeros((2, 4))
    for time, one in enumerate(passes):
        for layer, expert in enumerate(one):
            policy.observe(token(SHAPE, layer, expert))
            last_LE[layer, expert] = 2 * time + layer + 1
    assert (np.argsort(policy.worth(1), axis=None) == np.argsort(last_LE, axis=None)).all()


def test_lru_takes_a_prefetch_for_a_use() -> None:
    policy = make_keep_policy("lru", SHAPE)
    policy.observe(token(SHAPE, 0, 1))
    policy.observe(token(SHAPE, 1, 1))
    policy.loaded(0, 3)
    worth_LE = policy.worth(1)
    assert worth_LE[0, 3] > worth_LE[0, 1] > worth_LE[0, 0]


@given(PICKS, st.floats(0.1, 50))
def test_lrfu_is_the_published_sum(passes: list[tuple[int, int]], half_life: float) -> None:
    """C = sum over uses of (1/2)^(age / half-life), age in passes; by the policy up to one factor for all."""
    policy = LRFU(SHAPE, half_life=half_life)
    crf_LE = np.zeros((2, 4))
    decay = 0.5 ** (1 / (2 * half_life))
    for one in passes:
        for layer, expert in enumerate(one):
            policy.observe(token(SHAPE, layer, expert))
            crf_LE *= decay
            crf_LE[layer, expert] += 1
    worth_LE = policy.worth(1)
    np.testing.assert_allclose(worth_LE / worth_LE.max(), crf_LE / crf_LE.max(), rtol=1e-9, atol=1e-12)


def test_lrfu_goes_on_for_ever() -> None:
    policy = LRFU(SHAPE, half_life=0.01)
    for step in range(3000):
        for layer in range(2):
            policy.observe(token(SHAPE, layer, step % 3))
    worth_LE = policy.worth(1)
    assert np.isfinite(worth_LE).all()
    assert ranks(worth_LE) == [[3, 0, 1, 2], [3, 0, 1, 2]]


def test_lfu_counts_visits_and_a_prompt_by_its_share() -> None:
    policy = make_keep_policy("lfu", SHAPE)
    policy.observe(token(SHAPE, 0, 2))
    policy.observe(token(SHAPE, 0, 2))
    policy.observe(routing(SHAPE, 0, [[0], [0], [0], [1]], [RequestRows(1, 0, 4, decode=False)]))
    assert policy.worth(0)[0].tolist() == [0.75, 0.25, 2, 0]


def test_shares_of_a_mixed_step_are_the_largest() -> None:
    parts = [RequestRows(1, 0, 2, decode=False), RequestRows(2, 2, 3, decode=True), RequestRows(3, 3, 3, decode=False)]
    ids_U, share = shares(routing(SHAPE, 0, [[0], [1], [1]], parts))
    assert dict(zip(ids_U.tolist(), np.asarray(share).tolist(), strict=True)) == {0: 0.5, 1: 1.0}


def test_hobbit_is_the_published_score() -> None:
    weights = {"recency": 0.4, "frequency": 0.3, "high_precision": 0.2, "distance": 0.1}
    policy = make_keep_policy("hobbit", SHAPE, **weights)
    policy.begin(1)
    # Time in passes: a visit of one of two layers is half a pass.
    for layer, expert in [(0, 1), (1, 2), (0, 1), (1, 3), (0, 0)]:
        policy.observe(token(SHAPE, layer, expert))
    now = 2.5
    score_LE = np.zeros((2, 4))
    score_LE[0, 1] = 0.4 * 1.5 / now + (0.3 + 0.2) * 2 / now
    score_LE[0, 0] = 0.4 * 2.5 / now + (0.3 + 0.2) * 1 / now
    score_LE[1, 2] = 0.4 * 1.0 / now + (0.3 + 0.2) * 1 / now
    score_LE[1, 3] = 0.4 * 2.0 / now + (0.3 + 0.2) * 1 / now
    score_LE[0] += 0.1 * (1 - 0 / 2)
    score_LE[1] += 0.1 * (1 - 1 / 2)
    np.testing.assert_allclose(policy.worth(0) / now, score_LE)


def test_hobbit_starts_anew_with_a_sequence_but_remembers_the_order() -> None:
    policy = make_keep_policy("hobbit", SHAPE)
    policy.begin(1)
    for expert in (1, 1, 1, 1, 2):
        policy.observe(token(SHAPE, 0, expert))
    assert policy.worth(0)[0].argmax() == 1
    policy.end(1)
    policy.begin(2)
    policy.observe(token(SHAPE, 0, 3, request=2))
    assert ranks(policy.worth(0))[0] == [0, 1, 2, 3]


def test_emoe_predicts_every_so_many_requests() -> None:
    policy = make_keep_policy("emoe", SHAPE, group=2, coverage=0.6)
    for request, experts in [(1, (0, 0, 0)), (2, (0, 1, 2)), (3, (3, 2)), (4, (1,))]:
        policy.begin(request)
        if request == 4:
            break
        for expert in experts:
            policy.observe(token(SHAPE, 0, expert, request=request))
        policy.end(request)
    # The group of requests 1 and 2 used expert 0 four times in six; the others of the layer are ranked by last use.
    assert ranks(policy.worth(0))[0] == [1, 3, 2, 0]
    with pytest.raises(ValueError, match="group"):
        make_keep_policy("emoe", SHAPE, group=-1)
