"""`tool_choice` that asks for a call: even a model that cannot call tools writes one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from transformers import AutoTokenizer

from cli.running import MODEL
from moestro.engine.guides import Guides
from moestro.server.parts import Marks
from moestro.server.tools import Tool, call_guide
from moestro.store.locate import locate_source
from server.running import NAME, PROMPT, server

CHAT = [{"role": "user", "content": PROMPT}]
COMMON: dict[str, Any] = {"model": NAME, "messages": CHAT, "temperature": 0, "max_tokens": 180}


@pytest.fixture(scope="module", params=["hermes", "qwen3_coder"])
def client(request: pytest.FixtureRequest, store: Path) -> Iterator[OpenAI]:
    """Of a server whose context has room for the tools and a call, written in one dialect or another."""
    with server(store, context="768", tool_parser=request.param) as running:
        running.until_ready()
        yield running.client()


def function(name: str, key: str, values: list[str]) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": {key: {"enum": values}},
        "required": [key],
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [function("weather", "town", ["Ulm", "Bonn"]), function("clock", "zone", ["east", "west"])]
VALUES = {"weather": ("town", ["Ulm", "Bonn"]), "clock": ("zone", ["east", "west"])}


def assert_call(call: Any, names: list[str]) -> None:
    name, arguments = call.function.name, json.loads(call.function.arguments)
    assert name in names
    key, values = VALUES[name]
    assert list(arguments) == [key]
    assert arguments[key] in values


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", ["weather", "clock"]),
        ({"type": "function", "function": {"name": "clock"}}, ["clock"]),
        ({"type": "function", "function": {"name": "weather"}}, ["weather"]),
    ],
)
def test_the_answer_is_one_call(client: OpenAI, choice: Any, names: list[str]) -> None:
    asked = COMMON | {"tools": TOOLS, "tool_choice": choice}
    whole = client.chat.completions.create(**asked).choices[0]
    assert whole.finish_reason == "tool_calls"
    assert not whole.message.content
    (call,) = whole.message.tool_calls or ()
    assert_call(call, names)
    pieces = [chunk.choices[0] for chunk in client.chat.completions.create(stream=True, **asked)]
    (streamed,) = [piece.delta.tool_calls[0] for piece in pieces if piece.delta.tool_calls]
    assert streamed.function.model_dump() == call.function.model_dump()
    assert pieces[-1].finish_reason == "tool_calls"


def test_a_call_needs_something_to_call(client: OpenAI) -> None:
    named = {"type": "function", "function": {"name": "poem"}}
    regex = {"type": "regex", "pattern": "x"}
    for wrong, param in (
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": named, "tools": TOOLS}, "tool_choice"),
        ({"tool_choice": "required", "tools": TOOLS, "response_format": regex}, "response_format"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**COMMON | wrong)
        assert caught.value.param == param


def test_a_function_without_parameters_takes_any_object(client: OpenAI) -> None:
    tools = [{"type": "function", "function": {"name": "now"}}]
    asked = COMMON | {"tools": tools, "tool_choice": "required", "logit_bias": {str(_token(client, "}")): 100}}
    (call,) = client.chat.completions.create(**asked).choices[0].message.tool_calls or ()
    assert (call.function.name, json.loads(call.function.arguments)) == ("now", {})


def test_reasoning_that_the_prompt_has_begun_comes_first() -> None:
    """A model as small as ours does not end its reasoning: what may come is asked of the guide itself."""
    folder = locate_source(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    guides = Guides(tokenizer, vocabulary=4096, end_ids=frozenset({tokenizer.eos_token_id}))
    tools = [Tool.model_validate(tool) for tool in TOOLS]
    guide = call_guide(tools, "required", Marks(reasoning=True, calls=True, thinking=True), tokenizer)
    assert guide is not None
    call = '<tool_call>\n{"name": "clock", "arguments": {"zone": "west"}}\n</tool_call>'
    for text, whole in ((f"A <thought> or so.</think>\n\n{call}", True), ("Only a thought.", False)):
        constraint = guides.constraint(guide)
        for token in tokenizer(text)["input_ids"]:
            assert constraint.allowed()[token]
            constraint.take(token)
        assert constraint.complete is whole


def _token(client: OpenAI, text: str) -> int:
    answer = httpx.post(str(client.base_url.join("/tokenize")), json={"prompt": text}).json()
    return int(answer["tokens"][0])
