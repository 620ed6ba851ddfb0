"""`/metrics` for Prometheus, `/stats` for people and the page, and what only administrators may do."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import Field
from starlette.responses import Response

from moestro.engine.events import ServiceSnapshot
from moestro.errors import BudgetError, MoestroError
from moestro.memory.budget import parse_bytes
from moestro.server.desk import Desk
from moestro.server.errors import ApiError, as_api_error
from moestro.server.fields import Fields
from moestro.server.metrics import CONTENT_TYPE


class ResizeRequest(Fields):
    """A size such as 512MiB, 2GB."""

    memory: str


class ReloadRequest(Fields):
    """How the model that is served is put down."""

    drain_s: Annotated[float, Field(ge=0, le=1e6)] | None = Field(
        default=None, description="Seconds that requests under way get to end; left out: those of --drain."
    )


class Reloading(Fields):
    """The model is being opened anew; /health tells when it is there."""

    status: Literal["reloading"] = "reloading"


def observe_router(desk: Desk) -> APIRouter:
    """The endpoints."""
    router = APIRouter()

    @router.get("/metrics", response_model=None)
    async def metrics() -> Response:
        """Counters in Prometheus' text format."""
        return Response(desk.metrics.page(), media_type=CONTENT_TYPE)

    @router.get("/stats")
    async def stats() -> dict[str, Any]:
        """Requests, hits, waits, what memory is for; by layer and expert: bits in memory, tokens routed there."""
        serving = desk.serving(None)
        head = {"model": desk.host.name, "created": desk.host.created}
        return head | stats_json(serving.service.snapshot()) | {"uses": serving.llm.expert_counts().tolist()}

    @router.post("/admin/flush")
    async def flush() -> dict[str, Any]:
        """Forget every expert in memory and every kept prefix."""
        try:
            await asyncio.to_thread(desk.serving(None).service.flush)
        except MoestroError as error:
            raise as_api_error(error) from error
        return {"flushed": True}

    @router.post("/admin/resize")
    async def resize(body: ResizeRequest) -> dict[str, Any]:
        """Make the number of bytes another one, at most the one that the server began with; requests go on."""
        serving = desk.serving(None)
        try:
            await asyncio.to_thread(serving.service.resize, parse_bytes(body.memory))
        except BudgetError as error:
            raise ApiError(400, str(error), param="memory") from error
        except MoestroError as error:
            raise as_api_error(error) from error
        return {"memory_bytes": parse_bytes(body.memory)}

    @router.post("/admin/reload", status_code=202)
    async def reload(body: ReloadRequest | None = None) -> Reloading:
        """Open the model anew, as it is in its folder now; requests under way end first, new ones are refused."""
        desk.host.reload(drain_s=None if body is None else body.drain_s)
        return Reloading()

    return router


def stats_json(now: ServiceSnapshot) -> dict[str, Any]:
    """A snapshot as JSON. `levels` has a row for each MoE layer: bits of each expert that are in memory, 0 for none."""
    return {
        "requests": {
            "running": now.running,
            "waiting": now.waiting,
            "finished": now.finished,
            "listed": [asdict(one) | {"phase": one.phase.value} for one in now.requests],
        },
        "tokens": {
            "prompt": now.prompt_tokens,
            "cached": now.cached_tokens,
            "generated": now.generated_tokens,
        },
        "kv_blocks": {"all": now.kv_blocks, "used": now.kv_blocks_used, "kept": now.kv_blocks_kept},
        "levels": now.levels_LE.tolist(),
        "accepting": now.accepting,
        "stats": asdict(now.stats),
    }
