"""A server takes up what its store has become, within its memory, and says what it does meanwhile."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.tiny import tiny_checkpoint
from moestro import LLM, SamplingParams
from packing import pack_raw
from server.running import Running, server

PROMPT = "A bridge is"
LONG = {"prompt": PROMPT, "max_tokens": 480, "temperature": 0, "ignore_eos": True, "stream": True, "n": 4}
BOSS = {"Authorization": "Bearer boss"}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two stores whose models have the same shapes and other weights."""
    folder = tmp_path_factory.mktemp("reloaded")
    return {
        name: pack_raw(tiny_checkpoint(folder / f"{name}-checkpoint", seed), folder / name).path
        for seed, name in enumerate(("first", "second"))
    }


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, packed: dict[str, Path]) -> Path:
    """What the server is given; tests put another in its place."""
    folder = tmp_path_factory.mktemp("served") / "store"
    shutil.copytree(packed["first"], folder)
    return folder


@pytest.fixture(scope="module")
def running(store: Path) -> Iterator[Running]:
    with server(store, admin_key="boss", memory="40MiB", context="512") as started:
        started.until_ready()
        yield started


def _answer(http: httpx.Client) -> str:
    answer = http.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 24, "temperature": 0})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def _alone(store: Path) -> str:
    with LLM(store, memory="40MiB", context=512) as llm:
        return llm.generate(PROMPT, SamplingParams(max_tokens=24))[0].text


def _put(source: Path, store: Path) -> None:
    """Another store in its place, as packing does it: what the server has open stays what it was."""
    store.rename(store.with_suffix(".old"))
    shutil.copytree(source, store)
    shutil.rmtree(store.with_suffix(".old"))


def _reload(http: httpx.Client, **body: Any) -> httpx.Response:
    return http.post("/admin/reload", json=body, headers=BOSS)


def _until(http: httpx.Client, status: str) -> dict[str, Any]:
    while (told := http.get("/health").json())["status"] != status:
        assert told["status"] in ("finishing", "opening"), told
        time.sleep(0.05)
    return dict(told)


def test_requests_under_way_end_and_others_come_again(
    running: Running, http: httpx.Client, store: Path, packed: dict[str, Path]
) -> None:
    assert _answer(http) == _alone(packed["first"])
    _put(packed["second"], store)
    with http.stream("POST", "/v1/completions", json=LONG) as answer:
        lines = answer.iter_lines()
        next(lines)
        asked = _reload(http)
        assert (asked.status_code, asked.json()) == (202, {"status": "reloading"})
        told = http.get("/health")
        assert told.status_code == 503
        assert told.json()["status"] in ("finishing", "opening")
        refused = http.post("/v1/completions", json={"prompt": PROMPT})
        assert refused.status_code == 503
        assert int(refused.headers["Retry-After"]) > 0
        assert refused.json()["error"]["code"] == "model_loading"
        assert _reload(http).status_code == 409
        pieces = [line for line in lines if line]
    assert pieces[-1] == "data: [DONE]"
    assert sum('"finish_reason":"length"' in line for line in pieces) == 4
    _until(http, "ok")
    assert _answer(http) == _alone(packed["second"])
    assert _alone(packed["first"]) != _alone(packed["second"])


def test_requests_get_the_time_that_is_asked_for(http: httpx.Client) -> None:
    with http.stream("POST", "/v1/completions", json=LONG) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert _reload(http, drain_s=0).status_code == 202
        last = [line for line in lines if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
    _until(http, "ok")


def test_a_store_that_cannot_be_opened_is_named_and_another_reload_mends_it(
    running: Running, http: httpx.Client, store: Path
) -> None:
    before = _answer(http)
    manifest = store / "manifest.json"
    kept = manifest.read_bytes()
    manifest.write_bytes(b"{}")
    assert _reload(http).status_code == 202
    told = _until(http, "failed")
    assert str(store) in told["error"]["message"]
    refused = http.post("/v1/completions", json={"prompt": PROMPT})
    assert (refused.status_code, refused.json()["error"]) == (503, told["error"])
    assert told["error"]["code"] == "model_failed"
    assert http.get("/stats").status_code == 503
    assert http.get("/metrics").status_code == 200
    manifest.write_bytes(kept)
    assert _reload(http).status_code == 202
    _until(http, "ok")
    assert _answer(http) == before


def test_memory_stays_within_what_was_given(http: httpx.Client) -> None:
    """The process's peak is over all models that it had: the floor must not grow with each."""
    floors = []
    for _ in range(4):
        _answer(http)
        stats = http.get("/stats").json()["stats"]
        assert stats["peak_rss_bytes"] <= stats["process_floor_bytes"] + stats["memory_bytes"]
        floors.append(stats["process_floor_bytes"])
        assert _reload(http).status_code == 202
        _until(http, "ok")
    # Library pages that a first request touches are the plan's the first time, and the floor's from then on. It goes up
    # and down by 2 MiB with the pages that the heap happens to hold; a model that stayed would be 40 MiB each time.
    assert floors[-1] - floors[1] <= 8 << 20, floors


def test_only_administrators_may(http: httpx.Client) -> None:
    assert http.post("/admin/reload").status_code == 401
    assert _reload(http, drain=1).status_code == 400
    assert _reload(http, drain_s=-1).status_code == 400
    described = http.get("/openapi.json").json()["paths"]["/admin/reload"]["post"]
    assert "202" in described["responses"]


def test_the_server_ends_as_ever(running: Running) -> None:
    """The last test of this server."""
    assert running.end() == 0
    assert not [line for line in running.lines if "Traceback" in line]
