"""`/v1/chat/completions`."""

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
from moestro.server.answers import Answers, Ask
from moestro.server.desk import Desk, timings_json
from moestro.server.errors import ApiError, json_response
from moestro.server.fields import SamplingFields
from moestro.server.guides import ResponseFormat, guide_of
from moestro.server.host import Serving
from moestro.server.logprobs import chat_logprobs
from moestro.server.messages import Message, for_template
from moestro.server.sampling import choices_of, sampling_of
from moestro.server.stream import EventStream, until_gone


class ChatRequest(SamplingFields):
    """OpenAI's fields; what has no effect here is taken only with the values that ask for nothing."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = Field(None, description="Left out: what the context has room for.")
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Variables of the model's chat template.")
    store: Literal[False] | None = None
    metadata: dict[str, str] | None = Field(None, description="Without effect.")
    modalities: list[Literal["text"]] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = Field(None, description="Without effect.")
    prompt_cache_key: str | None = Field(None, description="Without effect: prefixes are found by their tokens.")


def chat_router(desk: Desk) -> APIRouter:
    """The endpoint."""
    router = APIRouter()

    @router.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer the last message of a conversation."""
        serving = desk.serving(body.model)
        ask = await asyncio.to_thread(_ask, body, serving)
        answers = desk.answers(serving)
        writer = ChatWriter(desk.host.name, with_logprobs=bool(body.logprobs))
        try:
            submitting = answers.submit([ask], priority=body.priority or 0, deadline_s=body.deadline_s)
            await until_gone(request, submitting)
            if body.stream:
                include_usage = bool(body.stream_options and body.stream_options.include_usage)
                chunks = writer.stream(answers, choices=len(ask.sampling), include_usage=include_usage)
                return EventStream(chunks, leave=answers.cancel)
            return json_response(await until_gone(request, writer.whole(answers)))
        except BaseException:
            answers.cancel()
            raise

    return router


def _ask(body: ChatRequest, serving: Serving) -> Ask:
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs is given without logprobs: true.", param="top_logprobs")
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise ApiError(400, "max_tokens is given beside max_completion_tokens. Leave it out.", param="max_tokens")
    prompt = serving.llm.chat_prompt(for_template(body.messages), settings=body.chat_template_kwargs)
    sampling = sampling_of(
        body,
        serving.defaults,
        max_tokens=body.max_tokens or body.max_completion_tokens or max(1, serving.llm.plan.context - len(prompt)),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        guide=guide_of(body.response_format),
    )
    return Ask(prompt, choices_of(sampling, body.n or 1))


class ChatWriter:
    """Writes answers as OpenAI does, in pieces or whole."""

    def __init__(self, model: str, *, with_logprobs: bool) -> None:
        self._id, self._model, self._created = f"chatcmpl-{secrets.token_hex(12)}", model, int(time.time())
        self._with_logprobs = with_logprobs

    async def stream(self, answers: Answers, *, choices: int, include_usage: bool) -> AsyncIterator[dict[str, Any]]:
        """Chunks: the role of each choice at once, then what comes."""
        for index in range(choices):
            yield self._chunk([self._choice(index, {"role": "assistant", "content": ""}, None)])
        async for index, event in answers.events():
            if event.text or event.logprobs:
                piece = self._choice(index, {"content": event.text}, None)
                if self._with_logprobs:
                    piece["logprobs"] = chat_logprobs(event.logprobs)
                yield self._chunk([piece])
            if event.finish_reason is not None:
                yield self._chunk([self._choice(index, {}, event.finish_reason)])
        if include_usage:
            yield self._chunk([]) | {"usage": answers.total.as_json(), "timings": timings_json(answers)}

    async def whole(self, answers: Answers) -> dict[str, Any]:
        """The object that has everything."""
        events: dict[int, list[Event]] = {}
        async for index, event in answers.events():
            events.setdefault(index, []).append(event)
        return self._head("chat.completion") | {
            "choices": [self._finished(index, events[index]) for index in sorted(events)],
            "usage": answers.total.as_json(),
            "timings": timings_json(answers),
        }

    def _finished(self, index: int, events: list[Event]) -> dict[str, Any]:
        text = "".join(event.text for event in events)
        tokens = [token for event in events for token in event.logprobs]
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": chat_logprobs(tokens) if self._with_logprobs else None,
            "finish_reason": events[-1].finish_reason,
        }

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._head("chat.completion.chunk") | {"choices": choices}

    def _choice(self, index: int, delta: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
