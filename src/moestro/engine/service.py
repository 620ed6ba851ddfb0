"""Requests from any thread, answered by one that owns the model and runs its steps.

with LLM("model", memory="2GB", max_sequences=8) as llm, Service(llm) as service:
    submitted = service.submit(llm.encode("Once upon"), SamplingParams(), on_event=print)
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from types import TracebackType

import numpy as np

from moestro.config import SamplingParams
from moestro.domain import Choice
from moestro.engine.engine import Engine
from moestro.engine.events import Event, ServiceSnapshot
from moestro.engine.llm import LLM, Prompt
from moestro.engine.submitted import Submitted, state_of
from moestro.errors import MoestroError, QueueFullError, RequestError, ServiceError

_LOG = logging.getLogger("moestro")
_FIRST_GUESS_S = 1.0
"""How long a request takes, before any has ended."""


class Service:
    """One thread that owns an opened LLM and runs its steps; requests come from any thread.

    While it is open nobody else may generate with the model. Closing it leaves the model open.

    Args:
        max_queue: requests that may wait beside those that can run at once.
    """

    def __init__(self, llm: LLM, *, max_queue: int = 64) -> None:
        if max_queue < 0:
            raise RequestError(f"max_queue is {max_queue}, expected a whole number of at least 0.")
        self._llm, self._max_queue = llm, max_queue
        self._open_engine: Engine | None = llm.engine
        self._kv_use = llm.engine.kv_use
        self._changed = threading.Condition()
        self._live: dict[str, Submitted] = {}
        self._inbox: list[Submitted] = []
        self._unwanted: list[Submitted] = []
        self._commands: list[tuple[Callable[[], bool | None], Future[None]]] = []
        self._refusal: ServiceError | None = None
        self._stopping = False
        self._count = 0
        self._finished: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        self._typical_s = _FIRST_GUESS_S
        self._thread = threading.Thread(target=self._run, name="moestro-service", daemon=True)
        self._thread.start()

    def submit(
        self,
        prompt_ids: Sequence[int],
        sampling: SamplingParams,
        on_event: Callable[[Event], None],
        *,
        variant: str | None = None,
        priority: int = 0,
        deadline_s: float | None = None,
        request_id: str | None = None,
    ) -> Submitted:
        """Queue a request. `on_event` is called on the service's thread and must not block.

        Args:
            variant: what it runs on (empty: the base; None: what the model was opened with).
            priority: lower ones go first.
            deadline_s: seconds from now after which the request ends with what it has, as "deadline".
            request_id: a name of its own (None: one is made).

        Raises:
            RequestError: the request is not valid; it says which field.
            VariantError, BudgetError: there is no such variant, or no room for it.
            QueueFullError: too many wait already.
            ServiceError: the service is closed, or has failed.
        """
        if deadline_s is not None and not deadline_s > 0:
            raise RequestError(f"deadline_s is {deadline_s}, expected seconds above 0.")
        if not -(2**31) <= priority < 2**31:
            raise RequestError(f"priority is {priority}, expected a whole number of 32 bits; lower ones go first.")
        answer = self._llm.prepare(prompt_ids, sampling, variant=variant)
        answer.sequence.priority = priority
        with self._changed:
            self._require_room()
            self._count += 1
            name = request_id or f"request-{self._count}"
            if name in self._live:
                raise RequestError(f"request_id is {name!r}, which another request in flight has. Give another one.")
            until = None if deadline_s is None else answer.sequence.submitted_at + deadline_s
            submitted = Submitted(name, answer, on_event, deadline=until)
            self._live[name] = submitted
            self._inbox.append(submitted)
            self._changed.notify_all()
        return submitted

    def cancel(self, submitted: Submitted) -> None:
        """End a request as "cancelled"; what it holds is free before the next step. Any thread, any number of times."""
        with self._changed:
            if self._live.get(submitted.id) is submitted:
                self._unwanted.append(submitted)
                self._changed.notify_all()

    def choose(self, prompt: Prompt) -> Choice:
        """Who answers a prompt, of the base and the store's variants.

        Any thread may ask but the service's own; where the router looks at what the base routes, that is between two
        steps.

        Raises:
            RouteError, RequestError, PlaneReadError: as `LLM.choose`.
            QueueFullError, ServiceError: as `submit`.
        """
        with self._changed:
            self._require_room()
        return self._llm.choose(prompt, route=self._route)

    def _route(self, prompt_ids: Sequence[int], layers: int) -> np.ndarray:
        found: list[np.ndarray] = []

        def look() -> bool:
            experts_NLK = self._engine.route(prompt_ids, layers)
            found.extend(() if experts_NLK is None else (experts_NLK,))
            return bool(found)

        self._between_steps(look)
        return found[0]

    def snapshot(self) -> ServiceSnapshot:
        """How things are. Any thread may ask; never waits for a step."""
        now = time.perf_counter()
        with self._changed:
            live = list(self._live.values())
            tokens, finished, accepting = Counter(self._tokens), dict(self._finished), self._refusal is None
        generated = sum(one.generated_tokens for one in live)
        engine = self._open_engine
        kv = self._kv_use if engine is None else engine.kv_use
        return ServiceSnapshot(
            requests=tuple(state_of(one, now) for one in live),
            stats=self._llm.stats(),
            levels_LE=self._llm.residency(),
            kv_blocks=kv.blocks,
            kv_blocks_used=kv.used,
            kv_blocks_kept=kv.kept,
            prompt_tokens=tokens["prompt"],
            cached_tokens=tokens["cached"],
            generated_tokens=tokens["generated"] + generated,
            finished=finished,
            accepting=accepting,
        )

    def flush(self) -> None:
        """Forget every expert in memory and every kept prefix, between two steps. Returns when that is done.

        Raises:
            ServiceError: the service is closed, or has failed.
        """
        self._between_steps(self._engine.forget)

    def resize(self, memory_bytes: int) -> None:
        """Make the number of bytes another one, between two steps: at most what the model was opened with.

        Raises:
            BudgetError: it is above that, or too little for the KV cache and two experts.
            ServiceError: the service is closed, or has failed.
        """
        self._between_steps(lambda: self._engine.resize(memory_bytes))

    def close(self, *, drain_s: float | None = None) -> None:
        """Take no more requests, finish those there are, and end the thread. Those not done after `drain_s` seconds
        (None: all the time they need) are cancelled."""
        with self._changed:
            self._refusal = self._refusal or ServiceError("The service is closing and takes no more requests.")
            if not self._changed.wait_for(lambda: not self._live, timeout=drain_s):
                self._unwanted.extend(self._live.values())
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()
        if self._open_engine is not None:
            # Whoever still reads an answer has a service, which must not keep a closed model's memory.
            self._kv_use, self._open_engine = self._open_engine.kv_use, None

    def __enter__(self) -> Service:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(drain_s=None if kind is None else 0.0)

    @property
    def _engine(self) -> Engine:
        assert self._open_engine is not None
        return self._open_engine

    def _between_steps(self, command: Callable[[], bool | None]) -> None:
        """Have the service's thread do something, again after the next step as long as it is False, and wait for it."""
        done: Future[None] = Future()
        with self._changed:
            if self._refusal is not None:
                raise self._refusal
            self._commands.append((command, done))
            self._changed.notify_all()
        done.result()

    def _require_room(self) -> None:
        if self._refusal is not None:
            raise self._refusal
        at_once = self._llm.options.max_sequences
        if len(self._live) >= at_once + self._max_queue:
            ahead = len(self._live) - at_once + 1
            raise QueueFullError(
                f"{len(self._live)} requests are in flight, of which {at_once} can run at once and {self._max_queue} "
                "may wait. Try again later, or open the service with a longer queue (max_queue).",
                retry_after_s=max(1.0, self._typical_s * ahead / at_once),
            )

    def _run(self) -> None:
        try:
            while self._take_orders():
                if self._engine.busy:
                    self._end_overdue()
                    if self._engine.busy:
                        self._engine.step()
                self._deliver()
        except Exception as error:  # whoever waits for an answer has to be told, whatever it is
            _LOG.exception("The service's thread failed.")
            self._fail(ServiceError(f"The engine failed ({error!r}) and answers no more. Start it again."))

    def _take_orders(self) -> bool:
        """Wait for something to do and take it up; False when it is time to end."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._inbox or self._unwanted or self._commands or self._stopping or self._engine.busy
            )
            coming, unwanted = self._inbox, self._unwanted
            self._inbox, self._unwanted = [], []
            if self._stopping and not self._live and not self._commands:
                return False
        for one in coming:
            if not one.answer.finished:
                self._engine.add(one.answer.sequence)
        for one in unwanted:
            self._engine.cancel(one.answer.sequence)
        for _ in range(len(self._commands)):  # those that are not finished come again
            command, done = self._commands.pop(0)
            try:
                finished = command()
            except Exception as error:  # whoever waits for it has to be told, whatever it is
                done.set_exception(error)
                if not isinstance(error, MoestroError):
                    raise
            else:
                if finished is False:
                    with self._changed:
                        self._commands.append((command, done))
                else:
                    done.set_result(None)
        return True

    def _end_overdue(self) -> None:
        now = time.perf_counter()
        with self._changed:
            live = tuple(self._live.values())
        for one in live:
            if one.deadline is not None and now >= one.deadline:
                one.answer.sequence.end("deadline")
                self._engine.cancel(one.answer.sequence)

    def _deliver(self) -> None:
        """Tell everyone what the step brought."""
        with self._changed:
            live = tuple(self._live.values())
        for one in live:
            event = one.news()
            if event is None:
                continue
            if event.finish_reason is not None:
                self._forget(one, event)
            self._tell(one, event)

    def _tell(self, one: Submitted, event: Event) -> None:
        try:
            one.on_event(event)
        except Exception:  # one listener's bug must not end the others' requests
            _LOG.exception("The listener of %s failed; the request is cancelled.", one.id)
            self._engine.cancel(one.answer.sequence)

    def _forget(self, one: Submitted, event: Event) -> None:
        assert event.finish_reason is not None
        assert event.usage is not None
        assert event.timings is not None
        with self._changed:
            self._live.pop(one.id, None)
            self._finished[event.finish_reason] += 1
            self._tokens["prompt"] += event.usage.prompt_tokens
            self._tokens["cached"] += event.usage.cached_tokens
            self._tokens["generated"] += event.usage.completion_tokens
            if event.finish_reason in ("stop", "length"):
                seconds = event.timings.total_s - event.timings.queue_s
                self._typical_s += (seconds - self._typical_s) / min(self._finished.total(), 16)
            self._changed.notify_all()

    def _fail(self, error: ServiceError) -> None:
        with self._changed:
            self._refusal = error
            live, commands = tuple(self._live.values()), self._commands
            self._inbox, self._unwanted, self._commands = [], [], []
        for _, done in commands:
            done.set_exception(error)
        for one in live:
            one.answer.sequence.fail(error)
            event = one.news()
            assert event is not None
            self._forget(one, event)
            self._tell(one, event)
        for one in live:
            self._engine.cancel(one.answer.sequence)
