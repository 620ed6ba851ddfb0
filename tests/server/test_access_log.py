"""`--access-log`: a line of JSON for each answer; nothing without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx

from server.running import NAME, PROMPT, Running, server

SECRET = "the secret key"


def entries(running: Running) -> list[dict[str, Any]]:
    return [json.loads(line) for line in running.lines if line.startswith("{")]


def test_every_answer_has_a_line_and_no_secret_is_in_it(store: Path) -> None:
    with server(store, access_log="yes", api_key=SECRET) as running:
        running.until_ready()
        key = {"Authorization": f"Bearer {SECRET}"}
        body = {"model": NAME, "prompt": PROMPT, "max_tokens": 3}
        http = running.http
        assert http.get("/v1/models?token=abc").status_code == 401
        whole = http.post("/v1/completions", json=body, headers=key)
        streamed = http.post("/v1/completions", json=body | {"stream": True}, headers=key)
        http.get("/no%0Asuch", headers=key)
        with http.stream("POST", "/v1/completions", json=body | {"stream": True, "max_tokens": 150}, headers=key):
            pass  # and leave
        assert running.end() == 0
        # A line is written when an answer is over, which the next request need not wait for.
        found = sorted((one for one in entries(running) if one["path"] != "/health"), key=lambda one: one["time"])
        text = "\n".join(running.lines)
    refused, first, second, missing, left = found
    assert (refused["method"], refused["path"], refused["status"]) == ("GET", "/v1/models", 401)
    assert (first["status"], first["bytes"], first["whole"]) == (200, len(whole.content), True)
    assert (second["status"], second["bytes"], second["whole"]) == (200, len(streamed.content), True)
    assert 0 <= second["first_byte_s"] <= second["seconds"]
    assert (missing["path"], missing["status"]) == ("/no\nsuch", 404)
    assert (left["status"], left["whole"]) == (200, False)
    assert SECRET not in text
    assert "abc" not in text
    assert PROMPT not in text


def test_off_by_default(running: Running, http: httpx.Client) -> None:
    http.get("/v1/models")
    assert entries(running) == []
