"""Runs the server: the socket, the model's thread, signals, the end."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from moestro.config import ServeOptions
from moestro.server.app import make_app
from moestro.server.host import ModelHost, Phase
from moestro.server.listen import address
from moestro.server.registry import registered
from moestro.server.rules import Rules

_GRACE_S = 5
"""For the last words to clients whose requests were ended."""

_PATIENCE_S = 3.0
"""How long a model that is being opened gets to stop; packing goes on another time from where it was."""

Say = Callable[[str], None]


def serve(
    host: ModelHost, options: ServeOptions, *, listener: socket.socket, rules: Rules, memory: str, say: Say
) -> None:
    """Answer requests until SIGTERM or SIGINT, then let those under way end; a second signal ends them.

    Args:
        memory: what the model was given, for `moestro ps`.
        say: is told where the server listens and when the model is there.

    Raises:
        MoestroError: the model cannot be opened.
    """
    url = address(listener, options.host)
    config = uvicorn.Config(
        make_app(host, options, rules),
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=75,
        proxy_headers=False,
        timeout_graceful_shutdown=options.drain + _GRACE_S,
    )
    server = _Server(config, host, drain_s=options.drain)
    with registered(url, host.name, memory):
        say(f"listening on {url}; opening {host.name}")

        def opened() -> None:
            if host.error is not None:
                server.should_exit = True
            elif host.loading.phase is Phase.READY:
                say(f"{host.name} is ready: {url} is a page, {url}/v1 is for OpenAI's clients")

        host.start(opened)
        asyncio.run(server.serve(sockets=[listener]))
        closed = host.close(wait_s=_PATIENCE_S)
    if host.error is not None:
        raise host.error
    if not closed:
        _leave_at_once()


def _leave_at_once() -> None:
    """The model is still being opened, by a thread that nothing can stop; nothing of it is kept in memory only."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


class _Server(uvicorn.Server):
    """uvicorn's, but a signal ends the process with code 0, and clients are told why they get no (whole) answer."""

    def __init__(self, config: uvicorn.Config, host: ModelHost, *, drain_s: float) -> None:
        super().__init__(config)
        self._host, self._drain_s, self._signals = host, drain_s, 0

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {one: signal.signal(one, self.handle_exit) for one in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self._signals += 1
        self.should_exit = True
        self.force_exit = self._signals > 2
        self._host.drain()
        ender = threading.Timer(self._drain_s if self._signals == 1 else 0.0, self._host.end_requests)
        ender.daemon = True
        ender.start()
