"""Training: what is regular is learnt, files come back as they were, and what does not fit is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moestro.errors import TraceError
from moestro.foresight import TrainingOptions, load_nets, save_nets, train
from moestro.policy.keeping.value import Value
from moestro.policy.observation import RequestRows, Routing, Shape
from moestro.policy.predictors.learned import Learned, between
from moestro.policy.predictors.net import HORIZONS, Nets
from moestro.simulate.slots import SlotReplay
from moestro.trace import Trace
from traces import random_trace

SHAPE = Shape(3, 8, 2)
Pair = tuple[Nets, Nets]


def regular(rows: int) -> Trace:
    """The first layer goes round; the second is random; the third does what the second does, one expert on."""
    trace = random_trace(0, prompts=(0,), answers=(rows,))
    trace.experts_NLK[:, 0] = (np.arange(rows)[:, None] + [0, 1]) % 8
    trace.experts_NLK[:, 2] = (trace.experts_NLK[:, 1] + 1) % 8
    return trace


@pytest.fixture(scope="module")
def nets() -> Pair:
    return train(regular(1200), TrainingOptions(epochs=16, width=16, batch=32, rate=1e-2))


def routing(layer: int, experts: list[int], *, request: int = 0) -> Routing:
    rows = (RequestRows(request, 0, 1, decode=True),)
    return Routing.of(layer, np.array([experts]), np.array([[0.6, 0.4]]), rows, experts=8)


def warmed(nets: Pair, *, rows: int = 20) -> Learned:
    """A predictor that has seen some rows, and the first two layers of one more."""
    after, ahead = nets
    predictor = Learned(SHAPE, after=after, ahead=ahead)
    predictor.begin(0)
    for row, (first_K, second_K, third_K) in enumerate(regular(rows).experts_NLK.tolist()):
        predictor.observe(routing(0, first_K))
        predictor.observe(routing(1, second_K if row < rows - 1 else [2, 6]))
        if row < rows - 1:
            predictor.observe(routing(2, third_K))
    return predictor


def test_what_is_regular_is_foreseen(nets: Pair) -> None:
    predictor = warmed(nets)  # the last row's layers have routed to 3 and 4, and to 2 and 6
    soon_E = predictor.forecast(2, 1)
    assert set(np.argsort(-soon_E)[:2].tolist()) == {3, 7}
    assert soon_E[[3, 7]].min() > 0.8
    outlook_HE = predictor.outlook(0)
    assert outlook_HE[0, [4, 5]].min() > 0.9 > 0.1 > outlook_HE[0, [0, 1, 2]].max()
    assert (np.diff(outlook_HE[:4].sum(1)) > 0).all()


def test_forecasts_are_probabilities_and_go_up_with_the_horizon(nets: Pair) -> None:
    predictor = warmed(nets)
    for layer in range(3):
        for horizon in (1, 3, 10, 100):
            forecast_E = predictor.forecast(layer, horizon)
            assert forecast_E.shape == (8,)
            assert ((forecast_E >= 0) & (forecast_E <= 1)).all()
    outlook_HE = predictor.outlook(0)
    assert between(outlook_HE, 4) == pytest.approx(outlook_HE[HORIZONS.index(4)])
    low, high = outlook_HE[HORIZONS.index(2)], outlook_HE[HORIZONS.index(4)]
    np.testing.assert_array_less(np.minimum(low, high) - 1e-6, between(outlook_HE, 3))
    assert between(outlook_HE, 1000) == pytest.approx(outlook_HE[-1])


def test_uses_by_any_request_count(nets: Pair) -> None:
    predictor = warmed(nets)
    alone_E = predictor.forecast(2, 1).copy()
    predictor.begin(1)
    predictor.observe(routing(1, [0, 4], request=1))
    both_E = predictor.forecast(2, 1)
    assert both_E[[1, 3, 5, 7]].min() > 0.7 > 0.3 > alone_E[[1, 5]].max()
    predictor.end(1)
    assert predictor.forecast(2, 1) == pytest.approx(alone_E)


def test_nothing_in_flight_is_no_error(nets: Pair) -> None:
    predictor = warmed(nets)
    predictor.end(0)
    assert np.isfinite(predictor.forecast(1, 1)).all()


def test_value_keeps_more_of_use_than_recency_does(nets: Pair) -> None:
    after, ahead = nets
    replay = SlotReplay(regular(400))
    (lru,), (belady,) = replay.lru([5]), replay.belady([5])
    (value,) = replay.run(Value(SHAPE, predictor=Learned(SHAPE, after=after, ahead=ahead)), [5])
    assert lru.hits < value.hits <= belady.hits


def test_training_twice_gives_the_same_nets() -> None:
    options = TrainingOptions(epochs=1, width=4)
    first, second = train(regular(300), options), train(regular(300), options)
    for one, other in zip(first, second, strict=True):
        for name, array in one.arrays().items():
            np.testing.assert_array_equal(array, other.arrays()[name])


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(TraceError, match="9 rows, expected at least 256"):
        train(random_trace(0, prompts=(0,), answers=(9,)))


def test_files_come_back_as_they_were(nets: Pair, tmp_path: Path) -> None:
    path = tmp_path / "nets"
    save_nets(path, *nets)
    for one, other in zip(nets, load_nets(path, SHAPE), strict=True):
        for name, array in one.arrays().items():
            np.testing.assert_array_equal(array, other.arrays()[name])


def test_bad_files_are_refused_by_name(nets: Pair, tmp_path: Path) -> None:
    path = tmp_path / "nets"
    with pytest.raises(TraceError, match="nets cannot be read"):
        load_nets(path, SHAPE)
    save_nets(path, *nets)
    with pytest.raises(TraceError, match="inner_LDW is float32 of shape"):
        load_nets(path, Shape(3, 9, 2))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(TraceError, match="nets cannot be read"):
        load_nets(path, SHAPE)
    after, ahead = nets
    after.arrays()["bias_LHE"][:] = np.nan
    save_nets(path, after, ahead)
    with pytest.raises(TraceError, match=r"bias_LHE is float32 .* expected finite"):
        load_nets(path, SHAPE)
