"""Orders of reading: what each promises, against brute force where that is possible."""

from __future__ import annotations

from itertools import pairwise, permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.errors import RequestError
from moestro.policy.order import LOAD_ORDERS, ChainLoad, ComputeCosts, make_load_order

LOADS = st.lists(
    st.builds(
        ChainLoad,
        expert=st.integers(0, 5),
        planes=st.integers(1, 4),
        tokens=st.integers(1, 9),
        read_s=st.integers(0, 6).map(float),
        compute_s=st.integers(0, 6).map(float),
    ),
    max_size=6,
)


def load(expert: int, planes: int = 1, tokens: int = 1, read_s: float = 1.0, compute_s: float = 1.0) -> ChainLoad:
    return ChainLoad(expert, planes, tokens, read_s, compute_s)


def makespan(loads: list[ChainLoad], order: tuple[int, ...] | list[int]) -> float:
    """When the last one is computed: each is read after those before it, and computed once read."""
    read = computed = 0.0
    for position in order:
        read += loads[position].read_s
        computed = max(computed, read) + loads[position].compute_s
    return computed


@pytest.mark.parametrize("name", LOAD_ORDERS)
@given(loads=LOADS)
def test_each_chain_comes_once(name: str, loads: list[ChainLoad]) -> None:
    assert sorted(LOAD_ORDERS[name](loads)) == list(range(len(loads)))


@settings(max_examples=60, deadline=None)
@given(loads=LOADS)
def test_johnson_is_as_quick_as_any_order(loads: list[ChainLoad]) -> None:
    best = min((makespan(loads, order) for order in permutations(range(len(loads)))), default=0.0)
    assert makespan(loads, LOAD_ORDERS["johnson"](loads)) == best


def test_arrival_is_as_asked() -> None:
    assert LOAD_ORDERS["arrival"]([load(3, tokens=1), load(1, tokens=9)]) == [0, 1]


def test_the_hottest_expert_comes_first() -> None:
    assert LOAD_ORDERS["hebf"]([load(3), load(1, tokens=9), load(2, tokens=4), load(0)]) == [1, 2, 0, 3]


def test_a_base_counts_those_who_want_more() -> None:
    """Expert 0: two tokens at its base and three at its third plane, five in all for its base."""
    loads = [load(0, planes=1, tokens=2), load(0, planes=3, tokens=3), load(1, planes=1, tokens=4)]
    assert LOAD_ORDERS["hebf"](loads) == [0, 2, 1]
    assert LOAD_ORDERS["hebf"]([load(0, planes=3, tokens=5), load(1, planes=1, tokens=4)]) == [0, 1]


@given(loads=LOADS)
def test_shallow_chains_of_an_expert_come_before_deep_ones(loads: list[ChainLoad]) -> None:
    order = LOAD_ORDERS["hebf"](loads)
    for before, after in pairwise(order):
        if loads[before].expert == loads[after].expert:
            assert loads[before].planes <= loads[after].planes


def test_names() -> None:
    assert make_load_order("auto") in LOAD_ORDERS.values()
    assert make_load_order("johnson") is LOAD_ORDERS["johnson"]
    with pytest.raises(RequestError, match=r"no order 'sjf'.*auto, arrival, hebf, johnson"):
        make_load_order("sjf")


def test_costs_are_found_again() -> None:
    costs = ComputeCosts()
    assert costs.seconds(3) == 0.0
    for experts, tokens in [(1, 1), (2, 9), (4, 5), (3, 30)] * 5:
        costs.computed(experts, tokens, 0.1 * experts + 0.01 * tokens)
    assert costs.seconds(7) == pytest.approx(0.17)


def test_costs_of_calls_that_are_all_alike() -> None:
    costs = ComputeCosts()
    for _ in range(5):
        costs.computed(4, 4, 0.8)
    assert costs.seconds(1) == pytest.approx(0.2)
