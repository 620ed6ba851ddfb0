from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moestro.trace import Trace
from moestro.trace.eam import directions_of, eam_of_rows, request_eam, shares_of, similarity
from traces import traces


def test_counts_of_rows() -> None:
    rows_NLK = np.array([[[0, 2], [1, 0]], [[2, 1], [1, 2]]], dtype=np.uint8)
    assert eam_of_rows(rows_NLK, 3).tolist() == [[1, 1, 2], [1, 2, 1]]


def test_ids_that_fill_their_type_do_not_wrap() -> None:
    rows_NLK = np.full((2, 300, 1), 255, dtype=np.uint8)
    counts_LE = eam_of_rows(rows_NLK, 256)
    assert (counts_LE[:, 255] == 2).all()
    assert counts_LE.sum() == 600


@given(trace=traces())
def test_phases_are_apart_and_complete(trace: Trace) -> None:
    for request in range(trace.requests):
        prompt_LE, answer_LE = (request_eam(trace, request, decode=decode) for decode in (False, True))
        decoded = int(trace.decode_N[trace.rows_of(request)].sum())
        assert (answer_LE.sum(axis=1) == decoded * trace.picks).all()
        np.testing.assert_array_equal(
            prompt_LE + answer_LE, eam_of_rows(trace.experts_NLK[trace.rows_of(request)], trace.num_experts)
        )


matrices = st.integers(0, 2**32 - 1).map(
    lambda seed: np.random.default_rng(seed).integers(0, 4, (3, 5)) * (np.random.default_rng(seed).random((3, 1)) < 0.7)
)


@given(counts_LE=matrices)
def test_normal_forms_leave_unknown_rows_alone(counts_LE: np.ndarray) -> None:
    known_L = counts_LE.any(axis=1)
    np.testing.assert_allclose(shares_of(counts_LE).sum(axis=1), known_L, rtol=1e-6)
    np.testing.assert_allclose(np.square(directions_of(counts_LE)).sum(axis=1), known_L, rtol=1e-6)


@given(one_LE=matrices, other_LE=matrices)
def test_similarity(one_LE: np.ndarray, other_LE: np.ndarray) -> None:
    found = similarity(one_LE, other_LE)
    assert 0 <= found <= 1 + 1e-6
    assert found == pytest.approx(similarity(other_LE, one_LE))
    assert found == pytest.approx(similarity(3 * one_LE, other_LE), abs=1e-6)
    assert similarity(one_LE, one_LE) == pytest.approx(1.0 if one_LE.any() else 0.0)
    # A layer that one side does not know changes nothing.
    without_LE = other_LE.copy()
    without_LE[~one_LE.any(axis=1)] = 0
    assert found == pytest.approx(similarity(one_LE, without_LE))


def test_similarity_by_hand() -> None:
    one_LE, other_LE = np.array([[3, 4], [1, 0], [0, 0]]), np.array([[4, 3], [0, 1], [5, 5]])
    assert similarity(one_LE, other_LE) == pytest.approx((24 / 25 + 0) / 2)
