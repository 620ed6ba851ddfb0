"""Whatever bytes arrive: no status 5xx, no lost connection without an answer to a whole request, the server lives."""

from __future__ import annotations

import contextlib
import socket
from urllib.parse import urlsplit

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error

from server.running import NAME, Running

_HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
_FRAGMENTS = st.sampled_from(
    [
        b"GET / HTTP/1.1\r\n", b"GET /stats HTTP/1.0\r\n\r\n", _HEAD, b"\r\n", b"\r\n\r\n", b"Content-Length: 5\r\n",
        b"Content-Length: -1\r\n", b"Content-Length: 99999999999999999999\r\n", b"Transfer-Encoding: chunked\r\n",
        b"Connection: close\r\n", b"Expect: 100-continue\r\n", b"Authorization: Bearer \xff\r\n", b"5\r\n{\"a\":\r\n",
        b"0\r\n\r\n", b'{"prompt": "a", "max_tokens": 1}', b"Upgrade: websocket\r\n", b"Host: \r\n",
        b"PRI * HTTP/2.0\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\n", b"GET http://x/ HTTP/1.1\r\n", b"GET /%00%ff//../page/../x HTTP/1.1\r\n",
        b"Origin: null\r\n",
    ]
)  # fmt: skip


def _send(running: Running, data: bytes, *, wait_s: float = 0.05) -> bytes:
    """What comes back until the server closes, or falls silent for `wait_s`."""
    parts = urlsplit(running.url)
    assert parts.hostname is not None
    assert parts.port is not None
    answer = b""
    with (
        socket.create_connection((parts.hostname, parts.port), timeout=30) as connection,
        contextlib.suppress(BrokenPipeError, ConnectionResetError, TimeoutError),
    ):
        connection.sendall(data)
        connection.settimeout(wait_s)
        while got := connection.recv(65536):
            answer += got
    return answer


@settings(max_examples=100, phases=[Phase.generate, Phase.shrink])
@given(data=st.one_of(st.binary(max_size=300), st.lists(st.one_of(_FRAGMENTS, st.binary(max_size=20))).map(b"".join)))
def test_bytes(running: Running, data: bytes) -> None:
    answer = _send(running, data)
    assert b"HTTP/1.1 5" not in answer, answer
    assert not answer or answer.startswith(b"HTTP/1.1 "), answer


def test_the_server_lives_on(running: Running, http: httpx.Client) -> None:
    body = b'{"prompt": "a", "max_tokens": 1}'
    whole = _HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    assert _send(running, whole, wait_s=30).startswith(b"HTTP/1.1 200 ")
    assert running.process.poll() is None
    assert not [line for line in running.lines if "Traceback" in line]
    assert http.get("/health").json() == {"status": "ok"}


class TestSchema:
    """What the OpenAPI description allows, and what is near it, is answered without a 5xx."""

    def test_the_description(self, http: httpx.Client) -> None:
        described = http.get("/openapi.json").json()
        assert {"/v1/chat/completions", "/v1/completions", "/tokenize", "/stats"} <= described["paths"].keys()
        schema = schemathesis.openapi.from_dict(described)
        for operation in schema.get_all_operations():
            self._examples(http, operation.ok())

    def _examples(self, http: httpx.Client, operation: schemathesis.APIOperation) -> None:  # type: ignore[type-arg]
        @settings(max_examples=4, phases=[Phase.generate], suppress_health_check=list(HealthCheck), deadline=None)
        @given(case=operation.as_strategy())
        def one(case: schemathesis.Case) -> None:
            if isinstance(case.body, dict) and "max_tokens" in case.body:
                case.body |= {"max_tokens": 2, "model": NAME}
            case.call_and_validate(base_url=str(http.base_url), checks=[not_a_server_error], timeout=30)

        one()
