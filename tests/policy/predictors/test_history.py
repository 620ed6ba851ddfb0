"""What is learned from: a whole trace at once or in chunks is the same thing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.policy.predictors.history import DECAYS, OWN, dense_rows, histories
from traces import random_trace


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), cut=st.integers(1, 150))
def test_in_chunks_or_all_at_once(seed: int, cut: int) -> None:
    trace = random_trace(seed, prompts=(0,), answers=(151,), layers=1)
    uses_NE, weights_NE = dense_rows(trace.experts_NLK[:, 0], trace.weights_NLK[:, 0], 8)
    whole_NFE = histories(uses_NE, weights_NE, np.zeros((OWN, 8), np.float32))
    before_NFE = histories(uses_NE[:cut], weights_NE[:cut], np.zeros((OWN, 8), np.float32))
    after_NFE = histories(uses_NE[cut:], weights_NE[cut:], before_NFE[-1])
    np.testing.assert_allclose(np.concatenate((before_NFE, after_NFE)), whole_NFE, rtol=2e-4, atol=1e-5)


def test_what_the_features_say() -> None:
    uses_NE, weights_NE = dense_rows(np.array([[3], [1], [1]]), np.full((3, 1), 0.5), 4)
    own_FE = histories(uses_NE, weights_NE, np.zeros((OWN, 4), np.float32))[-1]
    assert own_FE[0].tolist() == [0, 1, 0, 0]  # the last visit
    half = DECAYS.index(0.5)
    assert own_FE[half].tolist() == [0, 0.75, 0, 0.125]
    assert own_FE[-2].tolist() == pytest.approx([0, 1, 0, 1 / 1.5])  # two visits ago
    assert own_FE[-1].tolist() == [0, 1, 0, 0]  # weights are normalised
