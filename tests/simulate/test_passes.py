"""The order in which recorded rows are replayed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from moestro.simulate.passes import passes
from traces import random_trace


@given(concurrency=st.integers(1, 5), steps=st.booleans(), seed=st.integers(0, 50))
def test_every_row_goes_through_once_in_its_requests_order(concurrency: int, steps: bool, seed: int) -> None:
    trace = random_trace(seed, prompts=(3, 0, 5, 1), answers=(4, 2, 0, 3), steps=steps)
    seen: dict[int, list[int]] = {}
    flying: set[int] = set()
    for one in passes(trace, concurrency=concurrency):
        assert not flying & set(one.begins)
        flying |= set(one.begins)
        assert {rows.request for rows in one.requests} == flying
        assert len(flying) <= concurrency
        assert one.requests[-1].last == len(one.rows_B)
        for rows in one.requests:
            seen.setdefault(rows.request, []).extend(one.rows_B[rows.first : rows.last].tolist())
            assert (trace.decode_N[one.rows_B[rows.first : rows.last]] == rows.decode).all()
        flying -= set(one.ends)
    assert not flying
    for request in range(trace.requests):
        assert seen.get(request, []) == list(range(*trace.rows_of(request).indices(trace.rows)))


def test_a_prompt_is_one_pass_unless_recorded_otherwise() -> None:
    trace = random_trace(0, prompts=(3,), answers=(2,))
    assert [one.rows_B.tolist() for one in passes(trace)] == [[0, 1, 2], [3], [4]]
    assert [one.requests[0].decode for one in passes(trace)] == [False, True, True]
