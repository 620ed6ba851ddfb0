"""A server with memory for one whole context answers more long requests than fit at once: those without room wait."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from moestro import LLM, SamplingParams
from moestro.config import RuntimeOptions
from moestro.memory.budget import parse_bytes
from moestro.runtime.subject import Subject
from moestro.store.reader import Store
from server.running import server

CONTEXT = 512
REQUESTS, AT_ONCE, TOKENS = 6, 16, 24
PROMPTS = [[(7 * place + 31 * number) % 4000 for place in range(CONTEXT - TOKENS)] for number in range(REQUESTS)]


def test_requests_that_have_no_room_wait_and_are_answered(store: Path) -> None:
    options = RuntimeOptions(memory="1MiB", context=CONTEXT, max_sequences=AT_ONCE)
    # What structured output needs is beside the memory given; an extent more lets experts use what KV rows do not.
    plan = Subject.of_store(Store.open(store)).plan(options)
    memory = plan.least_bytes + 2 * plan.extent_bytes + parse_bytes("4MiB")
    with server(store, memory=str(memory), context=str(CONTEXT), max_concurrency=str(AT_ONCE)) as running:
        running.until_ready()
        assert "whole contexts of 512 tokens" in "\n".join(running.lines)
        with httpx.Client(base_url=running.url, timeout=100) as http, ThreadPoolExecutor(REQUESTS) as threads:
            asked = [threads.submit(_ask, http, prompt) for prompt in PROMPTS]
            seen = []
            while not all(one.done() for one in asked):
                seen.append(http.get("/stats").json())
            answers = [one.result() for one in asked]
            last = http.get("/stats").json()
    assert any(one["requests"]["running"] and one["requests"]["waiting"] for one in seen)
    assert last["kv_blocks"]["all"] < REQUESTS * CONTEXT // 16
    stats = last["stats"]
    assert stats["peak_rss_bytes"] <= stats["process_floor_bytes"] + stats["memory_bytes"]
    with LLM(store, memory="120MiB", context=CONTEXT, prefix_cache=False) as alone:
        sampling = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
        assert answers == [alone.generate(prompt, sampling)[0].text for prompt in PROMPTS]


def _ask(http: httpx.Client, prompt: list[int]) -> Any:
    body = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    answer = http.post("/v1/completions", json=body)
    answer.raise_for_status()
    return answer.json()["choices"][0]["text"]
