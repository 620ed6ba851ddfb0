"""OpenAI's own client against the running server."""

from __future__ import annotations

import time
from pathlib import Path

import httpx
import openai
import pytest
from openai import OpenAI

from moestro import LLM, SamplingParams
from server.running import NAME, PROMPT, Running

CHAT = [{"role": "user", "content": PROMPT}]


@pytest.fixture(scope="module")
def expected(store: Path) -> str:
    """What the Python API answers."""
    with LLM(store, memory="100MiB", context=256) as llm:
        return llm.generate(PROMPT, SamplingParams(max_tokens=24))[0].text


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


def test_a_completion_is_that_of_the_python_api(client: OpenAI, expected: str) -> None:
    answer = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=24, temperature=0)
    assert answer.choices[0].text == expected
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 24
    assert answer.usage.total_tokens == 24 + answer.usage.prompt_tokens


def test_a_stream_has_the_same_text(client: OpenAI, expected: str) -> None:
    chunks = list(client.completions.create(model=NAME, prompt=PROMPT, max_tokens=24, temperature=0, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert len(chunks) > 8


def test_prompts_and_choices_are_numbered_and_differ_by_seed(client: OpenAI) -> None:
    ids = [10, 20, 30]
    asked = {"model": NAME, "max_tokens": 8, "temperature": 1.0, "seed": 3}
    answer = client.completions.create(prompt=[ids, [7]], n=2, **asked)  # type: ignore[call-overload]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text != answer.choices[1].text
    alone = client.completions.create(prompt=ids, **asked)  # type: ignore[call-overload]
    assert alone.choices[0].text == answer.choices[0].text
    assert answer.usage.prompt_tokens == 4
    assert answer.usage.completion_tokens == 32


def test_chat_streams_what_it_answers_whole(client: OpenAI) -> None:
    asked = {"model": NAME, "messages": CHAT, "max_completion_tokens": 12, "seed": 5}
    whole = client.chat.completions.create(**asked)  # type: ignore[call-overload]
    chunks = list(
        client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **asked)  # type: ignore[call-overload]
    )
    pieces = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert pieces[0].delta.role == "assistant"
    assert "".join(piece.delta.content or "" for piece in pieces) == whole.choices[0].message.content
    assert pieces[-1].finish_reason == whole.choices[0].finish_reason == "length"
    assert chunks[-1].usage == whole.usage
    assert whole.usage.completion_tokens == 12


def test_seeds_decide(client: OpenAI) -> None:
    texts = [
        client.chat.completions.create(
            model=NAME,
            messages=CHAT,
            max_tokens=12,
            seed=seed,  # type: ignore[arg-type]
        )
        .choices[0]
        .message.content
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_content_may_come_in_parts(client: OpenAI) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": PROMPT[:5]}, {"type": "text", "text": PROMPT[5:]}]}]
    answers = [
        client.chat.completions.create(model=NAME, messages=one, max_tokens=6, temperature=0)  # type: ignore[arg-type]
        for one in (CHAT, parts)
    ]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content


def test_the_fields_of_moestros_own(client: OpenAI) -> None:
    more = {"top_k": 1, "ignore_eos": True, "quality": "fast"}
    answer = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=6, extra_body=more)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 6
    with pytest.raises(openai.BadRequestError, match="superb"):
        client.completions.create(model=NAME, prompt=PROMPT, extra_body={"quality": "superb"})


def test_a_client_that_leaves_frees_its_place(running: Running, http: httpx.Client) -> None:
    long = {"prompt": PROMPT, "max_tokens": 200, "temperature": 0, "ignore_eos": True}
    before = http.get("/stats").json()["requests"]["finished"].get("cancelled", 0)
    with http.stream("POST", "/v1/completions", json=long | {"stream": True}) as answer:
        next(answer.iter_lines())
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{running.url}/v1/completions", json=long | {"n": 4}, timeout=0.05)
    for _ in range(100):
        requests = http.get("/stats").json()["requests"]
        if requests["finished"].get("cancelled", 0) == before + 5 and not requests["running"]:
            return
        time.sleep(0.05)
    pytest.fail(str(requests))
