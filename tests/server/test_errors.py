"""Everything that goes wrong is an OpenAI error object that says what."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
TEXT = {"prompt": "hello", "max_tokens": 2}


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The error object, which must be whole."""
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"].endswith((".", ")"))
    return error


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", CHAT | {"bogus": 1}, "bogus"),
        ("/v1/chat/completions", CHAT | {"audio": {"voice": "alloy"}}, "audio"),
        ("/v1/chat/completions", CHAT | {"store": True}, "store"),
        ("/v1/chat/completions", CHAT | {"top_logprobs": 2}, "top_logprobs"),
        ("/v1/chat/completions", CHAT | {"temperature": "hot"}, "temperature"),
        ("/v1/chat/completions", CHAT | {"temperature": -1}, "temperature"),
        ("/v1/chat/completions", {"messages": []}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "king", "content": "x"}]}, "messages.0"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x", "mood": 1}]}, "messages.0.user.mood"),
        ("/v1/chat/completions", {}, "messages"),
        ("/v1/completions", TEXT | {"echo": True}, "echo"),
        ("/v1/completions", TEXT | {"prompt": 5}, "prompt"),
        ("/v1/completions", TEXT | {"prompt": ""}, "prompt"),
        ("/v1/completions", TEXT | {"prompt": ["a"] * 40, "n": 2}, "n"),
        ("/v1/completions", TEXT | {"logit_bias": {"x": 1}}, "logit_bias"),
        ("/v1/completions", TEXT | {"stream_options": {"x": 1}}, "stream_options.x"),
        ("/tokenize", {"prompt": "a", "messages": CHAT["messages"]}, "prompt"),
        ("/detokenize", {"tokens": [1, 10**6]}, "tokens"),
    ],
)
def test_a_field_that_does_not_do_is_named(http: httpx.Client, path: str, body: dict[str, Any], param: str) -> None:
    error = error_of(http.post(path, json=body), 400)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert param.split(".")[-1] in error["message"]


def test_null_is_the_same_as_nothing(http: httpx.Client) -> None:
    nothing = dict.fromkeys(("stop", "seed", "n", "top_p", "stream", "logprobs", "user", "stream_options"))
    assert http.post("/v1/chat/completions", json=CHAT | nothing).status_code == 200


@pytest.mark.parametrize(
    "body", [b"{", b"", b"[]", b"\xff\xfe", b'{"prompt": NaN}', b"[" * 100_000, b'{"prompt": "\\ud800"}']
)
def test_a_body_that_is_no_request(http: httpx.Client, body: bytes) -> None:
    error_of(http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"}), 400)


def test_a_body_of_another_type(http: httpx.Client) -> None:
    error = error_of(
        http.post("/v1/completions", content=b'{"prompt": "a"}', headers={"Content-Type": "text/plain"}), 400
    )
    assert "Content-Type: application/json" in error["message"]


def test_no_such_address_or_method(http: httpx.Client) -> None:
    assert "/v2/chat" in error_of(http.get("/v2/chat"), 404)["message"]
    assert "GET" in error_of(http.delete("/health"), 405)["message"]
    assert error_of(http.post("/v1/completions", json=TEXT | {"model": "x"}), 404)["code"] == "model_not_found"
    assert "no embeddings" in error_of(http.post("/v1/embeddings", json={"input": "a"}), 400)["message"]


def test_a_prompt_beyond_the_context(http: httpx.Client) -> None:
    error = error_of(http.post("/v1/completions", json={"prompt": [5] * 256}), 400)
    assert error["code"] == "context_length_exceeded"
    assert "256" in error["message"]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large(http: httpx.Client, chunked: bool) -> None:
    body = b'{"prompt": "' + b"a" * (4 << 20) + b'"}'
    content = iter([body[: 3 << 20], body[3 << 20 :]]) if chunked else body
    error = error_of(http.post("/v1/completions", content=content, headers={"Content-Type": "application/json"}), 413)
    assert "4.00 MiB" in error["message"]


def test_a_web_page_of_another_name_is_refused(http: httpx.Client) -> None:
    assert error_of(http.get("/v1/models", headers={"Host": "evil.example:80"}), 403)["code"] == "wrong_host"
    assert http.get("/v1/models", headers={"Host": "LOCALHOST:99"}).status_code == 200


def test_admin_endpoints_want_the_admin_key(http: httpx.Client) -> None:
    error_of(http.post("/admin/flush"), 401)
    error_of(http.post("/admin/flush", headers={"Authorization": "Bearer none"}), 401)
    assert http.post("/admin/flush", headers={"Authorization": "Bearer boss"}).json() == {"flushed": True}


def test_memory_can_be_made_less_and_what_it_was(http: httpx.Client) -> None:
    boss = {"Authorization": "Bearer boss"}
    body = {"prompt": "hello", "max_tokens": 60, "temperature": 0, "ignore_eos": True}
    before = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
    for memory, experts in (("40MiB", 120), ("60MiB", 256)):
        resized = http.post("/admin/resize", json={"memory": memory}, headers=boss)
        assert resized.json()["memory_bytes"] == int(memory[:2]) << 20
        assert http.post("/v1/completions", json=body).json()["choices"][0]["text"] == before
        held = sum(level > 0 for row in http.get("/stats").json()["levels"] for level in row)
        assert held <= experts
    for memory in ("1MiB", "1TiB", "much"):
        assert error_of(http.post("/admin/resize", json={"memory": memory}, headers=boss), 400)["param"] == "memory"
    error_of(http.post("/admin/resize", json={"memory": "40MiB"}), 401)
