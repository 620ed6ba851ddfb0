"""Decoded rows that give something up on their way: what the ledger decides, and what is computed, stay the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.checkpoints import packed_with_errors
from moestro import _native
from moestro.kernels.cpu import CpuKernels
from moestro.policy.levels import LevelAsk, LevelTable
from moestro.policy.levels.ledger import Ledger
from moestro.policy.observation import Routing
from moestro.runtime.allowance import PassAllowance
from moestro.runtime.batch import PackedBatch, Segment
from moestro.runtime.experts import RoutedExperts
from moestro.runtime.kv import blocks_for
from moestro.runtime.open import OpenModel
from opening import open_store
from packed_matrices import Source, random_experts

BUDGET = 0.06


@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed_with_errors(request.param, tmp_path_factory.mktemp(request.param))


def _decode(opened: OpenModel, tokens: int, budget: float) -> list[torch.Tensor]:
    runner, found = opened.runner, []
    blocks = runner.kv.allocate(blocks_for(tokens))
    for position in range(tokens):
        segment = Segment(0, [(7 * position) % 120 + 3], position, blocks, True, True, budget)
        found.append(runner.forward(PackedBatch([segment])).clone())
    runner.end_request(0)
    return found


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_the_same_is_given_up_in_fewer_calls(folder: Path, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    call = RoutedExperts.__call__
    monkeypatch.setattr(RoutedExperts, "__call__", lambda self, *given: calls.append(given[0]) or call(self, *given))
    found, stats, applied, called = {}, {}, {}, {}
    for alone in (True, False):
        with monkeypatch.context() as patch:
            if not alone:
                patch.setattr(PassAllowance, "begins", lambda *_: False)
            calls.clear()
            with open_store(folder, share=share, level_policy="ledger", prefetch="off", learn="off") as opened:
                found[alone] = _decode(opened, 120, BUDGET)
                stats[alone], applied[alone] = opened.runner.planes.stats, opened.runner.levels_applied
                called[alone] = len(calls)
                exact = _decode(opened, 20, 0.0)
    assert all(torch.equal(one, other) for one, other in zip(found[True], found[False], strict=True))
    for name in ("misses", "hits", "evictions", "bytes_read"):
        assert getattr(stats[True], name) == getattr(stats[False], name), name
    layers = len(opened.runner._experts.chains)
    assert called[True] < called[False] <= 120 * layers
    lower = sum(count for bits, count in applied[True].items() if bits != "4")
    assert lower > 0
    assert all(applied[True][bits] == applied[False][bits] for bits in ("0", "2", "3"))
    with open_store(folder, share=1.0) as opened:
        assert all(torch.equal(one, other) for one, other in zip(exact, _decode(opened, 20, 0.0), strict=True))


COUNT, HIDDEN, PICKS, BITS = 6, 64, 3, (2, 3, 4)
EXPERTS = random_experts(Source(3), COUNT, encoding="nested", hidden=HIDDEN, width=96, gate="halves", activation="silu")
PLANES_EP = EXPERTS.addresses([BITS[-1]] * COUNT)


@settings(deadline=None, max_examples=100)
@given(seed=st.integers(0, 2**16), budget=st.sampled_from([0.001, 0.02, 0.3]), scale=st.floats(0.01, 10))
def test_it_is_done_where_the_ledger_would_read_nothing(seed: int, budget: float, scale: float) -> None:
    chance = np.random.default_rng(seed)
    errors_LED = np.sort(chance.random((2, COUNT, 4)).astype(np.float32))[:, :, ::-1]
    sensitivity_L = np.array([0.1, 0.2], dtype=np.float32) * np.float32(scale)
    ledger = Ledger(LevelTable(np.array([[0, 100, 140, 200]] * 2), errors_LED, sensitivity_L, PICKS))
    ledger.step(np.array([budget]))
    price, left = ledger.terms()
    held_E = chance.integers(0, 4, COUNT)
    ids_1K = chance.permutation(COUNT)[None, :PICKS]
    weights_1K = chance.random((1, PICKS)).astype(np.float32)
    routing = Routing.of(1, ids_1K, weights_1K, (), experts=COUNT)
    wanted_1K = ledger.choose(LevelAsk(routing, np.array([budget]), held_E))

    levelled_EP = np.zeros((COUNT * len(BITS), 4), dtype=np.int64)
    levelled = CpuKernels(threads=2).known_experts(EXPERTS.spec, levelled_EP, BITS)
    held_EP = np.where(np.arange(4) < held_E[:, None], PLANES_EP, 0)
    costs, per_byte = ledger.cost_LES.ctypes.data, ledger.per_byte_LES.ctypes.data
    allowance = _native.Allowance(costs, per_byte, *ledger.cost_LES.shape)
    allowance.hold(1, levelled, held_EP.ctypes.data, COUNT, [0, 1, 2, 3])
    hidden_1H, chosen_LK = torch.rand(1, HIDDEN), np.full((2, PICKS), -1)
    out_PH, sum_1H = torch.empty(PICKS, HIDDEN), torch.full((1, HIDDEN), -7.0)
    arguments = (hidden_1H.data_ptr(), ids_1K.ctypes.data, weights_1K.ctypes.data, PICKS)
    results = (out_PH.data_ptr(), sum_1H.data_ptr())

    assert not allowance.compute(1, *arguments, *results), "before it has been given anything"
    allowance.begin(price, left, chosen_LK.ctypes.data)
    assert not allowance.compute(0, *arguments, *results), "nothing is known of this layer"
    done = allowance.compute(1, *arguments, *results)
    assert done == bool((wanted_1K == np.minimum(held_E, 3)[ids_1K]).all())
    if done:
        assert chosen_LK[1].tolist() == wanted_1K[0].tolist()
        assert allowance.left == pytest.approx(ledger.terms()[1], rel=1e-6, abs=1e-12)
        assert bool((sum_1H == 0).all()) == (not wanted_1K.any())
    else:
        assert allowance.left == left
        assert (chosen_LK == -1).all()
        assert (sum_1H == -7).all()


def test_what_does_not_fit_is_refused() -> None:
    levelled = CpuKernels(threads=2).known_experts(EXPERTS.spec, np.zeros((COUNT * 3, 4), dtype=np.int64), BITS)
    costs_LES = np.zeros((2, COUNT, 3))
    allowance = _native.Allowance(costs_LES.ctypes.data, costs_LES.ctypes.data, *costs_LES.shape)
    for moe, experts, depths in ((2, COUNT, [0, 1, 2, 3]), (0, COUNT + 1, [0, 1, 2, 3]), (0, COUNT, [0, 1, 3])):
        with pytest.raises(ValueError, match=f"layer {moe} does not exist, or does not fit"):
            allowance.hold(moe, levelled, PLANES_EP.ctypes.data, experts, depths)
