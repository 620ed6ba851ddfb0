"""Requests of one call of the API: handed to the service together, followed together, ended together."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from moestro.config import SamplingParams
from moestro.engine.events import Event, RequestTimings, Usage
from moestro.engine.service import Service
from moestro.engine.submitted import Submitted
from moestro.errors import MoestroError
from moestro.server.errors import ApiError, as_api_error
from moestro.server.metrics import Metrics


@dataclass(frozen=True)
class Ask:
    """One prompt with the parameters of each answer to it. `variant` answers, the base where it is empty."""

    prompt_ids: Sequence[int]
    sampling: Sequence[SamplingParams]
    variant: str = ""


@dataclass
class Total:
    """What the answers took together, for `usage`. A prompt with several answers counts once."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    timings: list[RequestTimings] = field(default_factory=list)

    def as_json(self) -> dict[str, object]:
        """OpenAI's usage object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Answers:
    """Follows the answers of one call: `submit`, then `events`. Whoever stops following has to `cancel`.

    Choices are numbered over all prompts: those of the first, then those of the second, ...
    """

    def __init__(self, service: Service, metrics: Metrics) -> None:
        self.total = Total()
        self._service, self._metrics = service, metrics
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._running: dict[int, Submitted] = {}
        self._first_choice: list[bool] = []
        self._over = threading.Event()

    async def submit(self, asks: Sequence[Ask], *, priority: int = 0, deadline_s: float | None = None) -> None:
        """Queue everything, or nothing. Raises ApiError."""
        loop = asyncio.get_running_loop()

        choices = [(ask, choice, one) for ask in asks for choice, one in enumerate(ask.sampling)]

        def everything() -> None:
            for number, (ask, choice, sampling) in enumerate(choices):
                if self._over.is_set():
                    return
                self._first_choice.append(choice == 0)
                listener = _Listener(number, loop, self._events)
                submitted = self._service.submit(
                    ask.prompt_ids,
                    sampling,
                    listener,
                    variant=ask.variant,
                    priority=priority,
                    deadline_s=deadline_s,
                )
                self._running[number] = submitted
                if self._over.is_set():  # the client left while this one was on its way
                    self._service.cancel(submitted)

        try:
            # Not here: compiling a grammar takes a while.
            await asyncio.to_thread(everything)
        except MoestroError as error:
            self.cancel()
            self._metrics.refused()
            raise as_api_error(error) from error
        except BaseException:
            self.cancel()
            raise

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """What happens, until every answer has ended. Raises ApiError when one ends with an error."""
        last: dict[int, float] = {}
        while self._running:
            number, event = await self._events.get()
            now = time.perf_counter()
            if event.token_ids:
                if number in last:
                    self._metrics.inter_token((now - last[number]) / len(event.token_ids), len(event.token_ids))
                last[number] = now
            if event.finish_reason is not None:
                del self._running[number]
                self._count(number, event)
                if event.error is not None:
                    raise as_api_error(event.error)
                if event.finish_reason == "cancelled":  # by the server itself: the client is still there
                    raise ApiError(
                        503,
                        "The server ends or loads its model anew: the answer is not complete.",
                        code="shutting_down",
                    )
            yield number, event

    def cancel(self) -> None:
        """End what still runs. Any number of times."""
        self._over.set()
        for submitted in list(self._running.values()):
            self._service.cancel(submitted)

    def _count(self, number: int, event: Event) -> None:
        usage, timings = event.usage, event.timings
        assert usage is not None
        assert timings is not None
        assert event.finish_reason is not None
        self._metrics.finished(event.finish_reason, usage, timings)
        self._add(usage, first_choice=self._first_choice[number])
        self.total.timings.append(timings)

    def _add(self, usage: Usage, *, first_choice: bool) -> None:
        self.total.completion_tokens += usage.completion_tokens
        if first_choice:
            self.total.prompt_tokens += usage.prompt_tokens
            self.total.cached_tokens += usage.cached_tokens


class _Listener:
    """Brings events from the service's thread to the event loop's."""

    def __init__(self, number: int, loop: asyncio.AbstractEventLoop, events: asyncio.Queue[tuple[int, Event]]) -> None:
        self._number, self._loop, self._events = number, loop, events

    def __call__(self, event: Event) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._events.put_nowait, (self._number, event))
