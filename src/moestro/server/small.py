"""Endpoints of a few lines: models, tokens, health, what is refused by name."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field
from starlette.responses import Response

from moestro.server.desk import Desk
from moestro.server.errors import ApiError, json_response
from moestro.server.fields import Fields, TokenId
from moestro.server.host import Phase
from moestro.server.messages import Message, for_template


class TokenizeRequest(Fields):
    """Either a text or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None


class DetokenizeRequest(Fields):
    """Token ids."""

    model: str | None = None
    tokens: list[TokenId]


def small_router(desk: Desk) -> APIRouter:
    """The endpoints."""
    router = APIRouter()
    host = desk.host

    @router.get("/health", response_model=None)
    async def health() -> Response:
        """200 when requests are taken; 503 before, with how far opening the model is, and after."""
        now = host.loading
        told: dict[str, Any] = {"status": "ok" if now.phase is Phase.READY else now.phase.value}
        if now.total_bytes:
            told |= {"done_bytes": now.done_bytes, "total_bytes": now.total_bytes}
            told["progress"] = round(now.done_bytes / now.total_bytes, 4)
        if now.phase is Phase.READY:
            if host.serving.service.snapshot().accepting:
                return json_response(told)
            failed = ApiError(
                503, "The engine has failed and answers no more; the log says why. Start the server again."
            )
            return json_response({"status": "failed"} | failed.body(), status=503)
        return json_response(told | host.not_ready().body(), status=503, headers={"Retry-After": "2"})

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The model that is served, and its variants as they are in the store now."""
        names = await asyncio.to_thread(desk.names)
        return {"object": "list", "data": [_model(desk, name) for name in names]}

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One of them, by name."""
        return _model(desk, (await asyncio.to_thread(desk.asked, name)).name)

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        """The token ids of a text, or of a conversation in the model's chat template."""
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "Give either prompt or messages.", param="prompt")
        llm = desk.serving(body.model).llm
        if body.messages is not None:
            tokens = await asyncio.to_thread(llm.chat_prompt, for_template(body.messages))
        else:
            tokens = await asyncio.to_thread(llm.encode, body.prompt or "")
        return {"count": len(tokens), "max_model_len": llm.plan.context, "tokens": tokens}

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        """The text of token ids."""
        tokenizer = desk.serving(body.model).llm.tokenizer
        unknown = next((token for token in body.tokens if token >= len(tokenizer)), None)
        if unknown is not None:
            message = f"tokens has {unknown}, and the vocabulary ends at {len(tokenizer) - 1}."
            raise ApiError(400, message, param="tokens")
        return {"prompt": await asyncio.to_thread(tokenizer.decode, body.tokens)}

    @router.post("/v1/embeddings", response_model=None)
    async def embeddings() -> Response:
        """Refused."""
        raise ApiError(
            400,
            "This server has no embeddings: the models that moestro runs are trained to write text, and their hidden "
            "states are no measure of likeness. Use a model made for embeddings.",
            code="unsupported",
        )

    return router


def _model(desk: Desk, name: str) -> dict[str, Any]:
    llm = desk.serving(None).llm
    return {
        "id": name,
        "object": "model",
        "created": desk.host.created,
        "owned_by": "moestro",
        "max_model_len": llm.plan.context,
    }
