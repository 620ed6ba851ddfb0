"""`/v1/responses`, the basic part: one message is answered, nothing is stored."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from moestro.engine.events import Event
from moestro.server.answers import Answers
from moestro.server.chat import ChatRequest, Prepared, prepare
from moestro.server.desk import Asked, Desk, choice_headers, choice_json
from moestro.server.fields import Fields
from moestro.server.guides import JsonObjectFormat, JsonSchemaFormat, TextFormat
from moestro.server.messages import AssistantMessage, Message, SystemMessage, UserMessage
from moestro.server.parts import Kind
from moestro.server.stream import reply
from moestro.server.tools import splitter_of


class InputPart(Fields):
    """A piece of a message."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: Annotated[list[Any], Field(max_length=0)] | None = None


class InputMessage(Fields):
    """A message, as it is asked or as an earlier response gave it."""

    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[InputPart]
    type: Literal["message"] | None = None
    id: str | None = None
    status: Literal["completed", "incomplete"] | None = None


class SchemaFormat(Fields):
    """JSON that a schema allows."""

    type: Literal["json_schema"]
    name: str
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class TextSettings(Fields):
    """What the answer has to look like."""

    format: Annotated[TextFormat | JsonObjectFormat | SchemaFormat, Field(discriminator="type")] | None = None


class ResponsesRequest(Fields):
    """The fields that this server knows of OpenAI's."""

    input: str | Annotated[list[InputMessage], Field(min_length=1)]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    text: TextSettings | None = None
    stream: bool | None = None
    store: Literal[False] | None = Field(default=None, description="Nothing is stored, also if left out.")
    metadata: dict[str, str] | None = None
    user: str | None = None
    truncation: Literal["disabled"] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = Field(default=None, description="moestro's own.")
    quality: str | None = Field(default=None, description="moestro's own.")


def responses_router(desk: Desk) -> APIRouter:
    """The endpoint."""
    router = APIRouter()

    @router.post("/v1/responses", response_model=None)
    async def respond(body: ResponsesRequest, request: Request) -> Response:
        """Answer a text, or the last message of a conversation."""
        asked = await asyncio.to_thread(desk.asked, body.model)
        prepared = await asyncio.to_thread(_prepared, body, asked)
        answers = desk.answers(asked.serving)
        writer = _Writer(prepared, body)
        return await reply(
            request,
            answers.submit([prepared.ask]),
            stream=writer.stream(answers) if body.stream else None,
            whole=lambda: writer.whole(answers),
            leave=answers.cancel,
            headers=choice_headers([prepared.asked.choice]),
            named=True,
        )

    return router


def _prepared(body: ResponsesRequest, asked: Asked) -> Prepared:
    """The same as of a chat, with its checks."""
    found = [InputMessage(role="user", content=body.input)] if isinstance(body.input, str) else body.input
    head: list[Message] = [SystemMessage(role="system", content=body.instructions)] if body.instructions else []
    form = body.text.format if body.text else None
    if isinstance(form, SchemaFormat):
        named = {"name": form.name, "schema": form.schema_}
        form = JsonSchemaFormat.model_validate({"type": "json_schema", "json_schema": named})  # type: ignore[assignment]
    chat = ChatRequest(
        messages=[*head, *(_message(one) for one in found)],
        max_completion_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        seed=body.seed,
        quality=body.quality,
        response_format=form,  # type: ignore[arg-type]
    )
    return prepare(chat, asked)


def _message(one: InputMessage) -> Message:
    text = one.content if isinstance(one.content, str) else "".join(part.text for part in one.content)
    if one.role == "assistant":
        return AssistantMessage(role="assistant", content=text)
    if one.role == "user":
        return UserMessage(role="user", content=text)
    return SystemMessage(role="system", content=text)


class _Writer:
    """Writes one response, whole or as OpenAI's events."""

    def __init__(self, prepared: Prepared, body: ResponsesRequest) -> None:
        asked, self._splitter = prepared.asked, splitter_of(prepared.marks)
        self._body, self._item = body, f"msg_{secrets.token_hex(12)}"
        self._head = {
            "id": f"resp_{secrets.token_hex(12)}",
            "object": "response",
            "created_at": int(time.time()),
            "model": asked.name,
            **choice_json(asked.choice),
            "error": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "temperature": body.temperature,
            "tool_choice": "auto",
            "tools": [],
            "top_p": body.top_p,
            "truncation": "disabled",
        }

    async def whole(self, answers: Answers) -> dict[str, Any]:
        """The response."""
        text, last = "", Event()
        async for _, last in answers.events():
            text += self._text(last)
        return self._finished(text, last, answers)

    async def stream(self, answers: Answers) -> AsyncIterator[dict[str, Any]]:
        """Its events, numbered."""
        number = 0
        async for event in self._events(answers):
            yield event | {"sequence_number": number}
            number += 1

    async def _events(self, answers: Answers) -> AsyncIterator[dict[str, Any]]:
        begun = self._head | {"status": "in_progress", "incomplete_details": None, "output": [], "usage": None}
        yield {"type": "response.created", "response": begun}
        yield {"type": "response.in_progress", "response": begun}
        item = {"output_index": 0, "item": self._message("in_progress", None)}
        yield {"type": "response.output_item.added", **item}
        place = {"item_id": self._item, "output_index": 0, "content_index": 0}
        yield {"type": "response.content_part.added", **place, "part": _text("")}
        text, last = "", Event()
        async for _, last in answers.events():
            if piece := self._text(last):
                text += piece
                yield {"type": "response.output_text.delta", **place, "delta": piece, "logprobs": []}
        yield {"type": "response.output_text.done", **place, "text": text, "logprobs": []}
        yield {"type": "response.content_part.done", **place, "part": _text(text)}
        response = self._finished(text, last, answers)
        yield {"type": "response.output_item.done", "output_index": 0, "item": response["output"][0]}
        kind = "response.completed" if response["status"] == "completed" else "response.incomplete"
        yield {"type": kind, "response": response}

    def _text(self, event: Event) -> str:
        """What an event brings of the answer itself; reasoning is no part of it."""
        parts = [*self._splitter.push(event.text), *(self._splitter.finish() if event.finish_reason else ())]
        return "".join(part.text for part in parts if part.kind is Kind.TEXT)

    def _finished(self, text: str, last: Event, answers: Answers) -> dict[str, Any]:
        whole, total = last.finish_reason == "stop", answers.total
        status = "completed" if whole else "incomplete"
        return self._head | {
            "status": status,
            "incomplete_details": None if whole else {"reason": "max_output_tokens"},
            "output": [self._message(status, text)],
            "usage": {
                "input_tokens": total.prompt_tokens,
                "input_tokens_details": {"cached_tokens": total.cached_tokens},
                "output_tokens": total.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": total.prompt_tokens + total.completion_tokens,
            },
        }

    def _message(self, status: str, text: str | None) -> dict[str, Any]:
        content = [] if text is None else [_text(text)]
        return {"id": self._item, "type": "message", "role": "assistant", "status": status, "content": content}


def _text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
