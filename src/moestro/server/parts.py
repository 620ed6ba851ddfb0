"""What an answer consists of: reasoning, text, calls of tools. Told apart by the marks of the model's chat template."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from moestro.server.dialects import HERMES, Call, Dialect, NoCallError, Schemas

THINK, THOUGHT = "<think>", "</think>"


class Kind(Enum):
    """What a piece of an answer is."""

    TEXT = "content"
    REASONING = "reasoning_content"
    CALL = "tool_calls"


@dataclass(frozen=True)
class Part:
    """A piece: text of its kind, or a whole call as OpenAI writes it."""

    kind: Kind
    text: str = ""
    call: dict[str, Any] | None = None


@dataclass(frozen=True)
class Marks:
    """What to look for: `calls` as `dialect` has them. `thinking` says that the prompt has begun the reasoning already,
    `schemas` are those of the functions that may be called."""

    reasoning: bool = False
    calls: bool = False
    thinking: bool = False
    dialect: Dialect = HERMES
    schemas: Schemas = field(default_factory=dict)


def has_reasoning(template: str) -> bool:
    """Whether a chat template has the model reason between marks."""
    return THOUGHT in template


def first_mark(text: str, marks: Sequence[str]) -> tuple[int, str] | None:
    """The mark that comes first in a text: where, and which."""
    return min(((place, mark) for mark in marks if (place := text.find(mark)) >= 0), default=None)


def kept_back(text: str, marks: Sequence[str]) -> int:
    """How many characters at the end of a text may be the beginning of a mark."""
    lengths = (length for mark in marks for length in range(1, len(mark)) if text.endswith(mark[:length]))
    return max(lengths, default=0)


def call_part(call: Call, index: int) -> Part:
    """A call as OpenAI writes it."""
    function = {"name": call.name, "arguments": call.arguments}
    told = {"index": index, "id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
    return Part(Kind.CALL, call=told)


class Splitter:
    """Takes an answer's text as it comes. What may be the beginning of a mark is kept back until that is certain."""

    def __init__(self, marks: Marks) -> None:
        self._marks = marks
        self._inside = Kind.REASONING if marks.thinking else Kind.TEXT
        self._rest = ""
        self._opened = ""
        self._calls = 0
        self._fresh = marks.thinking
        self._begins = True

    @property
    def has_calls(self) -> bool:
        """Whether there has been a call."""
        return self._calls > 0

    def push(self, text: str) -> Iterator[Part]:
        """The parts that are certain now."""
        self._rest += text
        while (found := self._first_mark()) is not None:
            place, mark = found
            yield from self._told(self._rest[:place], mark)
            self._rest = self._rest[place + len(mark) :]
            self._enter(mark)
        if self._inside is not Kind.CALL:  # calls are told whole
            certain = len(self._rest) - self._uncertain()
            yield from self._told(self._rest[:certain])
            self._rest = self._rest[certain:]

    def finish(self) -> Iterator[Part]:
        """What was kept back. A call that is not whole is text: what the model wrote is not lost."""
        yield from self._told(self._rest)
        self._rest = ""

    def _enter(self, mark: str) -> None:
        if mark in self._marks.dialect.opens and self._inside is Kind.TEXT:
            self._inside, self._opened = Kind.CALL, mark
        else:
            self._inside = Kind.REASONING if mark == THINK else Kind.TEXT
        self._fresh = True

    def _looked_for(self) -> tuple[str, ...]:
        dialect = self._marks.dialect
        if self._inside is Kind.REASONING:
            return (THOUGHT,)
        if self._inside is Kind.CALL:
            return (dialect.closes,) if dialect.closes else ()
        opens = dialect.opens if self._marks.calls and (self._begins or not dialect.at_start) else ()
        return ((THINK,) if self._marks.reasoning else ()) + opens

    def _first_mark(self) -> tuple[int, str] | None:
        found = first_mark(self._rest, self._looked_for())
        if found is None or not (self._marks.dialect.at_start and found[1] in self._marks.dialect.opens):
            return found
        return found if not self._rest[: found[0]].strip() else self._without_calls()

    def _without_calls(self) -> tuple[int, str] | None:
        """The answer has begun otherwise: no call can come any more."""
        self._begins = False
        return first_mark(self._rest, self._looked_for())

    def _uncertain(self) -> int:
        if self._marks.dialect.at_start and self._marks.calls and self._begins and not self._rest.strip():
            return len(self._rest)  # spaces before a call belong to it
        return kept_back(self._rest, self._looked_for())

    def _told(self, text: str, closed_by: str = "") -> Iterator[Part]:
        if self._inside is Kind.CALL:
            yield from self._read(self._opened + text + closed_by)
            return
        if self._fresh:  # line breaks after a mark belong to it
            text = text.lstrip()
        if text:
            self._fresh = False
            self._begins = self._begins and (self._inside is not Kind.TEXT or not text.strip())
            yield Part(self._inside, text)

    def _read(self, text: str) -> Iterator[Part]:
        try:
            calls = self._marks.dialect.read(text, self._marks.schemas)
        except NoCallError:
            yield Part(Kind.TEXT, text)
            return
        for call in calls:
            yield call_part(call, self._calls)
            self._calls += 1
