"""A line for each answered request, as JSON on standard error: who asked what, what it got, how long it took."""

from __future__ import annotations

import json
import sys
import time
from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class AccessLog:
    """ASGI middleware around everything else, so that what is refused is logged, too.

    Of a request only the path is written: neither its query nor its headers or body, where keys and prompts are. JSON,
    so that no path can forge a line.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        entry = _Entry(scope)

        async def noted(message: Message) -> None:
            entry.note(message)
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            sys.stderr.write(entry.line() + "\n")
            sys.stderr.flush()


class _Entry:
    """What is known of one request so far."""

    def __init__(self, scope: Scope) -> None:
        client = scope.get("client")
        self._started = time.perf_counter()
        self._facts: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "client": f"{client[0]}:{client[1]}" if client else "",
            "method": scope["method"],
            "path": scope["path"],
            "status": None,
            "first_byte_s": None,
            "bytes": 0,
            "whole": False,
        }

    def note(self, message: Message) -> None:
        """A piece of the answer is about to be sent."""
        if message["type"] == "http.response.start":
            self._facts["status"] = message["status"]
            self._facts["first_byte_s"] = self._seconds()
            variant = Headers(raw=message.get("headers", [])).get("x-moestro-variant")
            if variant is not None:
                self._facts["variant"] = variant
        elif message["type"] == "http.response.body":
            self._facts["bytes"] += len(message.get("body", b""))
            self._facts["whole"] = not message.get("more_body", False)

    def line(self) -> str:
        """All of it. `status` is null and `whole` false where the client left before that."""
        return json.dumps(self._facts | {"seconds": self._seconds()})

    def _seconds(self) -> float:
        return round(time.perf_counter() - self._started, 6)
