"""Foresight at run time: it moves planes, never results; and the simulator, told the same, counts the same."""

from __future__ import annotations

from collections.abc import Container, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from families import FAMILIES, random_model
from moestro.config import PackOptions, RuntimeOptions
from moestro.errors import RequestError, TraceError, UnsupportedModelError
from moestro.foresight import NETS_FILE, TrainingOptions, fit_store, net_file
from moestro.keys import PlaneKey
from moestro.memory.plane_cache import PlaneCache
from moestro.memory.planes import CacheStats
from moestro.memory.transfer import TransferEngine
from moestro.policy.choice import make_choice, policy_names
from moestro.policy.foresight import Foresight
from moestro.policy.observation import Shape
from moestro.policy.prefetch import Slack, SlackMeter
from moestro.runtime.foresight import Chosen
from moestro.runtime.native.forward import AskedEarly
from moestro.runtime.open import OpenModel, layouts_of
from moestro.simulate.timed import Machine, TimedReplay, TimedResult
from moestro.store.pack import pack
from moestro.store.reader import Store
from moestro.trace import Recorder, Trace
from opening import Feed, logits_of, open_store
from traces import random_trace

PROMPT = [5, 17, 3, 99, 42, 8, 120, 64, 31, 77, 12, 150, 9, 9, 23, 58, 101, 6, 44, 71]
OTHER = [9, 4, 77, 8, 8, 91, 33]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose predictor was trained on routing of its shape."""
    folder = tmp_path_factory.mktemp("foresight")
    random_model(FAMILIES["qwen3_moe"](), dtype=torch.bfloat16).save_pretrained(folder / "checkpoint")
    store = pack(folder / "checkpoint", folder / "store", options=PackOptions(calibration=False))
    most = max(layer.num_experts for layer in store.layers)
    trace = random_trace(0, prompts=(0,), answers=(300,), layers=len(store.layers), experts=most)
    fit_store(store.path, trace, TrainingOptions(epochs=1, width=4), progress=lambda _layers: None)
    return store.path


def _decode(opened: OpenModel, rows: int = 12) -> list[torch.Tensor]:
    """Two requests: a prompt each, then tokens one by one, then only the second one goes on."""
    feed = Feed(opened)
    found = [*feed.step({7: PROMPT}).values(), *feed.step({8: OTHER}).values()]
    for index in range(rows):
        found += feed.step({7: [index + 3], 8: [2 * index + 5]}).values()
    opened.runner.end_request(7)
    for index in range(rows):
        found += feed.step({8: [3 * index + 1]}).values()
    opened.runner.end_request(8)
    return found


@pytest.mark.parametrize("policy", policy_names())
def test_no_policy_changes_a_bit(policy: str, folder: Path) -> None:
    with open_store(folder, share=1.0) as opened:
        whole = _decode(opened)
    for prefetch in ("on", "off"):
        options = {"policy": policy, "predictor": "learned", "prefetch": prefetch}
        with open_store(folder, share=0.4, max_sequences=2, **options) as opened:
            found = _decode(opened)
            assert opened.chosen == Chosen(policy, "learned", "learned" if prefetch == "on" else "")
            if prefetch == "off":
                assert opened.runner.planes.stats.prefetches == 0
        assert all(torch.equal(one, other) for one, other in zip(found, whole, strict=True))


def _idle_link(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is absent and at all likely is worth reading ahead, however long anything takes here."""
    monkeypatch.setattr(SlackMeter, "slack", lambda _self, _read_s, *, reading, **_: Slack(1.0, 2.0 + reading))


def test_prefetches_are_made_and_change_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_store(folder, share=1.0) as opened:
        whole = _decode(opened, rows=40)
    _idle_link(monkeypatch)
    with open_store(folder, share=0.5, max_sequences=2, policy="value", predictor="ensemble") as opened:
        found = _decode(opened, rows=40)
        assert opened.runner.planes.stats.prefetches > 2
    assert all(torch.equal(one, other) for one, other in zip(found, whole, strict=True))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("predictor", ["gate", "recency+gate", "eamc"])
def test_gates_and_history_change_no_bit(
    native: bool, predictor: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_store(folder, share=1.0, native=native) as opened:
        whole = _decode(opened, rows=40)
    _idle_link(monkeypatch)
    options = {"policy": "lru", "predictor": predictor, "learn": "off"}
    with open_store(folder, share=0.4, native=native, max_sequences=2, **options) as opened:
        found = _decode(opened, rows=40)
        assert opened.runner.planes.stats.prefetches > 2
        assert 0 < opened.runner.foreseen.recall <= 1
    assert all(torch.equal(one, other) for one, other in zip(found, whole, strict=True))


def test_gates_see_what_a_trace_with_lookahead_has(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same hidden states, on both paths."""
    with open_store(folder, native=False) as opened:
        recorder = opened.runner.recorder = Recorder(_shape(folder).experts, keep=True)
        opened.runner.look_ahead(1)
        Feed(opened).step({0: OTHER})
        opened.runner.end_request(0)
        expected_NLC = recorder.trace().lookahead_NPLC[:, 0]  # type: ignore[index]
    for native in (True, False):
        told: list[tuple[int, int, np.ndarray]] = []
        monkeypatch.setattr(
            Foresight, "lookahead", lambda _self, layer, ahead, ids, told=told: told.append((layer, ahead, ids.copy()))
        )
        with open_store(folder, share=0.4, native=native, predictor="gate") as opened:
            Feed(opened).step({0: OTHER})
        assert [one[:2] for one in told] == [(layer, 1) for layer in range(_shape(folder).layers - 1)]
        same = [ids_TC == expected_NLC[:, layer] for layer, _, ids_TC in told]
        # Paths differ by roundings, which may turn a draw.
        assert np.mean(same) > 0.95


def test_the_decoder_comes_back_for_what_may_pay_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    monkeypatch.setattr(
        AskedEarly, "ask", lambda self, telling, ask=AskedEarly.ask: told.append(telling) or ask(self, telling)
    )
    with open_store(folder, share=0.4, max_sequences=2, predictor="gate", learn="off") as opened:
        picks = int(opened.skeleton.config.num_experts_per_tok)
        _decode(opened)
        # Two prompts, then both requests, then one.
        assert told[:14] == [picks] * 14, "several rows"
        assert all(1 <= one <= picks for one in told[14:])
        foresight = opened.runner._experts.foresight
        assert foresight is not None
        foresight.reads_ahead = False
        assert [foresight.telling(rows) for rows in (1, 2)] == [0, 0]


def test_gates_that_are_not_found_are_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "moestro.runtime.lookahead.is_experts_module", lambda module: isinstance(module, torch.nn.Embedding)
    )
    with (
        pytest.raises(UnsupportedModelError, match="Choose a predictor without 'gate'"),
        open_store(folder, share=0.4, predictor="ensemble+gate"),
    ):
        pass


def _recorded(folder: Path, policy: str, prefetch: str = "off") -> tuple[Trace, CacheStats, OpenModel]:
    options = {"policy": policy, "predictor": "recency", "prefetch": prefetch}
    with open_store(folder, share=0.4, max_sequences=2, **options) as opened:
        recorder = opened.runner.recorder = Recorder(experts=_shape(folder).experts, keep=True)
        feed = Feed(opened)
        for request in (0, 1):
            feed.step({request: PROMPT if request else OTHER})
            for index in range(30):
                feed.step({request: [(7 * index + 13 * request) % 150 + 3]})
            opened.runner.end_request(request)
        return recorder.trace(), opened.runner.planes.stats, opened


def _shape(folder: Path) -> Shape:
    store = Store.open(folder)
    return Shape(len(store.layers), max(layer.num_experts for layer in store.layers), 2)


def _replay(trace: Trace, opened: OpenModel, policy: str, *, prefetch: bool) -> TimedResult:
    """On a disk that reads everything while a layer is computed."""
    shape = Shape(trace.layers, trace.num_experts, trace.picks)
    foresight = make_choice(policy, "recency", shape, prefetch=prefetch, nets=None).foresight(prefetch=prefetch)
    return TimedReplay(
        trace,
        plane_bytes=[[sum(plane.nbytes for plane in one.planes)] for one in layouts_of(opened.store, 0)],
        memory=opened.plan.arena_bytes,
        machine=Machine(bytes_per_s=1e9, layer_s=1.0),
        policy=foresight.eviction,
        foresight=foresight,
    ).run()


@pytest.mark.parametrize("policy", ["lru", "lrfu", "hobbit", "moe_infinity", "value"])
def test_the_simulator_counts_what_the_runtime_counted(policy: str, folder: Path) -> None:
    trace, stats, opened = _recorded(folder, policy)
    replayed = _replay(trace, opened, policy, prefetch=False)
    for name in ("hits", "misses", "evictions", "bytes_read"):
        assert getattr(replayed.stats, name) == getattr(stats, name), name
    assert stats.misses > 20


@pytest.mark.parametrize("policy", ["lru", "lrfu", "value"])
def test_both_count_prefetches_alike(policy: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every read has ended before the next layer routes, prefetches are the same on both sides."""
    _idle_link(monkeypatch)
    prefetch = PlaneCache.prefetch

    def prefetch_and_wait(cache: PlaneCache, keys: Sequence[PlaneKey], *, spare: Container[PlaneKey] = ()) -> int:
        made = prefetch(cache, keys, spare=spare)
        if isinstance(cache._engine, TransferEngine):
            with cache._lock:
                while any(plane.ahead for plane in cache._loading.values()):
                    cache._changed.wait()
        return made

    monkeypatch.setattr(PlaneCache, "prefetch", prefetch_and_wait)
    trace, stats, opened = _recorded(folder, policy, prefetch="on")
    replayed = _replay(trace, opened, policy, prefetch=True)
    for name in ("hits", "misses", "evictions", "prefetches", "wasted_prefetches", "wasted_bytes"):
        assert getattr(replayed.stats, name) == getattr(stats, name), name
    assert replayed.foreseen == opened.runner.foreseen
    assert replayed.foreseen.needed > replayed.foreseen.useful > 10
    assert 0 < replayed.foreseen.precision < 1
    assert replayed.stats.late_prefetches == stats.late_prefetches == 0
    assert replayed.stats.late_stall_seconds == stats.late_stall_seconds == 0.0


def test_auto_is_the_best_that_pays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(*, gates: bool = False, **options: str) -> Chosen:
        return Chosen.of(RuntimeOptions(**options), nets_bytes=size, expert_bytes=size, gates=gates)

    size = (folder / NETS_FILE).stat().st_size
    assert chosen() == Chosen("lrfu", "", ahead="")
    assert chosen(gates=True) == Chosen("lrfu", "", ahead="gate")
    assert chosen(gates=True, prefetch="off") == Chosen("lrfu", "", ahead="")
    assert chosen(policy="value") == Chosen("value", "ensemble", ahead="ensemble")
    assert chosen(predictor="recency", prefetch="off", gates=True) == Chosen("value", "recency", ahead="")
    assert chosen(predictor="recency", gates=True) == Chosen("value", "recency", ahead="recency")
    monkeypatch.setattr(net_file, "MOST_OF_EXPERTS", 1.0)
    assert chosen() == Chosen("value", "learned", ahead="learned")
    assert chosen(gates=True) == Chosen("value", "learned", ahead="gate")
    assert chosen(policy="lru", prefetch="off") == Chosen("lru", "learned", ahead="")


def test_what_cannot_be_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="prefetch is 'maybe', expected auto, on or off"):
        RuntimeOptions(prefetch="maybe")
    with (
        pytest.raises(TraceError, match="Train it again"),
        open_store(_damaged(folder, tmp_path), share=0.4, policy="value", predictor="learned"),
    ):
        pass


def _damaged(folder: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "store"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / NETS_FILE).write_bytes(b"damaged")
    return copy


def test_a_prompt_alone_is_no_error(folder: Path) -> None:
    with open_store(folder, share=0.4, policy="value", predictor="learned") as opened:
        assert logits_of(opened, PROMPT, chunk=3).isfinite().all()
