"""Experts that are computed as they come: the bits of experts that are all there, whoever comes first and when."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro import _native
from moestro.kernels.cpu import CpuKernels
from packed_matrices import Source, random_experts

COUNT, HIDDEN, LEVEL = 6, 64, 4
EXPERTS = random_experts(Source(3), COUNT, encoding="nested", hidden=HIDDEN, width=96, gate="halves", activation="silu")
PLANES_EP = EXPERTS.addresses([LEVEL] * COUNT)


class Layer:
    """A layer whose experts are known as far as `known_EP` says."""

    def __init__(
        self, known_EP: np.ndarray, ids_TK: Sequence[Sequence[int]], seed: int = 0, levels: Sequence[int] = (LEVEL,)
    ) -> None:
        self.known_EP = np.ascontiguousarray(known_EP)
        self.known = CpuKernels(threads=2).known_experts(EXPERTS.spec, self.known_EP, levels)
        self.arrivals = _native.Arrivals()
        self.turn = self.arrivals.begin()
        self.ids_TK = torch.tensor(ids_TK)
        generator = torch.Generator().manual_seed(seed)
        self.hidden_TH = torch.randn(len(ids_TK), HIDDEN, generator=generator) / 100
        self.weights_TK = torch.rand(*self.ids_TK.shape, generator=generator)
        self.sum_TH = torch.full_like(self.hidden_TH, -7.0)
        self.out_PH = torch.empty(self.ids_TK.numel(), HIDDEN)
        places = (self.hidden_TH, self.ids_TK, self.weights_TK)
        self._arguments = (*(one.data_ptr() for one in places), *self.ids_TK.shape)
        self._results = (self.out_PH.data_ptr(), self.sum_TH.data_ptr())

    def come(self, *experts: int) -> None:
        for expert in experts:
            self.arrivals.come(self.turn, expert, PLANES_EP[expert].tolist())

    def run_arriving(self) -> tuple[list[tuple[float, float, int]], list[tuple[float, float, int, float]]] | None:
        return self.known.run_arriving(*self._arguments, *self._results, self.arrivals)

    def all_at_once(self) -> torch.Tensor:
        there = Layer(PLANES_EP, self.ids_TK.tolist())
        there.hidden_TH.copy_(self.hidden_TH)
        there.weights_TK.copy_(self.weights_TK)
        assert there.known.run(*there._arguments, *there._results)
        return there.sum_TH


@settings(max_examples=60, deadline=None)
@given(
    ids_TK=st.integers(1, 4).flatmap(
        lambda picks: st.lists(st.permutations(range(COUNT)).map(lambda ids: ids[:picks]), min_size=1, max_size=9)
    ),
    before=st.integers(0, COUNT),
    order=st.permutations(range(COUNT)),
    seed=st.integers(0, 1000),
)
def test_the_bits_are_those_of_experts_that_are_all_there(
    ids_TK: list[list[int]], before: int, order: list[int], seed: int
) -> None:
    layer = Layer(np.zeros_like(PLANES_EP), ids_TK, seed)
    wanted = [expert for expert in order if any(expert in ids for ids in ids_TK)]
    layer.come(*wanted[:before])

    def others() -> None:
        for expert in wanted[before:]:
            time.sleep(0.0002 * (seed % 3))
            layer.come(expert)

    reader = threading.Thread(target=others)
    reader.start()
    course = layer.run_arriving()
    reader.join()
    assert course is not None
    computed, waited = course
    assert torch.equal(layer.sum_TH, layer.all_at_once())
    assert sum(experts for _, _, experts in computed) == len(wanted)
    moments = [moment for begun, ended, *_ in sorted([*computed, *waited]) for moment in (begun, ended)]
    assert moments == sorted(moments), "what is computed and what is waited for take turns"
    assert {expert for _, _, expert, _ in waited} <= set(wanted[before:])
    used = sorted(set(wanted))
    assert (layer.known_EP[used] == PLANES_EP[used]).all(), "where they are is known from now on"


@settings(max_examples=30, deadline=None)
@given(
    picks=st.lists(st.lists(st.integers(0, 3 * COUNT), min_size=3, max_size=3), min_size=1, max_size=5),
    seed=st.integers(0, 1000),
)
def test_an_expert_may_come_at_several_levels_and_be_left_out(picks: list[list[int]], seed: int) -> None:
    """Numbers of experts at three levels, -1 for none: as if each were computed by itself."""
    bits = (2, 3, 4)
    ids_TK = [[number - 1 for number in row] for row in picks]
    layer = Layer(np.zeros((COUNT * len(bits), 4), dtype=np.int64), ids_TK, seed, bits)
    for number in {number for row in ids_TK for number in row if number >= 0}:
        expert, level = divmod(number, len(bits))
        layer.arrivals.come(layer.turn, number, EXPERTS.addresses([bits[level]] * COUNT)[expert].tolist())
    assert layer.run_arriving() is not None
    for row, numbers in enumerate(ids_TK):
        expected_H = torch.zeros(HIDDEN)
        for k, number in enumerate(numbers):
            if number >= 0:
                expert, level = divmod(number, len(bits))
                jobs = EXPERTS.jobs([bits[level]] * (expert + 1), [[]] * expert + [[row]], [0])
                alone_1H = torch.empty(1, HIDDEN)
                CpuKernels(threads=2).experts(EXPERTS.spec, jobs, layer.hidden_TH, alone_1H)
                expected_H += layer.weights_TK[row, k] * alone_1H[0]
        assert torch.allclose(layer.sum_TH[row], expected_H, atol=1e-6 * float(expected_H.abs().max()) + 1e-30)


def test_where_an_expert_was_before_does_not_count() -> None:
    """It may be there no more: what was known is not computed before it comes."""
    stale_EP = PLANES_EP.copy()
    stale_EP[0] = PLANES_EP[1]
    layer = Layer(stale_EP, [[0, 2]])
    layer.come(2, 0)
    assert layer.run_arriving() is not None
    assert torch.equal(layer.sum_TH, layer.all_at_once())


def test_one_that_fails_ends_it_and_the_next_begins_anew() -> None:
    layer = Layer(PLANES_EP, [[0, 2]])
    layer.come(0)
    threading.Timer(0.02, layer.arrivals.fail).start()
    assert layer.run_arriving() is None
    late, layer.turn = layer.turn, layer.arrivals.begin()
    layer.arrivals.come(late, 0, PLANES_EP[5].tolist())  # of a read that the failure has made useless
    layer.come(0, 2)
    assert layer.run_arriving() is not None
    assert torch.equal(layer.sum_TH, layer.all_at_once())


def test_who_waits_can_be_interrupted() -> None:
    layer = Layer(PLANES_EP, [[0, 2]])
    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        layer.run_arriving()


@pytest.mark.parametrize("expert", [-2, COUNT])
def test_what_does_not_exist_is_refused(expert: int) -> None:
    with pytest.raises(ValueError, match=f"expert {expert} does not exist"):
        Layer(PLANES_EP, [[0, expert]]).run_arriving()
    layer = Layer(PLANES_EP, [[0, 2]])
    layer.arrivals.come(layer.turn, expert, [1])
    with pytest.raises(ValueError, match=f"expert {expert} came"):
        layer.run_arriving()
    with pytest.raises(ValueError, match="too many planes"):
        layer.arrivals.come(layer.turn, 0, [1, 2, 3, 4, 5])
