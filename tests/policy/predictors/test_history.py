"""Histories: row by row, in chunks and for a whole trace at once are the same thing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.policy.observation import Shape
from moestro.policy.predictors.history import DECAYS, OWN, History, dense_rows, histories
from traces import random_trace


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), cut=st.integers(1, 150))
def test_rows_one_by_one_in_chunks_or_all_at_once(seed: int, cut: int) -> None:
    trace = random_trace(seed, prompts=(0,), answers=(151,), layers=1)
    ids_NK, weights_NK = trace.experts_NLK[:, 0].astype(np.int64), trace.weights_NLK[:, 0]
    single, chunks = History(Shape(1, 8, 2)), History(Shape(1, 8, 2))
    stepped = []
    for ids_K, weights_K in zip(ids_NK, weights_NK, strict=True):
        single.step(0, ids_K, weights_K / np.float32(weights_K.sum()))
        stepped.append(single.own_LFE[0].copy())
    chunks.steps(0, ids_NK[:cut], weights_NK[:cut])
    chunks.steps(0, ids_NK[cut:], weights_NK[cut:])
    uses_NE, dense_NE = dense_rows(ids_NK, weights_NK, 8)
    whole_NFE = histories(uses_NE, dense_NE, np.zeros((OWN, 8), dtype=np.float32))
    np.testing.assert_allclose(whole_NFE, np.stack(stepped), rtol=2e-4, atol=1e-5)
    np.testing.assert_allclose(chunks.own_LFE[0], stepped[-1], rtol=2e-4, atol=1e-5)


def test_what_the_features_say() -> None:
    history = History(Shape(2, 4, 1))
    for expert in (3, 1, 1):
        history.steps(0, np.array([[expert]]), np.array([[0.5]]))
    own_FE = history.own_LFE[0]
    assert own_FE[0].tolist() == [0, 1, 0, 0]  # the last visit
    half = DECAYS.index(0.5)
    assert own_FE[half].tolist() == [0, 0.75, 0, 0.125]
    assert own_FE[-2].tolist() == pytest.approx([0, 1, 0, 1 / 1.5])  # two visits ago
    assert own_FE[-1].tolist() == [0, 1, 0, 0]  # weights are normalised
    assert not history.own_LFE[1].any()


def test_a_copy_is_a_copy() -> None:
    one, other = History(Shape(1, 4, 1)), History(Shape(1, 4, 1))
    one.step(0, np.array([2]), np.array([1.0]))
    other.copy_from(one)
    one.step(0, np.array([1]), np.array([1.0]))
    assert other.own_LFE[0, 0].tolist() == [0, 0, 1, 0]
