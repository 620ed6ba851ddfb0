"""All endpoints, errors and guards in one ASGI application."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

import moestro
from moestro.config import ServeOptions
from moestro.server.access_log import AccessLog
from moestro.server.chat import chat_router
from moestro.server.completions import completions_router
from moestro.server.desk import make_desk
from moestro.server.errors import install_handlers
from moestro.server.guard import Guard
from moestro.server.host import ModelHost
from moestro.server.observe import observe_router
from moestro.server.page import page_router
from moestro.server.responses import responses_router
from moestro.server.rules import Rules
from moestro.server.small import small_router


def make_app(host: ModelHost, options: ServeOptions, rules: Rules) -> ASGIApp:
    """The application that serves the host's model."""
    app = FastAPI(
        title="moestro",
        version=moestro.__version__,
        docs_url=None,  # they load scripts from other hosts
        redoc_url=None,
        redirect_slashes=False,
    )
    desk = make_desk(host)
    for router in (chat_router, completions_router, responses_router, small_router, observe_router):
        app.include_router(router(desk))
    app.include_router(page_router())
    install_handlers(app)
    guarded: ASGIApp = Guard(app, rules)
    origins = [origin.strip() for origin in options.cors.split(",") if origin.strip()]
    if origins:
        # Outermost, so that a page can read why it was refused.
        guarded = CORSMiddleware(
            guarded, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"], max_age=600
        )
    return AccessLog(guarded) if options.access_log else guarded
