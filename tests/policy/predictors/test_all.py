"""What holds for every predictor."""

from __future__ import annotations

import numpy as np
import pytest

from moestro.errors import MoestroError
from moestro.policy.knowledge import needs
from moestro.policy.observation import RequestRows, Routing, Shape
from moestro.policy.predictors import PREDICTORS, Ensemble, LooksAhead, Predictor, make_predictor
from routings import SHAPES, busy, random_pass, routing, show

# Of routing and gates alone; what is made of trained nets is tested with them.
SINGLE = [name for name, factory in PREDICTORS.items() if not needs(factory)]
NAMES = [*SINGLE, "ensemble", "+".join(SINGLE)]


def check(predictor: Predictor, shape: Shape) -> None:
    """All forecasts are probabilities, that rise with the horizon."""
    for layer in range(shape.layers):
        before_E = np.zeros(shape.experts)
        for horizon in (1, 2, 30):
            chance_E = predictor.forecast(layer, horizon).copy()
            assert chance_E.shape == (shape.experts,)
            assert chance_E.dtype == np.float32
            assert np.isfinite(chance_E).all()
            assert chance_E.min() >= 0
            assert chance_E.max() <= 1
            assert (chance_E >= before_E - 1e-6).all()
            before_E = chance_E


def gates(predictor: Predictor, shape: Shape, one: Routing, rng: np.random.Generator) -> None:
    """Random gates of the two layers after this one."""
    if isinstance(predictor, LooksAhead):
        for ahead in (2, 1):
            scores_TE = rng.random((len(one.experts_TK), shape.experts))
            ids_TC = np.argsort(-scores_TE, axis=1)[:, : 2 * shape.picks].astype(np.uint16)
            predictor.lookahead(one.layer, ahead, ids_TC, np.take_along_axis(scores_TE, ids_TC.astype(np.int64), 1))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_forecasts_are_probabilities_whatever_comes(name: str, shape: Shape) -> None:
    predictor = make_predictor(name, shape)
    rng = np.random.default_rng(1)
    check(predictor, shape)
    for event in busy(shape, 0, passes=40):
        show(predictor, event)
        if isinstance(event, Routing):
            gates(predictor, shape, event, rng)
            if rng.random() < 0.2:
                check(predictor, shape)
    check(predictor, shape)


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_of_thousands_of_rows_and_one_without(name: str) -> None:
    shape = Shape(4, 16, 4)
    predictor = make_predictor(name, shape)
    predictor.begin(1)
    rng = np.random.default_rng(0)
    for one in random_pass(shape, rng, [(1, 5000, False)]):
        predictor.observe(one)
        gates(predictor, shape, one, rng)
        check(predictor, shape)
    for layer in range(shape.layers):
        predictor.observe(routing(shape, layer, [], [RequestRows(1, 0, 0, decode=False)]))
        check(predictor, shape)


@pytest.mark.parametrize("name", NAMES)
def test_no_peeking(name: str) -> None:
    """What comes later changes no earlier forecast."""
    shape = SHAPES[0]
    rng = np.random.default_rng(3)
    past = [one for _ in range(30) for one in random_pass(shape, rng, [(1, 1, True), (2, 1, True)])]
    seen = []
    for seed in (4, 5):
        rng = np.random.default_rng(seed)
        future = [one for _ in range(10) for one in random_pass(shape, rng, [(1, 1, True), (2, 1, True)])]
        predictor = make_predictor(name, shape)
        predictor.begin(1)
        predictor.begin(2)
        forecasts = []
        for one in [*past, *future]:
            predictor.observe(one)
            forecasts.append([predictor.forecast(layer, 2).copy() for layer in range(shape.layers)])
        seen.append(np.array(forecasts))
    assert (seen[0][: len(past)] == seen[1][: len(past)]).all()
    assert (seen[0] != seen[1]).any()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "gate"])
def test_a_rule_is_found(name: str) -> None:
    """Two experts that are always used are foreseen, by one request and by several, cold and within many visits."""
    shape = Shape(3, 12, 2)
    predictor = make_predictor(name, shape)
    for requests in ((1,), (2, 3)):
        for request in requests:
            predictor.begin(request)
        for _ in range(150):
            for layer in range(3):
                rows = [RequestRows(request, i, i + 1, decode=True) for i, request in enumerate(requests)]
                predictor.observe(routing(shape, layer, [[layer, 7 + layer]] * len(requests), rows))
        for layer in range(3):
            chance_E = predictor.forecast(layer).copy()
            assert set(np.argsort(-chance_E)[:2].tolist()) == {layer, 7 + layer}
            assert chance_E[[layer, 7 + layer]].min() > 0.8
            assert np.delete(chance_E, [layer, 7 + layer]).max() < 0.2
        for request in requests:
            predictor.end(request)


def test_unknown_names_and_knowledge_are_refused_by_name() -> None:
    shape = SHAPES[0]
    with pytest.raises(MoestroError, match=r"'oracle'.*ensemble.*recency"):
        make_predictor("recency+oracle", shape)
    with pytest.raises(MoestroError, match=r"'recency\+popularity' does not take speed; it takes half_life"):
        make_predictor("recency+popularity", shape, speed=1)
    with pytest.raises(MoestroError, match=r"'recency\+learned' needs after, ahead"):
        make_predictor("recency+learned", shape)
    with pytest.raises(MoestroError, match="twice"):
        make_predictor("recency+recency", shape)
    make_predictor("recency+popularity", shape, half_life=3.0)


def test_the_default_ensemble_takes_more_members() -> None:
    more = make_predictor("ensemble+gate", SHAPES[0])
    assert isinstance(more, Ensemble)
    assert [type(member).__name__ for member in more.members][-2:] == ["PreviousLayer", "Gate"]
