"""What holds for every keep policy."""

from __future__ import annotations

import numpy as np
import pytest

from moestro.errors import MoestroError
from moestro.policy.keeping import KEEP_POLICIES, make_keep_policy
from moestro.policy.knowledge import needs
from moestro.policy.observation import RequestRows, Routing, Shape
from routings import SHAPES, busy, random_pass, routing, show, token

# Of routing alone; what is made of trained nets is tested with them.
NAMES = [name for name, factory in KEEP_POLICIES.items() if not needs(factory)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_worths_are_finite_whatever_comes(name: str, shape: Shape) -> None:
    policy = make_keep_policy(name, shape)
    assert policy.worth(0).shape == (shape.layers, shape.experts)
    for event in busy(shape, 0, passes=60):
        show(policy, event)
        if isinstance(event, Routing):
            policy.loaded(event.layer, int(event.counts_E.argmax()))
            worth_LE = policy.worth(event.layer)
            assert worth_LE.shape == (shape.layers, shape.experts)
            assert np.isfinite(worth_LE).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_of_thousands_of_rows_and_one_without(name: str) -> None:
    shape = Shape(4, 16, 4)
    policy = make_keep_policy(name, shape)
    policy.begin(1)
    for one in random_pass(shape, np.random.default_rng(0), [(1, 5000, False)]):
        policy.observe(one)
    for layer in range(shape.layers):
        policy.observe(routing(shape, layer, [], [RequestRows(1, 0, 0, decode=False)]))
    assert np.isfinite(policy.worth(3)).all()


@pytest.mark.parametrize("name", NAMES)
def test_no_peeking(name: str) -> None:
    """The same past and another future: the same worths until they part, and the same objects twice the same."""
    shape = SHAPES[0]
    rng = np.random.default_rng(3)
    past = [one for _ in range(20) for one in random_pass(shape, rng, [(1, 1, True)])]
    future = [one for _ in range(20) for one in random_pass(shape, rng, [(1, 1, True)])]
    seen = []
    for coming in (future, [one for layer in range(3) for one in future[layer::3]][::-1]):
        policy = make_keep_policy(name, shape)
        policy.begin(1)
        worths = []
        for one in [*past, *coming]:
            policy.observe(one)
            worths.append(policy.worth(one.layer).copy())
        seen.append(worths)
    assert all((first == second).all() for first, second in zip(seen[0][: len(past)], seen[1], strict=False))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_used_always_is_worth_more_than_what_never_is(name: str) -> None:
    shape = Shape(2, 6, 2)
    policy = make_keep_policy(name, shape)
    for request in range(1, 30):
        policy.begin(request)
        for _ in range(4):
            for layer in range(2):
                policy.observe(token(shape, layer, 1, 4, request=request))
        policy.end(request)
    policy.begin(30)
    policy.observe(token(shape, 0, 1, 4, request=30))
    worth_E = policy.worth(0)[0]
    assert worth_E[[1, 4]].min() > worth_E[[0, 2, 3, 5]].max()


def test_unknown_names_and_knowledge_are_refused_by_name() -> None:
    shape = SHAPES[0]
    with pytest.raises(MoestroError, match=r"'fifo'.*adapmoe.*lru"):
        make_keep_policy("fifo", shape)
    with pytest.raises(MoestroError, match=r"'lrfu' does not take speed; it takes half_life"):
        make_keep_policy("lrfu", shape, speed=3)
    with pytest.raises(MoestroError, match=r"'lru' does not take speed; it takes nothing"):
        make_keep_policy("lru", shape, speed=3)


@pytest.mark.parametrize(
    ("name", "knowledge"),
    [
        ("lrfu", {"half_life": 0}),
        ("adapmoe", {"slots": 5}),
        ("emoe", {"group": 0}),
        ("emoe", {"coverage": 1.5}),
        ("edgemoe", {"sensitivity_L": np.ones(2)}),
        ("edgemoe", {"sensitivity_L": np.array([1, np.nan, 1])}),
    ],
)
def test_impossible_knowledge_is_refused(name: str, knowledge: dict[str, object]) -> None:
    with pytest.raises(MoestroError, match=name):
        make_keep_policy(name, SHAPES[0], **knowledge)
