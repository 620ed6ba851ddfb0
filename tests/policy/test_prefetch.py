"""When a prefetch pays, and what happens when it did not."""

from __future__ import annotations

import numpy as np
import pytest

from moestro.policy.observation import Routing, Shape
from moestro.policy.predictors import Gate
from moestro.policy.prefetch import Prefetcher, Slack, SlackMeter, Strain


class Says:
    """A predictor that says what a test wants."""

    def __init__(self, *likely: float) -> None:
        self.likely_E = np.array(likely, dtype=np.float32)
        self.asked: list[tuple[int, int]] = []

    def begin(self, request: int) -> None: ...

    def end(self, request: int) -> None: ...

    def observe(self, routing: Routing) -> None: ...

    def forecast(self, layer: int, horizon: int = 1) -> np.ndarray:
        self.asked.append((layer, horizon))
        return self.likely_E


SHAPE = Shape(3, 4, 2)


NONE_HELD = np.ones(4, dtype=bool)


def test_the_likeliest_absent_experts_of_the_next_layer() -> None:
    predictor = Says(0.9, 0.2, 0.95, 0.8)
    prefetcher = Prefetcher(SHAPE, predictor)
    held = np.array([True, True, False, True])
    assert prefetcher.propose(0, held, Slack(1.0, 5.0)) == [(1, 0), (1, 3), (1, 1)]
    assert prefetcher.propose(2, NONE_HELD, Slack(1.0, 5.0))[0] == (0, 2)
    assert predictor.asked == [(1, 1), (0, 1)]


@pytest.mark.parametrize(
    ("idle_s", "least"),
    [(2.0, 0.1 / 1.1), (1.0, 0.1 / 1.1), (0.5, 0.6 / 1.1), (0.1, 1.0 / 1.1)],
)
def test_the_probability_that_pays_follows_from_the_slack(idle_s: float, least: float) -> None:
    for likely, proposed in ((least - 0.01, []), (least + 0.01, [(1, 0)])):
        assert Prefetcher(SHAPE, Says(likely, 0, 0, 0)).propose(0, NONE_HELD, Slack(1.0, idle_s)) == proposed


def test_no_more_than_the_link_has_time_for() -> None:
    prefetcher = Prefetcher(SHAPE, Says(0.9, 0.9, 0.9, 0.9))
    assert prefetcher.propose(0, NONE_HELD, Slack(1.0, 2.0)) == [(1, 0), (1, 1)]
    assert prefetcher.propose(0, NONE_HELD, Slack(1.0, 0.0)) == []


def test_prefetches_that_do_not_pay_stop_and_are_tried_again() -> None:
    prefetcher = Prefetcher(SHAPE, Says(0.99, 0, 0, 0))
    unused_E = np.array([0, 1, 1, 0])
    made = []
    for _ in range(200):
        made.append(bool(prefetcher.propose(0, NONE_HELD, Slack(1.0, 0.6))))
        prefetcher.judge(1, unused_E)
    assert made[0]
    assert 1 < sum(made) < 13
    used_E = np.array([1, 1, 0, 0])
    for _ in range(64 * 20):
        prefetcher.propose(0, NONE_HELD, Slack(1.0, 0.6))
        prefetcher.judge(1, used_E)
    assert all(prefetcher.propose(0, NONE_HELD, Slack(1.0, 0.6)) for _ in range(10))


def test_the_meter_learns_idle_time_apart_for_layers_that_read() -> None:
    meter, now = SlackMeter(), 0.0
    for turn in range(600):
        reading = turn % 2 == 0
        meter.routed(now)
        now += 5.0 if reading else 0.0
        meter.served(now, read=reading)
        now += 2.0 if reading else 3.0
    assert meter.slack(1.0, reading=True) == Slack(1.0, pytest.approx(2.0, rel=0.01))
    assert meter.slack(1.0, reading=False) == Slack(1.0, pytest.approx(3.0, rel=0.01))


@pytest.mark.parametrize(
    ("piece_s", "work_s", "least"),
    [(9.0, 0.0, 0.6 / 1.1), (0.2, 0.0, 0.3 / 0.8), (0.2, 0.3, 0.6 / 0.8)],
)
def test_what_is_lost_is_a_piece_and_the_work_of_asking(piece_s: float, work_s: float, least: float) -> None:
    slack = Slack(1.0, 0.5, piece_s, work_s)
    for likely, proposed in ((least - 0.01, []), (least + 0.01, [(1, 0)])):
        assert Prefetcher(SHAPE, Says(likely, 0, 0, 0)).propose(0, NONE_HELD, slack) == proposed


def test_who_reads_ahead_by_rank_reads_what_would_have_been_proposed() -> None:
    gate = Gate(SHAPE)
    prefetcher, slack = Prefetcher(SHAPE, gate), Slack(1.0, 1.6, 0.5)
    absent_E, ids = np.array([True, True, True, False]), [2, 0, 1, 3]
    gate.begin(0)
    for _ in range(40):
        gate.lookahead(0, 1, np.array([ids]))
        prefetcher.made(0, absent_E, [], slack)
        gate.observe(Routing(1, np.array([[2, 0]]), np.ones((1, 2), np.float32), (), np.array([1, 0, 1, 0])))
    (nothing, places) = prefetcher.places(4, [Slack(1.0, 0.0), slack])
    assert nothing == [0] * 4
    gate.lookahead(0, 1, np.array([ids]))
    proposed = prefetcher.propose(0, absent_E, slack)
    read: list[int] = []
    for rank, expert in enumerate(ids):
        if absent_E[expert] and len(read) < places[rank]:
            read.append(expert)
    assert [expert for _, expert in proposed] == read == [2, 0]
    assert places[2] == 0, "was never used"


def test_what_was_read_by_rank_is_judged_like_a_proposal() -> None:
    prefetcher = Prefetcher(SHAPE, Gate(SHAPE))
    for _ in range(100):
        prefetcher.made(0, np.ones(4, dtype=bool), [1], Slack(1.0, 2.0))
        prefetcher.judge(1, np.array([1, 0, 0, 0]))
    tried = [any(prefetcher.places(4, [Slack(1.0, 2.0)])[0]) for _ in range(128)]
    assert 0 < sum(tried) < 8, "it did not pay, and is tried now and then"
    assert not Prefetcher(SHAPE, Says(0.9, 0, 0, 0)).by_rank


def test_strain_is_learned_from_how_much_longer_layers_take() -> None:
    strain = Strain(0.5)
    strain.layer(2.0, 1.0)
    assert strain.part == 0.5, "nothing to compare with"
    for _ in range(400):
        strain.layer(2.0, 0.0)
        strain.layer(2.0 + 0.2 * 1.5, 1.5)
    assert strain.part == pytest.approx(0.2, abs=0.02)
    for _ in range(1 << 16):
        strain.layer(2.0, 0.0)
    assert strain.part == pytest.approx(0.5, abs=0.02), "what was long ago says little"


def test_a_gate_names_absent_experts_by_how_often_such_were_used() -> None:
    gate = Gate(SHAPE)
    prefetcher, slack = Prefetcher(SHAPE, gate), Slack(1.0, 5.0)
    gate.begin(0)
    absent_E = np.array([True, False, True, True])
    for _ in range(200):
        for layer in range(SHAPE.layers):
            # The gate says 0 and 1, then 2 and 3; used are 1 and 2.
            gate.observe(Routing(layer, np.array([[1, 2]]), np.ones((1, 2), np.float32), (), np.array([0, 1, 1, 0])))
            gate.lookahead(layer, 1, np.array([[0, 1, 2, 3]]))
            if layer < SHAPE.layers - 1:
                proposed = prefetcher.propose(layer, absent_E, slack)
    assert proposed == [(2, 2)]


def test_ranks_that_would_not_pay_need_not_be_told_of() -> None:
    gate = Gate(SHAPE)
    prefetcher = Prefetcher(SHAPE, gate)
    assert prefetcher.telling(2) == 2, "nothing has been asked for: all may pay"
    gate.begin(0)
    absent_E = np.ones(4, dtype=bool)
    used, counts_E = np.array([[3, 2]]), np.array([0, 0, 1, 1])

    def visit(idle_s: float) -> None:
        for layer in range(SHAPE.layers):
            gate.observe(Routing(layer, used, np.ones((1, 2), np.float32), (), counts_E))
            # Of what the gate names, the first and the third are used.
            gate.lookahead(layer, 1, np.array([[3, 0, 2, 1]]))
            if layer < SHAPE.layers - 1:
                prefetcher.propose(layer, absent_E, Slack(1.0, idle_s))

    for _ in range(200):
        visit(5.0)
    assert prefetcher.telling(1) == 1
    assert prefetcher.telling(2) == 1, "the second is never used"
    assert prefetcher.telling(4) == 3, "the third is, though the second is not"
    visit(1e-6)
    assert prefetcher.telling(4) == 1, "so little time is worth nothing, and one is looked at all the same"


def test_a_predictor_that_names_nobody_is_told_of_all() -> None:
    assert Prefetcher(SHAPE, Says(0.9, 0.1, 0, 0)).telling(4) == 4
