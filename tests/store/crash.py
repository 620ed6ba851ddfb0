"""Packing in a process that kills itself at a chosen moment."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from moestro.calibration import pack
from moestro.config import PackOptions
from moestro.store.pack import PackLimits

RAW = PackOptions(levels="raw")
LIMITS = PackLimits(sync_bytes=32 << 10)
_CHANGING_CALLS = ("write", "pwrite", "fsync", "fdatasync", "ftruncate", "rename", "replace", "unlink", "mkdir")


def processes() -> ForkServerContext:
    """Makes processes that have torch and transformers imported already, and nothing else in common with this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["moestro.calibration"])
    return context


def run(target: Callable[..., None], *args: Any) -> int | None:
    """Run `target` in a process of its own and return its exit code (minus the signal that killed it)."""
    process = processes().Process(target=target, args=args)
    process.start()
    process.join(60)
    return process.exitcode


def pack_until(source: Path, destination: Path, fatal_call: int, options: PackOptions = RAW) -> None:
    """Pack, and die by SIGKILL in the middle of the `fatal_call`-th call that changes something on the disk."""
    _count_calls(lambda count: count == fatal_call)
    pack(source, destination, options=options, limits=LIMITS)


def pack_counting(source: Path, destination: Path, report: Path, options: PackOptions = RAW) -> None:
    """Pack, and write to `report` how many calls changed something on the disk."""
    calls = _count_calls(lambda _: False)
    pack(source, destination, options=options, limits=LIMITS)
    report.write_text(str(len(calls)))


def _count_calls(is_fatal: Callable[[int], bool]) -> list[str]:
    calls: list[str] = []

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            calls.append(name)
            if is_fatal(len(calls)):
                if name in ("write", "pwrite"):
                    real(args[0], args[1][: len(args[1]) // 2], *args[2:])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        return call

    for name in _CHANGING_CALLS:
        setattr(os, name, counted(name, getattr(os, name)))
    return calls
