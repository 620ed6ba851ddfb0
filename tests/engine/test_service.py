"""A service: requests from many threads, each with the tokens that it gets alone, and none that holds up the others."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moestro import LLM, SamplingParams
from moestro.engine.events import Event, Phase
from moestro.engine.service import Service
from moestro.engine.submitted import Submitted
from moestro.errors import BudgetError, PlaneReadError, QueueFullError, RequestError, ServiceError
from moestro.store.reader import Store

PROMPTS = ["def main(argv):\n    ", "The dictionary", "Der Befehl", "1 + 2 ="]
LONG = SamplingParams(max_tokens=200, ignore_eos=True)


class Listener:
    """Keeps the events of one request."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._ended = threading.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if event.finish_reason is not None:
            self._ended.set()

    def last(self) -> Event:
        assert self._ended.wait(60), "no end came"
        return self.events[-1]

    def has_begun(self) -> bool:
        return any(event.token_ids for event in self.events)

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events)

    @property
    def token_ids(self) -> list[int]:
        return [token for event in self.events for token in event.token_ids]


@pytest.fixture(scope="module")
def llm(shipped: Path) -> Iterator[LLM]:
    with LLM(shipped, memory="48MiB", context=256, max_sequences=2) as opened:
        yield opened


@pytest.fixture
def service(llm: LLM) -> Iterator[Service]:
    with Service(llm, max_queue=4) as opened:
        yield opened


def _submit(
    service: Service, llm: LLM, prompt: str, sampling: SamplingParams, **more: float
) -> tuple[Submitted, Listener]:
    listener = Listener()
    return service.submit(llm.encode(prompt), sampling, listener, **more), listener  # type: ignore[arg-type]


def _until(condition: object) -> None:
    for _ in range(6000):
        if condition():  # type: ignore[operator]
            return
        time.sleep(0.01)
    raise AssertionError("it does not come true")


def test_requests_of_many_threads_get_what_they_get_alone(llm: LLM) -> None:
    sampling = [SamplingParams(max_tokens=20, temperature=0.9, seed=seed) for seed in range(len(PROMPTS))]
    alone = [llm.generate(prompt, one)[0] for prompt, one in zip(PROMPTS, sampling, strict=True)]
    listeners = [Listener() for _ in PROMPTS]
    with Service(llm) as service:
        threads = [
            threading.Thread(target=service.submit, args=(llm.encode(prompt), one, listener))
            for prompt, one, listener in zip(PROMPTS, sampling, listeners, strict=True)
        ]
        for thread in threads:
            thread.start()
        for listener, whole in zip(listeners, alone, strict=True):
            last = listener.last()
            assert (listener.token_ids, listener.text) == (whole.token_ids, whole.text)
            assert last.finish_reason == whole.finish_reason
            assert last.usage is not None
            assert last.usage.completion_tokens == len(whole.token_ids)
            assert last.usage.prompt_tokens == whole.prompt_tokens == last.prompt_done_tokens
            assert last.timings is not None
            assert 0 <= last.timings.queue_s <= last.timings.ttft_s <= last.timings.total_s
            assert all(event.usage is None for event in listener.events[:-1])


def test_a_full_queue_refuses_and_a_cancelled_request_makes_room(service: Service, llm: LLM) -> None:
    begun = [_submit(service, llm, PROMPTS[0], LONG) for _ in range(6)]
    with pytest.raises(QueueFullError, match="4 may wait") as refusal:
        _submit(service, llm, PROMPTS[1], LONG)
    assert refusal.value.retry_after_s >= 1
    for submitted, _ in begun[1:]:
        service.cancel(submitted)
        service.cancel(submitted)
    assert [listener.last().finish_reason for _, listener in begun[1:]] == ["cancelled"] * 5
    _, later = _submit(service, llm, PROMPTS[1], SamplingParams(max_tokens=3))
    assert len(later.token_ids if later.last() else []) == 3
    assert begun[0][1].last().finish_reason == "length"
    service.cancel(begun[0][0])
    assert service.snapshot().kv_blocks_used == 0


def test_a_deadline_ends_what_runs_and_what_waits(service: Service, llm: LLM) -> None:
    listeners = [_submit(service, llm, PROMPTS[0], LONG, deadline_s=0.05)[1] for _ in range(4)]
    patient = _submit(service, llm, PROMPTS[2], SamplingParams(max_tokens=4))[1]
    assert {listener.last().finish_reason for listener in listeners} <= {"deadline", "length"}
    assert listeners[-1].last().finish_reason == "deadline"
    assert patient.last().finish_reason == "length"


def test_a_snapshot_tells_of_everyone(service: Service, llm: LLM) -> None:
    running = [_submit(service, llm, PROMPTS[0], LONG) for _ in range(2)]
    waiting = _submit(service, llm, PROMPTS[1], LONG)[0]
    _until(lambda: all(listener.has_begun() for _, listener in running))
    snapshot = service.snapshot()
    states = {state.id: state for state in snapshot.requests}
    assert (snapshot.running, snapshot.waiting) == (2, 1)
    assert states[waiting.id].phase is Phase.WAITING
    assert states[running[0][0].id].phase is Phase.DECODE
    assert states[running[0][0].id].generated_tokens >= 1
    assert 0 < snapshot.kv_blocks_used <= snapshot.kv_blocks
    assert snapshot.levels_LE.shape == (8, 32)
    assert snapshot.levels_LE.any()
    assert snapshot.stats.hits + snapshot.stats.misses > 0
    assert snapshot.generated_tokens >= 2
    assert snapshot.accepting
    for submitted, _ in [*running, (waiting, None)]:
        service.cancel(submitted)


def test_a_listener_that_fails_loses_its_request_alone(service: Service, llm: LLM) -> None:
    def fails(event: Event) -> None:
        raise RuntimeError("a bug of the listener")

    service.submit(llm.encode(PROMPTS[0]), LONG, fails)
    _, other = _submit(service, llm, PROMPTS[1], SamplingParams(max_tokens=5))
    assert other.last().finish_reason == "length"
    _until(lambda: service.snapshot().running == 0)


def test_bad_requests_are_refused_at_once(service: Service, llm: LLM) -> None:
    for ids, more, says in (
        ([], {}, "empty"),
        ([1], {"deadline_s": 0}, "deadline_s"),
        ([1], {"priority": 2**40}, "priority"),
    ):
        with pytest.raises(RequestError, match=says):
            service.submit(ids, LONG, print, **more)  # type: ignore[arg-type]
    service.submit([5], LONG, Listener(), request_id="one")
    with pytest.raises(RequestError, match="one"):
        service.submit([5], LONG, print, request_id="one")


def test_what_is_forgotten_is_read_again(service: Service, llm: LLM) -> None:
    first = _submit(service, llm, PROMPTS[0], SamplingParams(max_tokens=8))[1]
    first.last()
    service.flush()
    assert not service.snapshot().levels_LE.any()
    again = _submit(service, llm, PROMPTS[0], SamplingParams(max_tokens=8))[1]
    assert again.last().finish_reason == "length"
    assert again.token_ids == first.token_ids


def test_memory_is_made_less_and_more_between_steps(service: Service, llm: LLM) -> None:
    given, running = llm.plan.memory_bytes, _submit(service, llm, PROMPTS[0], LONG)[1]
    _until(running.has_begun)
    service.resize(given - (4 << 20))
    assert service.snapshot().stats.memory_bytes == given - (4 << 20)
    with pytest.raises(BudgetError, match="opened with"):
        service.resize(given + 4096)
    service.resize(given)
    assert running.last().finish_reason == "length"
    assert running.token_ids == _tokens_of_long(service, llm)


def _tokens_of_long(service: Service, llm: LLM) -> list[int]:
    """What the same request gets when nothing happens meanwhile."""
    listener = _submit(service, llm, PROMPTS[0], LONG)[1]
    listener.last()
    return listener.token_ids


def test_closing_drains_or_cancels(llm: LLM) -> None:
    service = Service(llm)
    finishes = _submit(service, llm, PROMPTS[0], SamplingParams(max_tokens=10))[1]
    service.close()
    assert finishes.events[-1].finish_reason == "length"
    with pytest.raises(ServiceError, match="closing"):
        _submit(service, llm, PROMPTS[0], LONG)
    service.close()
    service = Service(llm)
    cut = [_submit(service, llm, PROMPTS[0], LONG)[1] for _ in range(3)]
    service.close(drain_s=0.0)
    assert [listener.events[-1].finish_reason for listener in cut] == ["cancelled"] * 3
    assert not service.snapshot().requests
    assert llm.generate(PROMPTS[0], SamplingParams(max_tokens=3))[0].finish_reason == "length"


def test_a_plane_that_cannot_be_read_ends_who_needs_it(shipped: Path, llm: LLM, tmp_path: Path) -> None:
    damaged = tmp_path / "store"
    damaged.mkdir()
    for file in shipped.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    before = llm.expert_counts()
    wanted = SamplingParams(max_tokens=5)
    llm.generate(PROMPTS[1], wanted)
    used_LE = llm.expert_counts() > before
    extent = Store.open(damaged).plane((7, int(used_LE[7].argmax()), 0))
    with extent.file.open("r+b") as file:
        file.seek(extent.offset + 100)
        byte = file.read(1)[0]
        file.seek(extent.offset + 100)
        file.write(bytes([byte ^ 1]))
    with LLM(damaged, memory="48MiB", context=64) as broken, Service(broken) as service:
        listener = _submit(service, broken, PROMPTS[1], wanted)[1]
        last = listener.last()
        assert last.finish_reason == "error"
        assert isinstance(last.error, PlaneReadError)
        assert service.snapshot().accepting
        assert service.snapshot().kv_blocks_used == 0


def test_a_failure_of_the_engine_is_told_to_everyone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service(llm)
    listener = _submit(service, llm, PROMPTS[0], LONG)[1]
    _until(listener.has_begun)

    def fails() -> None:
        raise RuntimeError("nothing works")

    monkeypatch.setattr(llm.engine, "step", fails)
    assert isinstance(listener.last().error, ServiceError)
    with pytest.raises(ServiceError, match="nothing works"):
        _submit(service, llm, PROMPTS[0], LONG)
    service.close()
    monkeypatch.undo()
    assert llm.generate(PROMPTS[0], SamplingParams(max_tokens=3))[0].finish_reason == "length"
