"""Which rows of a group are whose, and what kernels are told of it."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.kernels.base import ExpertDeltaSpec
from moestro.keys import FIRST_DELTA
from moestro.runtime.batch import Run
from moestro.runtime.deltas import StepDeltas, expert_deltas
from moestro.runtime.grouping import Grouping

EXPERTS = 6
SPEC = ExpertDeltaSpec(None, None, 0, 0)


class Odd:
    """A variant that changed the experts of odd numbers."""

    def spec(self, layer: int, expert: int) -> ExpertDeltaSpec | None:  # noqa: ARG002
        return SPEC if expert % 2 else None


@settings(max_examples=80, deadline=None)
@given(
    base=st.integers(0, 4),
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    picks=st.integers(1, 3),
    seed=st.integers(0, 10**6),
)
def test_every_row_of_a_changed_expert_has_the_delta_of_its_own_variant(
    base: int, lengths: list[int], picks: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    ends = base + np.cumsum(lengths)
    runs = [
        Run(3 * number, int(end - length), int(end))
        for number, (end, length) in enumerate(zip(ends, lengths, strict=True))
    ]
    index_TK = np.array([random.permutation(EXPERTS + 1)[:picks] for _ in range(ends[-1])])  # the last is none
    rows = Grouping(index_TK, EXPERTS)
    deltas = StepDeltas(runs, [Odd()] * len(runs), arena=1 << 20)
    plain = [((2, rows.expert_of(group), 0), (2, rows.expert_of(group), 1)) for group in rows.used]
    chains = deltas.chains(2, rows, plain)
    wanted = {(row, int(expert)) for row, picked in enumerate(index_TK) for expert in picked if row >= base}
    wanted = {(row, expert) for row, expert in wanted if expert < EXPERTS and expert % 2}
    batch = [(place, tuple(100 * place + at for at in range(len(chain)))) for place, chain in enumerate(chains)]
    arrived, pieces = deltas.arrived(rows, batch)
    assert [group for group, _ in arrived] == rows.used
    assert all(len(offsets) == 2 for _, offsets in arrived)
    found = set()
    for (group, _), some, chain, (place, _) in zip(arrived, pieces, chains, batch, strict=True):
        assert chain[:2] == plain[place]
        assert [key[2] - FIRST_DELTA for key in chain[2:]] == [piece.variant for piece in some]
        for number, piece in enumerate(some):
            assert piece.address == (1 << 20) + 100 * place + 2 + number
            run = next(one for one in runs if one.variant == piece.variant)
            own = rows.rows_of(group)[piece.first : piece.end].tolist()
            assert own
            assert all(run.first <= row < run.end for row in own)
            found |= {(row, rows.expert_of(group)) for row in own}
    assert found == wanted
    _check_kernels_view(rows, pieces)


def _check_kernels_view(rows: Grouping, pieces: list[list]) -> None:  # type: ignore[type-arg]
    if not rows.used:  # every row picked none: there is nothing to compute
        assert pieces == []
        return
    jobs = rows.jobs(rows.used, np.zeros((len(rows.used), 4), dtype=np.int64))
    told = expert_deltas(pieces, jobs.starts)
    if told is None:
        assert not any(pieces)
        return
    assert told.specs == (SPEC,)
    assert len(told.jobs) == sum(map(len, pieces))
    assert (jobs.starts[told.jobs] <= told.firsts).all()
    assert (told.firsts < told.ends).all()
    assert (told.ends <= jobs.starts[told.jobs + 1]).all()
