"""What the commands draw with: tables on standard output, a progress bar on standard error."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from moestro.cli.boundary import say
from moestro.memory.budget import format_bytes

if TYPE_CHECKING:
    from moestro.store.pack import PackProgress

Row = tuple[str, str] | tuple[str, str, str]
_PLAIN_SECONDS = 5.0


class Report(Protocol):
    """Takes bytes done, bytes in all, and what is being done, where that changes."""

    def __call__(self, done: int, total: int, stage: str = "") -> None: ...


def output() -> Console:
    """Standard output."""
    return Console(highlight=False)


def notes() -> Console:
    """Standard error, for everything that is not the command's result."""
    return Console(stderr=True, highlight=False)


def print_json(value: Mapping[str, Any]) -> None:
    """The one JSON object that `--json` promises on standard output."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def print_table(title: str, rows: Sequence[Row]) -> None:
    """Rows of (name, value) or (name, value, remark) under a title."""
    console = output()
    names = max(len(row[0]) for row in rows)
    values = max((len(row[1]) for row in rows if len(row) == 3), default=0)
    if title:
        console.print(Text(title, style="bold"), soft_wrap=True)
    for name, value, *remark in rows:
        line = Text(f"  {name.ljust(names)}  {value}")
        if remark and remark[0]:
            line.append(" " * (values - len(value)) + f"  {remark[0]}", style="dim")
        console.print(line, soft_wrap=True)


class _Bytes(ProgressColumn):
    def render(self, task: Task) -> Text:
        total = f" of {format_bytes(int(task.total))}" if task.total else ""
        return Text(f"{format_bytes(int(task.completed))}{total}")


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{format_bytes(int(speed))}/s" if speed else "")


@contextmanager
def progress_bar(label: str) -> Iterator[Report]:
    """A bar with bytes per second and time left; plain lines where standard error is not a terminal."""
    console = notes()
    if not console.is_terminal:
        yield _PlainProgress(label)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), _Bytes(), _Speed(), TimeRemainingColumn())
    progress = Progress(*columns, console=console, transient=True)
    task = progress.add_task(label, total=None)

    def report(done: int, total: int, stage: str = "") -> None:
        progress.start()  # at the first report, so that nothing is drawn when there is nothing to do
        progress.update(task, completed=done, total=total, description=f"{label}: {stage}" if stage else label)

    try:
        yield report
    finally:
        progress.stop()


@contextmanager
def pack_bar(label: str) -> Iterator[Callable[[PackProgress], None]]:
    """`progress_bar` of what writes stores."""
    with progress_bar(label) as report:
        yield lambda step: report(step.done_bytes, step.total_bytes, step.stage)


class _PlainProgress:
    """A line every few seconds and for all that is said to begin; none about work that is quickly done. What time is
    left is judged by the speed of what is being done now."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._start = self._begun = self._heard = self._last = time.monotonic()
        self._stage, self._done, self._before = "", 0, 0

    def __call__(self, done: int, total: int, stage: str = "") -> None:
        now = time.monotonic()
        begins = stage != self._stage and done == self._done
        if stage != self._stage:
            self._stage, self._begun, self._before = stage, self._heard, self._done
        self._done, self._heard = done, now
        more = done - self._before
        if now - (self._start if begins else self._last) < _PLAIN_SECONDS or not (more or begins):
            return
        self._last = now
        line = f"{stage}: " if stage else ""
        line += f"{format_bytes(done)} of {format_bytes(total)}"
        if more:
            speed = more / max(now - self._begun, 1e-9)
            line += f", {format_bytes(int(speed))}/s, {(total - done) / speed:.0f} s left"
        say(self._label, line)
