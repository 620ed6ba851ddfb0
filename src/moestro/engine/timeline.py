"""Timelines as files that chrome://tracing and ui.perfetto.dev open (the Trace Event Format of Chromium).

Every event is a complete one ("ph": "X") with begin and duration in microseconds; within a lane (a "thread" of the
format) events follow each other or lie one inside of the other.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moestro.errors import RequestError
from moestro.spans import LANES, Timeline
from moestro.store.disk import sync_file

_PROCESS = 1


def check_timeline_path(path: Path) -> None:
    """Find out before any work whether a timeline could be written. Raises RequestError."""
    if path.is_dir():
        raise RequestError(f"The timeline {path} is a folder. Give the name of a .json file.")
    if not path.absolute().parent.is_dir():
        raise RequestError(
            f"The folder {path.absolute().parent} of the timeline {path.name} does not exist. Make it first."
        )


def write_timeline(path: Path, timeline: Timeline) -> None:
    """Make `path` hold the timeline, or leave it as it was. Says so when events had to be left out. Raises OSError."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            about = json.dumps({"events": len(timeline), "left_out": timeline.dropped})
            file.write(f'{{"displayTimeUnit": "ms", "otherData": {about}, "traceEvents": [\n')
            for number, event in enumerate(_events(timeline)):
                file.write(",\n" if number else "")
                json.dump(event, file)
            file.write("\n]}\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_file(path.absolute().parent)
    if timeline.dropped:
        logging.getLogger("moestro").warning(
            "The timeline %s holds the first %d events; %d later ones were left out. Generate fewer tokens to see all.",
            path,
            len(timeline),
            timeline.dropped,
        )


def _events(timeline: Timeline) -> Iterator[dict[str, Any]]:
    yield _name("process_name", 0, "moestro")
    for lane in range(len(LANES) + timeline.readers):
        yield _name("thread_name", lane, LANES[lane] if lane < len(LANES) else f"reads {lane - len(LANES)}")
        yield {"name": "thread_sort_index", "ph": "M", "pid": _PROCESS, "tid": lane, "args": {"sort_index": lane}}
    for lane, kind, begun, ended, values in timeline:
        # Whole nanoseconds, so that rounding keeps what is inside of what inside.
        first, last = round((begun - timeline.begun) * 1e9), round((ended - timeline.begun) * 1e9)
        yield {
            "name": kind.name.format(**values),
            "cat": kind.lane or "read",
            "ph": "X",
            "pid": _PROCESS,
            "tid": lane,
            "ts": first / 1000,
            "dur": (last - first) / 1000,
            "args": _shown(values),
        }


def _name(what: str, lane: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": _PROCESS, "tid": lane, "args": {"name": name}}


def _shown(values: dict[str, float]) -> dict[str, float]:
    """Counts as whole numbers, seconds as microseconds."""
    return {
        (name.removesuffix("_s") + "_us" if name.endswith("_s") else name): (
            round(value * 1e6, 3) if name.endswith("_s") else int(value)
        )
        for name, value in values.items()
    }
