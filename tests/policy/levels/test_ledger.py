"""The ledger: no token loses more than its budget, nothing is given up for nothing, the price finds its level."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moestro.policy.levels import LevelAsk, LevelTable
from moestro.policy.levels.base import shares
from moestro.policy.levels.ledger import Ledger
from moestro.policy.observation import Routing

LAYERS, EXPERTS, PICKS, EXACT = 3, 6, 2, 3


def _table(seed: int = 0) -> LevelTable:
    chance = np.random.default_rng(seed)
    falls_LED = np.sort(chance.random((LAYERS, EXPERTS, EXACT)), axis=-1)[..., ::-1]
    errors_LED = np.concatenate([np.ones((LAYERS, EXPERTS, 1)), 0.5 * falls_LED], axis=-1)
    return LevelTable(np.array([[0, 100, 150, 200]] * LAYERS), errors_LED, chance.random(LAYERS) + 0.1, PICKS)


def _routing(chance: np.random.Generator, layer: int, rows: int) -> Routing:
    experts_TK = np.stack([chance.permutation(EXPERTS)[:PICKS] for _ in range(rows)])
    weights_TK = chance.random((rows, PICKS), dtype=np.float32) + np.float32(0.01)
    return Routing.of(layer, experts_TK, weights_TK, (), experts=EXPERTS)


def _lost(table: LevelTable, routing: Routing, levels_TK: np.ndarray) -> np.ndarray:
    """[T] nats by the definition of the table."""
    assert table.sensitivity_L is not None
    layer, share_TK = routing.layer, shares(routing.weights_TK)
    errors_ED = table.errors_LED[layer]
    above_TK = errors_ED[routing.experts_TK, levels_TK] - errors_ED[routing.experts_TK, table.exact]
    return np.asarray(table.sensitivity_L[layer] * (share_TK * above_TK).sum(-1))


@given(st.integers(0, 2**16), st.integers(1, 5), st.integers(1, 8))
def test_budgets_are_kept_and_nothing_is_given_up_for_nothing(seed: int, rows: int, steps: int) -> None:
    chance, table = np.random.default_rng(seed), _table(seed)
    ledger = Ledger(table)
    for _ in range(steps):
        budget_T = chance.choice([0.0, 0.01, 0.3], rows)
        lost_T = np.zeros(rows)
        ledger.step(budget_T)
        for layer in range(LAYERS):
            routing, held_E = _routing(chance, layer, rows), chance.integers(0, EXACT + 1, EXPERTS)
            levels_TK = ledger.choose(LevelAsk(routing, budget_T, held_E))
            assert (levels_TK[budget_T == 0] == EXACT).all()
            assert (levels_TK >= np.minimum(held_E[routing.experts_TK], EXACT)).all()
            lost_T += _lost(table, routing, levels_TK)
            for expert in np.unique(routing.experts_TK):
                users_R = np.nonzero(routing.experts_TK == expert)[0]
                if (budget_T[users_R] == 0).any():  # read for one, so free for all
                    assert (levels_TK[routing.experts_TK == expert] == EXACT).all()
        assert (lost_T <= budget_T * (1 + 1e-6) + 1e-12).all()
        gains_LES = ledger.gains()
        if gains_LES is not None:
            assert (gains_LES <= 1).all()
            assert (np.diff(gains_LES, axis=-1) <= 0).all()


def _spent(ledger: Ledger, table: LevelTable, budget: float, steps: int, seed: int = 5) -> float:
    """Mean part of the budget that the last half of `steps` tokens lose when nothing is in memory."""
    chance, found = np.random.default_rng(seed), []
    for _ in range(steps):
        lost = 0.0
        ledger.step(np.array([budget]))
        for layer in range(LAYERS):
            routing = _routing(chance, layer, 1)
            levels_TK = ledger.choose(LevelAsk(routing, np.array([budget]), np.zeros(EXPERTS, dtype=np.int64)))
            lost += float(_lost(table, routing, levels_TK)[0])
        found.append(lost / budget)
    return float(np.mean(found[steps // 2 :]))


def test_the_price_lets_tokens_spend_their_budget() -> None:
    table = _table()
    assert _spent(Ledger(table), table, 0.1, 400) > 0.5


def test_of_two_planes_the_cheaper_goes() -> None:
    errors_ED = np.array([[1, 0.5, 0.01], [1, 0.5, 0.4], [1, 0, 0]])
    table = LevelTable(np.array([[0, 100, 200]]), errors_ED[None], np.array([1.0]), 2)
    routing = Routing.of(0, np.array([[0, 1]]), np.array([[0.5, 0.5]], dtype=np.float32), (), experts=3)
    ledger = Ledger(table)
    for _ in range(60):
        ledger.step(np.array([0.06]))
        levels_TK = ledger.choose(LevelAsk(routing, np.array([0.06]), np.zeros(3, dtype=np.int64)))
    # Expert 1's upper plane spares 0.1 for half of the row's weight, expert 0's as many bytes and 0.49.
    assert levels_TK.tolist() == [[2, 1]]


def test_weights_that_are_not_numbers_give_nothing_up_and_break_no_price() -> None:
    chance, ledger, budget_T = np.random.default_rng(1), Ledger(_table()), np.array([0.3])
    ledger.step(budget_T)
    for layer in range(LAYERS):
        experts_TK = _routing(chance, layer, 1).experts_TK
        nan = Routing.of(layer, experts_TK, np.full((1, PICKS), np.nan, np.float32), (), experts=EXPERTS)
        assert (ledger.choose(LevelAsk(nan, budget_T, np.zeros(EXPERTS, dtype=np.int64))) == EXACT).all()
    ledger.step(budget_T)
    assert np.isfinite(ledger.terms()).all()
