"""`/v1/chat/completions`."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from moestro.engine.events import Event
from moestro.server.answers import Answers, Ask
from moestro.server.desk import Asked, Desk, choice_headers, choice_json, timings_json
from moestro.server.errors import ApiError
from moestro.server.fields import SamplingFields
from moestro.server.guides import ResponseFormat, guide_of
from moestro.server.logprobs import chat_logprobs
from moestro.server.messages import Message, for_template, user_text
from moestro.server.parts import Kind, Marks, Part
from moestro.server.routed import routed_json
from moestro.server.sampling import choices_of, sampling_of
from moestro.server.stream import reply
from moestro.server.tools import (
    Tool,
    ToolChoice,
    call_guide,
    marks_of,
    needs_special_tokens,
    splitter_of,
    tools_for_template,
)


class ChatRequest(SamplingFields):
    """OpenAI's fields; what has no effect here is taken only with the values that ask for nothing."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Left out: what the context has room for."
    )
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: ToolChoice | None = Field(default=None, description="required, or a function: the answer is one call.")
    parallel_tool_calls: Literal[True] | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None, description="Variables of the model's chat template."
    )
    store: Literal[False] | None = None
    metadata: dict[str, str] | None = Field(default=None, description="Without effect.")
    modalities: list[Literal["text"]] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = Field(default=None, description="Without effect.")
    prompt_cache_key: str | None = Field(
        default=None, description="Without effect: prefixes are found by their tokens."
    )


@dataclass(frozen=True)
class Prepared:
    """A conversation as the engine takes it, what to look for in answers, and what answers."""

    ask: Ask
    marks: Marks
    asked: Asked


def chat_router(desk: Desk) -> APIRouter:
    """The endpoint."""
    router = APIRouter()

    @router.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer the last message of a conversation."""
        asked = await asyncio.to_thread(desk.asked, body.model)
        prepared = await asyncio.to_thread(prepare, body, asked)
        answers = desk.answers(asked.serving)
        writer = ChatWriter(prepared, with_logprobs=bool(body.logprobs))
        include_usage = bool(body.stream_options and body.stream_options.include_usage)
        return await reply(
            request,
            answers.submit([prepared.ask], priority=body.priority or 0, deadline_s=body.deadline_s),
            stream=writer.stream(answers, include_usage=include_usage) if body.stream else None,
            whole=lambda: writer.whole(answers),
            leave=answers.cancel,
            headers=choice_headers([prepared.asked.choice]),
        )

    return router


def prepare(body: ChatRequest, asked: Asked) -> Prepared:
    """Everything of a request that can be wrong is found here. Raises ApiError, RequestError."""
    asked = asked.decided(user_text(body.messages))
    serving = asked.serving
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs is given without logprobs: true.", param="top_logprobs")
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise ApiError(400, "max_tokens is given beside max_completion_tokens. Leave it out.", param="max_tokens")
    tools = tools_for_template(body.tools, body.tool_choice, serving)
    prompt = serving.llm.chat_prompt(for_template(body.messages), tools=tools, settings=body.chat_template_kwargs)
    marks = marks_of(serving, prompt, body.tools or () if tools else ())
    call = call_guide(body.tools, body.tool_choice, marks, serving.llm.tokenizer)
    form = guide_of(body.response_format)
    if call is not None and form is not None:
        raise ApiError(400, "tool_choice asks for a call: response_format has no place in it.", param="response_format")
    sampling = sampling_of(
        body,
        serving.defaults,
        max_tokens=body.max_tokens or body.max_completion_tokens or max(1, serving.llm.plan.context - len(prompt)),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        guide=call or form,
    )
    if needs_special_tokens(marks):
        sampling = replace(sampling, skip_special_tokens=False)
    ask = Ask(prompt, choices_of(sampling, body.n or 1), asked.variant)
    return Prepared(ask, marks, asked)


class ChatWriter:
    """Writes answers as OpenAI does, in pieces or whole."""

    def __init__(self, prepared: Prepared, *, with_logprobs: bool) -> None:
        self._id, self._created, self._asked = f"chatcmpl-{secrets.token_hex(12)}", int(time.time()), prepared.asked
        self._with_logprobs = with_logprobs
        self._splitters = [splitter_of(prepared.marks) for _ in prepared.ask.sampling]

    async def stream(self, answers: Answers, *, include_usage: bool) -> AsyncIterator[dict[str, Any]]:
        """Chunks: the role of each choice at once, then what comes."""
        for index in range(len(self._splitters)):
            yield self._chunk([self._choice(index, {"role": "assistant", "content": ""})])
        async for index, event in answers.events():
            deltas = [_delta(part) for part in self._parts(index, event)]
            if event.logprobs and not deltas:
                deltas.append({"content": ""})
            for number, delta in enumerate(deltas):
                piece = self._choice(index, delta)
                if self._with_logprobs and number == 0:
                    piece["logprobs"] = chat_logprobs(event.logprobs)
                yield self._chunk([piece])
            if event.finish_reason is not None:
                yield self._chunk([self._choice(index, {}, self._reason(index, event)) | routed_json(event)])
        if include_usage:
            yield self._chunk([]) | {"usage": answers.total.as_json(), "timings": timings_json(answers)}

    async def whole(self, answers: Answers) -> dict[str, Any]:
        """The object that has everything."""
        choices: dict[int, dict[str, Any]] = {}
        async for index, event in answers.events():
            choice = choices.setdefault(index, self._unfinished(index))
            for part in self._parts(index, event):
                _add(choice["message"], part)
            if self._with_logprobs:
                choice["logprobs"]["content"] += chat_logprobs(event.logprobs)["content"]
            if event.finish_reason is not None:
                choice |= {"finish_reason": self._reason(index, event), **routed_json(event)}
        return self._head("chat.completion") | {
            "choices": [choices[index] for index in sorted(choices)],
            "usage": answers.total.as_json(),
            "timings": timings_json(answers),
        }

    def _parts(self, index: int, event: Event) -> Iterator[Part]:
        yield from self._splitters[index].push(event.text)
        if event.finish_reason is not None:
            yield from self._splitters[index].finish()

    def _reason(self, index: int, event: Event) -> str | None:
        return (
            "tool_calls" if event.finish_reason == "stop" and self._splitters[index].has_calls else event.finish_reason
        )

    def _unfinished(self, index: int) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": "", "refusal": None}
        logprobs: dict[str, Any] | None = {"content": []} if self._with_logprobs else None
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": None}

    def _head(self, kind: str) -> dict[str, Any]:
        head = {"id": self._id, "object": kind, "created": self._created, "model": self._asked.name}
        return head | choice_json(self._asked.choice)

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._head("chat.completion.chunk") | {"choices": choices}

    def _choice(self, index: int, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def _delta(part: Part) -> dict[str, Any]:
    return {part.kind.value: [part.call] if part.kind is Kind.CALL else part.text}


def _add(message: dict[str, Any], part: Part) -> None:
    if part.call is not None:
        message.setdefault("tool_calls", []).append({key: part.call[key] for key in ("id", "type", "function")})
    else:
        message[part.kind.value] = message.get(part.kind.value, "") + part.text
