"""Calibration and the ensemble: probabilities come true, and many are no worse than the best."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moestro.policy.observation import Routing, Shape
from moestro.policy.predictors import Calibrated, Ensemble, Predictor
from moestro.policy.predictors.calibration import MonotoneMap, isotonic
from moestro.policy.predictors.rehearsal import Rehearsal
from routings import token

SHAPE = Shape(2, 8, 1)


class Says:
    """A predictor for the test: knows the coming expert with a certain reliability, and says so with any figure."""

    def __init__(self, seed: int, *, right: float, says: float) -> None:
        self._rng = np.random.default_rng(seed)
        self._right, self._says = right, says
        self.coming = 0
        self._guess = 0

    def begin(self, request: int, /) -> None:
        pass

    def end(self, request: int, /) -> None:
        pass

    def observe(self, routing: Routing, /) -> None:
        pass

    def look(self, coming: int) -> None:
        sees = self._rng.random() < self._right
        self._guess = coming if sees else int(self._rng.integers(0, 8))

    def forecast(self, _layer: int, _horizon: int = 1, /) -> np.ndarray:
        chance_E = np.full(8, 0.02, np.float32)
        chance_E[self._guess] = self._says
        return chance_E


def play(predictors: list[Predictor], says: list[Says], visits: int) -> tuple[np.ndarray, np.ndarray]:
    """Forecasts [visits, predictors, E] and what came [visits]."""
    rng = np.random.default_rng(9)
    forecasts, came = [], []
    for visit in range(visits):
        coming = int(rng.integers(0, 8))
        for each in says:
            each.look(coming)
        forecasts.append([predictor.forecast(visit % 2).copy() for predictor in predictors])
        came.append(coming)
        for predictor in predictors:
            predictor.observe(token(SHAPE, visit % 2, coming))
    return np.array(forecasts), np.array(came)


def log_loss(forecast_NE: np.ndarray, came_N: np.ndarray) -> float:
    used_NE = np.eye(8)[came_N]
    chance_NE = np.clip(forecast_NE, 1e-6, 1 - 1e-6)
    return float(-(used_NE * np.log(chance_NE) + (1 - used_NE) * np.log(1 - chance_NE)).sum(1).mean())


@pytest.mark.parametrize("says", [0.2, 0.95])
def test_calibration_makes_forecasts_come_true(says: float) -> None:
    inner = Says(0, right=0.5, says=says)
    calibrated = Calibrated(SHAPE, inner)
    forecast_NPE, came_N = play([calibrated], [inner], 4000)
    late_NE = forecast_NPE[2000:, 0]
    sure_N = late_NE.max(1)
    hit_N = late_NE.argmax(1) == came_N[2000:]
    assert sure_N.mean() == pytest.approx(hit_N.mean(), abs=0.04)
    assert hit_N.mean() == pytest.approx(0.5 + 0.5 / 8, abs=0.03)
    assert calibrated.reliability()[0].error > 0.01


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.1, 10)), min_size=1, max_size=20))
def test_isotonic_rises_keeps_the_mean_and_what_rises_already(points: list[tuple[float, float]]) -> None:
    mean_B, weight_B = np.array(points).T
    fitted_B = isotonic(mean_B, weight_B)
    assert (np.diff(fitted_B) >= -1e-12).all()
    assert (fitted_B * weight_B).sum() == pytest.approx((mean_B * weight_B).sum())
    np.testing.assert_allclose(isotonic(np.sort(mean_B), weight_B), np.sort(mean_B))
    np.testing.assert_allclose(isotonic(fitted_B, weight_B), fitted_B)


@given(st.integers(0, 1000))
def test_the_map_never_turns_the_order_round(seed: int) -> None:
    rng = np.random.default_rng(seed)
    learnt = MonotoneMap()
    for _ in range(130):
        chance_E = rng.random(16) ** 3
        learnt.add(chance_E, rng.random(16) < rng.random())
    mapped_E = learnt(np.linspace(0, 1, 200))
    assert (np.diff(mapped_E) >= 0).all()
    assert mapped_E.min() >= 0
    assert mapped_E.max() <= 1


def test_an_untaught_map_changes_little() -> None:
    chance_E = np.linspace(0.02, 0.98, 50)
    np.testing.assert_allclose(MonotoneMap()(chance_E), chance_E, atol=0.01)


def test_the_ensemble_is_as_good_as_its_best_member_and_better_with_two_that_differ() -> None:
    says = [Says(1, right=0.6, says=0.65), Says(2, right=0.1, says=0.9), Says(3, right=0.6, says=0.65)]
    alone = Ensemble(SHAPE, says[:2])
    both = Ensemble(SHAPE, says)
    forecast_NPE, came_N = play([says[0], alone, both], says, 3000)
    best, stacked, two = (log_loss(forecast_NPE[1500:, i], came_N[1500:]) for i in range(3))
    assert stacked < best * 1.01
    assert two < best * 0.8


def test_members_that_say_the_same_do_no_harm() -> None:
    says = [Says(1, right=0.6, says=0.65)] * 3
    forecast_NPE, came_N = play([says[0], Ensemble(SHAPE, says)], says[:1], 3000)
    assert log_loss(forecast_NPE[1500:, 1], came_N[1500:]) < 1.01 * log_loss(forecast_NPE[1500:, 0], came_N[1500:])


def test_rehearsals_come_true_at_the_layer_and_range_that_they_were_made_for() -> None:
    shape = Shape(12, 4, 1)
    rehearsal = Rehearsal(shape)
    made: dict[tuple[int, int], tuple[int, int]] = {}
    ranges = set()
    for visit in range(12 * 200):
        layer = visit % 12
        for reach, stamp in rehearsal.due(layer).items():
            made_at, meant = made.pop((layer, reach))
            ahead = visit - made_at + 1
            assert int(stamp[0]) == made_at
            assert meant == layer
            assert (ahead > 4) == (reach == 2)
            assert 1 < ahead <= 12
            ranges.add((reach, layer))
        for other, reach in rehearsal.wanted():
            made[other, reach] = (visit, other)
            rehearsal.keep(other, reach, np.array([visit]))
        rehearsal.step(layer)
    assert ranges == {(reach, layer) for reach in (1, 2) for layer in range(12)}
