"""The collection: what incremental matching says is what comparing everything anew says, whatever happens meanwhile."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moestro.trace import EamCollection, Matcher
from moestro.trace.collection import default_capacity
from moestro.trace.eam import shares_of, similarity

LAYERS, EXPERTS = 3, 6


def random_eam(rng: np.random.Generator, *, gaps: bool = True) -> np.ndarray:
    """Counts [L, E]; with gaps some layers are not known."""
    counts_LE = rng.integers(0, 5, (LAYERS, EXPERTS))
    if gaps:
        counts_LE[rng.random(LAYERS) < 0.3] = 0
    counts_LE[0, 0] += not counts_LE.any()
    return counts_LE


def filled(seed: int, entries: int, capacity: int = 50) -> EamCollection:
    rng = np.random.default_rng(seed)
    collection = EamCollection(LAYERS, EXPERTS, capacity=capacity)
    for _ in range(entries):
        collection.insert(random_eam(rng))
    return collection


def expected_similarities(collection: EamCollection, counts_LE: np.ndarray) -> dict[int, float]:
    """Of the entries that have a known layer in common, from scratch."""
    known_L = counts_LE.any(axis=1)
    entries = [collection.counts(index) for index in range(len(collection))]
    return {
        index: similarity(counts_LE, entry_LE)
        for index, entry_LE in enumerate(entries)
        if (known_L & entry_LE.any(axis=1)).any()
    }


Event = tuple[str, int]
events = st.lists(
    st.one_of(
        st.tuples(st.just("observe"), st.integers(0, LAYERS - 1)),
        st.tuples(st.just("insert"), st.just(0)),
        st.tuples(st.just("clear"), st.just(0)),
        st.tuples(st.just("nearest"), st.integers(1, 8)),
    ),
    max_size=40,
)


@given(seed=st.integers(0, 2**32 - 1), start=st.integers(0, 30), capacity=st.integers(1, 40), events=events)
def test_incremental_matching_is_matching_from_scratch(
    seed: int, start: int, capacity: int, events: list[Event]
) -> None:
    rng = np.random.default_rng(seed)
    collection = filled(seed, start, capacity)
    matcher = Matcher(collection)
    counts_LE = np.zeros((LAYERS, EXPERTS), dtype=np.int64)
    for name, number in [*events, ("nearest", 5)]:
        if name == "observe":
            counts_E = rng.integers(0, 3, EXPERTS)
            counts_LE[number] += counts_E
            matcher.observe(number, counts_E)
        elif name == "insert":
            collection.insert(random_eam(rng))
        elif name == "clear":
            counts_LE[:] = 0
            matcher.clear()
        else:
            expected = expected_similarities(collection, counts_LE)
            indices, similarities = matcher.nearest(number)
            assert len(indices) == len(set(indices.tolist())) == min(number, len(expected))
            best = sorted(expected.values(), reverse=True)[: len(indices)]
            np.testing.assert_allclose(similarities, best, atol=1e-5)
            np.testing.assert_allclose(similarities, [expected[index] for index in indices.tolist()], atol=1e-5)


def test_no_drift_over_many_tokens() -> None:
    rng = np.random.default_rng(0)
    collection = filled(0, 30)
    matcher = Matcher(collection)
    counts_LE = np.zeros((LAYERS, EXPERTS), dtype=np.int64)
    for step in range(6000):
        counts_E = np.bincount(rng.choice(EXPERTS, 2, replace=False), minlength=EXPERTS)
        counts_LE[step % LAYERS] += counts_E
        matcher.observe(step % LAYERS, counts_E)
    expected = expected_similarities(collection, counts_LE)
    indices, similarities = matcher.nearest(30)
    np.testing.assert_allclose(similarities, [expected[index] for index in indices.tolist()], atol=1e-5)


def test_nothing_is_like_anything_while_nothing_is_known() -> None:
    for collection in (filled(0, 0), filled(0, 10)):
        for count in (1, 3, 20):
            indices, similarities = Matcher(collection).nearest(count)
            assert len(indices) == len(similarities) == 0
    empty = filled(0, 0)
    matcher = Matcher(empty)
    matcher.observe(0, np.ones(EXPERTS, dtype=np.int64))
    assert len(matcher.nearest(1)[0]) == 0
    assert empty.overall().tolist() == np.zeros((LAYERS, EXPERTS)).tolist()


def test_an_entry_that_does_not_know_the_layer_is_left_out() -> None:
    collection = EamCollection(2, 3, capacity=4)
    collection.insert(np.array([[1, 0, 0], [0, 0, 0]]))
    collection.insert(np.array([[0, 0, 0], [0, 9, 1]]))
    matcher = Matcher(collection)
    matcher.observe(1, np.array([0, 1, 0]))
    indices, similarities = matcher.nearest(2)
    assert indices.tolist() == [1]
    matcher.observe(0, np.array([0, 1, 0]))
    indices, similarities = matcher.nearest(2)
    assert indices.tolist() == [1, 0]
    assert similarities.tolist() == [pytest.approx(9 / 82**0.5), 0]


@given(seed=st.integers(0, 2**32 - 1), extra=st.integers(1, 10))
def test_a_full_collection_gives_up_what_is_most_like_the_new(seed: int, extra: int) -> None:
    rng = np.random.default_rng(seed)
    collection = filled(seed, 5, capacity=5)
    for _ in range(extra):
        new_LE = random_eam(rng)
        before = {index: collection.counts(index).copy() for index in range(5)}
        likeness = [similarity(new_LE, entry_LE) for entry_LE in before.values()]
        index = collection.insert(new_LE)
        assert likeness[index] == pytest.approx(max(likeness), abs=1e-5)
        assert len(collection) == 5
        for other, entry_LE in before.items():
            np.testing.assert_array_equal(collection.counts(other), new_LE if other == index else entry_LE)


@given(seed=st.integers(0, 2**32 - 1), data=st.data())
def test_similarities_and_probabilities(seed: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    collection = filled(seed, data.draw(st.integers(1, 20)))
    counts_LE = random_eam(rng)
    entries = [collection.counts(index) for index in range(len(collection))]
    np.testing.assert_allclose(
        collection.similarities(counts_LE), [similarity(counts_LE, one) for one in entries], atol=1e-5
    )
    chosen_M = np.array(data.draw(st.lists(st.integers(0, len(collection) - 1), min_size=1, max_size=5)))
    weights_M = rng.random(len(chosen_M)) + 0.1
    found_LE = collection.probabilities(chosen_M, weights_M)
    weighted = sum(
        weight * entries[index] / entries[index].sum(axis=1).max()
        for index, weight in zip(chosen_M.tolist(), weights_M, strict=True)
    )
    np.testing.assert_allclose(found_LE, shares_of(np.asarray(weighted)), atol=1e-5)
    np.testing.assert_allclose(
        collection.probabilities(chosen_M, weights_M, layers=slice(1, 3)), found_LE[1:], atol=1e-6
    )
    alike_LE = collection.probabilities(chosen_M)
    np.testing.assert_allclose(alike_LE, collection.probabilities(chosen_M, np.full(len(chosen_M), 2.0)), atol=1e-6)


def test_long_requests_count_no_more_than_short_ones() -> None:
    collection = EamCollection(1, 2, capacity=4)
    collection.insert(np.array([[1000, 0]]))
    collection.insert(np.array([[0, 1]]))
    assert collection.overall().tolist() == [[0.5, 0.5]]


def test_ids_differ_and_are_kept() -> None:
    collection = filled(0, 20)
    assert len(set(collection.ids_n.tolist())) == 20
    index = collection.insert(np.ones((LAYERS, EXPERTS)), id=77)
    assert collection.ids_n[index] == 77


def test_what_cannot_be_an_entry_is_refused() -> None:
    collection = filled(0, 1)
    for wrong_LE in (np.zeros((LAYERS, EXPERTS)), np.ones((LAYERS, EXPERTS + 1)), -np.ones((LAYERS, EXPERTS))):
        with pytest.raises(AssertionError):
            collection.insert(wrong_LE)


def test_default_capacities() -> None:
    assert default_capacity(24, 32) == 1024
    assert default_capacity(30, 2048) == 136  # Switch scale: 61,440 experts
    assert default_capacity(100, 10000) == 128
