"""gpt-oss's answers: messages on channels. `analysis` is reasoning, what is for `functions.NAME` a call, the rest text.

    <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json
    <|message|>{...}<|call|>

The prompt ends with `<|start|>assistant`. The last token of an answer, <|call|> or <|return|>, is not in its text.
Source: OpenAI's description of the harmony format.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import Enum

from moestro.server.dialects import CHANNEL, MESSAGE, NoCallError, read_harmony
from moestro.server.parts import Kind, Marks, Part, call_part, first_mark, kept_back

START = "<|start|>"
_BEGINS = (START, CHANNEL)
_ENDS = ("<|end|>", "<|call|>", "<|return|>")
_ANALYSIS = re.compile(rf"{re.escape(CHANNEL)}\s*analysis\b")
_FOR_FUNCTION = re.compile(r"\bto=functions\.")


class _Place(Enum):
    """Where in its messages an answer is."""

    BETWEEN = "between messages"
    HEADER = "before the text of a message"
    BODY = "in the text of a message"


_MARKS = {_Place.BETWEEN: _BEGINS, _Place.HEADER: (MESSAGE, *_ENDS), _Place.BODY: (*_BEGINS, *_ENDS)}


class HarmonySplitter:
    """Takes an answer's text, special tokens included, as it comes. What is in no message is text."""

    def __init__(self, marks: Marks) -> None:
        self._marks = marks
        self._place = _Place.BETWEEN
        self._kind = Kind.TEXT
        self._rest = self._header = ""
        self._calls = 0

    @property
    def has_calls(self) -> bool:
        """Whether there has been a call."""
        return self._calls > 0

    def push(self, text: str) -> Iterator[Part]:
        """The parts that are certain now."""
        self._rest += text
        while (found := first_mark(self._rest, _MARKS[self._place])) is not None:
            place, mark = found
            before, self._rest = self._rest[:place], self._rest[place + len(mark) :]
            yield from self._pass(before, mark)
        if self._place is not _Place.HEADER and self._kind is not Kind.CALL:
            certain = len(self._rest) - kept_back(self._rest, _MARKS[self._place])
            yield from self._told(self._rest[:certain])
            self._rest = self._rest[certain:]

    def finish(self) -> Iterator[Part]:
        """What was kept back."""
        if self._place is _Place.HEADER:
            yield Part(Kind.TEXT, self._header + self._rest)
        else:
            yield from self._told(self._rest)
        self._rest, self._place, self._kind = "", _Place.BETWEEN, Kind.TEXT

    def _pass(self, before: str, mark: str) -> Iterator[Part]:
        """Go beyond a mark, and the text before it."""
        if self._place is _Place.HEADER and mark == MESSAGE:
            self._header += before + mark
            yield from self._open()
            return
        if self._place is _Place.HEADER:  # it ends before it has begun
            yield Part(Kind.TEXT, self._header + before + mark)
        else:
            yield from self._told(before)
        self._kind = Kind.TEXT
        self._place, self._header = (_Place.HEADER, mark) if mark in _BEGINS else (_Place.BETWEEN, "")

    def _open(self) -> Iterator[Part]:
        """A message's header is whole."""
        self._place = _Place.BODY
        if _FOR_FUNCTION.search(self._header):
            if self._marks.calls:
                self._kind = Kind.CALL
            else:
                yield Part(Kind.TEXT, self._header)
        elif _ANALYSIS.search(self._header):
            self._kind = Kind.REASONING

    def _told(self, text: str) -> Iterator[Part]:
        if self._kind is not Kind.CALL:
            if text:
                yield Part(self._kind, text)
            return
        try:
            (call,) = read_harmony(self._header + text, self._marks.schemas)
        except NoCallError:
            yield Part(Kind.TEXT, self._header + text)
            return
        yield call_part(call, self._calls)
        self._calls += 1
