"""What the commands draw with: tables on standard output, a progress bar on standard error."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from moestro.cli.boundary import say
from moestro.memory.budget import format_bytes

Row = tuple[str, str] | tuple[str, str, str]
Report = Callable[[int, int], None]
"""(bytes done, bytes in all)"""

_PLAIN_SECONDS = 5.0


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

    def report(done: int, total: int) -> None:
        progress.start()  # at the first report, so that nothing is drawn when there is nothing to do
        progress.update(task, completed=done, total=total)

    try:
        yield report
    finally:
        progress.stop()


class _PlainProgress:
    """A line every few seconds."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._start = self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last < _PLAIN_SECONDS or not done:
            return
        self._last = now
        speed = done / (now - self._start)
        say(
            self._label,
            f"{format_bytes(done)} of {format_bytes(total)}, {format_bytes(int(speed))}/s, "
            f"{(total - done) / speed:.0f} s left",
        )
