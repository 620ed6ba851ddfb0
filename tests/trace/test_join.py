"""Traces joined: every request as it was."""

from __future__ import annotations

import numpy as np
import pytest

from moestro.errors import TraceError
from moestro.trace.join import join
from traces import assert_same, random_trace


def test_every_request_goes_through_as_it_did() -> None:
    parts = [random_trace(0), random_trace(1, steps=True), random_trace(2, prompts=(4,), answers=(2,))]
    joined = join(parts)
    wanted = [
        (one.experts_NLK[each.first : each.last].tolist(), each.decode)
        for one in parts
        for request in range(one.requests)
        for each in one.passes(request)
    ]
    found = [
        (joined.experts_NLK[each.first : each.last].tolist(), each.decode)
        for request in range(joined.requests)
        for each in joined.passes(request)
    ]
    assert found == wanted
    assert [one["number"] for one in joined.meta] == [0, 1, 2, 0, 1, 2, 0]


def test_one_trace_is_itself() -> None:
    trace = random_trace(0)
    assert_same(join([trace]), trace)


def test_lookahead_is_kept_where_all_have_it() -> None:
    ahead = random_trace(0, ahead=2)
    both = join([ahead, ahead])
    assert both.lookahead_NPLC is not None
    assert ahead.lookahead_NPLC is not None
    np.testing.assert_array_equal(both.lookahead_NPLC[ahead.rows :], ahead.lookahead_NPLC)
    assert join([ahead, random_trace(1)]).lookahead_NPLC is None


def test_traces_of_two_models_are_refused() -> None:
    with pytest.raises(TraceError, match=r"\(3, 8, 2\).*\(3, 9, 2\)"):
        join([random_trace(0), random_trace(0, experts=9)])
