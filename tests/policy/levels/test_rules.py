"""Level policies with a rule of their own, and how they are found."""

from __future__ import annotations

import numpy as np
import pytest

from moestro.errors import RequestError
from moestro.policy.levels import (
    LEVEL_POLICIES,
    QUALITIES,
    LevelAsk,
    LevelTable,
    budget_of,
    choose_level_policy,
    parse_quality,
)
from moestro.policy.observation import Routing

BALANCED = QUALITIES["balanced"]
TABLE = LevelTable(
    np.array([[0, 100, 150], [0, 100, 150]]),
    np.broadcast_to(np.array([1, 0.1, 0.01]), (2, 5, 3)),
    np.array([0.001, 2.0]),
    3,
    dict.fromkeys(QUALITIES.values(), 0.1),
)


def _choose(policy: str, weights: list[float], budget: float, held: list[int] | None = None, layer: int = 0) -> list:
    routing = Routing.of(layer, np.array([[4, 0, 2]]), np.array([weights], dtype=np.float32), (), experts=5)
    ask = LevelAsk(routing, np.array([budget]), np.array(held or [0] * 5))
    one = LEVEL_POLICIES[policy](TABLE)
    one.step(ask.budget_T)
    return one.choose(ask)[0].tolist()  # type: ignore[no-any-return]


def test_the_gate_loads_by_the_weight_of_those_before() -> None:
    # Before them: nothing, .7 and .93 of the weight; the published thresholds are .6 and .9.
    assert _choose("gate", [0.7, 0.23, 0.07], BALANCED) == [2, 1, 0]
    assert _choose("gate", [0.07, 0.7, 0.23], BALANCED) == [0, 2, 1]
    assert _choose("gate", [7.0, 2.3, 0.7], BALANCED) == [2, 1, 0]
    assert _choose("gate", [0.7, 0.23, 0.07], BALANCED, held=[2, 0, 1, 0, 0]) == [2, 2, 1]
    assert _choose("gate", [0.7, 0.23, 0.07], 0.0) == [2, 2, 2]


def test_what_hardly_matters_is_left_out_where_it_hardly_matters() -> None:
    weights = [0.7, 0.25, 0.05]
    assert _choose("sensitivity", weights, BALANCED, layer=0) == [2, 0, 0]  # the likeliest always stays
    assert _choose("sensitivity", weights, BALANCED, layer=1) == [2, 2, 2]
    assert _choose("sensitivity", [0.8, 0.19, 0.005], BALANCED, layer=1) == [2, 2, 0]
    assert _choose("sensitivity", weights, 0.0) == [2, 2, 2]


def _learned(nats: list[list[float]], weights: list[float], budget: float, held: int = 0) -> list[int]:
    """`nats`, of each expert at level 0 and 1, are what they cost for a whole weight; a price of .1 for 150 bytes."""
    routing = Routing.of(0, np.array([[4, 0, 2]]), np.array([weights], dtype=np.float32), (), experts=5)
    ask = LevelAsk(routing, np.array([budget]), np.full(5, held), np.log([nats]))
    return LEVEL_POLICIES["learned"](TABLE).choose(ask)[0].tolist()  # type: ignore[no-any-return]


def test_the_net_and_the_price_decide_wherever_planes_are() -> None:
    even = [1.0, 1.0, 1.0]
    # Of a third of the error each: exact costs .1, the lower level .0667 and a third of its nats, out a third of them.
    nats = [[3.0, 0.3], [3.0, 0.03], [0.1, 0.01]]
    assert _learned(nats, even, BALANCED) == [2, 1, 0]
    assert _learned(nats, even, BALANCED, held=2) == [2, 1, 0]
    assert _learned(nats, even, 0.0) == [2, 2, 2]
    assert _learned(nats, [1.0, 1e-3, 1e-3], BALANCED) == [2, 0, 0]


def test_planes_are_worth_what_they_are_used() -> None:
    policy = LEVEL_POLICIES["learned"](TABLE)
    routing = Routing.of(0, np.array([[4, 0]]), np.ones((1, 2), dtype=np.float32), (), experts=5)
    for _ in range(40):
        policy.choose(LevelAsk(routing, np.array([BALANCED]), np.zeros(5), np.log([[[9.0, 0.01], [9.0, 9.0]]])))
    gains_LES = policy.gains()
    assert gains_LES is not None
    assert gains_LES.max() <= 1
    assert (np.diff(gains_LES, axis=2) <= 0).all()
    assert gains_LES[0, 4, 0] > 0.9 > 0.1 > gains_LES[0, 4, 1]
    assert gains_LES[0, 0].min() > 0.9
    policy.choose(LevelAsk(routing, np.array([0.0]), np.zeros(5)))
    assert policy.gains() is None


@pytest.mark.parametrize("policy", LEVEL_POLICIES)
def test_exact_rows_are_exact(policy: str) -> None:
    assert _choose(policy, [0.9, 0.09, 0.01], 0.0) == [2, 2, 2]


def test_fixed_is_exact_whatever_is_asked() -> None:
    assert _choose("fixed", [0.9, 0.09, 0.01], 1.0) == [2, 2, 2]


def test_qualities_are_names_or_nats() -> None:
    assert parse_quality("exact") == 0
    assert parse_quality("0") == 0
    assert parse_quality("0.015") == 0.015
    assert list(QUALITIES.values()) == sorted(QUALITIES.values())
    for wrong in ("best", "-1", "nan", "inf", "", "11"):
        with pytest.raises(RequestError, match="expected exact, high, balanced, fast, or a number"):
            parse_quality(wrong)
    assert budget_of("gate", "fast") == QUALITIES["fast"]
    with pytest.raises(RequestError, match="not a number"):
        budget_of("gate", "0.015")


def test_policies_are_chosen_by_what_was_measured() -> None:
    assert choose_level_policy("auto", measured=True, store="s") == "ledger"
    assert choose_level_policy("auto", measured=False, store="s") == "gate"
    assert choose_level_policy("fixed", measured=False, store="s") == "fixed"
    with pytest.raises(RequestError, match="packed without calibration"):
        choose_level_policy("ledger", measured=False, store="s")
    assert choose_level_policy("learned", measured=True, routed=True, store="s") == "learned"
    with pytest.raises(RequestError, match="moestro pack MODEL s --bit-router"):
        choose_level_policy("learned", measured=True, store="s")
    with pytest.raises(RequestError, match="auto, fixed, gate, learned, ledger, sensitivity"):
        choose_level_policy("best", measured=True, store="s")
