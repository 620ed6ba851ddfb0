"""Recording: what went through a model, in whatever steps and beside whatever neighbours, is what the trace says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moestro.errors import TraceError
from moestro.policy.observation import RequestRows
from moestro.trace import CollectionFile, Recorder, StepRouting, Trace
from moestro.trace.eam import request_eam
from moestro.trace.recorder import quantised_weights
from traces import EXCERPT, assert_same, random_trace, traces

Batch = tuple[list[RequestRows], np.ndarray, StepRouting]


def steps_of(trace: Trace, seed: int, neighbours: int) -> Iterator[Batch]:
    """The trace as a model would have run it: passes of up to `neighbours` requests in one step, ids out of order."""
    rng = np.random.default_rng(seed)
    waiting = [list(trace.passes(request)) for request in range(trace.requests)]
    while any(waiting):
        running = [request for request, passes in enumerate(waiting) if passes]
        rows, requests = [], []
        for request in rng.permutation(running)[:neighbours].tolist():
            one = waiting[request].pop(0)
            first = len(rows)
            rows += range(one.first, one.last)
            requests.append(RequestRows(request, first, len(rows), one.decode))
        shuffle_TLK = rng.random((len(rows), trace.layers, trace.picks)).argsort(axis=-1)
        experts_TLK = np.take_along_axis(trace.experts_NLK[rows].astype(np.int64), shuffle_TLK, axis=-1)
        weights_TLK = np.take_along_axis(trace.weights_NLK[rows] / 255 * 0.7, shuffle_TLK, axis=-1)
        ahead = trace.lookahead_NPLC
        routing = StepRouting(
            experts_TLK.swapaxes(0, 1),
            weights_TLK.swapaxes(0, 1).astype(np.float32),
            None if ahead is None else ahead[rows].transpose(2, 0, 1, 3),
        )
        yield requests, trace.token_N[rows], routing


@given(trace=traces(), seed=st.integers(0, 2**32 - 1), neighbours=st.integers(1, 4))
def test_a_trace_that_is_run_is_recorded(trace: Trace, seed: int, neighbours: int) -> None:
    recorder = Recorder(trace.num_experts, keep=True)
    for requests, token_T, routing in steps_of(trace, seed, neighbours):
        recorder.step(requests, token_T, routing)
    for request in np.random.default_rng(seed).permutation(trace.requests).tolist():
        recorder.end(request)
        recorder.end(request)
        recorder.describe(request, {"name": request})
    found = recorder.trace()
    for request in range(trace.requests):
        assert found.meta[request] == {
            "prompt_tokens": int((~trace.decode_N[trace.rows_of(request)]).sum()),
            "name": request,
        }
        assert [(one.first, one.last, one.decode) for one in found.passes(request)] == [
            (one.first, one.last, one.decode) for one in trace.passes(request)
        ]
    assert found.num_experts == trace.num_experts
    np.testing.assert_array_equal(found.token_N, trace.token_N)
    np.testing.assert_array_equal(found.offsets_R1, trace.offsets_R1)
    np.testing.assert_array_equal(found.decode_N, trace.decode_N)
    # Equal weights leave the order open, and renormalising moves a weight by a rounding.
    np.testing.assert_array_equal(np.sort(found.experts_NLK), np.sort(trace.experts_NLK))
    assert np.abs(found.weights_NLK.astype(int) - trace.weights_NLK).max() <= 1 + trace.picks // 2
    if trace.lookahead_NPLC is not None:
        np.testing.assert_array_equal(found.lookahead_NPLC, trace.lookahead_NPLC)


def test_steps_are_shared_by_neighbours() -> None:
    trace = random_trace(0, prompts=(2, 2), answers=(2, 2))
    recorder = Recorder(trace.num_experts, keep=True)
    for requests, token_T, routing in steps_of(trace, 0, neighbours=2):
        recorder.step(requests, token_T, routing)
    for request in range(2):
        recorder.end(request)
    assert recorder.trace().step_N is not None
    assert recorder.trace().step_N.tolist() == [0, 0, 1, 2] * 2


def test_real_routing_survives(tmp_path: Path) -> None:
    trace = Trace.load(EXCERPT)
    recorder = Recorder(trace.num_experts, keep=True)
    for requests, token_T, routing in steps_of(trace, 0, neighbours=3):
        recorder.step(requests, token_T, routing)
    for request in range(trace.requests):
        recorder.end(request)
    recorder.trace().save(tmp_path / "again.npz")
    again = Trace.load(tmp_path / "again.npz")
    assert_same(again, recorder.trace())
    np.testing.assert_array_equal(np.sort(again.experts_NLK), np.sort(trace.experts_NLK))


@given(trace=traces(), seed=st.integers(0, 2**32 - 1))
def test_ended_requests_are_in_the_collections(
    trace: Trace, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = CollectionFile(
        tmp_path_factory.mktemp("recorded") / "one.npz", model="m", layers=trace.layers, experts=trace.num_experts
    )
    recorder = Recorder(trace.num_experts, collections=file)
    for requests, token_T, routing in steps_of(trace, seed, neighbours=2):
        recorder.step(requests, token_T, routing)
    assert (len(file.prefill), len(file.decode)) == (0, 0)
    for request in range(trace.requests):
        recorder.end(request)
    by_phase = [{int(one) for one in collection.ids_n} for collection in (file.prefill, file.decode)]
    assert len(by_phase[0] | by_phase[1]) == trace.requests
    for collection, decode in ((file.prefill, False), (file.decode, True)):
        expected = [request_eam(trace, request, decode=decode) for request in range(trace.requests)]
        expected = [one for one in expected if one.any()]
        assert len(collection) == len(expected)
        for index, counts_LE in enumerate(expected):
            np.testing.assert_array_equal(collection.counts(index), counts_LE)


def test_phases_of_one_request_have_one_id(tmp_path: Path) -> None:
    trace = random_trace(0, prompts=(3, 3), answers=(2, 2))
    file = CollectionFile(tmp_path / "one.npz", model="m", layers=trace.layers, experts=trace.num_experts)
    recorder = Recorder(trace.num_experts, collections=file)
    for requests, token_T, routing in steps_of(trace, 0, neighbours=2):
        recorder.step(requests, token_T, routing)
    for request in range(2):
        recorder.end(request)
    assert file.prefill.ids_n.tolist() == file.decode.ids_n.tolist()


def test_nothing_recorded_is_said() -> None:
    with pytest.raises(TraceError, match="no request has ended"):
        Recorder(4, keep=True).trace()


@given(seed=st.integers(0, 2**32 - 1), picks=st.integers(1, 16))
def test_quantised_weights_add_up(seed: int, picks: int) -> None:
    rng = np.random.default_rng(seed)
    weights_NLK = rng.random((5, 3, picks)).astype(np.float32) * (rng.random((5, 3, 1)) < 0.8)
    sums_NL = quantised_weights(weights_NLK).sum(axis=-1, dtype=int)
    assert np.abs(sums_NL - 255).max() <= picks / 2
