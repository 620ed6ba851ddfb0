"""`/v1/completions`: text goes on from where prompts end."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from moestro.engine.events import Event
from moestro.server.answers import Answers, Ask
from moestro.server.desk import Asked, Desk, choice_headers, choice_json, timings_json
from moestro.server.errors import ApiError
from moestro.server.fields import MOST_CHOICES, SamplingFields, TokenId
from moestro.server.host import Serving
from moestro.server.logprobs import CompletionLogprobs
from moestro.server.routed import ROUTED, routed_json
from moestro.server.sampling import choices_of, sampling_of
from moestro.server.stream import reply

_DEFAULT_TOKENS = 16
"""OpenAI's."""

Ids = Annotated[list[TokenId], Field(min_length=1)]


class CompletionRequest(SamplingFields):
    """OpenAI's fields; `echo`, `suffix` and `best_of` only with the values that change nothing."""

    prompt: str | Ids | Annotated[list[str], Field(min_length=1)] | Annotated[list[Ids], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = Field(default=None, description="Most new tokens; 16 if left out.")
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None
    best_of: Literal[1] | None = None


def completions_router(desk: Desk) -> APIRouter:
    """The endpoint."""
    router = APIRouter()

    @router.post("/v1/completions", response_model=None)
    async def complete(body: CompletionRequest, request: Request) -> Response:
        """Go on from one or several prompts, each of them text or token ids."""
        asked = await asyncio.to_thread(desk.asked, body.model)
        asks, decided = await asyncio.to_thread(_asks, body, asked)
        answers = desk.answers(asked.serving)
        writer = _Writer(asked, decided, body.n or 1, with_logprobs=body.logprobs is not None)
        include_usage = bool(body.stream_options and body.stream_options.include_usage)
        return await reply(
            request,
            answers.submit(asks, priority=body.priority or 0, deadline_s=body.deadline_s),
            stream=writer.stream(answers, include_usage=include_usage) if body.stream else None,
            whole=lambda: writer.whole(answers),
            leave=answers.cancel,
            headers=choice_headers([one.choice for one in decided]),
        )

    return router


def _asks(body: CompletionRequest, asked: Asked) -> tuple[list[Ask], list[Asked]]:
    """The prompts, and what answers each of them."""
    given = _given(body.prompt)
    prompts = _encoded(given, asked.serving)
    if len(prompts) * (body.n or 1) > MOST_CHOICES:
        raise ApiError(400, f"prompt and n ask for more than {MOST_CHOICES} answers at once.", param="n")
    most = body.max_tokens or _DEFAULT_TOKENS
    sampling = sampling_of(body, asked.serving.defaults, max_tokens=most, logprobs=body.logprobs)
    decided = [asked.decided(one) for one in given]
    choices = [(prompt, one.variant) for prompt, one in zip(prompts, decided, strict=True)]
    return [Ask(prompt, choices_of(sampling, body.n or 1), variant) for prompt, variant in choices], decided


def _given(prompt: Any) -> list[str | list[int]]:
    """Each prompt, where there may be one or a list of them."""
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


def _encoded(prompts: Sequence[str | list[int]], serving: Serving) -> list[list[int]]:
    found = [serving.llm.encode(one) for one in prompts]
    if not all(found):
        raise ApiError(400, "prompt is empty. Expected at least one character of text.", param="prompt")
    return found


class _Writer:
    """Writes answers as OpenAI does."""

    def __init__(self, asked: Asked, decided: Sequence[Asked], each: int, *, with_logprobs: bool) -> None:
        names = {one.name for one in decided}
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": names.pop() if len(names) == 1 else asked.name,
        }
        self._of_choice: list[dict[str, Any]] = [choice_json(one.choice) for one in decided for _ in range(each)]
        if len(decided) == 1:
            self._head |= self._of_choice[0]
            self._of_choice = [{}] * each
        self._logprobs = [CompletionLogprobs() if with_logprobs else None for _ in self._of_choice]

    async def stream(self, answers: Answers, *, include_usage: bool) -> AsyncIterator[dict[str, Any]]:
        async for index, event in answers.events():
            if not event.text and not event.token_ids and event.finish_reason is None:
                continue
            yield self._head | {"choices": [self._choice(index, event)]}
        tail = self._head | {"choices": [], "usage": answers.total.as_json(), "timings": timings_json(answers)}
        if include_usage:
            yield tail

    async def whole(self, answers: Answers) -> dict[str, Any]:
        choices: dict[int, dict[str, Any]] = {}
        async for index, event in answers.events():
            piece = self._choice(index, event)
            if index not in choices:
                choices[index] = piece
                continue
            so_far = choices[index]
            so_far["text"] += piece["text"]
            so_far |= {name: piece[name] for name in ("finish_reason", ROUTED) if name in piece}
            if so_far["logprobs"] is not None:
                for name, values in piece["logprobs"].items():
                    so_far["logprobs"][name].extend(values)
        return self._head | {
            "choices": [choices[index] for index in sorted(choices)],
            "usage": answers.total.as_json(),
            "timings": timings_json(answers),
        }

    def _choice(self, index: int, event: Event) -> dict[str, Any]:
        logprobs = self._logprobs[index]
        return {
            "index": index,
            "text": event.text,
            "logprobs": None if logprobs is None else logprobs.take(event.logprobs),
            "finish_reason": event.finish_reason,
            **self._of_choice[index],
            **routed_json(event),
        }
