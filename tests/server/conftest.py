"""One server for all tests that do not end or overload it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from cli.running import MODEL
from moestro.store.locate import locate_source
from packing import pack_raw
from server.running import Running, server

_TEMPLATE = """\
{% if tools %}Functions, to be called as <tool_call>{"name": ..., "arguments": ...}</tool_call>:
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}{% endif %}\
{% for m in messages %}{{ m['content'] }}\
{% for call in m['tool_calls'] or [] %}<tool_call>{{ call['function'] | tojson }}</tool_call>{% endfor %}
{% endfor %}{% if thinking %}<think>
{% endif %}{# answers may reason up to </think> #}"""


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the built-in model whose chat template takes tools, and may have it reason. Do not change it."""
    source = tmp_path_factory.mktemp("source")
    for file in locate_source(MODEL).iterdir():
        if file.name != "chat_template.jinja":
            (source / file.name).symlink_to(file)
    (source / "chat_template.jinja").write_text(_TEMPLATE)
    return pack_raw(source, tmp_path_factory.mktemp("served") / "store").path


@pytest.fixture(scope="session")
def running(store: Path) -> Iterator[Running]:
    with server(store, admin_key="boss") as started:
        started.until_ready()
        yield started


@pytest.fixture(scope="session")
def client(running: Running) -> OpenAI:
    return running.client()


@pytest.fixture
def http(running: Running) -> httpx.Client:
    """To ask the server by hand: this room's, or the one that a module has in its place."""
    return running.http
