"""Answers that come piece by piece as server-sent events, and clients that leave."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from moestro.server.errors import ApiError, json_response, to_json

_LOG = logging.getLogger("moestro.server")

KEEP_ALIVE_S = 10.0
"""A comment is sent when nothing else has been for so long: proxies close connections that are silent."""

T = TypeVar("T")


class EventStream(Response):
    """Sends each object of `chunks` as one event, then [DONE]. `leave` is called at the end, however it comes.

    An error after the first byte cannot have a status any more: it is an event with the error object, without [DONE].
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        chunks: AsyncIterator[dict[str, Any]],
        *,
        leave: Callable[[], None],
        headers: Mapping[str, str],
        named: bool = False,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers})
        del self.headers["content-length"]
        self._chunks, self._leave, self._named = chunks, leave, named

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        try:
            await _first_of(self._send_all(send), _gone(receive))
        finally:
            self._leave()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for line in self._lines():
                await send({"type": "http.response.body", "body": line, "more_body": True})
            if not self._named:
                await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": True})
        except ApiError as error:
            await send({"type": "http.response.body", "body": self._event(error.body()), "more_body": True})
        except Exception as error:  # a bug of ours: the client is told in the only way that is left
            _LOG.exception("A stream failed.")
            bug = ApiError(500, f"The server has a bug ({type(error).__name__}); its log has the traceback.")
            await send({"type": "http.response.body", "body": self._event(bug.body()), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _lines(self) -> AsyncIterator[bytes]:
        chunks = self._chunks.__aiter__()
        while True:
            coming = asyncio.ensure_future(anext(chunks, None))
            try:
                while not (await asyncio.wait({coming}, timeout=KEEP_ALIVE_S))[0]:
                    yield b": the model is at work\n\n"
            finally:
                coming.cancel()
            chunk = coming.result()
            if chunk is None:
                return
            yield self._event(chunk)

    def _event(self, chunk: dict[str, Any]) -> bytes:
        name = f"event: {chunk['type']}\n".encode("ascii") if self._named and "type" in chunk else b""
        return name + b"data: " + to_json(chunk) + b"\n\n"


async def reply(
    request: Request,
    submitting: Awaitable[object],
    *,
    stream: AsyncIterator[dict[str, Any]] | None,
    whole: Callable[[], Awaitable[dict[str, Any]]],
    leave: Callable[[], None],
    headers: Mapping[str, str],
    named: bool = False,
) -> Response:
    """What comes of a call once it is submitted: `stream` as events if there is one, else one object.

    `leave` is called when the client goes, when anything fails, and at the end of a stream.
    """
    try:
        await until_gone(request, submitting)
        if stream is not None:
            return EventStream(stream, leave=leave, headers=headers, named=named)
        response = json_response(await until_gone(request, whole()))
        response.headers.update(headers)
        return response
    except BaseException:
        leave()
        raise


async def until_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client leaves. Raises ApiError then, which nobody reads."""
    done, result = await _first_of(work, _gone(request.receive))
    if not done:
        raise ApiError(499, "The client has left.")
    return result


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _first_of(work: Awaitable[T], other: Awaitable[None]) -> tuple[bool, T]:
    """Run both until one ends, and cancel the other: (whether `work` was it, its result)."""
    tasks: list[asyncio.Task[Any]] = [asyncio.ensure_future(work), asyncio.ensure_future(other)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    if tasks[0].cancelled():
        return False, None  # type: ignore[return-value]
    return True, tasks[0].result()
