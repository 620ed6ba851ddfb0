"""What an answer consists of: reasoning, text, calls of tools. Told apart by the marks of the model's chat template."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

THINK, THOUGHT = "<think>", "</think>"
CALL, CALLED = "<tool_call>", "</tool_call>"
_OTHER_CALLS = ("<arg_key>", "<function=")
"""Marks of templates whose calls are not JSON between `CALL` and `CALLED`."""


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
    """What to look for. `thinking` says that the prompt has begun the reasoning already."""

    reasoning: bool = False
    calls: bool = False
    thinking: bool = False


def takes_calls(template: str) -> bool:
    """Whether a chat template takes tools and has calls written as JSON between marks (as Hermes, Qwen3 do)."""
    return "tools" in template and CALL in template and not any(mark in template for mark in _OTHER_CALLS)


def has_reasoning(template: str) -> bool:
    """Whether a chat template has the model reason between marks."""
    return THOUGHT in template


class Splitter:
    """Takes an answer's text as it comes. What may be the beginning of a mark is kept back until that is certain."""

    def __init__(self, marks: Marks) -> None:
        self._marks = marks
        self._inside = Kind.REASONING if marks.thinking else Kind.TEXT
        self._rest = ""
        self._calls = 0
        self._fresh = marks.thinking

    @property
    def has_calls(self) -> bool:
        """Whether there has been a call."""
        return self._calls > 0

    def push(self, text: str) -> Iterator[Part]:
        """The parts that are certain now."""
        self._rest += text
        while (found := self._first_mark()) is not None:
            place, mark = found
            yield from self._told(self._rest[:place])
            self._rest = self._rest[place + len(mark) :]
            self._inside = {THINK: Kind.REASONING, CALL: Kind.CALL}.get(mark, Kind.TEXT)
            self._fresh = True
        if self._inside is not Kind.CALL:  # calls are told whole
            certain = len(self._rest) - self._kept_back()
            yield from self._told(self._rest[:certain])
            self._rest = self._rest[certain:]

    def finish(self) -> Iterator[Part]:
        """What was kept back. A call without an end is text: what the model wrote is not lost."""
        if self._inside is Kind.CALL:
            yield Part(Kind.TEXT, CALL + self._rest)
        else:
            yield from self._told(self._rest)
        self._rest = ""

    def _looked_for(self) -> tuple[str, ...]:
        if self._inside is Kind.REASONING:
            return (THOUGHT,)
        if self._inside is Kind.CALL:
            return (CALLED,)
        return ((THINK,) if self._marks.reasoning else ()) + ((CALL,) if self._marks.calls else ())

    def _first_mark(self) -> tuple[int, str] | None:
        places = [(self._rest.find(mark), mark) for mark in self._looked_for()]
        return min(((place, mark) for place, mark in places if place >= 0), default=None)

    def _kept_back(self) -> int:
        longest = 0
        for mark in self._looked_for():
            for length in range(1, len(mark)):
                if self._rest.endswith(mark[:length]):
                    longest = max(longest, length)
        return longest

    def _told(self, text: str) -> Iterator[Part]:
        if self._inside is Kind.CALL:
            yield self._call(text)
            return
        if self._fresh:  # line breaks after a mark belong to it
            text = text.lstrip()
        if text:
            self._fresh = False
            yield Part(self._inside, text)

    def _call(self, text: str) -> Part:
        try:
            call = json.loads(text)
            name, arguments = call["name"], call.get("arguments", {})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return Part(Kind.TEXT, CALL + text + CALLED)
        told = {
            "index": self._calls,
            "id": f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": {
                "name": str(name),
                "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False),
            },
        }
        self._calls += 1
        return Part(Kind.CALL, call=told)
