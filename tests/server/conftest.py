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


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the built-in model. Do not change it."""
    return pack_raw(locate_source(MODEL), tmp_path_factory.mktemp("served") / "store").path


@pytest.fixture(scope="session")
def running(store: Path) -> Iterator[Running]:
    with server(store, admin_key="boss") as started:
        started.until_ready()
        yield started


@pytest.fixture(scope="session")
def client(running: Running) -> OpenAI:
    return running.client()


@pytest.fixture(scope="session")
def http(running: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=running.url, timeout=60) as made:
        yield made
