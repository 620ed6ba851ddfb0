"""Where the time of a run goes, by clocks of the test's own, and the timeline of a run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from threading import Lock
from typing import Any

import pytest

from engine.tiny import tiny_checkpoint
from moestro import LLM, SamplingParams
from moestro.config import RuntimeOptions
from moestro.errors import RequestError
from moestro.memory.transfer import TransferEngine
from moestro.runtime.expert_layers import RawExperts
from moestro.runtime.plan import Plan
from moestro.spans import LANES
from opening import plan_of
from packing import pack_raw

PROMPTS = ["def main(argv):\n    ", "The dictionary", "Der Befehl"]
SAMPLING = SamplingParams(max_tokens=8, ignore_eos=True)


class Ticks:
    """A clock that goes on by a microsecond whenever somebody looks at it, and by what it is told besides."""

    def __init__(self) -> None:
        self._now = 0
        self._lock = Lock()

    def __call__(self) -> float:
        return self.pass_time(1)

    def pass_time(self, microseconds: int) -> float:
        with self._lock:
            self._now += microseconds
            return self._now / 1e6


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attribution")
    return pack_raw(tiny_checkpoint(folder / "checkpoint"), folder / "store").path


def _plan(store: Path, **options: Any) -> Plan:
    return plan_of(store, RuntimeOptions(context=64, **options))


def _open(store: Path, *, share: float, clock: Ticks, **options: Any) -> LLM:
    memory = _plan(store, **options).bytes_for_experts(share)
    return LLM(store, memory=memory, context=64, clock=clock, **options)


@pytest.mark.parametrize("prefetch", ["on", "off"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_the_parts_add_up_to_the_time_of_generating(store: Path, share: float, prefetch: str) -> None:
    clock = Ticks()
    with _open(store, share=share, clock=clock, max_sequences=2, prefetch=prefetch, predictor="ensemble") as llm:
        before = clock()
        llm.generate(PROMPTS, SAMPLING)
        wall = clock() - before
        stats = llm.stats()
        assert sum(stats.time_s.values()) == pytest.approx(wall, rel=0.05)
        assert sum(stats.time_s.values()) == pytest.approx(stats.wall_s, rel=1e-6)
        assert stats.wall_s <= wall
        before = clock()
        list(llm.stream(PROMPTS[0], SAMPLING))
        assert llm.stats().wall_s - stats.wall_s == pytest.approx(clock() - before, rel=0.05)
    assert all(seconds >= 0 for seconds in stats.time_s.values())
    waited = [stats.time_s[f"{why}_{how}"] for why in ("demand", "late") for how in ("queue", "read")]
    assert stats.stall_s == pytest.approx(sum(waited), rel=1e-6)
    assert stats.demand_stall_s == pytest.approx(sum(waited[:2]), rel=1e-6, abs=1e-9)


def test_each_part_gets_what_is_spent_on_it(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Ticks()
    calls: Counter[str] = Counter()
    slow = {"compute": 50_000, "read": 30_000}

    compute = RawExperts.compute

    def slow_compute(self: RawExperts, *arguments: Any) -> None:
        calls["compute"] += 1
        clock.pass_time(slow["compute"])
        compute(self, *arguments)

    read = TransferEngine._read

    def slow_read(self: TransferEngine, tickets: Any) -> Any:
        calls["read"] += 1
        clock.pass_time(slow["read"])
        return read(self, tickets)

    monkeypatch.setattr(RawExperts, "compute", slow_compute)
    monkeypatch.setattr(TransferEngine, "_read", slow_read)
    with _open(store, share=0.0, clock=clock, prefetch="off") as llm:
        llm.generate(PROMPTS[0], SAMPLING)
        time_s = llm.stats().time_s
    assert calls["compute"] > 0
    assert calls["read"] > 0
    # Reads go on while experts are computed, and then are part of that: nothing else is slow.
    assert time_s["experts"] >= calls["compute"] * slow["compute"] / 1e6
    everything = (calls["compute"] * slow["compute"] + calls["read"] * slow["read"]) / 1e6
    assert sum(time_s.values()) == pytest.approx(everything, rel=0.05)
    assert time_s["demand_queue"] + time_s["demand_read"] > 0
    assert time_s["late_queue"] == time_s["late_read"] == 0
    assert time_s["dense"] + time_s["python"] < 0.05 * everything


def test_everything_in_memory_waits_for_nothing_once_it_is_read(store: Path) -> None:
    with _open(store, share=1.0, clock=Ticks()) as llm:
        llm.generate(PROMPTS[0], SAMPLING)
        first = llm.stats().time_s
        llm.generate(PROMPTS[0], SAMPLING)
        second = llm.stats().time_s
    waits = [name for name in first if name.endswith(("_queue", "_read"))]
    assert sum(first[name] for name in waits) > 0
    assert [first[name] for name in waits] == [second[name] for name in waits]


@pytest.fixture(scope="module", params=["on", "off"])
def run(
    request: pytest.FixtureRequest, store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[dict[str, Any], LLM]]:
    """The timeline of a run, and the model that ran."""
    path = tmp_path_factory.mktemp("timeline") / "timeline.json"
    with _open(store, share=0.3, clock=Ticks(), max_sequences=2, prefetch=request.param, predictor="ensemble") as llm:
        with llm.timeline(path):
            if request.param == "on":
                llm._model.runner.planes.prefetch([(1, 0, 0), (1, 1, 0)])
            llm.generate(PROMPTS, SAMPLING)
        yield json.loads(path.read_text()), llm


def _complete(timeline: dict[str, Any], **wanted: Any) -> list[dict[str, Any]]:
    events = [event for event in timeline["traceEvents"] if event["ph"] == "X"]
    return [event for event in events if all(event[key] == value for key, value in wanted.items())]


def test_every_read_is_there_once_with_its_bytes(run: tuple[dict[str, Any], LLM]) -> None:
    timeline, llm = run
    reads, stats = _complete(timeline, cat="read"), llm.stats()
    assert sum(event["args"]["bytes"] for event in reads) == stats.bytes_read > 0
    assert len(reads) == llm._model.transfers.stats.reads
    size = stats.expert_bytes // llm.plan.total_experts
    assert {event["args"]["bytes"] for event in reads} == {size}
    assert all(event["args"]["queue_us"] > 0 for event in reads)
    ahead = [event for event in reads if not event["args"]["urgent"]]
    assert bool(ahead) == (llm.options.prefetch != "off")
    assert all({"layer", "expert", "plane"} <= event["args"].keys() for event in reads)


def test_lanes_are_named_and_their_events_follow_or_enclose_each_other(run: tuple[dict[str, Any], LLM]) -> None:
    timeline, _ = run
    names = {event["tid"]: event["args"]["name"] for event in timeline["traceEvents"] if event["name"] == "thread_name"}
    events = _complete(timeline)
    assert {event["tid"] for event in events} == names.keys()
    assert list(names.values())[: len(LANES)] == list(LANES)
    assert {event["pid"] for event in timeline["traceEvents"]} == {1}
    assert all(event["ts"] >= 0 and event["dur"] >= 0 for event in events)
    for lane in names:
        open_until: list[int] = []
        ours = sorted(_complete(timeline, tid=lane), key=lambda event: (event["ts"], -event["dur"]))
        for event in ours:
            begin, end = round(1000 * event["ts"]), round(1000 * (event["ts"] + event["dur"]))
            while open_until and open_until[-1] <= begin:
                open_until.pop()
            assert not open_until or end <= open_until[-1], event
            open_until.append(end)


def test_the_forward_pass_and_the_waits_are_there(run: tuple[dict[str, Any], LLM]) -> None:
    timeline, llm = run
    passes = _complete(timeline, name="forward pass")
    assert len(passes) == len(_complete(timeline, name="step")) > 8
    assert sum(event["args"]["rows"] for event in passes) * 3 == llm.expert_counts()[0].sum()
    layers = len(llm.expert_counts())
    for layer in range(layers):
        assert len(_complete(timeline, name=f"experts of layer {layer}")) == len(passes)
    waits = _complete(timeline, name="wait")
    assert sum(event["dur"] for event in waits) / 1e6 == pytest.approx(llm.stats().stall_s, rel=1e-6)
    assert sum(event["args"]["late"] for event in waits) <= llm.stats().late_prefetches


def test_a_timeline_is_written_when_an_error_ends_it_and_only_then_recorded(store: Path, tmp_path: Path) -> None:
    path = tmp_path / "timeline.json"
    with _open(store, share=0.3, clock=Ticks()) as llm:
        with pytest.raises(RequestError):
            _generate_within(llm, path, [*PROMPTS, ""])
        first = path.read_text()
        assert _complete(json.loads(first), name="step")
        llm.generate(PROMPTS[0], SAMPLING)
        assert path.read_text() == first
    assert sorted(one.name for one in tmp_path.iterdir()) == ["timeline.json"]


def _generate_within(llm: LLM, timeline: Path, prompts: list[str]) -> None:
    with llm.timeline(timeline):
        for prompt in prompts:
            llm.generate(prompt, SAMPLING)


def test_what_does_not_fit_is_counted_and_said(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from moestro.engine import llm as module

    whole = module.Timeline
    monkeypatch.setattr(module, "Timeline", lambda begun: whole(begun, limit=20))
    with _open(store, share=0.3, clock=Ticks()) as llm, llm.timeline(tmp_path / "short.json"):
        llm.generate(PROMPTS[0], SAMPLING)
    timeline = json.loads((tmp_path / "short.json").read_text())
    assert len(_complete(timeline)) == timeline["otherData"]["events"] == 20
    assert timeline["otherData"]["left_out"] > 0
    assert "the first 20 events" in caplog.text


def test_a_place_that_cannot_be_written_is_refused_at_once(store: Path, tmp_path: Path) -> None:
    with _open(store, share=0.3, clock=Ticks()) as llm:
        for path in (tmp_path, tmp_path / "no" / "timeline.json"):
            with pytest.raises(RequestError, match="timeline"), llm.timeline(path):
                raise AssertionError("it must not come this far")
        assert llm.stats().wall_s == 0
