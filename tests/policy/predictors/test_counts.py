"""Popularity, recency, successors, previous token and layer, EAMC and gate, on cases worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from moestro.policy.observation import RequestRows, Routing, Shape
from moestro.policy.predictors.eamc import EamcPredictor
from moestro.policy.predictors.flight import any_of, within
from moestro.policy.predictors.gate import Gate
from moestro.policy.predictors.popularity import Popularity
from moestro.policy.predictors.previous_layer import PreviousLayer
from moestro.policy.predictors.previous_token import PreviousToken
from moestro.policy.predictors.recency import Recency
from moestro.policy.predictors.successors import Successors
from moestro.trace.collection import EamCollection
from routings import routing, token, tokens

SHAPE = Shape(2, 4, 1)


def test_requests_and_visits_are_merged_as_independent() -> None:
    chance_RE = np.array([[0.5, 0], [0.5, 0.2]])
    np.testing.assert_allclose(any_of(chance_RE), [0.75, 0.2])
    np.testing.assert_allclose(within(np.array([0.5, 0.0, 1.0]), 3), [0.875, 0, 1])


def test_popularity_is_the_share_of_rows_with_a_prior_of_eight() -> None:
    popularity = Popularity(SHAPE)
    popularity.begin(1)
    for expert in (2, 2, 2, 1):
        popularity.observe(token(SHAPE, 0, expert))
    np.testing.assert_allclose(popularity.forecast(0), np.array([2, 3, 5, 2]) / 12, rtol=1e-6)
    popularity.begin(2)
    np.testing.assert_allclose(popularity.forecast(0), 1 - (1 - np.array([2, 3, 5, 2]) / 12) ** 2, rtol=1e-6)


def test_popularity_of_a_long_prompt_weighs_as_sixteen_rows() -> None:
    popularity = Popularity(SHAPE)
    popularity.begin(1)
    popularity.observe(routing(SHAPE, 0, [[3]] * 1600, [RequestRows(1, 0, 1600, decode=False)]))
    np.testing.assert_allclose(popularity.forecast(0), np.array([2, 2, 2, 18]) / 24, rtol=1e-6)


def test_recency_halves_with_the_half_life_and_starts_from_popularity() -> None:
    recency = Recency(SHAPE, half_life=2)
    recency.begin(1)
    for expert in (1, 2, 2):
        recency.observe(token(SHAPE, 0, expert))
    keep = 0.5**0.5
    expected_E = 0.25 * keep**3 + (1 - keep) * np.array([0, keep**2, keep + 1, 0])
    np.testing.assert_allclose(recency.forecast(0), expected_E, rtol=1e-5)
    recency.begin(2)
    recency.end(1)
    np.testing.assert_allclose(recency.forecast(0), np.array([2, 3, 4, 2]) / 11, rtol=1e-5)


def test_successors_count_smooth_and_forget() -> None:
    counts = Successors(8, 4)
    prior_E = np.full(4, 0.25)
    before = np.array([[5]])
    for expert in (0, 0, 3):
        counts.add(before, np.array([[expert]]))
    np.testing.assert_allclose(counts.chances(before, prior_E)[0, 0], np.array([3, 1, 1, 2]) / 7, rtol=1e-6)
    np.testing.assert_allclose(counts.mean(before, prior_E), counts.chances(before, prior_E).mean(1), rtol=1e-6)
    np.testing.assert_allclose(counts.chances(np.array([[6]]), prior_E)[0, 0], prior_E)
    for _ in range(10_000):
        counts.add(before, np.array([[1]]))
    assert counts.chances(before, prior_E)[0, 0, 1] > 0.99


def test_successors_in_little_memory_know_the_latest_places() -> None:
    counts = Successors(100, 4, limit_bytes=5 * 16)
    prior_E = np.full(4, 0.25)
    for place in range(20):
        for _ in range(3):
            counts.add(np.array([[place, (place + 50) % 100]]), np.array([[place % 4]]))
    counts.add(np.arange(60, 80)[None], np.array([[0]]))
    for place in range(60, 75):
        np.testing.assert_allclose(counts.chances(np.array([[place]]), prior_E)[0, 0], prior_E)
    for place in range(75, 80):
        np.testing.assert_allclose(counts.chances(np.array([[place]]), prior_E)[0, 0], [0.4, 0.2, 0.2, 0.2], rtol=1e-6)


def test_previous_token_learns_what_follows() -> None:
    predictor = PreviousToken(SHAPE, trust=1.0)
    predictor.begin(1)
    for one in tokens(SHAPE, [[[step % 4], [3 - step % 4]] for step in range(400)]):
        predictor.observe(one)
    assert predictor.forecast(0).argmax() == 0
    assert predictor.forecast(1).argmax() == 3
    assert predictor.forecast(0).max() > 0.9
    # Another request has its own last token; with two, both successors are likely.
    predictor.begin(2)
    predictor.observe(token(SHAPE, 0, 1, request=2))
    assert set(np.argsort(-predictor.forecast(0))[:2].tolist()) == {0, 2}


def test_previous_token_learns_from_a_prompt() -> None:
    predictor = PreviousToken(SHAPE, trust=1.0)
    predictor.begin(1)
    rows = [[step % 4] for step in range(160)]
    for _ in range(40):
        predictor.observe(routing(SHAPE, 0, rows, [RequestRows(1, 0, 160, decode=False)]))
    assert predictor.forecast(0).argmax() == 0
    assert predictor.forecast(0).max() > 0.9


@pytest.mark.parametrize("prompt", [False, True])
def test_previous_layer_learns_pairs_of_layers(prompt: bool) -> None:
    shape = Shape(4, 5, 1)
    rng = np.random.default_rng(0)
    predictor = PreviousLayer(shape, reach=2, trusts=(1.0,))
    predictor.begin(1)
    for _ in range(60 if prompt else 600):
        first_T = rng.integers(0, 5, 12 if prompt else 1)
        parts = [RequestRows(1, 0, len(first_T), decode=not prompt)]
        for layer in range(4):
            predictor.observe(routing(shape, layer, ((first_T + layer) % 5)[:, None].tolist(), parts))
    last = int(first_T[-1])
    for layer in range(2):
        predictor.observe(token(shape, layer, (last + layer) % 5))
    assert predictor.forecast(2).argmax() == (last + 2) % 5
    assert predictor.forecast(2).max() > 0.9
    assert predictor.forecast(3).argmax() == (last + 3) % 5
    # Nothing within reach: popularity, which is about even here.
    assert predictor.forecast(1).max() < 0.4


def test_eamc_takes_the_nearest_and_until_then_popularity() -> None:
    collection = EamCollection(2, 4)
    predictor = EamcPredictor(SHAPE, collection, nearest=1)
    predictor.begin(1)
    predictor.observe(token(SHAPE, 0, 3))
    np.testing.assert_allclose(predictor.forecast(1), 0.25)
    collection.insert(np.array([[4, 1, 0, 0], [0, 3, 1, 0]]))
    collection.insert(np.array([[0, 0, 2, 2], [1, 0, 0, 4]]))
    predictor.observe(token(SHAPE, 0, 3))
    np.testing.assert_allclose(predictor.forecast(1), [0.2, 0, 0, 0.8], rtol=1e-6)
    predictor.end(1)
    assert len(collection) == 2


def test_eamc_with_no_collection_learns_from_what_ended() -> None:
    predictor = EamcPredictor(SHAPE, nearest=1)
    for request, (first, second) in enumerate([(0, 1), (2, 3), (2, 1)] * 2, start=1):
        predictor.begin(request)
        for one in tokens(SHAPE, [[[first], [second]]] * 5, request=request):
            predictor.observe(one)
        predictor.end(request)
    predictor.begin(9)
    predictor.observe(token(SHAPE, 0, 0, request=9))
    assert predictor.forecast(1).argmax() == 1


def asked(gate: Gate, ids: list[list[int]]) -> np.ndarray:
    gate.lookahead(0, 1, np.array(ids))
    return gate.forecast(1).copy()


def test_gate_is_as_sure_as_its_ranks_were_right() -> None:
    shape = Shape(2, 6, 2)
    rng = np.random.default_rng(0)
    gate = Gate(shape)
    gate.begin(1)
    for _ in range(2000):
        ids_C = rng.permutation(6)[:4]
        gate.observe(token(shape, 0, 0, 1))
        gate.lookahead(0, 1, ids_C[None])
        # The first is always right, and either the second or one that was not named.
        other = ids_C[1] if rng.random() < 0.6 else next(each for each in range(6) if each not in ids_C)
        gate.observe(token(shape, 1, int(ids_C[0]), int(other)))
    gate.observe(token(shape, 0, 0, 1))
    chance_E = asked(gate, [[5, 4, 3, 2]])
    assert chance_E[5] > 0.98
    assert chance_E[4] == pytest.approx(0.6, abs=0.05)
    assert chance_E[[3, 2]].max() < 0.02
    # 2 picks less 1.6 are left for the two others.
    assert chance_E[[0, 1]].sum() == pytest.approx(0.4, abs=0.08)


def test_gate_merges_rows_and_forgets_once_the_layer_has_routed() -> None:
    shape = Shape(3, 6, 1)
    gate = Gate(shape, furthest=1)
    gate.begin(1)
    gate.begin(2)
    rows = [RequestRows(1, 0, 1, decode=True), RequestRows(2, 1, 2, decode=True)]
    popular_E = gate.forecast(1).copy()
    gate.observe(routing(shape, 0, [[0], [1]], rows))
    gate.lookahead(0, 2, np.array([[1, 2], [1, 2]]))
    np.testing.assert_allclose(gate.forecast(2), popular_E)
    both_E, each_E = asked(gate, [[3, 0], [3, 0]]), asked(gate, [[3, 0], [2, 0]])
    assert both_E[3] == pytest.approx(1 - (1 - 0.75) ** 2)
    assert 0.75 < each_E[3] < 0.8
    assert each_E[2] == pytest.approx(each_E[3], abs=1e-6)
    gate.observe(routing(shape, 1, [[3], [3]], rows))
    assert gate.forecast(1).max() < 0.6


def test_gate_ignores_rows_that_do_not_match() -> None:
    gate = Gate(SHAPE)
    gate.begin(1)
    gate.observe(token(SHAPE, 0, 0))
    gate.lookahead(0, 1, np.array([[1, 2], [1, 2]]))
    gate.observe(token(SHAPE, 1, 3))
    assert isinstance(token(SHAPE, 1, 3), Routing)
    assert np.isfinite(gate.forecast(1)).all()
