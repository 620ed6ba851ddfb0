"""A conversation: messages so far, and whoever answers them, a server or a model in this process."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol

from moestro.client.connection import Connection
from moestro.config import ChatOptions, SamplingParams
from moestro.domain import AUTO, BASE
from moestro.domain.examples import text_of_messages

if TYPE_CHECKING:
    from moestro import LLM
    from moestro.engine.events import Event
    from moestro.engine.results import Stats

Message = dict[str, str]


@dataclass(frozen=True)
class Told:
    """What is known of an answer at its end; None for what the one who answered does not tell.

    `variant` is the one that was chosen for it, where that was left to the router of domains.
    """

    tokens: int
    ttft_s: float
    decode_s: float
    finish_reason: str
    hits: int | None = None
    misses: int | None = None
    bytes_read: int | None = None
    variant: str | None = None


class Partner(Protocol):
    """Whoever answers."""

    @property
    def name(self) -> str: ...

    def answer(self, messages: Sequence[Message]) -> Iterator[str | Told]:
        """Pieces of text, then what is known of the whole. Closing the iterator ends it. Raises MoestroError."""


@dataclass
class Conversation:
    """Messages to and fro. `say` adds both; an answer that was broken off is kept as far as it came."""

    partner: Partner
    system: str = ""
    messages: list[Message] = field(default_factory=list)

    def say(self, text: str) -> Iterator[str | Told]:
        """The answer to `text`. An error takes the message back. Raises MoestroError."""
        asked = {"role": "user", "content": text}
        head = [{"role": "system", "content": self.system}] if self.system else []
        pieces: list[str] = []
        try:
            for piece in self.partner.answer([*head, *self.messages, asked]):
                if isinstance(piece, str):
                    pieces.append(piece)
                yield piece
        finally:
            if pieces:
                self.messages += [asked, {"role": "assistant", "content": "".join(pieces)}]

    def reset(self) -> None:
        """Forget all messages; what the assistant is to be like stays."""
        self.messages.clear()

    def take_back(self) -> str | None:
        """Take the last question and its answer back, and return the question."""
        if not self.messages:
            return None
        self.messages, last = self.messages[:-2], self.messages[-2]
        return last["content"]


class Server:
    """A model behind a URL."""

    def __init__(self, connection: Connection, options: ChatOptions, *, quality: str = "") -> None:
        self._connection, self._values = connection, _asked(options)
        if quality:
            self._values["quality"] = quality
        self.name = str(connection.get("/v1/models")["data"][0]["id"])

    def answer(self, messages: Sequence[Message]) -> Iterator[str | Told]:
        body: dict[str, Any] = {"model": self.name, "messages": list(messages), **self._values}
        body["stream_options"] = {"include_usage": True}
        start, first, reason, tokens = time.perf_counter(), 0.0, "", 0
        for event in self._connection.stream("/v1/chat/completions", body):
            for choice in event["choices"]:
                text = choice["delta"].get("content")
                reason = choice["finish_reason"] or reason
                if text:
                    first = first or time.perf_counter()
                    yield text
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
        first = first or time.perf_counter()
        yield Told(tokens, first - start, time.perf_counter() - first, reason)


class Local:
    """A model in this process, run by a thread of its own, so that Ctrl-C hits who waits for it and not its steps."""

    def __init__(self, llm: LLM, options: ChatOptions, *, name: str) -> None:
        from moestro.engine.service import Service
        from moestro.server.defaults import read_defaults

        self.name, self._llm, self._service = name, llm, Service(llm)
        self._values: dict[str, Any] = {**read_defaults(llm.path).values, **_asked(options)}

    def answer(self, messages: Sequence[Message]) -> Iterator[str | Told]:
        variant = self._llm.options.variant
        if variant == AUTO:
            variant = self._service.choose(text_of_messages(messages)).variant or ""
        prompt = self._llm.chat_prompt(list(messages))
        sampling = SamplingParams(**{"seed": secrets.randbits(63), **self._values})
        events: SimpleQueue[Event] = SimpleQueue()
        before = self._llm.stats()
        submitted = self._service.submit(prompt, sampling, events.put, variant=variant)
        try:
            while (event := events.get()).finish_reason is None:
                if event.text:
                    yield event.text
        finally:
            self._service.cancel(submitted)
        if event.error is not None:
            raise event.error
        if event.text:
            yield event.text
        chosen = variant or BASE if self._llm.options.variant == AUTO else None
        yield replace(_told(event, before, self._llm.stats()), variant=chosen)

    def close(self) -> None:
        """End the thread; the model stays open."""
        self._service.close(drain_s=0.0)


def _told(event: Event, before: Stats, now: Stats) -> Told:
    assert event.usage is not None
    assert event.timings is not None
    return Told(
        tokens=event.usage.completion_tokens,
        ttft_s=event.timings.ttft_s,
        decode_s=event.timings.decode_s,
        finish_reason=str(event.finish_reason),
        hits=now.hits - before.hits,
        misses=now.misses - before.misses,
        bytes_read=now.bytes_read - before.bytes_read,
    )


def _asked(options: ChatOptions) -> dict[str, Any]:
    """What the user said; the model's authors decide the rest."""
    values: dict[str, Any] = {"max_tokens": options.max_tokens}
    if options.temperature >= 0:
        values["temperature"] = float(options.temperature)
    if options.seed >= 0:
        values["seed"] = options.seed
    return values
