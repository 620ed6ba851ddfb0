"""Who may use a server, how much it takes at once, and how it begins and ends."""

from __future__ import annotations

import json
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from cli.running import assert_user_error, run
from moestro.cli.options import flags_of
from moestro.config import ChatOptions, LoadOptions, ServeOptions
from server.running import NAME, PROMPT, Running, server

LONG = {"prompt": PROMPT, "max_tokens": 220, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def keyed(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with keys and room for one request and one that waits. The last test ends it."""
    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text("alpha\nbeta\n")
    flags = {"max_concurrency": "1", "max_queue": "1", "cors": "https://good.example", "tool_parser": "mistral"}
    with server(store, api_key_file=str(keys), **flags) as started:
        started.until_ready()
        yield started


def test_a_key_is_needed(keyed: Running) -> None:
    for key in ("alpha", "beta"):
        assert keyed.client(key).models.list().data[0].id == NAME
    for key in ("gamma", "", "alpha beta", "ALPHA"):
        with pytest.raises(openai.AuthenticationError) as caught:
            keyed.client(key or "x").models.list()
        assert caught.value.code == "invalid_api_key"
    for path in ("/stats", "/metrics", "/openapi.json", "/v1/models", "/no/such"):
        assert keyed.http.get(path).status_code == 401, path
    assert keyed.http.get("/health").status_code == 200
    assert keyed.http.get("/").headers["content-type"].startswith("text/html")


def test_without_an_admin_key_there_are_no_admin_endpoints(keyed: Running) -> None:
    answer = keyed.http.post("/admin/flush", headers={"Authorization": "Bearer alpha"})
    assert answer.status_code == 403
    assert "--admin-key" in answer.json()["error"]["message"]


def test_pages_of_named_origins_may_call(keyed: Running) -> None:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    allowed = httpx.options(f"{keyed.url}/v1/models", headers={"Origin": "https://good.example", **asked})
    assert allowed.headers["access-control-allow-origin"] == "https://good.example"
    refused = httpx.options(f"{keyed.url}/v1/models", headers={"Origin": "https://evil.example", **asked})
    assert "access-control-allow-origin" not in refused.headers


def test_what_does_not_fit_the_queue_is_refused_and_told_when_to_come_again(keyed: Running) -> None:
    client = keyed.client("alpha")
    with httpx.Client(base_url=keyed.url, headers={"Authorization": "Bearer alpha"}, timeout=60) as http:
        with http.stream("POST", "/v1/completions", json=LONG | {"stream": True, "n": 2}) as both:
            lines = both.iter_lines()  # kept: a generator that is thrown away closes the stream
            next(lines)
            with pytest.raises(openai.RateLimitError) as caught:
                client.completions.create(model=NAME, prompt="a")
        assert caught.value.code == "queue_full"
        assert int(caught.value.response.headers["Retry-After"]) >= 1
        counted = 'moestro:requests_refused_total{model_name="tiny"} 1.0'
        assert counted in http.get("/metrics").text


def test_calls_are_read_as_the_flag_says(keyed: Running) -> None:
    written = r'\[TOOL_CALLS\]\[\{"name": "weather", "arguments": \{"town": "[A-Z][a-z]{2}"\}\}\]'
    tools = [{"type": "function", "function": {"name": "weather"}}]
    asked = {"model": NAME, "messages": [{"role": "user", "content": PROMPT}], "tools": tools, "temperature": 0}
    chat = keyed.client("alpha").chat.completions
    form = {"type": "regex", "pattern": written}
    answer = chat.create(max_tokens=60, response_format=form, **asked).choices[0]  # type: ignore[call-overload]
    assert answer.finish_reason == "tool_calls"
    assert answer.message.tool_calls[0].function.name == "weather"
    town = {"town": {"enum": ["Ulm", "Bonn"]}}
    schema = {"type": "object", "properties": town, "required": ["town"], "additionalProperties": False}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": schema}}]
    forced = chat.create(max_tokens=60, tool_choice="required", **asked | {"tools": tools}).choices[0]  # type: ignore[call-overload]
    assert forced.finish_reason == "tool_calls"
    assert json.loads(forced.message.tool_calls[0].function.arguments)["town"] in ("Ulm", "Bonn")


def test_a_port_that_is_taken(keyed: Running, store: Path) -> None:
    port = keyed.url.rsplit(":", 1)[1]
    assert_user_error(run("serve", store, "--port", port), "is taken", "--port")


def test_one_end_lets_requests_finish_and_refuses_others(keyed: Running) -> None:
    """The last test of this server."""
    with httpx.Client(base_url=keyed.url, headers={"Authorization": "Bearer beta"}, timeout=60) as http:
        pieces = []
        with http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as answer:
            lines = answer.iter_lines()
            pieces.append(next(lines))
            ender = threading.Thread(target=lambda: codes.append(keyed.end(signal.SIGTERM)))
            codes: list[int] = []
            ender.start()
            pieces.extend(lines)
        ender.join()
    assert codes == [0]
    assert pieces[-2:] == ["data: [DONE]", ""]
    assert '"finish_reason":"length"' in pieces[-4]
    assert not [line for line in keyed.lines if "Traceback" in line]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--host", "0.0.0.0"], ("--api-key-file", "--insecure")),
        (["--host", "no.such.name.invalid", "--insecure"], ("no address",)),
        (["--port", "70000"], ("65535",)),
        (["--api-key", "a", "--api-key-file", "b"], ("either",)),
        (["--api-key-file", "/no/such/file"], ("/no/such/file",)),
        (["--max-request", "much"], ("max_request",)),
        (["--config", "/no/such.toml"], ("/no/such.toml",)),
    ],
)
def test_what_cannot_be_served(store: Path, flags: list[str], words: tuple[str, ...]) -> None:
    assert_user_error(run("serve", store, *flags), *words)


@pytest.mark.parametrize(
    ("name", "options"), [("serve", ServeOptions), ("chat", ChatOptions), ("bench-serve", LoadOptions)]
)
def test_every_option_is_in_the_help(name: str, options: type) -> None:
    shown = re.sub(r"\s+", " ", run(name, "--help", env={"COLUMNS": "400", "TERMINAL_WIDTH": "400"}).stdout)
    for flag in flags_of(options):
        assert flag.help in shown
        assert f"[env var: {flag.variable}]" in shown
        assert all(f"{one} " in shown for one in flag.declaration.split("/"))


def test_a_file_of_settings(store: Path, tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text('host = "0.0.0.0"\nmax-queue = 3\n')
    assert_user_error(run("serve", store, "--config", file), "0.0.0.0")
    assert_user_error(run("serve", store, "--config", file, "--port", "-1"), "port is -1")
    file.write_text("speed = 3\n")
    assert_user_error(run("serve", store, "--config", file), "speed", "max_queue")


def test_a_model_that_cannot_be_opened_ends_the_server(store: Path) -> None:
    result = run("serve", store, "--port", "0", "--memory", "1MiB")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("error: 1.00 MiB is too little for this model")
