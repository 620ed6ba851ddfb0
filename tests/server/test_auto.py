"""`model="NAME:auto"` from outside: who answers is told in header and body, and is what answers under its own name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from domain.domains import examples, texts
from moestro.domain import router_path
from moestro.store.variant_file import remove_variant
from routed_store import routed_store
from server.running import NAME, Running, server

AUTO = f"{NAME}:auto"
PROMPTS = {domain: "sum " * (domain == "sums") + texts(domain, 1, words=20, seed=50)[0] for domain in examples()}
SHORT = {"max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = routed_store(tmp_path_factory.mktemp("routed"), examples())
    (path / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    return path


@pytest.fixture(scope="module")
def running(store: Path) -> Iterator[Running]:
    with server(store, memory="64MB") as started:
        started.until_ready()
        yield started


def name_of(domain: str) -> str:
    return NAME if domain == "base" else f"{NAME}:{domain}"


@pytest.mark.parametrize("domain", sorted(PROMPTS))
def test_completions(http: httpx.Client, domain: str) -> None:
    asked = {"prompt": PROMPTS[domain], **SHORT}
    auto = http.post("/v1/completions", json={"model": AUTO, **asked})
    named = http.post("/v1/completions", json={"model": name_of(domain), **asked})
    assert auto.headers["x-moestro-variant"] == domain
    body = auto.json()
    assert body["model"] == name_of(domain)
    assert body["moestro"]["variant"] == (None if domain == "base" else domain)
    assert 0.5 <= body["moestro"]["confidence"] <= 1
    assert body["moestro"]["domain_tokens"] == 0
    assert body["choices"][0]["text"] == named.json()["choices"][0]["text"]
    assert "x-moestro-variant" not in named.headers
    assert "moestro" not in named.json()


def test_every_prompt_of_a_call_is_chosen_for(http: httpx.Client) -> None:
    asked = {"prompt": list(PROMPTS.values()), "n": 2, **SHORT, "temperature": 1.0, "seed": 3}
    answer = http.post("/v1/completions", json={"model": AUTO, **asked})
    assert answer.headers["x-moestro-variant"] == ", ".join(PROMPTS)
    body = answer.json()
    assert body["model"] == AUTO
    chosen = [choice["moestro"]["variant"] or "base" for choice in body["choices"]]
    assert chosen == [domain for domain in PROMPTS for _ in range(2)]


def test_chats_whole_and_streamed(running: Running) -> None:
    client: OpenAI = running.client()
    asked = {"messages": [{"role": "user", "content": PROMPTS["code"]}], **SHORT}
    raw = client.chat.completions.with_raw_response.create(model=AUTO, **asked)  # type: ignore[call-overload]
    assert raw.headers["x-moestro-variant"] == "code"
    whole = raw.parse()
    assert whole.model == f"{NAME}:code"
    assert whole.moestro["variant"] == "code"
    chunks = list(client.chat.completions.create(model=AUTO, stream=True, **asked))  # type: ignore[call-overload]
    assert {chunk.model for chunk in chunks} == {f"{NAME}:code"}
    assert {chunk.moestro["variant"] for chunk in chunks} == {"code"}
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    named = client.chat.completions.create(model=f"{NAME}:code", **asked)  # type: ignore[call-overload]
    assert streamed == whole.choices[0].message.content == named.choices[0].message.content


def test_responses(http: httpx.Client) -> None:
    asked = {"input": PROMPTS["sums"], "max_output_tokens": 4, "temperature": 0}
    answer = http.post("/v1/responses", json={"model": AUTO, **asked})
    assert answer.headers["x-moestro-variant"] == "sums"
    assert answer.json()["model"] == f"{NAME}:sums"
    assert answer.json()["moestro"]["variant"] == "sums"


def test_models_and_statistics_know_of_it(http: httpx.Client) -> None:
    assert AUTO in [one["id"] for one in http.get("/v1/models").json()["data"]]
    assert http.get(f"/v1/models/{AUTO}").json()["id"] == AUTO
    assert http.get("/stats").json()["stats"]["domain_tokens"] == 0


def test_a_variant_that_goes_and_a_router_that_is_damaged(store: Path, http: httpx.Client) -> None:
    """Last: it takes the store apart, as somebody could while the server runs."""
    asked = {"prompt": PROMPTS["sums"], "model": AUTO, **SHORT}
    remove_variant(store, "sums")
    gone = http.post("/v1/completions", json=asked)
    assert (gone.headers["x-moestro-variant"], gone.json()["model"]) == ("base", NAME)
    assert gone.json()["moestro"]["domain"] == "sums"
    router_path(store).write_bytes(b"nothing")
    damaged = http.post("/v1/completions", json=asked)
    assert damaged.status_code == 404
    assert "domains.npz" in damaged.json()["error"]["message"]
    router_path(store).unlink()
    missing = http.post("/v1/completions", json=asked)
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"
    assert AUTO not in [one["id"] for one in http.get("/v1/models").json()["data"]]
    assert http.post("/v1/completions", json={**asked, "model": NAME}).status_code == 200
