"""MoE-Infinity, FineMoE, AdapMoE and EdgeMoE, on cases small enough to work out by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.policy.keeping import make_keep_policy
from moestro.policy.keeping.adapmoe import AdapMoE, slots_per_layer
from moestro.policy.observation import Shape
from moestro.trace.collection import EamCollection
from routings import token, tokens

SHAPE = Shape(2, 4, 1)


def test_moe_infinity_is_the_published_priority() -> None:
    collection = EamCollection(2, 4)
    collection.insert(np.array([[4, 1, 0, 0], [0, 3, 1, 0]]))
    collection.insert(np.array([[0, 0, 2, 2], [1, 0, 0, 4]]))
    policy = make_keep_policy("moe_infinity", SHAPE, collection=collection)
    policy.begin(1)
    policy.observe(token(SHAPE, 0, 3))
    share_LE = np.array([[0, 0, 0.5, 0.5], [0.2, 0, 0, 0.8]])
    expected_LE = (share_LE + 1e-6) * np.array([[1], [0.5]])
    np.testing.assert_allclose(policy.worth(0), expected_LE, atol=1e-8)
    # The other entry is nearer from now on.
    policy.observe(token(SHAPE, 1, 1))
    policy.observe(token(SHAPE, 0, 0))
    assert policy.worth(0)[0].argmax() == 0
    assert policy.worth(0)[1].argmax() == 1


def test_moe_infinity_breaks_ties_by_recency() -> None:
    collection = EamCollection(2, 4)
    collection.insert(np.array([[4, 0, 0, 0], [4, 0, 0, 0]]))
    policy = make_keep_policy("moe_infinity", SHAPE, collection=collection)
    policy.begin(1)
    for expert in (0, 2, 3, 1):
        policy.observe(token(SHAPE, 0, expert))
    assert np.argsort(policy.worth(0)[0]).tolist() == [2, 3, 1, 0]


def test_moe_infinity_with_no_collection_learns_its_own_and_leaves_a_given_one_alone() -> None:
    given_one = EamCollection(2, 4)
    for collection in (None, given_one):
        policy = make_keep_policy("moe_infinity", SHAPE, collection=collection)
        for request, expert in [(1, 1), (2, 2), (3, 1)]:
            policy.begin(request)
            for one in tokens(SHAPE, [[[expert], [3 - expert]]] * 5, request=request):
                policy.observe(one)
            if request < 3:
                policy.end(request)
        if collection is None:
            share_E = policy.worth(1)[1]
            assert share_E[2] == pytest.approx(0.5, abs=1e-3)
            assert share_E[[0, 1, 3]].max() < 1e-3
    assert len(given_one) == 0


def test_finemoe_takes_probabilities_from_the_most_similar_pass() -> None:
    shape = Shape(3, 6, 2)
    policy = make_keep_policy("finemoe", shape)
    first, second = [[0, 1], [2, 3], [4, 5]], [[1, 2], [0, 5], [0, 1]]
    policy.begin(1)
    for one in tokens(shape, [first, second, first[:1]]):
        policy.observe(one)
    # Stored rows have length 1: weights 2/3 and 1/3 become 2 and 1 over the root of 5.
    p_E = np.full(6, 1e-3)
    p_E[[2, 3]] = np.array([2, 1]) / 5**0.5
    frequency_E = np.array([1, 0, 1, 1, 0, 1])
    np.testing.assert_allclose(policy.worth(0)[1], p_E * frequency_E, rtol=1e-6)


def test_finemoe_replaces_the_most_similar_map() -> None:
    shape = Shape(1, 6, 1)
    policy = make_keep_policy("finemoe", shape, capacity=2)
    policy.begin(1)
    for expert in (0, 1, 1, 1, 0):
        policy.observe(token(shape, 0, expert))
    assert policy.worth(0)[0].argmax() == 0


@given(st.data())
@settings(max_examples=50)
def test_slots_per_layer_are_the_best_there_are(data: st.DataObject) -> None:
    layers, experts, least = 3, 5, data.draw(st.integers(1, 2))
    gains = data.draw(st.lists(st.integers(0, 9), min_size=layers * experts, max_size=layers * experts))
    hits_LE = np.cumsum(np.array(gains, float).reshape(layers, experts), 1)
    slots = data.draw(st.integers(layers * least, layers * experts))
    chosen_L = slots_per_layer(hits_LE, slots, least=least)
    assert chosen_L.sum() == slots
    assert chosen_L.min() >= least
    assert chosen_L.max() <= experts
    every = itertools.product(range(least, experts + 1), repeat=layers)
    best = max(sum(hits_LE[i, c - 1] for i, c in enumerate(one)) for one in every if sum(one) == slots)
    assert hits_LE[np.arange(layers), chosen_L - 1].sum() == best


def test_adapmoe_gives_slots_where_they_pay_and_is_lru_within() -> None:
    shape = Shape(2, 6, 1)
    policy = AdapMoE(shape, slots=6)
    policy.begin(1)
    # Layer 0 goes round five experts, layer 1 has one.
    for one in tokens(shape, [[[step % 5], [0]] for step in range(40)]):
        policy.observe(one)
    assert policy.quota_L.tolist() == [5, 1]
    worth_LE = policy.worth(1)
    assert np.argsort(-worth_LE[0]).tolist() == [4, 3, 2, 1, 0, 5]
    assert np.unravel_index(worth_LE.argmin(), worth_LE.shape)[0] == 1


def test_edgemoe_follows_the_two_layers_before() -> None:
    shape = Shape(3, 4, 1)
    sensitivity_L = np.array([1.0, 2.0, 3.0])
    policy = make_keep_policy("edgemoe", shape, sensitivity_L=sensitivity_L)
    policy.begin(1)
    for one in tokens(shape, [[[step % 4], [(step + 1) % 4], [(step + 2) % 4]] for step in range(400)]):
        policy.observe(one)
    policy.observe(token(shape, 0, 2))
    worth_LE = policy.worth(0)
    assert worth_LE[1].argmax() == 3
    assert worth_LE[2].argmax() == 0
    assert worth_LE[1].max() == pytest.approx(2, abs=0.2)
    assert worth_LE[2].max() == pytest.approx(3, abs=0.3)
    np.testing.assert_allclose(worth_LE[0], 0.25, atol=0.01)
