"""Conversations as OpenAI writes them, and as chat templates take them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from moestro.server.errors import ApiError
from moestro.server.fields import Fields


class TextPart(Fields):
    """A piece of a message. Models here read nothing but text."""

    type: Literal["text"]
    text: str


Content = str | list[TextPart]


class FunctionCall(Fields):
    """What an earlier answer called."""

    name: str
    arguments: str = Field(description="A JSON object, as text.")


class ToolCall(Fields):
    """A call in an earlier answer."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class SystemMessage(Fields):
    """What the assistant is to be like."""

    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(Fields):
    """What the user says."""

    role: Literal["user"]
    content: Content
    name: str | None = None


class AssistantMessage(Fields):
    """An earlier answer. `reasoning_content` is passed to the template, which may leave it out."""

    role: Literal["assistant"]
    content: Content | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    refusal: Literal[""] | None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None


class ToolMessage(Fields):
    """What a tool gave back."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: str | None = None


Message = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage,
    Field(discriminator="role"),
]


def for_template(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Plain texts, and arguments of calls as objects: what templates of models expect. Raises ApiError."""
    return [_plain(message, place) for place, message in enumerate(messages)]


def user_text(messages: Sequence[Message]) -> str:
    """What the user says in all of a conversation: by it, domains are told."""
    return "\n".join(_text(message.content) for message in messages if isinstance(message, UserMessage))


def _plain(message: Message, place: int) -> dict[str, Any]:
    plain: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    plain["content"] = _text(message.content)
    if message.name is not None:
        plain["name"] = message.name
    if isinstance(message, ToolMessage):
        plain["tool_call_id"] = message.tool_call_id
    if isinstance(message, AssistantMessage):
        if message.reasoning_content is not None:
            plain["reasoning_content"] = message.reasoning_content
        if message.tool_calls:
            plain["tool_calls"] = [_call(call, place, number) for number, call in enumerate(message.tool_calls)]
    return plain


def _call(call: ToolCall, place: int, number: int) -> dict[str, Any]:
    where = f"messages.{place}.tool_calls.{number}.function.arguments"
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"{where} is not JSON ({error}).", param=where) from error
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def _text(content: Content | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text for part in content)
