"""A server as its clients see it: JSON in, JSON or a stream of it out. One connection a call, so any thread may ask."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any
from urllib.parse import urlsplit

from moestro.errors import ClientError


class Connection:
    """A server by its URL, with the key that it wants (empty: none).

    Raises:
        ClientError: from the constructor, if `url` is none; from each call, if the server cannot be reached, or answers
            with an error.
    """

    def __init__(self, url: str, *, key: str = "", timeout_s: float = 600.0) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ClientError(f"{url!r} is no URL of a server. Expected one such as http://127.0.0.1:8000.")
        try:
            port = parts.port
        except ValueError as error:
            raise ClientError(
                f"{url!r} has no valid port ({error}). Expected such as http://127.0.0.1:8000."
            ) from error
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}"
        self._kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._host, self._port, self._path = parts.hostname, port, urlsplit(self.url).path
        self._key, self._timeout_s = key, timeout_s

    def get(self, path: str) -> dict[str, Any]:
        """What a GET gives."""
        with self._answer("GET", path, None) as answer:
            return _object(answer.read(), self.url)

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """What a POST gives."""
        with self._answer("POST", path, body) as answer:
            return _object(answer.read(), self.url)

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of an answer as they come. Closing the iterator ends the request."""
        with self._answer("POST", path, {**body, "stream": True}) as answer:
            while line := answer.readline():
                name, _, value = line.partition(b":")
                if name != b"data":
                    continue
                if value.strip() == b"[DONE]":
                    return
                event = _object(value, self.url)
                if "error" in event:
                    raise ClientError(_message(event, 200))
                yield event
        raise ClientError(f"{self.url} ended the answer before it was complete. Look at the server's log.")

    @contextmanager
    def _answer(self, method: str, path: str, body: Mapping[str, Any] | None) -> Iterator[http.client.HTTPResponse]:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body).encode()
        with closing(self._kind(self._host, self._port, timeout=self._timeout_s)) as connection:
            try:
                connection.request(method, self._path + path, data, headers)
                answer = connection.getresponse()
                if answer.status >= 400:
                    raise ClientError(_message(_object(answer.read(), self.url), answer.status))
                yield answer
            except ClientError:
                raise
            except TimeoutError as error:
                raise ClientError(f"{self.url} did not answer for {self._timeout_s:g} s. Is it overloaded?") from error
            except (OSError, http.client.HTTPException) as error:
                reason = getattr(error, "strerror", None) or repr(error)
                raise ClientError(
                    f"{self.url} cannot be reached ({reason}). Is the server running? `moestro ps` lists those of this "
                    "machine."
                ) from error


def _object(data: bytes, url: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise ClientError(f"{url} answered with something else than JSON. Is it a server of models?") from error
    if not isinstance(value, dict):
        raise ClientError(f"{url} answered with JSON that is no object. Is it a server of models?")
    return value


def _message(answer: Mapping[str, Any], status: int) -> str:
    error = answer.get("error")
    message = error.get("message") if isinstance(error, dict) else None
    return f"{message or 'The server refused the request without a reason.'} (HTTP status {status})"
