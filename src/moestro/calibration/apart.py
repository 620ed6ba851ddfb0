"""Packing in a process of its own, for whoever goes on to run the model.

Packing holds the dense weights and a layer's activations. What the allocator keeps of that would count as the floor of
the process that opens the store afterwards, beside the number of bytes that it was given. So the work is done by
another Python: a request as one JSON object on its standard input, reports as JSON lines on its standard output.
"""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from moestro import errors
from moestro.calibration.packing import pack
from moestro.config import PackOptions
from moestro.errors import MoestroError, PackError
from moestro.store.pack import PackProgress
from moestro.store.reader import Store

_PROGRAM = "from moestro.calibration.apart import main; main()"


def pack_apart(
    source: Path,
    destination: Path,
    *,
    options: PackOptions | None = None,
    progress: Callable[[PackProgress], None] | None = None,
) -> Store:
    """As `pack`, in another process.

    Raises:
        PackError: that process was ended from outside.
        MoestroError: what `pack` raises.
    """
    request = {
        "source": str(source.absolute()),
        "destination": str(destination.absolute()),
        "options": asdict(options or PackOptions()),
    }
    with subprocess.Popen(
        [sys.executable, "-c", _PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request))
            process.stdin.close()
            _follow(process.stdout, progress)
        except BaseException:
            process.terminate()
            raise
    if process.returncode < 0:
        raise PackError(
            f"The process that packed {source} was ended by signal {signal.Signals(-process.returncode).name}: there "
            "may have been too little memory. What is finished is kept: the same command goes on from there."
        )
    if process.returncode:
        raise RuntimeError(f"the process that packed {source} failed; its traceback is on standard error")
    return Store.open(destination)


def _follow(reports: IO[str], progress: Callable[[PackProgress], None] | None) -> None:
    """Hand on what the other process says, until it has nothing more to say."""
    for line in reports:
        (kind, content) = json.loads(line)
        if kind == "progress" and progress:
            progress(PackProgress(*content))
        elif kind == "warning":
            logging.getLogger("moestro").warning("%s", content)
        elif kind == "error":
            name, message = content
            raise getattr(errors, name)(message)


def main() -> None:
    """Do what standard input asks for."""
    say = _Reports()
    logging.getLogger("moestro").addHandler(_Warnings(say))
    request = json.load(sys.stdin)
    try:
        pack(
            Path(request["source"]),
            Path(request["destination"]),
            options=PackOptions(**request["options"]),
            progress=lambda step: say("progress", [step.done_bytes, step.total_bytes, step.stage]),
        )
    except MoestroError as error:
        public = next(kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
        say("error", [public.__name__, str(error)])
    except KeyboardInterrupt:
        # The process that waits for this one was interrupted as well, and says so.
        sys.exit(1)


class _Reports:
    """Lines on standard output, which nobody else may write to from here on."""

    def __init__(self) -> None:
        self._out, sys.stdout = sys.stdout, sys.stderr

    def __call__(self, kind: str, content: Any) -> None:
        self._out.write(json.dumps([kind, content]) + "\n")
        self._out.flush()


class _Warnings(logging.Handler):
    """Warnings of the rooms below, for the other process to show."""

    def __init__(self, say: _Reports) -> None:
        super().__init__(logging.WARNING)
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        self._say("warning", record.getMessage())
