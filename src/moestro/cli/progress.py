"""What commands that take minutes share: texts to work through, and a line now and then on how far they are."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from moestro.errors import RequestError

if TYPE_CHECKING:
    from moestro.engine.windows import Text

_SECONDS_BETWEEN_LINES = 5.0


class Progress(Protocol):
    """`done` of `total` parts."""

    @property
    def done(self) -> int: ...

    @property
    def total(self) -> int: ...


P = TypeVar("P", bound=Progress)


class Lines(Generic[P]):
    """Passes progress on to `line` every few seconds, but not the end, which the result shows."""

    def __init__(self, line: Callable[[P], None]) -> None:
        self._line = line
        self._last = time.monotonic()

    def __call__(self, now: P) -> None:
        if now.done == now.total or time.monotonic() - self._last < _SECONDS_BETWEEN_LINES:
            return
        self._last = time.monotonic()
        self._line(now)


def read_text(path: Path) -> Text:
    """The file, named by its path. Raises RequestError when it is not text."""
    from moestro.engine.windows import Text

    try:
        return Text(str(path), path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text ({error}). Expected a text file.") from error
