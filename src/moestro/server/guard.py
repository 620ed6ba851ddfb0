"""Who may ask, and how much: keys, the Host header, the size of a body. Before anything of a request is read."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moestro.memory.budget import format_bytes
from moestro.server.errors import ApiError
from moestro.server.rules import Rules

_OPEN = ("/", "/health", "/favicon.ico")
_OPEN_FOLDER = "/page/"
_ADMIN = "/admin/"


class Guard:
    """ASGI middleware that answers what `rules` do not allow."""

    def __init__(self, app: ASGIApp, rules: Rules) -> None:
        self._app, self._rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._check(scope, headers)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        await self._app(scope, _Limited(receive, self._rules.most_bytes), send)

    def _check(self, scope: Scope, headers: Headers) -> None:
        self._check_host(headers)
        self._check_length(headers)
        path = scope["path"]
        if path.startswith(_ADMIN):
            self._check_admin(headers)
        elif path not in _OPEN and not path.startswith(_OPEN_FOLDER):
            self._check_key(headers)

    def _check_host(self, headers: Headers) -> None:
        allowed, host = self._rules.hosts, headers.get("host")
        if allowed is not None and host and _without_port(host) not in allowed:
            message = (
                "The Host header is of another machine than the one this server listens for. Use http://127.0.0.1, or "
                "start the server with an API key."
            )
            raise ApiError(403, message, code="wrong_host")

    def _check_length(self, headers: Headers) -> None:
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._rules.most_bytes:
            raise _too_large(self._rules.most_bytes)

    def _check_key(self, headers: Headers) -> None:
        if self._rules.keys and not self._rules.allows(_given(headers)):
            raise _unauthorised("This server needs an API key: Authorization: Bearer KEY. It is missing or wrong.")

    def _check_admin(self, headers: Headers) -> None:
        if self._rules.admin_key is None:
            raise ApiError(403, "There are no admin endpoints: the server was started without --admin-key.")
        if not self._rules.allows_admin(_given(headers)):
            raise _unauthorised("This endpoint needs the admin key: Authorization: Bearer KEY. It is missing or wrong.")


class _Limited:
    """Counts the bytes of a body as they come: not all bodies say how long they are."""

    def __init__(self, receive: Receive, most_bytes: int) -> None:
        self._receive, self._most, self._seen = receive, most_bytes, 0

    async def __call__(self) -> Message:
        message = await self._receive()
        self._seen += len(message.get("body", b""))
        if self._seen > self._most:
            raise _too_large(self._most)
        return message


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"The body is larger than {format_bytes(most)}, the most that this server takes.")


def _unauthorised(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _given(headers: Headers) -> str:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _without_port(host: str) -> str:
    name = host.rsplit(":", 1)[0] if host.count(":") == 1 or "]:" in host else host
    return name.strip("[]").lower()
