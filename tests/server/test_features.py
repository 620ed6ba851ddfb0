"""Stop strings, log-probabilities, bias, penalties and structured output, through OpenAI's own client."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from server.running import NAME, PROMPT

CHAT = [{"role": "user", "content": PROMPT}]
GREEDY = {"model": NAME, "temperature": 0}


def test_a_stop_string_ends_the_answer_and_is_not_in_it(client: OpenAI) -> None:
    whole = client.completions.create(prompt=PROMPT, max_tokens=24, **GREEDY).choices[0]  # type: ignore[call-overload]
    stop = whole.text[6:9]
    place = whole.text.index(stop)
    chunks = list(client.completions.create(prompt=PROMPT, max_tokens=24, stop=[stop], stream=True, **GREEDY))  # type: ignore[call-overload]
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.text[:place]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_log_probabilities_of_chats(client: OpenAI) -> None:
    asked = {"messages": CHAT, "max_tokens": 5, "logprobs": True, "top_logprobs": 3, **GREEDY}
    whole = client.chat.completions.create(**asked).choices[0]  # type: ignore[call-overload]
    tokens = whole.logprobs.content
    assert len(tokens) == 5
    assert b"".join(bytes(one.bytes) for one in tokens).decode() == whole.message.content
    for one in tokens:
        assert len(one.top_logprobs) == 3
        assert one.logprob == max(other.logprob for other in one.top_logprobs) <= 0  # the likeliest was taken
    pieces = [chunk.choices[0] for chunk in client.chat.completions.create(stream=True, **asked)]  # type: ignore[call-overload]
    streamed = [one for piece in pieces if piece.logprobs for one in piece.logprobs.content]
    assert streamed == tokens


def test_log_probabilities_of_completions(client: OpenAI) -> None:
    choice = client.completions.create(prompt=PROMPT, max_tokens=5, logprobs=2, **GREEDY).choices[0]  # type: ignore[call-overload]
    assert "".join(choice.logprobs.tokens) == choice.text
    assert [len(top) for top in choice.logprobs.top_logprobs] == [2] * 5
    assert choice.logprobs.text_offset[1] == len(choice.logprobs.tokens[0])
    assert all(math.exp(one) <= 1 for one in choice.logprobs.token_logprobs)


def test_bias_and_penalties(client: OpenAI, http: httpx.Client) -> None:
    token = http.post("/tokenize", json={"prompt": "x"}).json()["tokens"][0]
    asked = {"prompt": PROMPT, "max_tokens": 6, **GREEDY}
    biased = client.completions.create(logit_bias={str(token): 100}, **asked).choices[0]  # type: ignore[call-overload]
    assert biased.text == "x" * 6
    penalised = client.completions.create(  # type: ignore[call-overload]
        logit_bias={str(token): 100}, extra_body={"repetition_penalty": 100.0}, **asked
    ).choices[0]
    assert penalised.text.count("x") == 1


def test_an_answer_follows_a_schema(client: OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"size": {"enum": ["small", "large"]}, "count": {"type": "integer", "maximum": 99}},
        "required": ["size", "count"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema, "strict": True}}
    answer = client.chat.completions.create(messages=CHAT, max_tokens=60, response_format=form, **GREEDY).choices[0]  # type: ignore[call-overload]
    assert answer.finish_reason == "stop"
    thing = json.loads(answer.message.content)
    assert thing.keys() == {"size", "count"}
    assert thing["size"] in ("small", "large")


def test_an_answer_follows_an_expression(client: OpenAI) -> None:
    form = {"type": "regex", "pattern": "(yes|no), [a-z]{3}"}
    answer = client.chat.completions.create(messages=CHAT, max_tokens=20, response_format=form, **GREEDY).choices[0]  # type: ignore[call-overload]
    assert re.fullmatch(form["pattern"], answer.message.content)


@pytest.mark.parametrize(
    "form",
    [
        {"type": "regex", "pattern": "("},
        {"type": "grammar", "grammar": "start: nothing_like_it"},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no such type"}}},
    ],
)
def test_a_form_that_cannot_be_followed_is_refused(client: OpenAI, form: dict[str, object]) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(messages=CHAT, response_format=form, **GREEDY)  # type: ignore[call-overload]
    assert caught.value.param == "response_format"


TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"town": {}}}}}
]
CALLED = r'<tool_call>\{"name": "weather", "arguments": \{"town": "[A-Z][a-z]{2}"\}\}</tool_call>'


def test_calls_of_tools(client: OpenAI) -> None:
    """The model is too small to call by itself; an expression makes it write what larger ones write."""
    form = {"type": "regex", "pattern": "So: " + CALLED}
    asked = {"messages": CHAT, "tools": TOOLS, "max_tokens": 60, "response_format": form, **GREEDY}
    whole = client.chat.completions.create(**asked).choices[0]  # type: ignore[call-overload]
    assert whole.finish_reason == "tool_calls"
    assert whole.message.content == "So: "
    (call,) = whole.message.tool_calls
    assert call.function.name == "weather"
    town = json.loads(call.function.arguments)["town"]
    assert len(town) == 3
    pieces = [chunk.choices[0] for chunk in client.chat.completions.create(stream=True, **asked)]  # type: ignore[call-overload]
    (streamed,) = [piece.delta.tool_calls[0] for piece in pieces if piece.delta.tool_calls]
    assert streamed.function.model_dump() == call.function.model_dump()
    assert pieces[-1].finish_reason == "tool_calls"
    result = [
        *CHAT,
        {"role": "assistant", "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": "rain"},
    ]
    again = client.chat.completions.create(messages=result, tools=TOOLS, max_tokens=2, **GREEDY)  # type: ignore[call-overload]
    assert again.usage.prompt_tokens > len(PROMPT) // 4


def test_without_tools_marks_are_text(client: OpenAI) -> None:
    form = {"type": "regex", "pattern": CALLED}
    more = [{}, {"tools": TOOLS, "tool_choice": "none"}]
    for one in more:
        answer = client.chat.completions.create(messages=CHAT, max_tokens=60, response_format=form, **one, **GREEDY)  # type: ignore[call-overload]
        assert answer.choices[0].message.content.startswith("<tool_call>")
        assert answer.choices[0].finish_reason == "stop"


def test_reasoning_is_apart(client: OpenAI) -> None:
    form = {"type": "regex", "pattern": "why</think>\\n\\nbecause"}
    answer = client.chat.completions.create(  # type: ignore[call-overload]
        messages=CHAT,
        max_tokens=40,
        response_format=form,
        extra_body={"chat_template_kwargs": {"thinking": True}},
        **GREEDY,
    )
    message = answer.choices[0].message
    assert (message.reasoning_content, message.content) == ("why", "because")


def test_responses(client: OpenAI) -> None:
    asked = {"model": NAME, "input": PROMPT, "max_output_tokens": 8, "temperature": 0}
    whole = client.responses.create(**asked)  # type: ignore[call-overload]
    chat = client.chat.completions.create(messages=CHAT, max_tokens=8, **GREEDY)  # type: ignore[call-overload]
    assert whole.output_text == chat.choices[0].message.content
    assert whole.status == "incomplete"
    assert whole.incomplete_details.reason == "max_output_tokens"
    assert whole.usage.output_tokens == 8
    events = list(client.responses.create(stream=True, **asked))  # type: ignore[call-overload]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == whole.output_text


def test_responses_to_conversations_with_a_form(client: OpenAI) -> None:
    schema = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"]}
    answer = client.responses.create(
        model=NAME,
        instructions="be brief",
        input=[
            {"role": "user", "content": [{"type": "input_text", "text": "one"}]},
            {"role": "assistant", "content": "two"},
            {"role": "user", "content": "three"},
        ],
        text={"format": {"type": "json_schema", "name": "x", "schema": schema | {"additionalProperties": False}}},
        temperature=0,
    )
    assert answer.status == "completed"
    assert json.loads(answer.output_text).keys() == {"yes"}
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        client.responses.create(model=NAME, input="a", previous_response_id=answer.id)


def test_routed_experts_are_told_with_the_end(client: OpenAI) -> None:
    asking = {"return_routed_experts": True}
    whole = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=5, temperature=0, extra_body=asking)
    routed: Any = (whole.choices[0].model_extra or {})["routed_experts"]
    assert whole.usage is not None
    assert len(routed["experts"]) + routed["first"] == whole.usage.total_tokens - 1
    assert {len(layers) for layers in routed["experts"]} == {8}
    assert all(len(set(ids)) == 4 for layers in routed["experts"] for ids in layers)
    messages: Any = [{"role": "user", "content": PROMPT}]
    stream = client.chat.completions.create(
        model=NAME, messages=messages, max_tokens=5, temperature=0, stream=True, extra_body=asking
    )
    *_, last = [chunk for chunk in stream if chunk.choices]
    assert len((last.choices[0].model_extra or {})["routed_experts"]["experts"][-1]) == 8
    plain = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=5)
    assert "routed_experts" not in (plain.choices[0].model_extra or {})
