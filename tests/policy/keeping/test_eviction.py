"""From worth to victims: the least worth that may leave does, a chain's top plane first."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.keys import FIRST_DELTA, PlaneKey
from moestro.policy import Need
from moestro.policy.keeping.eviction import WorthEviction
from moestro.policy.observation import RequestRows, Routing, Shape
from routings import Free

SHAPE = Shape(5, 20, 2)
NEED = Need((9, 9, 9), 4096, urgent=True)


class Fixed:
    """A policy whose worths a test sets."""

    proportional = True
    lasting = True

    def __init__(self) -> None:
        self.worth_LE = np.zeros((SHAPE.layers, SHAPE.experts))
        self.held: set[tuple[int, int]] = set()
        self.observed = 0

    def begin(self, request: int) -> None: ...

    def end(self, request: int) -> None: ...

    def observe(self, _routing: Routing) -> None:
        self.observed += 1

    def loaded(self, layer: int, expert: int) -> None:
        assert (layer, expert) not in self.held
        self.held.add((layer, expert))

    def evicted(self, layer: int, expert: int) -> None:
        self.held.remove((layer, expert))

    def worth(self, _layer: int) -> np.ndarray:
        return self.worth_LE


def routing() -> Routing:
    rows = (RequestRows(0, 0, 1, decode=True),)
    return Routing.of(0, np.array([[0, 1]]), np.array([[0.5, 0.5]]), rows, experts=SHAPE.experts)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_the_least_worth_that_may_leave_does(seed: int) -> None:
    random = np.random.default_rng(seed)
    policy = Fixed()
    eviction = WorthEviction(policy, SHAPE)
    held: set[PlaneKey] = set()
    for layer in range(5):
        for expert in random.permutation(20)[: random.integers(0, 21)].tolist():
            for plane in range(int(random.integers(1, 4))):
                held.add((layer, expert, plane))
                eviction.on_load((layer, expert, plane), 4096)
    while held:
        policy.worth_LE = random.integers(0, 4, size=(5, 20)).astype(float)
        eviction.observe(routing())
        for _ in range(int(random.integers(1, 12))):
            free = {key for key in held if random.random() < 0.7}
            key = eviction.victim(NEED, Free(*free))
            if not free:
                assert key is None
                break
            assert key in free
            assert policy.worth_LE[key[:2]] == min(policy.worth_LE[one[:2]] for one in free)
            assert key[2] == max(plane for layer, expert, plane in free if (layer, expert) == key[:2])
            held.remove(key)
            eviction.on_evict(key)
            assert policy.held == {one[:2] for one in held}
    for layer in range(5):
        assert eviction.absent(layer).all()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_where_planes_have_gains_the_plane_of_least_worth_leaves(seed: int) -> None:
    random = np.random.default_rng(seed)
    policy = Fixed()
    eviction = WorthEviction(policy, SHAPE)
    policy.worth_LE = random.integers(0, 4, size=(5, 20)).astype(float)
    gains_LEP = np.minimum.accumulate(random.integers(0, 3, size=(5, 20, 3)) / 2, axis=-1)
    eviction.gains_LEP = gains_LEP
    held = [(layer, expert, plane) for layer in range(5) for expert in range(20) for plane in range(3)]
    for key in held:
        eviction.on_load(key, 4096)
    eviction.observe(routing())
    left = []
    while held:
        victim = eviction.victim(NEED, Free(*held))
        assert victim is not None
        left.append(victim)
        held.remove(victim)
        eviction.on_evict(victim)
    worth = [policy.worth_LE[layer, expert] * gains_LEP[layer, expert, plane] for layer, expert, plane in left]
    assert worth == sorted(worth)
    for (layer, expert, plane), later in zip(left, range(len(left)), strict=True):
        assert all((layer, expert, above) in left[:later] for above in range(plane + 1, 3))


def test_victims_are_named_ahead_as_they_would_go_one_by_one() -> None:
    policy = Fixed()
    eviction = WorthEviction(policy, SHAPE)
    policy.worth_LE = np.random.default_rng(3).random((SHAPE.layers, SHAPE.experts))
    held = [(layer, expert, 0) for layer in range(SHAPE.layers) for expert in range(0, SHAPE.experts, 3)]
    for key in held:
        eviction.on_load(key, 1)
    eviction.observe(routing())
    evictable = Free(*held)
    named = eviction.victims(5, evictable)
    assert named == sorted(held, key=lambda key: policy.worth_LE[key[:2]])[:5]
    assert named[0] == eviction.victim(NEED, evictable)
    assert len(eviction.victims(500, evictable)) == len(held)
    assert named[0] not in eviction.victims(5, Free(*set(held) - {named[0]}))
    policy.lasting = False
    assert eviction.victims(5, evictable) == [], "who needs room would have a say"


def test_absent_are_experts_without_a_plane() -> None:
    eviction = WorthEviction(Fixed(), SHAPE)
    eviction.on_load((1, 3, 0), 4096)
    eviction.on_load((1, 3, 1), 4096)
    eviction.on_evict((1, 3, 1))
    assert np.flatnonzero(~eviction.absent(1)).tolist() == [3]
    assert eviction.absent(0).all()


def _victims(eviction: WorthEviction, held: list[PlaneKey]) -> list[PlaneKey]:
    """All that leave, in order."""
    left, held = [], list(held)
    while held:
        victim = eviction.victim(NEED, Free(*held))
        assert victim is not None
        left.append(victim)
        held.remove(victim)
        eviction.on_evict(victim)
    return left


def test_planes_of_idle_variants_leave_first_and_others_with_their_expert() -> None:
    policy = Fixed()
    eviction = WorthEviction(policy, SHAPE)
    policy.worth_LE[0, :3] = (3.0, 1.0, 2.0)
    held = [(0, expert, plane) for expert in range(3) for plane in (0, 1, FIRST_DELTA, FIRST_DELTA + 57)]
    for key in held:
        eviction.on_load(key, 4096)
    eviction.observe(routing())
    eviction.idle = 1 << (FIRST_DELTA + 57)
    left = _victims(eviction, held)
    assert left[:3] == [(0, expert, FIRST_DELTA + 57) for expert in (1, 2, 0)]
    assert left[3:] == [(0, expert, plane) for expert in (1, 2, 0) for plane in (FIRST_DELTA, 1, 0)]
    assert not policy.held


def test_planes_of_variants_leave_too_where_planes_have_gains() -> None:
    policy = Fixed()
    eviction = WorthEviction(policy, SHAPE)
    policy.worth_LE[0, :2] = (4.0, 1.0)
    eviction.gains_LEP = np.broadcast_to([1.0, 0.1], (SHAPE.layers, SHAPE.experts, 2))
    held = [(0, expert, plane) for expert in range(2) for plane in (0, 1, FIRST_DELTA)]
    for key in held:
        eviction.on_load(key, 4096)
    eviction.observe(routing())
    assert _victims(eviction, held) == [(0, 1, 1), (0, 0, 1), (0, 1, 4), (0, 1, 0), (0, 0, 4), (0, 0, 0)]


def test_an_expert_of_which_only_a_variant_has_a_plane_is_absent() -> None:
    eviction = WorthEviction(Fixed(), SHAPE)
    eviction.on_load((1, 3, FIRST_DELTA + 2), 4096)
    assert eviction.absent(1).all()
